#!/bin/sh
# A development set in certs/dev: a CA, and a certificate for this machine's own names. Run again, it renews the certificate
# and keeps the CA.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
directory=$root/certs/dev

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
cd -- "$root"

if [ ! -e "$directory/ca.pem" ]; then
    "$PYTHON" -m quictunnel certs init --dir "$directory" --name 'quictunnel development CA' --days 825
fi
"$PYTHON" -m quictunnel certs issue --dir "$directory" localhost 127.0.0.1 ::1
"$PYTHON" -m quictunnel certs show --dir "$directory"
