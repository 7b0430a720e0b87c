"""ProxyEntry: which tunnel a request is for, and what it is told when there is none."""

import re
from contextlib import suppress
from typing import Any

import pytest

from quictunnel.log import AccessLog
from quictunnel.quic.stream import StreamLeg
from quictunnel.server.entry import ProxyEntry
from quictunnel.server.hosts import Hosts
from quictunnel.server.registry import Registry, RegistryLimits
from quictunnel.trust.owners import Held
from quictunnel.trust.tokens import Grant
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.fields import parse_host
from quictunnel.wire.frames import RequestHead
from tests.support.memory import Recorder
from tests.unit.test_registry import FakeLink

pytestmark = pytest.mark.interpreted  # a stand-in for Link


class Visitor(Recorder):
    """A visitor's leg as the entry sees it."""

    def __init__(self, tunnel_header: bytes = b"") -> None:
        super().__init__()
        self.tunnel_header = tunnel_header
        self.host = ""
        self.request_id = ""
        self.tunnel: Any = None
        self.error: TunnelError | None = None
        self.method, self.target = b"GET", b"/"
        self.status, self.bytes_in, self.bytes_out, self.started = 200, 0, 2, 10.0
        self.client_address = "192.0.2.7"

    @property
    def code(self) -> ErrorCode | None:
        return self.errors[0].code if self.errors else None


class Access(AccessLog):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("text", enabled=True)
        self.told: list[tuple[Any, ...]] = []

    def record(self, *values: Any) -> None:
        self.told.append(values)


class Entry:
    """An entry before the tunnels that are named."""

    def __init__(self, *names: str, domain: str = "example.com", default_tunnel: bool = False) -> None:
        self.registry = Registry(RegistryLimits(in_flight=3))
        self.known: dict[str, Held] = {}
        self.hosts = Hosts(self.registry.tunnel, self.known.get)
        self.links: dict[str, FakeLink] = {}
        self.access = Access()
        self.now = 12.0
        for name in names:
            link = self.links[name] = FakeLink(self.registry)
            grant = Grant("id", name, (), None, b"digest")
            self.registry.register(grant, f"session-{name}", "agent", 0, link, 0.0)  # type: ignore[arg-type]
        self.entry = ProxyEntry(
            self.registry,
            self.hosts,
            WindowBudget(0),
            self.access,
            domain=domain,
            default_tunnel=default_tunnel,
            clock=lambda: self.now,
        )

    def ask(self, host: str, header: bytes = b"") -> Visitor:
        visitor = Visitor(header)
        with suppress(ValueError):  # the door refuses such a request
            visitor.host = parse_host(host.encode("utf-8"))[0]
        head = RequestHead(b"GET", b"http", host.encode("utf-8"), b"/", [])
        self.entry.open_exchange(head, visitor)  # type: ignore[arg-type]
        return visitor


ROUTES = [
    ("app.example.com", b"", "app"),
    ("app.example.com:8080", b"", "app"),
    ("APP.Example.COM", b"", "app"),
    ("app.example.com.", b"", "app"),
    ("app.example.com", b"other", "app"),  # the host comes first
    ("elsewhere.example", b"other", "other"),
    ("elsewhere.example", b"OTHER", "other"),
    ("192.0.2.1:8080", b"app", "app"),
    ("[2001:db8::1]", b"app", "app"),
    ("", b"app", "app"),
    ("unknown.example.com", b"app", None),  # and does not fall through to the header
    ("deep.app.example.com", b"", None),
    ("app.deep.example.com", b"app", None),
    ("example.com", b"", None),
    ("example.com", b"app", "app"),
    ("notexample.com", b"", None),
    ("app.example.com.evil.example", b"", None),
    ("elsewhere.example", b"", None),
    ("elsewhere.example", b"no/name", None),
    ("elsewhere.example", b"\xff", None),
    ("\u00e4.example.com", b"", None),
]


@pytest.mark.parametrize(("host", "header", "name"), ROUTES, ids=[f"{host} {header!r}" for host, header, _ in ROUTES])
def test_request_goes_to_the_tunnel_it_names(host: str, header: bytes, name: str | None) -> None:
    entry = Entry("app", "other")
    visitor = entry.ask(host, header)
    if name is None:
        assert visitor.code == ErrorCode.DESTINATION_NOT_FOUND
        assert visitor.tunnel is None
    else:
        assert not visitor.errors
        assert visitor.tunnel.name == name
        assert isinstance(visitor.peer, StreamLeg)
        assert entry.links[name].legs == [visitor.peer]


HOSTS = [
    ("shop.example.org", b"", "app"),
    ("SHOP.example.org.:8443", b"other", "app"),  # before the header
    ("any.shop.example", b"", "other"),
    ("a_b.shop.example", b"", "other"),  # as visitors write it
    ("vip.shop.example", b"", "app"),  # by name before by wildcard
    ("a.b.shop.example", b"", None),
    ("shop.example", b"", None),
    ("shop.example", b"app", "app"),  # of nobody's host, as ever
    ("app.example.com", b"", "app"),
    ("example.com", b"", None),  # the domain is no custom host, whoever has the wildcard above it
    ("example.com", b"other", "other"),
    ("app.shop.example.com", b"app", None),  # deeper names below the domain are nobody's
    ("a_b.example.com", b"app", None),
    ("192.0.2.1", b"app", "app"),
    ("[2001:db8::1]:80", b"app", "app"),
]


