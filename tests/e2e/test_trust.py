"""Who is let in, who is believed, and what those who are not are told."""

import datetime
import ipaddress
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from quictunnel.trust import certificates
from quictunnel.trust.join import JoinString
from tests.support.backends import Connection, RawBackend, answer
from tests.support.processes import Process, Processes, Server, free_udp_port, poll
from tests.support.visits import visit

pytestmark = pytest.mark.either

BACKEND = "127.0.0.1:9"
"never asked"


@pytest.fixture(scope="module")
def servers(processes: Processes) -> Callable[[str], Server]:
    """A running server of an engine; the tests of this file share it."""
    made: dict[str, Server] = {}

    def server(engine: str) -> Server:
        if engine not in made:
            made[engine] = processes.server(engine=engine)
        return made[engine]

    return server


@pytest.fixture
def server(engine: str, servers: Callable[[str], Server]) -> Server:
    return servers(engine)


def refused(client: Process, *words: str, limit: float = 8.0) -> None:
    """The client gives up at once, with status 1 and one line on standard error that holds the words."""
    status = client.exited(limit)
    lines = [line for line in client.log.splitlines() if not re.match(r"\d{4}-", line)]
    assert status == 1, client.log
    assert len(lines) == 1, client.log
    assert lines[0].startswith("quictunnel: ")
    for word in words:
        assert word in lines[0]
    assert client.output == ""


def pin_of(server: Server) -> bytes:
    pin = JoinString.parse(server.join).ca_pin
    assert pin is not None
    return pin


def join_with(server: Server, token: str, pin: bytes | None = None) -> str:
    return JoinString(f"127.0.0.1:{server.quic_port}", pin or pin_of(server), token).encode()


# Tokens.


def test_wrong_token_is_refused_for_good(engines: tuple[str, str], servers: Callable[[str], Server]) -> None:
    server = servers(engines[0])
    token = server.token("app")
    wrong = token[:-4] + ("aaaa" if token[-4:] != "aaaa" else "bbbb")
    join = join_with(server, wrong)
    client = server.processes.start("connect", BACKEND, "--join", join, "--engine", engines[1])
    refused(client, "refuses", "token")
    assert wrong not in client.log + server.log
    assert "does not know this token" in client.log


def test_token_of_another_server_is_refused(server: Server, engine: str, processes: Processes) -> None:
    state = processes.directory / f"elsewhere-{engine}"
    token = processes.run("token", "create", "--state-dir", str(state), "--tunnel", "*").stdout.strip()
    client = processes.start("connect", BACKEND, "--join", join_with(server, token), "--engine", engine)
    refused(client, "does not know this token")


def test_expired_token_is_refused(server: Server, engine: str) -> None:
    token = server.token("app", lasts=1)
    time.sleep(1.1)  # it is the clock that is tested
    client = server.processes.start("connect", BACKEND, "--join", join_with(server, token), "--engine", engine)
    refused(client, "expired")


def test_revoked_token_is_refused(server: Server, engine: str) -> None:
    token = server.token("app")
    server.revoke(token)
    client = server.processes.start("connect", BACKEND, "--join", join_with(server, token), "--engine", engine)
    refused(client, "revoked")


@pytest.mark.parametrize("tunnel", ["other", "team", "team-a-b.c"])
def test_name_out_of_the_token_s_scope_is_refused(server: Server, engine: str, tunnel: str) -> None:
    token = server.token("team-*", "app")
    args = ("connect", BACKEND, "--join", join_with(server, token), "--engine", engine, "--tunnel", tunnel)
    client = server.processes.start(*args)
    if "." in tunnel:
        assert client.exited() == 2  # no tunnel's name at all
        return
    refused(client, tunnel)


