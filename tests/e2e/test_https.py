"""TLS of the server's own for visitors: real processes, and clients that check what they are shown."""

import functools
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from quictunnel.trust.certificates import init, issue
from tests.support.backends import Connection, RawBackend, answer, echo
from tests.support.processes import ROOT, Processes, Tunnel, poll
from tests.support.tls import LOOPS, TlsVisitor, client_context, client_hello
from tests.support.visits import visit

HTTPS = ("--https", "127.0.0.1:0")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, raw: RawBackend) -> Iterator[Callable[[str, str], Tunnel]]:
    """A tunnel ``app`` to ``raw`` of an engine, on an event loop of that name; the tests of this file share it."""
    with ExitStack() as stack:

        @functools.cache
        def tunnel(engine: str, loop: str) -> Tunnel:
            home = tmp_path_factory.mktemp(loop)
            path = str(ROOT)
            if loop == "asyncio":
                (home / "uvloop.py").write_text("raise ImportError('not for this test')\n")
                path = os.pathsep.join((str(home), path))
            processes = stack.enter_context(Processes(home, {"PYTHONPATH": path}))
            return processes.tunnel(raw.target, (engine, engine), serve=HTTPS)

        yield tunnel


@pytest.fixture(params=[loop.id for loop in LOOPS])
def tunnel(request: pytest.FixtureRequest, shared: Callable[[str, str], Tunnel], raw: RawBackend) -> Iterator[Tunnel]:
    """A tunnel on each event loop, and on each engine."""
    raw.requests.clear()
    yield shared({"asyncio": "aioquic", "uvloop": "auto"}[request.param], request.param)
    raw.handler = echo


@pytest.fixture
def one(shared: Callable[[str, str], Tunnel], raw: RawBackend) -> Tunnel:
    """Where it does not matter what lies behind the door."""
    raw.requests.clear()
    return shared("auto", LOOPS[-1].id)


def port_of(tunnel: Tunnel) -> int:
    return int(tunnel.server.facts["https"].rpartition(":")[2])


def authority_of(tunnel: Tunnel) -> Path:
    return tunnel.server.state / "ca.pem"


def visitor(tunnel: Tunnel, name: str = "app.localhost") -> TlsVisitor:
    return TlsVisitor(port_of(tunnel), client_context(authority_of(tunnel)), name)


def ask(tunnel: Tunnel, host: str, *fields: str, name: str = "app.localhost") -> bytes:
    """A GET on a connection of its own; the answer as it came."""
    with visitor(tunnel, name) as made:
        lines = ["GET / HTTP/1.1", f"Host: {host}", *fields, "Connection: close", "", ""]
        made.send("\r\n".join(lines).encode())
        got, goodbye = made.read_all()
        assert goodbye
        return got


def curl(*args: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    return subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "--max-time", "20", *args], capture_output=True, text=True, check=False
    )


# What is served


def test_curl_and_the_backend_see_https(tunnel: Tunnel) -> None:
    port = port_of(tunnel)
    got = curl("--cacert", str(authority_of(tunnel)), f"https://app.localhost:{port}/x", "-d", "hello")
    assert got.returncode == 0, got.stderr
    head = got.stdout.lower()
    assert head.startswith("post /x http/1.1\n") and head.endswith("hello")
    assert "x-forwarded-proto: https\n" in head
    assert "proto=https\n" in head and f'host="app.localhost:{port}"' in head


def test_httpx_sends_requests_over_connections_that_it_keeps(tunnel: Tunnel) -> None:
    context = client_context(authority_of(tunnel))
    with httpx.Client(base_url=f"https://127.0.0.1:{port_of(tunnel)}", verify=context, trust_env=False) as client:

        def one(number: int) -> str:
            body = bytes([number]) * 20_000
            got = client.post(
                f"/{number}",
                content=body,
                headers={"Host": "app.localhost"},
                extensions={"sni_hostname": "app.localhost"},
            )
            assert got.status_code == 200 and got.content.endswith(body)
            return str(got.extensions["network_stream"].get_extra_info("client_addr"))

        with ThreadPoolExecutor(8) as pool:
            connections = set(pool.map(one, range(50)))
    assert len(connections) <= 8


def test_plain_http_is_served_beside_it(tunnel: Tunnel) -> None:
    got = visit(tunnel.address, host="app.localhost")
    assert got.status == 200
    assert b"x-forwarded-proto: http\r\n" in got.body.lower()


