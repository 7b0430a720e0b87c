"""CONNECT: refused, unless the tunnel's client says that its backend is a proxy; then it passes as opaque bytes."""

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.support.backends import Connection, RawBackend, answer, echo
from tests.support.processes import Processes, Tunnel
from tests.support.visits import RawVisitor

ASK = b"CONNECT far.example:443 HTTP/1.1\r\nHost: far.example:443\r\nX-Tunnel-Session: app\r\n\r\n"


def proxy(connection: Connection) -> None:
    """As much of a forward proxy as a CONNECT needs: it dials where it is asked to, and says no to one name."""
    while head := connection.head():
        place = head.split(b" ")[1]
        if place == b"no.example:1":
            connection.answer(403, b"not there")
            continue
        if place == b"far.example:443":
            # The far end is this very thread: it echoes, in capitals, until the visitor has said all.
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nearly ")
            while data := (connection._read or connection.sock.recv(65536)):
                connection._read = b""
                connection.send(data.upper())
            connection.send(b" bye")
            return
        host, _, port = place.rpartition(b":")
        with socket.create_connection((host.decode(), int(port))) as far:
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_copy, args=(far, connection.sock))
            back.start()
            _copy(connection.sock, far)
            back.join(10)
        return


def _copy(source: socket.socket, to: socket.socket) -> None:
    while data := source.recv(65536):
        to.sendall(data)
    to.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def backend() -> Iterator[RawBackend]:
    with RawBackend(proxy) as backend:
        yield backend


@pytest.fixture(scope="module")
def tunnel(processes: Processes, backend: RawBackend) -> Tunnel:
    return processes.tunnel(backend.target, connect=("--allow-connect",))


def test_bytes_pass_both_ways_after_a_connect_early_ones_and_each_end(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(ASK + b"hello")  # not even waiting for the 200
        assert visitor.read_line() == b"HTTP/1.1 200 Connection Established\r\n"
        assert visitor.read_line() == b"\r\n"
        visitor.send(b" there")
        visitor.sock.shutdown(socket.SHUT_WR)
        assert visitor.read_all() == b"early HELLO THERE bye"


def test_a_proxy_that_says_no_is_heard_and_nothing_after_it_is_a_request(tunnel: Tunnel, backend: RawBackend) -> None:
    backend.requests.clear()
    with RawVisitor(tunnel.address) as visitor:
        ask = ASK.replace(b"far.example:443", b"no.example:1")
        visitor.send(ask + b"GET /smuggled HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        refusal = visitor.read_answer()
        assert (refusal.status, refusal.body, refusal["connection"]) == (403, b"not there", "close")
        assert visitor.read_all() == b""
    assert [head.split(b"\r\n")[0] for head in backend.requests] == [b"CONNECT no.example:1 HTTP/1.1"]


def test_the_proxy_sees_the_authority_and_no_framing(tunnel: Tunnel, backend: RawBackend) -> None:
    backend.requests.clear()
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(ASK)
        assert visitor.read_line().startswith(b"HTTP/1.1 200 ")
    [head] = backend.requests
    lines = head.lower().split(b"\r\n")
    assert lines[:2] == [b"connect far.example:443 http/1.1", b"host: far.example:443"]
    names = {line.partition(b":")[0] for line in lines[2:] if line}
    assert names.isdisjoint({b"connection", b"upgrade", b"transfer-encoding", b"content-length", b"x-tunnel-session"})


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_goes_through_the_tunnel_to_somewhere_else(tunnel: Tunnel) -> None:
    with RawBackend(answer(200, b"far away")) as far:
        host, port = tunnel.address
        command = ["curl", "-sS", "--max-time", "20", "--proxytunnel", "-x", f"http://{host}:{port}"]
        command += ["--proxy-header", "X-Tunnel-Session: app", f"{far.target}/"]
        done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"far away"), done.stderr


def test_connect_is_refused_where_no_client_allows_it(processes: Processes) -> None:
    with RawBackend(echo) as plain:
        tunnel = processes.tunnel(plain.target)
        with RawVisitor(tunnel.address) as visitor:
            visitor.send(ASK + b"GET /smuggled HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
            refusal = visitor.read_answer()
            assert (refusal.status, refusal["connection"]) == (501, "close")
            assert visitor.read_all() == b""
        assert plain.requests == []


def test_connect_needs_a_backend_that_can_be_a_proxy(processes: Processes) -> None:
    for options in (["3000", "--backend-http", "2"], ["tests.support.apps:app"]):
        done = processes.run("connect", *options, "--allow-connect")
        assert done.status == 2
        assert "--allow-connect needs a backend on a socket that speaks HTTP/1.1" in done.stderr