@pytest.mark.parametrize("tunnel", ["team-a", "app"])
def test_name_in_the_token_s_scope_is_served(server: Server, engine: str, tunnel: str) -> None:
    token = server.token("team-*", "app")
    with RawBackend(answer(200, b"mine")) as backend:
        args = ("--join", join_with(server, token), "--engine", engine, "--tunnel", tunnel)
        client = server.processes.start("connect", backend.target, *args)
        assert client.ready()["tunnel"] == tunnel
        assert visit(server.http, host=f"{tunnel}.localhost").body == b"mine"
        assert client.stop() == 0
    server.revoke(token)


def test_token_in_the_environment_is_taken(server: Server, engine: str) -> None:
    token = server.token("quiet")
    ca = server.state / "ca.pem"
    args = ("--server", f"127.0.0.1:{server.quic_port}", "--ca", str(ca), "--engine", engine, "--tunnel", "quiet")
    client = server.processes.start("connect", BACKEND, *args, env={"QUICTUNNEL_TOKEN": token})
    client.ready()
    assert token not in client.log + client.output + server.log
    assert client.stop() == 0


def test_token_revoked_while_it_is_used_ends_its_session(
    engines: tuple[str, str], servers: Callable[[str], Server]
) -> None:
    server = servers(engines[0])
    token = server.token("ends")
    with RawBackend(answer()) as backend:
        args = ("--join", join_with(server, token), "--engine", engines[1], "--tunnel", "ends")
        client = server.processes.start("connect", backend.target, *args)
        client.ready()
        assert visit(server.http, host="ends.localhost").status == 200
        state = ("--state-dir", str(server.state))
        assert server.processes.run("token", "revoke", token.split("_")[1], *state).status == 0
        began = time.monotonic()
        assert client.exited(5) == 1
        assert time.monotonic() - began < 5
        assert [line for line in client.log.splitlines() if line.startswith("quictunnel: ")]
        assert "revoked" in client.log.splitlines()[-1]
        assert visit(server.http, host="ends.localhost").status == 503


def test_token_that_expires_while_it_is_used_ends_its_session(server: Server, engine: str) -> None:
    token = server.token("brief", lasts=3)
    args = ("--join", join_with(server, token), "--engine", engine, "--tunnel", "brief")
    client = server.processes.start("connect", BACKEND, *args)
    client.ready()
    assert client.exited(8) == 1
    assert "expired" in client.log.splitlines()[-1]


def test_name_of_another_token_cannot_be_taken(engine: str, servers: Callable[[str], Server]) -> None:
    server = servers(engine)
    tokens = [server.token("mine") for _ in range(2)]

    def start(token: str) -> Process:
        args = ("--join", join_with(server, token), "--engine", engine, "--tunnel", "mine")
        return server.processes.start("connect", BACKEND, *args)

    owner = start(tokens[0])
    owner.ready()
    refused(start(tokens[1]), "mine", "another token")
    assert owner.stop() == 0
    refused(start(tokens[1]), "mine", "another token")  # not even in the gap
    server.revoke(tokens[0])
    heir = start(tokens[1])
    heir.ready()
    assert heir.stop() == 0
    server.revoke(tokens[1])


# The server's certificate.