def test_scripts_and_clients_are_told_of_both_doors(tunnel: Tunnel) -> None:
    port = port_of(tunnel)
    [ready] = re.findall(r"^ready .*$", tunnel.server.process.output, re.M)
    facts = tunnel.server.facts
    assert ready.split()[1:] == [f"{key}={facts[key]}" for key in ("http", "quic", "domain", "engine", "https")]
    assert f"visitors find a tunnel at https://NAME.localhost:{port}\n" in tunnel.server.process.output
    assert f"ready tunnel=app url=https://app.localhost:{port}\n" in tunnel.client.process.output
    urls = f"https://app.localhost:{port}, http://app.localhost:{tunnel.address[1]}"
    assert f"serving tunnel app at {urls} from" in tunnel.client.log


def test_an_upgraded_connection_passes_bytes(tunnel: Tunnel, raw: RawBackend) -> None:
    def upgrade(connection: Connection) -> None:
        if connection.head():
            connection.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
            while data := connection.sock.recv(65536):
                connection.send(data.upper())

    raw.handler = upgrade
    with visitor(tunnel) as made:
        made.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        assert made.read().startswith(b"HTTP/1.1 101 ")
        for word in (b"one", b"two"):
            made.send(word)
            assert made.read() == word.upper()


def test_a_request_under_way_ends_before_the_server_does(tunnel: Tunnel, raw: RawBackend) -> None:
    """And a connection that is idle holds nothing up."""

    def slow(connection: Connection) -> None:
        while connection.head():
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwh")
            poll(lambda: "= stopping" in tunnel.server.log)
            connection.send(b"at")

    raw.handler = slow
    with visitor(tunnel) as made, visitor(tunnel) as idle:
        made.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
        got = made.read()
        started = time.monotonic()
        tunnel.server.process.popen.terminate()
        rest, goodbye = made.read_all()
        assert (got + rest).endswith(b"what") and goodbye
        assert idle.read_all() == (b"", True)
        assert tunnel.server.process.exited() == 0
        assert time.monotonic() - started < 10, "the grace is half a minute"
    raw.handler = echo
    tunnel.server.start()
    poll(lambda: visit(tunnel.address).status == 200)


# Certificates


def test_an_unknown_tunnel_is_shown_the_servers_certificate_which_is_not_for_it(one: Tunnel) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'none\.localhost'"):
        visitor(one, "none.localhost")
    got = curl("-k", "-i", f"https://none.localhost:{port_of(one)}/")
    assert got.stdout.startswith("HTTP/2 404 ")


def test_a_tunnel_has_a_certificate_of_its_own_and_no_file_of_it_is_left(tunnel: Tunnel) -> None:
    with visitor(tunnel) as made:
        certificate = made.tls.getpeercert()
        assert certificate is not None
        assert certificate["subjectAltName"] == (("DNS", "app.localhost"),)
    kept = {path.name for path in tunnel.server.state.iterdir()}
    kept -= {"run", ".lock", ".tokens.json.lock", ".names.db.lock", "names.db-shm", "names.db-wal"}
    assert kept == {"ca.key", "ca.pem", "local.join", "names.db", "server.key", "server.pem", "tokens.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("domain", "names"), [("t.example.com", {"*.t.example.com", "t.example.com"}), ("home", {"app.home"})]
)
def test_other_domains(processes: Processes, domain: str, names: set[str]) -> None:
    """A domain of two labels has a wildcard; one of a single label needs a certificate for each tunnel."""
    with RawBackend(answer(200, b"here")) as backend:
        tunnel = processes.tunnel(backend.target, serve=(*HTTPS, "--domain", domain))
        assert f" url=https://app.{domain}:{port_of(tunnel)}\n" in tunnel.client.process.output
        with visitor(tunnel, f"app.{domain}") as made:
            certificate = made.tls.getpeercert()
            assert certificate is not None
            assert names <= {str(name) for _, name in certificate["subjectAltName"]}
            made.send(f"GET / HTTP/1.1\r\nHost: app.{domain}\r\n\r\n".encode())
            assert made.read().endswith(b"here")


