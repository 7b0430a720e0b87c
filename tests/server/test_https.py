"""A server's port of TLS, in the test's process: whose names it has certificates for, and their renewal."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quictunnel.app.identity import identity_of
from quictunnel.app.reload import Reloader
from quictunnel.app.serve import _renew, make_server
from quictunnel.log import AccessLog
from quictunnel.quic.engine import select_engine
from quictunnel.quic.sockets import settle
from quictunnel.server.registry import Session, Tunnel
from quictunnel.server.server import Server
from quictunnel.settings import ServeSettings
from quictunnel.trust.certificates import init, issue
from quictunnel.trust.files import TrustError
from quictunnel.trust.tokens import Grant, TokenStore
from tests.support.tls import TlsVisitor, client_context


def options(directory: Path, **more: Any) -> ServeSettings:
    local = "127.0.0.1:0"
    return ServeSettings(http=local, https=local, quic=local, state_dir=directory, **more)


@asynccontextmanager
async def serving(settings: ServeSettings) -> AsyncIterator[Server]:
    """A server that knows a tunnel ``app`` and looks at its certificates all the time."""
    tokens = TokenStore(settings.state_dir)
    tokens.load()
    identity = identity_of(settings, settings.quic.host)
    access = AccessLog("text", enabled=False)
    server = make_server(settings, select_engine("auto"), tokens, identity, access)
    reloader = Reloader(settings, lambda: settings, server, tokens, access, identity)
    await server.start()
    server.registry.tunnels["app"] = Tunnel("app")
    renewal = asyncio.get_running_loop().create_task(_renew(reloader))
    try:
        yield server
        assert not renewal.done()
    finally:
        renewal.cancel()
        server.close()
        await settle()


async def shown(server: Server, authority: Path, name: str) -> bytes:
    """The certificate that a visitor is shown who asks for that name, and checks it."""
    assert server.https_address is not None
    port = server.https_address[1]

    def visit() -> bytes:
        with TlsVisitor(port, client_context(authority), name) as made:
            certificate = made.tls.getpeercert(binary_form=True)
            assert certificate
            return certificate

    return await asyncio.to_thread(visit)


async def until(question: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not await question():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_renew.__globals__, "_RENEWAL_CHECK", 0.01)


async def test_a_certificate_that_is_renewed_is_shown_without_a_restart(tmp_path: Path) -> None:
    async with serving(options(tmp_path)) as server:
        authority = tmp_path / "ca.pem"
        before = [await shown(server, authority, name) for name in ("localhost", "app.localhost")]
        await asyncio.sleep(0.05)
        assert [await shown(server, authority, name) for name in ("localhost", "app.localhost")] == before, (
            "a look is not a renewal"
        )
        (tmp_path / "server.pem").unlink()

        async def renewed() -> bool:
            return await shown(server, authority, "localhost") != before[0]

        await until(renewed)
        assert await shown(server, authority, "app.localhost") != before[1]


async def test_a_pair_of_ones_own_is_read_again(tmp_path: Path, log_lines: list[str]) -> None:
    authority = init(tmp_path)
    pair = issue(tmp_path, ["localhost", "app.localhost"])
    async with serving(options(tmp_path / "state", cert=pair.certificate, key=pair.key)) as server:
        before = await shown(server, authority, "app.localhost")
        old = pair.key.read_bytes()
        # Half of a pair, as whoever renews it leaves for a moment: the old one goes on.
        issue(tmp_path, ["localhost", "app.localhost"])
        new = pair.key.read_bytes()
        pair.key.write_bytes(old)

        async def complained() -> bool:
            return any("cannot renew" in line for line in log_lines)

        await until(complained)
        assert await shown(server, authority, "app.localhost") == before
        pair.key.write_bytes(new)

        async def renewed() -> bool:
            return await shown(server, authority, "app.localhost") != before

        await until(renewed)


@pytest.mark.parametrize("domain", ["localhost", "home", "t.example.com"])
async def test_every_tunnel_of_any_domain_is_shown_a_certificate_for_it(tmp_path: Path, domain: str) -> None:
    async with serving(options(tmp_path, domain=domain)) as server:
        await shown(server, tmp_path / "ca.pem", domain)
        await shown(server, tmp_path / "ca.pem", f"app.{domain}")
        for name in (f"none.{domain}", f"x.app.{domain}", "app.example"):
            if name != "none.t.example.com":  # a wildcard is for all
                with pytest.raises(ssl.SSLCertVerificationError):
                    await shown(server, tmp_path / "ca.pem", name)


def serve_hosts(server: Server, *hosts: str) -> Session:
    """Have a client of ``app`` say that these are its hosts."""
    tunnel = server.registry.tunnels["app"]
    session = Session("s" * 24, 1, tunnel, Grant("id", "app", hosts, None, b""), "agent", 0.0)
    tunnel.sessions[session.id] = session
    server._hosts.register(session, hosts)
    return session


@pytest.mark.parametrize("domain", ["localhost", "t.example.com"])
async def test_custom_hosts_are_shown_certificates_for_them(tmp_path: Path, domain: str) -> None:
    async with serving(options(tmp_path, domain=domain)) as server:
        authority = tmp_path / "ca.pem"
        session = serve_hosts(server, "app.example.org", "*.wild.example.org", "*.intranet")
        for name in ("app.example.org", "any.wild.example.org", "wiki.intranet", domain):
            await shown(server, authority, name)
        for name in ("other.example.org", "wild.example.org", "a.b.wild.example.org", "intranet"):
            with pytest.raises(ssl.SSLCertVerificationError):
                await shown(server, authority, name)
        server.registry.tunnels["app"].sessions.clear()
        server._hosts.ended(session)
        with pytest.raises(ssl.SSLCertVerificationError):
            await shown(server, authority, "app.example.org")


async def test_all_hosts_below_a_wildcard_share_one_certificate(tmp_path: Path) -> None:
    """Names that anybody can make up must not cost a signature each, nor push others' certificates out."""
    async with serving(options(tmp_path)) as server:
        serve_hosts(server, "*.example.org")
        assert server._tls is not None
        leaves = {server._tls._leaf(f"n{number}.example.org") for number in range(1000)}
        assert len(leaves) == len(server._tls._leaves) == 1