class Authority:
    """A CA, and server certificates of it as good or as bad as a test wants."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = certificates.init(directory)
        self.pin = certificates.authority_pin(x509.load_pem_x509_certificate(self.ca.read_bytes()))

    def issue(self, *names: str, seconds: float) -> tuple[Path, Path]:
        """A certificate that is good until so many seconds from now."""
        ca_key = load_pem_private_key((self.directory / "ca.key").read_bytes(), None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        ca = x509.load_pem_x509_certificate(self.ca.read_bytes())
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        alternatives = [_general_name(name) for name in names]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(seconds=seconds))
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        paths = self.directory / "made.pem", self.directory / "made.key"
        paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        paths[1].chmod(0o600)
        return paths

    def server(self, processes: Processes, engine: str, *names: str, seconds: float = 3600) -> Server:
        """A server with such a certificate."""
        certificate, key = self.issue(*names, seconds=seconds)
        return processes.server("--cert", str(certificate), "--key", str(key), "--ca", str(self.ca), engine=engine)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def test_wrong_pin_is_refused(engines: tuple[str, str], servers: Callable[[str], Server]) -> None:
    server = servers(engines[0])
    join = join_with(server, server.token("app"), bytes(32))
    client = server.processes.start("connect", BACKEND, "--join", join, "--engine", engines[1])
    refused(client, "not the one in the join string")


def test_authority_in_a_file_is_trusted(engine: str, processes: Processes, authority: Authority) -> None:
    server = authority.server(processes, engine, "127.0.0.1")
    token = server.token("app")
    args = ("--server", f"127.0.0.1:{server.quic_port}", "--engine", engine, "--token", token)
    with RawBackend(answer()) as backend:
        client = processes.start("connect", backend.target, *args, "--tunnel", "app", "--ca", str(authority.ca))
        client.ready()
        assert visit(server.http).status == 200
        assert client.stop() == 0
    assert server.process.stop() == 0


def test_pin_of_an_authority_of_one_s_own_is_trusted(engine: str, processes: Processes, authority: Authority) -> None:
    server = authority.server(processes, engine, "127.0.0.1")
    assert pin_of(server) == authority.pin
    client = processes.client(server, BACKEND, engine=engine)
    assert client.process.stop() == 0
    assert server.process.stop() == 0


def test_another_authority_is_not_trusted(server: Server, engine: str, authority: Authority) -> None:
    token = server.token("app")
    args = ("--server", f"127.0.0.1:{server.quic_port}", "--engine", engine, "--token", token)
    refused(server.processes.start("connect", BACKEND, *args, "--ca", str(authority.ca)), "not of the given CA")


def test_system_trust_does_not_hold_for_an_authority_of_one_s_own(server: Server, engine: str) -> None:
    token = server.token("app")
    args = ("--server", f"127.0.0.1:{server.quic_port}", "--engine", engine, "--token", token)
    refused(server.processes.start("connect", BACKEND, *args, "--ca", "system"), "certificate")


def test_certificate_that_has_expired_is_refused(engine: str, processes: Processes, authority: Authority) -> None:
    # The server refuses to start with one that has expired already.
    until = time.time() + 3
    server = authority.server(processes, engine, "127.0.0.1", seconds=3)
    poll(lambda: time.time() > until + 1, what="the certificate's end")
    client = processes.client(server, BACKEND, engine=engine, wait=False)
    refused(client.process, "certificate", "expired")
    assert server.process.stop() == 0


def test_certificate_for_another_name_is_refused(engine: str, processes: Processes, authority: Authority) -> None:
    server = authority.server(processes, engine, "other.example", "127.0.0.2")
    client = processes.client(server, BACKEND, engine=engine, wait=False)
    refused(client.process, "other.example", "127.0.0.1")
    assert server.process.stop() == 0


def test_name_that_the_certificate_must_have_can_be_said(
    engine: str, processes: Processes, authority: Authority
) -> None:
    server = authority.server(processes, engine, "other.example")
    client = processes.client(server, BACKEND, "--server-name", "other.example", engine=engine)
    assert client.process.stop() == 0
    assert server.process.stop() == 0


def test_server_does_not_start_with_an_expired_certificate(processes: Processes, authority: Authority) -> None:
    certificate, key = authority.issue("127.0.0.1", seconds=-60)
    result = processes.run(*_serve(processes), "--cert", str(certificate), "--key", str(key))
    assert result.status == 1
    assert "expired" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_server_does_not_start_with_another_certificate_s_key(processes: Processes, authority: Authority) -> None:
    certificate, _ = authority.issue("127.0.0.1", seconds=60)
    key = authority.directory / "ca.key"
    result = processes.run(*_serve(processes), "--cert", str(certificate), "--key", str(key))
    assert result.status == 1
    assert "does not belong" in result.stderr


def _serve(processes: Processes) -> tuple[str, ...]:
    places = ("--http", "127.0.0.1:0", "--quic", "127.0.0.1:0")
    return "serve", *places, "--state-dir", str(processes.directory / "unused")


def test_nobody_is_trusted_without_being_told(processes: Processes) -> None:
    args = ("--server", f"127.0.0.1:{free_udp_port()}", "--token", "qtk_a_b")
    result = processes.run("connect", BACKEND, *args, "--state-dir", str(processes.directory / "unused"))
    assert result.status == 1
    assert "whom to trust" in result.stderr


def test_client_on_the_server_s_machine_needs_no_join_string(server: Server, engine: str) -> None:
    args = ("--state-dir", str(server.state), "--engine", engine, "--tunnel", "near")
    client = server.processes.start("connect", BACKEND, *args)
    assert client.ready()["tunnel"] == "near"
    assert client.stop() == 0


def test_server_keeps_its_identity_over_a_restart(engine: str, processes: Processes) -> None:
    server = processes.server(engine=engine)
    join = server.join
    assert server.process.stop() == 0
    server.start()
    assert server.join == join
    assert server.process.stop() == 0


def test_private_files_are_private(server: Server) -> None:
    for file in server.state.rglob("*"):
        if file.is_file() and file.suffix not in (".pem", ".lock"):
            assert file.stat().st_mode & 0o077 == 0, file


# The backend's certificate.


@pytest.fixture
def backend_tls(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("127.0.0.1", "localhost", seconds=3600))
    return context


@pytest.mark.parametrize("option", ["ca", "insecure"])
def test_https_backend_that_is_trusted(
    server: Server, engine: str, authority: Authority, backend_tls: ssl.SSLContext, option: str
) -> None:
    options = ("--backend-ca", str(authority.ca)) if option == "ca" else ("--backend-insecure",)
    with RawBackend(answer(200, b"over tls"), tls=backend_tls) as backend:
        client = server.processes.client(server, backend.target, *options, tunnel="tls", engine=engine)
        for _ in range(3):
            assert visit(server.http, host="tls.localhost").body == b"over tls"
        assert backend.connections == 1
        assert client.process.stop() == 0


def test_https_backend_that_is_not_trusted_is_502(server: Server, engine: str, backend_tls: ssl.SSLContext) -> None:
    with RawBackend(answer(), tls=backend_tls) as backend:
        client = server.processes.client(server, backend.target, tunnel="tls", engine=engine)
        got = visit(server.http, host="tls.localhost")
        assert (got.status, got.error) == (502, "tls_certificate_error")
        assert backend.requests == []
        assert client.process.stop() == 0


def test_https_backend_for_another_name_is_502(server: Server, engine: str, authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("other.example", seconds=3600))
    with RawBackend(answer(), tls=context) as backend:
        options = ("--backend-ca", str(authority.ca))
        client = server.processes.client(server, backend.target, *options, tunnel="tls", engine=engine)
        got = visit(server.http, host="tls.localhost")
        assert (got.status, got.error) == (502, "tls_certificate_error")
        assert client.process.stop() == 0


def test_https_backend_that_speaks_plain_http_is_502(server: Server, engine: str) -> None:
    def handle(connection: Connection) -> None:
        connection.sock.recv(65536)
        connection.answer(400, b"this is no HTTP")

    with RawBackend(handle) as backend:
        target = backend.target.replace("http:", "https:")
        client = server.processes.client(server, target, "--backend-insecure", tunnel="tls", engine=engine)
        got = visit(server.http, host="tls.localhost")
        assert (got.status, got.error) == (502, "tls_protocol_error")
        assert client.process.stop() == 0


def test_trust_options_of_a_backend_without_tls_are_refused(server: Server) -> None:
    result = server.processes.run("connect", BACKEND, "--join", server.join, "--backend-insecure")
    assert result.status == 1
    assert "--backend-insecure" in result.stderr
