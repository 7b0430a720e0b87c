"""Which certificate visitors are shown, and what is kept of their handshakes."""

import asyncio
import os
import ssl
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from quictunnel.http import tls
from quictunnel.http.tls import ALPN, VisitorTls, asked_host, quiet_names
from quictunnel.trust.certificates import Issuer, ensure_server_certificate, issue
from tests.support.tls import LOOPS, client_context, client_hello, handshake


class Site:
    """A state directory with its CA, and TLS for the tunnel ``app``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ensured = ensure_server_certificate(directory, ["localhost"], datetime.now(UTC))
        self.issued: list[str] = []
        self.known = {"app.localhost"}
        issuer = Issuer(directory, datetime.now(UTC))

        def issue_known(host: str) -> bytes:
            self.issued.append(host)
            return issuer.issue(host, datetime.now(UTC)) if host in self.known else b""

        self.issue: Callable[[str], bytes] = issue_known
        self.tls = VisitorTls(str(self.ensured.certificate), str(self.ensured.key), self.issue)
        self.client = client_context(self.ensured.authority)

    def shown(self, name: str | None) -> bytes:
        """The certificate that a visitor is shown who asks for that name; it checks nothing."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        _, client = handshake(self.tls.context, context, name)
        certificate = client.getpeercert(binary_form=True)
        assert certificate
        return certificate

    @property
    def default(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.ensured.certificate.read_text())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "state")


# Certificates


def test_a_tunnel_that_is_known_is_shown_a_certificate_of_its_own(site: Site) -> None:
    _, client = handshake(site.tls.context, site.client, "app.localhost")
    certificate = client.getpeercert()
    assert certificate is not None
    assert certificate["subjectAltName"] == (("DNS", "app.localhost"),)


def test_a_certificate_is_made_once(site: Site) -> None:
    assert site.shown("app.localhost") == site.shown("APP.localhost") != site.default
    assert site.issued == ["app.localhost"]


@pytest.mark.parametrize("name", [None, "localhost", "other.localhost", "x.app.localhost", "127.0.0.1", "example.com"])
def test_everybody_else_is_shown_the_servers(site: Site, name: str | None) -> None:
    assert site.shown(name) == site.default


def test_a_client_that_checks_names_refuses_the_servers_for_an_unknown_tunnel(site: Site) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(site.tls.context, site.client, "other.localhost")


def test_the_least_used_certificates_make_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LEAVES", 3)
    names = [f"{letter}.localhost" for letter in "abcd"]
    site.known.update(names)
    for name in ("a.localhost", "b.localhost", "c.localhost", "a.localhost", "d.localhost", "a.localhost"):
        site.shown(name)
    assert site.issued == names
    site.shown("b.localhost")
    assert site.issued == [*names, "b.localhost"]
    assert len(site.tls._leaves) == 3


def test_a_renewed_certificate_is_shown_to_the_next_visitor_and_renews_those_of_tunnels(site: Site) -> None:
    before = site.default, site.shown("app.localhost")
    issue(site.directory, ["localhost"])
    assert site.shown(None) == before[0]
    site.tls.replace(str(site.ensured.certificate), str(site.ensured.key), site.issue)
    after = site.default, site.shown("app.localhost")
    assert site.shown(None) == after[0] != before[0]
    assert after[1] != before[1]
    handshake(site.tls.context, site.client, "app.localhost")


def test_a_certificate_that_cannot_be_used_replaces_nothing(site: Site, tmp_path: Path) -> None:
    before = site.default, site.shown("app.localhost")
    other = issue(site.directory, ["localhost"], out=tmp_path / "other.pem")
    for certificate, key in ((other.certificate, site.ensured.key), (tmp_path / "none.pem", other.key)):
        with pytest.raises(OSError):
            site.tls.replace(str(certificate), str(key), site.issue)
    assert (site.shown(None), site.shown("app.localhost")) == before


def test_a_key_with_a_password_is_an_error_not_a_question(site: Site) -> None:
    key = load_pem_private_key(site.ensured.key.read_bytes(), None)
    locked = site.directory / "locked.key"
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(ValueError, match="password"):
        VisitorTls(str(site.ensured.certificate), str(locked))


@pytest.mark.parametrize("failure", [ValueError("no such name"), OSError(28, "No space left on device")])
def test_a_certificate_that_cannot_be_made_leaves_the_servers(
    site: Site, failure: Exception, log_lines: list[str]
) -> None:
    def fail(host: str) -> bytes:
        raise failure

    site.tls.replace(str(site.ensured.certificate), str(site.ensured.key), fail)
    assert site.shown("app.localhost") == site.default
    assert log_lines == [f"ERROR cannot make a certificate for app.localhost: {failure}"]


def test_nobody_else_can_read_the_key_and_nothing_is_left(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir(site.directory))
    seen: list[tuple[Path, int]] = []
    load = tls._context

    def look(certificate: str, key: str) -> ssl.SSLContext:
        seen.append((Path(certificate).parent, stat.S_IMODE(os.stat(certificate).st_mode)))
        return load(certificate, key)

    monkeypatch.setattr(tls, "_context", look)
    umask = os.umask(0)
    try:
        site.shown("app.localhost")
    finally:
        os.umask(umask)
    assert seen == [(site.directory, 0o600)]
    assert sorted(os.listdir(site.directory)) == before


