"""The containers' health check: `health.py [URL [TUNNEL]]` sends one request; the exit status is 0 if all is well.

Without arguments the server in the same container is asked for a tunnel that nobody has: that it answers is enough, so
a server without clients is healthy. The answer of a URL must be a good one (2xx or 3xx); TUNNEL goes into
X-Tunnel-Session, so that the request is one through that tunnel.
"""

import http.client
import os
import sys
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

LIMIT = 4.0
"seconds to wait for each byte; the container's own time-out for the check is just above it"


def main(argv: Sequence[str]) -> str | None:
    """What is wrong, or None."""
    try:
        if not argv:
            port = os.environ.get("QUICTUNNEL_HTTP", "").rpartition(":")[2] or "8080"
            ask(f"http://127.0.0.1:{port}/", {"Host": "health.localhost"})
            return None
        status = ask(argv[0], {"X-Tunnel-Session": argv[1]} if argv[1:] else {})
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no answer: {error!r}"
    return None if 200 <= status < 400 else f"{argv[0]} answered {status}"


def ask(url: str, fields: Mapping[str, str]) -> int:
    """The status of the answer to a GET. Raises OSError, ValueError and HTTPException."""
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port or 80, timeout=LIMIT)
    try:
        connection.request("GET", target.path or "/", headers=fields)
        answer = connection.getresponse()
        answer.read(65536)
        return answer.status
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
