#!/bin/sh
# Give a client what it needs and no more: the CA's certificate and a token for one tunnel. The CA's key, with which
# anybody could be the server, stays in the server's state directory.
#
#     compose/invite.sh STATE-DIR DIR TUNNEL     then: quictunnel connect BACKEND --config DIR/connect.toml ...
set -eu
umask 077

[ $# -eq 3 ] || { echo 'usage: invite.sh STATE-DIR DIR TUNNEL' >&2; exit 2; }
state=$1 invite=$2 tunnel=$3

# The certificate is copied last: where it is, the token is too. A server that made a new CA gave up its old tokens.
if cmp -s "$state/ca.pem" "$invite/ca.pem"; then
    echo "$invite is still good"
    exit
fi

# What the command says beside the token may hold the token: it is shown only when there is none.
said=$invite/.said
trap 'rm -f "$said"' EXIT
token=$(quictunnel token create --state-dir "$state" --tunnel "$tunnel" --note 'made by invite.sh' 2>"$said") || {
    cat "$said" >&2
    exit 1
}
printf '[connect]\nca = "%s"\ntoken = "%s"\n' "$invite/ca.pem" "$token" >"$invite/connect.toml"
cp "$state/ca.pem" "$invite/ca.pem"
echo "$invite is ready for a client of the tunnel $tunnel"
