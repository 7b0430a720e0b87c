#!/bin/sh
# A production set in certs/prod: a CA, and a certificate for the tunnel server of DOMAIN, for every tunnel *.DOMAIN, and for
# the other names and addresses that clients dial. Run again, it renews the certificate and keeps the CA.
set -eu

usage() {
    echo 'usage: certs/prod.sh DOMAIN [NAME|IP ...]' >&2
    exit 2
}

[ $# -ge 1 ] || usage
domain=$1
shift
case $domain in
    '' | -* | *'*'* | .* | *.) usage ;;
    *.*) ;;
    *)
        echo "certs/prod.sh: $domain is not a public domain: it needs a dot, as in tunnel.example.com" >&2
        exit 2
        ;;
esac

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
directory=$root/certs/prod

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
cd -- "$root"

if [ ! -e "$directory/ca.pem" ]; then
    "$PYTHON" -m quictunnel certs init --dir "$directory"
fi
"$PYTHON" -m quictunnel certs issue --dir "$directory" "$domain" "*.$domain" "$@"
"$PYTHON" -m quictunnel certs show --dir "$directory"
