"""The commands as users run them: how they start, why they do not, what they print and what they log."""

import json
import re
import socket
import stat
from pathlib import Path

import pytest

from quictunnel.trust.join import JoinString
from tests.support.backends import RawBackend, answer, echo
from tests.support.processes import Processes, Server, free_udp_port, poll
from tests.support.visits import RawVisitor, visit

pytestmark = pytest.mark.either

ANYWHERE = ("--http", "127.0.0.1:0", "--quic", "127.0.0.1:0")


@pytest.fixture(scope="module")
def server(processes: Processes) -> Server:
    return processes.server()


def failed(processes: Processes, status: int, *words: str, args: tuple[str, ...]) -> None:
    """The command ends with the status and one line on standard error that holds the words."""
    result = processes.run(*args)
    lines = [line for line in result.stderr.splitlines() if not re.match(r"\d{4}-", line)]
    assert (result.status, len(lines)) == (status, 1), result
    assert lines[0].startswith("quictunnel: ")
    for word in words:
        assert word in lines[0]
    assert result.stdout == ""


def test_status_shows_who_serves_and_says_when_nobody_is_there(processes: Processes) -> None:
    with RawBackend(answer()) as backend:
        tunnel = processes.tunnel(backend.target, name="shown")
        assert visit(tunnel.address, host=tunnel.host).status == 200
        args = ("status", "--state-dir", str(tunnel.server.state))
        result = processes.run(*args)
        assert (result.status, result.stderr) == (0, ""), result
        assert re.search(rf"^server {tunnel.server.process.pid}: .* up \d+s, http 127\.0\.0\.1:\d+,", result.stdout)
        assert re.search(r"^shown +1 +healthy .* 127\.0\.0\.1:\d+ .*quictunnel/", result.stdout, re.M)
        told = json.loads(processes.run(*args, "--json").stdout)
        assert [each["pid"] for each in told["processes"]] == [tunnel.server.process.pid]
        assert told["totals"]["sessions"] == 1
        tunnel.server.process.kill()
        failed(processes, 1, "no server is running with the state directory", args=args)
        tunnel.server.start()
        assert len(json.loads(processes.run(*args, "--json").stdout)["processes"]) == 1


# Starting, and not.


def test_demo_once_succeeds(engine: str, tmp_path: Path) -> None:
    with Processes(tmp_path, cold=True) as processes:
        result = processes.run("demo", "--once", "--http", "127.0.0.1:0", "--engine", engine)
    assert result.status == 0, result
    assert "50 of 50 went through" in result.stdout
    assert re.search(r"public URL +http://demo\.localhost:\d+", result.stdout)


def test_demo_serves_until_it_is_told_to_stop(engine: str, processes: Processes) -> None:
    demo = processes.start("demo", "--http", "127.0.0.1:0", "--engine", engine)
    port = int(demo.said(r"public URL +http://demo\.localhost:(\d+)")[1])
    demo.said("Ctrl-C ends the demo")
    assert b"It works" in visit(("127.0.0.1", port), host="demo.localhost").body
    assert demo.stop() == 0


def test_demo_has_one_door_whatever_the_environment_has_for_serve(processes: Processes) -> None:
    result = processes.run("demo", "--once", "--http", "127.0.0.1:0", env={"QUICTUNNEL_HTTPS": "127.0.0.1:0"})
    assert result.status == 0, result
    assert "http://demo.localhost:" in result.stdout


def test_demo_takes_another_port_when_the_default_is_taken(processes: Processes) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", 8080))
            sock.listen()
        except OSError:
            pass  # somebody has it already: as good
        assert processes.run("demo", "--once").status == 0