def test_nothing_is_left_of_a_certificate_that_openssl_refuses(site: Site, log_lines: list[str]) -> None:
    before = sorted(os.listdir(site.directory))
    site.tls.replace(str(site.ensured.certificate), str(site.ensured.key), lambda host: b"no PEM")
    assert site.shown("app.localhost") == site.default
    assert sorted(os.listdir(site.directory)) == before
    assert len(log_lines) == 1


# Handshakes


@pytest.mark.parametrize("name", ["app.localhost", "localhost"])
def test_what_visitors_may_speak_is_the_same_for_every_certificate(site: Site, name: str) -> None:
    client = client_context(site.ensured.authority, "spdy/3", *reversed(ALPN))
    server, _ = handshake(site.tls.context, client, name)
    assert server.selected_alpn_protocol() == ALPN[0]


@pytest.mark.parametrize("name", ["app.localhost", "localhost"])
def test_a_visitor_that_speaks_nothing_we_do_agrees_on_nothing(site: Site, name: str) -> None:
    server, _ = handshake(site.tls.context, client_context(site.ensured.authority, "spdy/3"), name)
    assert server.selected_alpn_protocol() is None


@pytest.mark.parametrize("name", ["app.localhost", "localhost"])
def test_tls_1_2_has_forward_secrecy_and_nothing_older_is_spoken(site: Site, name: str) -> None:
    site.client.maximum_version = ssl.TLSVersion.TLSv1_2
    server, _ = handshake(site.tls.context, site.client, name)
    cipher = server.cipher()
    assert cipher is not None and cipher[0].startswith("ECDHE-ECDSA-")
    for old in ("AES128-SHA", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-SHA256"):
        site.client.set_ciphers(f"{old}:@SECLEVEL=0")
        with pytest.raises(ssl.SSLError):
            handshake(site.tls.context, site.client, name)
    for context in (site.tls.context, site.tls._load(site.issue("app.localhost"))):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("app.localhost", "app.localhost"),
        ("Other.Example", "other.example"),
        ("localhost", "localhost"),
        ("a_b.example", "a_b.example"),
        ("127.0.0.1", ""),
        (None, ""),
    ],
)
def test_the_host_that_was_asked_for_is_kept(site: Site, name: str | None, host: str) -> None:
    site.client.check_hostname = False
    site.client.verify_mode = ssl.CERT_NONE
    server, _ = handshake(site.tls.context, site.client, name)
    assert asked_host(server) == host


@pytest.mark.parametrize(
    ("name", "host"),
    [("App.Localhost.", "app.localhost"), ("127.0.0.1", ""), ("::1", ""), ("", ""), ("a b:1", "a b:1")],
)
def test_every_spelling_of_a_name_is_one_and_an_address_is_none(name: str, host: str) -> None:
    """Python's client sends neither final dots nor addresses; others do."""
    assert tls._host(name) == host


def test_a_name_outside_ascii_is_refused_without_a_traceback(
    site: Site, log_lines: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's own would fail the test

    def shake_hands() -> None:
        upward = ssl.MemoryBIO()
        upward.write(client_hello("xxx.localhost").replace(b"xxx", b"\xff\n\xfe"))
        with pytest.raises(ssl.SSLError):
            site.tls.context.wrap_bio(upward, ssl.MemoryBIO(), server_side=True).do_handshake()

    with quiet_names():
        shake_hands()
    assert capfd.readouterr().err == ""
    assert log_lines == ["DEBUG = no TLS with a visitor: it asked for b'\\xff\\n\\xfe.localhost'"]
    shake_hands()
    assert "UnicodeDecodeError" in capfd.readouterr().err, "or there is nothing to be quiet about any more"


@pytest.mark.parametrize("thing", [None, object(), 3])
def test_what_is_no_handshake_has_asked_for_nothing(thing: object) -> None:
    assert asked_host(thing) == ""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_resumed_session_keeps_its_host(site: Site, version: ssl.TLSVersion) -> None:
    site.client.minimum_version = site.client.maximum_version = version
    server, client = handshake(site.tls.context, site.client, "app.localhost")
    server.write(b"x")
    client.read(1)  # and so the tickets that TLS 1.3 sends after the handshake
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    again = site.tls.context.wrap_bio(upward, downward, server_side=True)
    resumed = site.client.wrap_bio(downward, upward, server_hostname="app.localhost", session=client.session)
    for _ in range(4):
        for each in (resumed, again):
            with suppress(ssl.SSLWantReadError):
                each.do_handshake()
    assert resumed.session_reused
    assert asked_host(again) == "app.localhost"


@pytest.mark.parametrize("make", LOOPS)
def test_a_transport_shows_the_host_on_every_event_loop(
    site: Site, make: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """What a connection reads when it is made, after a real handshake over a socket."""
    seen: list[str] = []

    class Visitor(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            seen.append(asked_host(transport.get_extra_info("ssl_object")))
            transport.close()

    async def visit() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Visitor, "127.0.0.1", 0, ssl=site.tls.context)
        port = server.sockets[0].getsockname()[1]
        for name in ("app.localhost", "localhost"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=site.client, server_hostname=name)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(visit())
    assert seen == ["app.localhost", "localhost"]