async def test_urls_of_hosts_name_those_that_can_be_opened_first(tmp_path: Path) -> None:
    async with serving(options(tmp_path)) as server:
        server.https_address, server.http_address = ("0.0.0.0", 443), ("0.0.0.0", 80)
        assert server.public_urls("app", ["*.b.example", "a.example"]) == [
            "https://a.example",
            "https://app.localhost",
            "http://app.localhost",
            "https://*.b.example",
        ]


async def test_urls_name_the_best_door_first(tmp_path: Path) -> None:
    async with serving(options(tmp_path)) as server:
        assert server.https_address is not None
        https, http = server.https_address[1], server.http_address[1]
        assert server.public_urls("app") == [f"https://app.localhost:{https}", f"http://app.localhost:{http}"]
        server.https_address, server.http_address = ("0.0.0.0", 443), ("0.0.0.0", 80)
        assert server.public_urls("app") == ["https://app.localhost", "http://app.localhost"]


async def test_a_server_that_cannot_have_its_port_holds_none(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        http = free.getsockname()[1]
        free.close()
        settings = ServeSettings(http=f"127.0.0.1:{http}", https=place, quic="127.0.0.1:0", state_dir=tmp_path)
        tokens = TokenStore(tmp_path)
        identity = identity_of(settings, "127.0.0.1")
        server = make_server(settings, select_engine("auto"), tokens, identity, AccessLog("text", enabled=False))
        with pytest.raises(OSError, match=rf"--https {place}: "):
            await server.start()
        server.close()
        await settle()
        socket.create_server(("127.0.0.1", http)).close()


def test_a_ca_that_cannot_sign_is_told_at_the_start(tmp_path: Path) -> None:
    identity_of(options(tmp_path), "127.0.0.1")
    (tmp_path / "ca.key").write_text("no key")
    with pytest.raises(TrustError, match=r"ca\.key"):
        identity_of(options(tmp_path), "127.0.0.1")


async def test_issuing_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """Measured about 2 ms; the bound is for a machine that has other work."""
    async with serving(options(tmp_path)) as server:
        assert server._tls is not None
        names = [f"t{number}.localhost" for number in range(50)]
        server.registry.tunnels |= {name.partition(".")[0]: Tunnel(name) for name in names}
        loop = asyncio.get_running_loop()
        taken = []
        for name in names:
            started = loop.time()
            assert server._tls._leaf(name) is not None
            taken.append(loop.time() - started)
        assert sorted(taken)[25] < 0.05