@pytest.mark.slow
def test_a_pair_of_ones_own_is_shown_to_visitors_too(processes: Processes, tmp_path: Path) -> None:
    authority = init(tmp_path)
    pair = issue(tmp_path, ["app.localhost", "localhost", "127.0.0.1"])
    own = ("--cert", str(pair.certificate), "--key", str(pair.key), "--ca", str(authority))
    server = processes.server(*HTTPS, *own)
    with RawBackend(answer(200, b"here")) as backend:
        client = processes.client(server, backend.target)
        tunnel = Tunnel(server, client, "app")
        with TlsVisitor(port_of(tunnel), client_context(authority), "app.localhost") as made:
            made.send(b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n")
            assert made.read().endswith(b"here")
        assert not (server.state / "ca.pem").exists()


# 421


def test_another_host_than_that_of_the_handshake_is_refused(one: Tunnel, raw: RawBackend) -> None:
    got = ask(one, "other.localhost", "X-Tunnel-Session: app")
    assert got.startswith(b"HTTP/1.1 421 Misdirected Request\r\n")
    assert b"proxy-status: quictunnel; error=http_request_error" in got.lower()
    got = ask(one, "app.localhost", "X-Tunnel-Session: app", name="localhost")
    assert got.startswith(b"HTTP/1.1 421 ")
    assert raw.requests == []
    assert ask(one, "app.localhost").startswith(b"HTTP/1.1 200 ")


def test_a_tunnel_may_be_named_by_the_header_where_the_handshake_names_the_domain(one: Tunnel) -> None:
    assert ask(one, "localhost", "X-Tunnel-Session: app", name="localhost").startswith(b"HTTP/1.1 200 ")


# At the door


def failed(processes: Processes, *says: str, args: tuple[str, ...]) -> None:
    status, output, log = processes.run("serve", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0", *args)
    assert status in (1, 2) and output == ""
    assert log.startswith("quictunnel: ") and log.count("\n") == 1
    for text in says:
        assert text in log


def test_a_taken_port_is_one_line(processes: Processes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        place = f"127.0.0.1:{sock.getsockname()[1]}"
        args = ("--https", place, "--state-dir", str(tmp_path), "--log-level", "error")
        failed(processes, "--https", place, "in use", args=args)


def test_the_same_port_twice_is_one_line(processes: Processes, tmp_path: Path) -> None:
    args = ("--http", "127.0.0.1:8443", "--https", "8443", "--state-dir", str(tmp_path))
    failed(processes, "--https and --http are both 127.0.0.1:8443", args=args)


def test_a_key_of_another_certificate_is_one_line(processes: Processes, tmp_path: Path) -> None:
    init(tmp_path)
    one, two = (issue(tmp_path, ["localhost"], out=tmp_path / f"{name}.pem") for name in ("one", "two"))
    pair = ("--cert", str(one.certificate), "--key", str(two.key))
    failed(processes, "does not belong to the certificate", args=(*HTTPS, *pair, "--state-dir", str(tmp_path / "s")))
    pair = ("--cert", str(tmp_path / "none.pem"), "--key", str(one.key))
    failed(processes, "none.pem", args=(*HTTPS, *pair, "--state-dir", str(tmp_path / "s")))


def test_what_is_not_tls_is_closed_and_nothing_is_said_of_it(tunnel: Tunnel) -> None:
    before = len(tunnel.server.log)
    port = port_of(tunnel)
    names = client_hello("xxx.localhost").replace(b"xxx", b"\xff\n\xfe")
    for first in (b"GET / HTTP/1.1\r\nHost: app.localhost\r\n\r\n", b"\x16\x03\x01" + os.urandom(500), names, b"\0"):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(10)
            sock.sendall(first)
            sock.shutdown(socket.SHUT_WR)
            got = b""
            try:
                while data := sock.recv(4096):
                    got += data
            except ConnectionResetError:
                pass
            assert b"HTTP" not in got
    with visitor(tunnel) as made:
        os.write(made.sock.fileno(), os.urandom(500))
        # Nothing is under way that a goodbye could make look complete: Python 3.11.2 says one, later ones do not.
        assert not made.read_all()[0]
    assert tunnel.server.log[before:] == ""
    assert ask(tunnel, "app.localhost").startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_thousands_of_handshakes_that_never_end_keep_nobody_out(tunnel: Tunnel) -> None:
    """Three times as many as may be under way; each has sent all but the last byte of its hello."""
    first = client_hello("app.localhost")[:-1]
    port = port_of(tunnel)
    ask(tunnel, "app.localhost")
    before, said = tunnel.server.process.resident(), len(tunnel.server.log)
    with ExitStack() as stack:
        for number in range(3072):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            sock.sendall(first)
            if number % 512 == 0:
                assert ask(tunnel, "app.localhost").startswith(b"HTTP/1.1 200 ")
        descriptors = Path(f"/proc/{tunnel.server.process.pid}/fd")
        assert poll(lambda: len(list(descriptors.iterdir())) < 1024 + 100)
        grown = tunnel.server.process.resident() - before
        print(f"{grown / 1024:.0f} KiB for 1,024 half-open handshakes")
        assert grown < 500 * 1024 * 1024
        assert ask(tunnel, "app.localhost").startswith(b"HTTP/1.1 200 ")
    lines = tunnel.server.log[said:].splitlines()
    assert all(" GET / 200 " in line for line in lines), lines