def test_first_run_needs_nothing_and_keeps_what_it_makes(engine: str, tmp_path: Path) -> None:
    with Processes(tmp_path / "home", cold=True) as processes:
        server = processes.start("serve", *ANYWHERE, "--engine", engine)
        facts = server.ready()
        assert set(facts) >= {"http", "quic", "domain", "engine"}
        assert facts["engine"] == engine
        client = processes.start("connect", "127.0.0.1:9", "--server", facts["quic"], "--engine", engine)
        assert client.ready()["url"].startswith("http://")
        assert client.stop() == 0
        assert server.stop() == 0
        state = processes.directory / ".local" / "state" / "quictunnel"
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert {"ca.pem", "ca.key", "server.pem", "server.key"} <= {file.name for file in state.iterdir()}


def test_taken_http_port_is_one_line(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        place = f"127.0.0.1:{sock.getsockname()[1]}"
        args = ("serve", "--http", place, "--quic", "127.0.0.1:0", "--state-dir", str(processes.directory / "taken"))
        failed(processes, 1, "--http", place, "in use", args=args)


def test_taken_quic_port_is_one_line(processes: Processes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{sock.getsockname()[1]}"
        args = ("serve", "--http", "127.0.0.1:0", "--quic", place, "--state-dir", str(processes.directory / "taken"))
        failed(processes, 1, "--quic", place, "in use", args=args)


def test_address_of_another_machine_is_one_line(processes: Processes) -> None:
    args = ("serve", "--http", "192.0.2.1:80", "--quic", "127.0.0.1:0", "--state-dir", str(processes.directory / "x"))
    failed(processes, 1, "--http", "192.0.2.1:80", args=args)


@pytest.mark.parametrize("content", [None, "", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_bad_certificate_is_one_line(processes: Processes, tmp_path: Path, content: str | None) -> None:
    certificate = tmp_path / "bad.pem"
    if content is not None:
        certificate.write_text(content)
    args = ("--cert", str(certificate), "--key", str(certificate), "--state-dir", str(tmp_path))
    failed(processes, 1, str(certificate), args=("serve", *ANYWHERE, *args))


def test_certificate_without_its_key_is_one_line(processes: Processes, tmp_path: Path) -> None:
    failed(processes, 2, "--cert and --key", args=("serve", *ANYWHERE, "--cert", str(tmp_path / "a.pem")))


def test_state_directory_that_cannot_be_is_one_line(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    failed(processes, 1, str(file), args=("serve", *ANYWHERE, "--state-dir", str(file)))


def test_broken_token_file_is_one_line(processes: Processes, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    result = processes.run("token", "create", "--tunnel", "a", "--state-dir", str(state))
    assert result.status == 0
    [tokens] = [file for file in state.iterdir() if file.read_bytes()]
    tokens.write_text("{")
    failed(processes, 1, str(tokens), args=("serve", *ANYWHERE, "--state-dir", str(state)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[serve]\nhttpp = '127.0.0.1:0'\n", ("unknown option 'httpp'", "did you mean 'http'")),
        (b"[serv]\n", ("unknown table 'serv'", "did you mean 'serve'")),
        (b"[serve\n", ("is not TOML",)),
        (b"[serve]\nhead-time = 'soon'\n", ("serve.head-time", "soon")),
        (None, ("cannot be read",)),
    ],
)
def test_bad_configuration_file_is_one_line(
    processes: Processes, tmp_path: Path, content: bytes | None, words: tuple[str, ...]
) -> None:
    config = tmp_path / "config.toml"
    if content is not None:
        config.write_bytes(content)
    failed(processes, 2, str(config), *words, args=("serve", "--config", str(config)))


def test_configuration_file_is_obeyed_by_both_sides(processes: Processes, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    port = free_udp_port()
    config.write_text(
        f"""
        [serve]
        http = "127.0.0.1:0"
        quic = "127.0.0.1:{port}"
        domain = "tunnel.example"
        state-dir = "{tmp_path}/state"

        [connect]
        server = "127.0.0.1:{port}"
        state-dir = "{tmp_path}/state"
        tunnel = "filed"
        host-header = "backend"
        """
    )
    server = processes.start("serve", "--config", str(config))
    facts = server.ready()
    with RawBackend(echo) as backend:
        client = processes.start("connect", backend.target, "--config", str(config))
        assert client.ready()["tunnel"] == "filed"
        address = ("127.0.0.1", int(facts["http"].rpartition(":")[2]))
        body = visit(address, host="filed.tunnel.example").body
        assert f"host: 127.0.0.1:{backend.port}\r\n".encode() in body.lower()
        assert client.stop() == 0
    assert server.stop() == 0


def test_environment_is_obeyed(processes: Processes, tmp_path: Path) -> None:
    env = {"QUICTUNNEL_HTTP": "127.0.0.1:0", "QUICTUNNEL_QUIC": "127.0.0.1:0", "QUICTUNNEL_STATE_DIR": str(tmp_path)}
    server = processes.start("serve", env=env | {"QUICTUNNEL_DOMAIN": "env.example"})
    assert server.ready()["domain"] == "env.example"
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("backend", "status"),
    [
        ("", 2),
        ("nonsense", 2),
        ("ftp://127.0.0.1", 2),
        ("localhost:99999", 2),
        ("http://127.0.0.1:80/path", 2),
        ("unix:", 2),
        ("no.such.module:app", 1),
        ("tests.support.apps:missing", 1),
        ("tests.support.apps:__name__", 1),
    ],
)
def test_bad_backend_is_one_line(server: Server, backend: str, status: int) -> None:
    failed(server.processes, status, args=("connect", backend, "--join", server.join))


def test_bad_backend_ca_is_one_line(server: Server, tmp_path: Path) -> None:
    args = ("connect", "https://127.0.0.1:9", "--join", server.join, "--backend-ca", str(tmp_path / "none.pem"))
    failed(server.processes, 1, str(tmp_path / "none.pem"), args=args)


@pytest.mark.parametrize("join", ["qt1_", "qt9_AAAA", "hello", "qt1_!!!!"])
def test_bad_join_string_is_one_line_that_does_not_repeat_it(processes: Processes, join: str) -> None:
    failed(processes, 2, "--join", args=("connect", "3000", "--join", join))
    assert processes.run("connect", "3000", "--join", join).stderr.count("hello") == 0


def test_no_server_to_be_found_is_one_line(processes: Processes, tmp_path: Path) -> None:
    failed(processes, 1, "--join", args=("connect", "3000", "--state-dir", str(tmp_path / "none")))


def test_bad_ca_file_is_one_line(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    args = ("connect", "3000", "--server", "127.0.0.1:9", "--token", "qtk_a_b", "--ca", str(file))
    failed(processes, 1, str(file), args=args)


# Logs.


def test_each_request_and_each_session_is_one_line(engine: str, processes: Processes) -> None:
    server = processes.server(engine=engine)
    with RawBackend(answer(201, b"12345")) as backend:
        client = processes.client(server, backend.target, engine=engine)
        visit(server.http, "/one?a=b")
        visit(server.http, "/two", method="POST", body=b"abc")
        visit(server.http, "/three", host="nobody.localhost")
        assert client.process.stop() == 0
    assert server.process.stop() == 0
    requests = [line for line in server.log.splitlines() if re.search(r" INFO  (GET|POST) ", line)]
    assert len(requests) == 3
    pattern = r"^\S+Z INFO  {} {} {}B [0-9.]+ms tunnel={} id=[0-9a-f]+ client=127\.0\.0\.1 in={}B{}$"
    assert re.match(pattern.format("GET", r"/one\?a=b", "201 5", "app", 0, ""), requests[0])
    assert re.match(pattern.format("POST", "/two", "201 5", "app", 3, ""), requests[1])
    assert re.match(pattern.format("GET", "/three", r"404 \d+", "-", 0, " error=destination_not_found"), requests[2])
    assert len(re.findall(r" INFO  session \d+ serves tunnel app from ", server.log)) == 1
    assert len(re.findall(r" INFO  session \d+ of tunnel app ended after ", server.log)) == 1
    assert len(re.findall(r" INFO  serving tunnel app at ", client.log)) == 1


def test_json_log_is_one_object_a_line(engine: str, processes: Processes) -> None:
    server = processes.server("--log-format", "json", engine=engine)
    with RawBackend(answer(201, b"12345")) as backend:
        client = processes.client(server, backend.target, "--log-format", "json", engine=engine)
        visit(server.http, '/"quoted"\\?a=b', method="PUT", body=b"abc")
        assert client.process.stop() == 0
    assert server.process.stop() == 0
    entries = [json.loads(line) for line in (server.log + client.log).splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    [request] = [entry for entry in entries if entry["logger"] == "quictunnel.access"]
    assert (request["method"], request["target"], request["status"]) == ("PUT", '/"quoted"\\?a=b', 201)
    assert (request["tunnel"], request["received"], request["sent"]) == ("app", 3, 5)
    assert request["ms"] > 0


def test_debug_log_has_the_quic_library_in_it(engine: str, processes: Processes) -> None:
    server = processes.server("--log-level", "trace", "--log-format", "json", engine=engine)
    client = processes.client(server, "127.0.0.1:9", "--log-level", "trace", engine=engine)
    visit(server.http)
    assert client.process.stop() == 0
    assert server.process.stop() == 0
    entries = [json.loads(line) for line in server.log.splitlines()]
    libraries = {"aioquic": "quic", "qh3": "quic"}
    assert any(entry["logger"].split(".")[0] == libraries[engine] for entry in entries)
    secret = JoinString.parse(server.join).token
    for text in (server.log, client.log, client.process.output):
        assert server.join not in text
        assert secret not in text


def test_control_characters_never_reach_the_terminal(server: Server) -> None:
    for target in (b"/\x1b[31mred", b"/a\x07b", b"/\x9b31m", b"/\xe2\x80\xae", b"/\x7f"):
        with RawVisitor(server.http) as visitor:
            visitor.send(b"GET " + target + b" HTTP/1.1\r\nHost: a\x1bb.localhost\r\n\r\n")
            visitor.read_all()
        with RawVisitor(server.http) as visitor:
            visitor.send(b"GET " + target + b" HTTP/1.1\r\nHost: nobody.localhost\r\nConnection: close\r\n\r\n")
            visitor.read_all()
    visit(server.http, "/last", host="nobody.localhost")
    poll(lambda: "/last" in server.log, what="the last line of the log")
    raw = server.process.log.encode()
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80\xae", raw)


def test_secrets_are_in_no_log(engine: str, processes: Processes) -> None:
    server = processes.server(engine=engine)
    token = server.token("app", "other")
    join = JoinString(f"127.0.0.1:{server.quic_port}", JoinString.parse(server.join).ca_pin, token).encode()
    with RawBackend(answer()) as backend:
        args = ("--join", join, "--engine", engine, "--tunnel")
        client = processes.start("connect", backend.target, *args, "app")
        client.ready()
        stranger = processes.run("connect", backend.target, *args, "elsewhere")
        assert stranger.status == 1
        visit(server.http, fields={"Authorization": "Bearer visitor-s-secret", "Cookie": "session=visitor-s-secret"})
        server.revoke(token)
        assert client.exited() == 1
    texts = (server.log, client.log, client.output, stranger.stdout, stranger.stderr)
    own = JoinString.parse(server.join).token
    for text in texts:
        for secret in (token, token.split("_", 2)[2], join, own, "visitor-s-secret"):
            assert secret not in text
    assert server.process.stop() == 0


def test_log_file_is_written_and_private(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "serve.log"
    server = processes.server("--log-file", str(file))
    visit(server.http, "/noted", host="nobody.localhost")
    assert server.process.stop() == 0
    assert "/noted" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert server.log == ""


def test_quiet_log_is_quiet(processes: Processes) -> None:
    server = processes.server("--log-level", "error")
    visit(server.http, host="nobody.localhost")
    assert server.process.stop() == 0
    assert server.log == ""