@pytest.mark.parametrize(("host", "header", "name"), HOSTS, ids=[f"{host} {header!r}" for host, header, _ in HOSTS])
def test_custom_host_comes_before_all_else(host: str, header: bytes, name: str | None) -> None:
    entry = Entry("app", "other")
    for tunnel, hosts in (("app", ["shop.example.org", "vip.shop.example"]), ("other", ["*.shop.example", "*.com"])):
        (session,) = entry.registry.tunnels[tunnel].sessions.values()
        entry.hosts.register(session, hosts)
    visitor = entry.ask(host, header)
    if name is None:
        assert visitor.code == ErrorCode.DESTINATION_NOT_FOUND
    else:
        assert not visitor.errors
        assert visitor.tunnel.name == name


def test_host_that_only_the_book_knows_is_a_tunnel_without_a_client() -> None:
    entry = Entry("app", "other")
    entry.known["shop.example.org"] = Held("host", "shop.example.org", "id", "app", False, 0, 0)
    entry.links["app"].close(0, "gone")
    entry.now += 60.0
    visitor = entry.ask("shop.example.org", b"other")
    assert visitor.code == ErrorCode.DESTINATION_UNAVAILABLE
    assert visitor.errors[0].fault.retry_after


def test_host_of_a_connect_is_not_whom_it_is_for() -> None:
    entry = Entry("app", "other")
    (session,) = entry.registry.tunnels["app"].sessions.values()
    entry.hosts.register(session, ["shop.example.org"])
    visitor = Visitor(b"other")
    visitor.host = "shop.example.org"
    head = RequestHead(b"CONNECT", b"http", b"shop.example.org:443", b"shop.example.org:443", [])
    entry.entry.open_exchange(head, visitor)  # type: ignore[arg-type]
    assert visitor.code == ErrorCode.NOT_IMPLEMENTED, "the tunnel of the header, which offers none"


def test_only_tunnel_is_the_default_where_that_is_allowed() -> None:
    assert Entry("app", default_tunnel=True).ask("127.0.0.1:8080").tunnel.name == "app"
    assert Entry("app").ask("127.0.0.1:8080").code == ErrorCode.DESTINATION_NOT_FOUND
    assert Entry("app", "b", default_tunnel=True).ask("127.0.0.1").code == ErrorCode.DESTINATION_NOT_FOUND
    assert Entry(default_tunnel=True).ask("127.0.0.1").code == ErrorCode.DESTINATION_NOT_FOUND


def test_named_tunnel_that_is_unknown_is_not_the_default_one() -> None:
    assert Entry("app", default_tunnel=True).ask("b.example.com").code == ErrorCode.DESTINATION_NOT_FOUND
    assert Entry("app", default_tunnel=True).ask("x", b"b").code == ErrorCode.DESTINATION_NOT_FOUND


def test_tunnel_without_clients_is_unavailable_and_counts_nothing() -> None:
    entry = Entry("app")
    entry.links["app"].close(0, "gone")  # long ago, as clocks go here
    entry.now += 60.0
    visitor = entry.ask("app.example.com")
    assert visitor.code == ErrorCode.DESTINATION_UNAVAILABLE
    assert visitor.tunnel is None
    assert entry.registry.tunnels["app"].in_flight == 0


def test_tunnel_at_its_limit_says_so_until_an_exchange_is_done() -> None:
    entry = Entry("app")
    visitors = [entry.ask("app.example.com") for _ in range(3)]
    assert entry.ask("app.example.com").code == ErrorCode.CONNECTION_LIMIT_REACHED
    entry.entry.exchange_done(visitors[0])  # type: ignore[arg-type]
    assert not entry.ask("app.example.com").errors


def test_each_request_has_an_id_of_its_own() -> None:
    entry = Entry("app")
    ids = [entry.ask(host).request_id for host in ("app.example.com", "app.example.com", "nobody.example")]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{7,}", each) for each in ids)


def test_every_exchange_is_recorded_with_its_fate() -> None:
    entry = Entry("app")
    visitor, lost = entry.ask("app.example.com"), entry.ask("nobody.example")
    lost.error = lost.errors[0]
    lost.status = 404
    for each in (visitor, lost):
        entry.entry.exchange_done(each)  # type: ignore[arg-type]
    assert entry.access.told == [
        (visitor.request_id, "app", b"GET", b"/", 200, 0, 2, 2.0, "192.0.2.7", ""),
        (lost.request_id, "", b"GET", b"/", 404, 0, 2, 2.0, "192.0.2.7", "destination_not_found"),
    ]
