"""The gate: which hello is welcomed, which is refused and how, and what ends a registration."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from quictunnel.quic.link import LinkClosed
from quictunnel.server.book import Book
from quictunnel.server.gate import Gate
from quictunnel.server.hosts import Hosts
from quictunnel.server.registry import Registry, RegistryLimits
from quictunnel.trust.owners import Owners
from quictunnel.trust.tokens import TokenStore
from quictunnel.wire.control import VERSION, Authority, Drain, Drained, Grow, Hello, Refuse, Unknown, Welcome
from quictunnel.wire.errors import ErrorCode, TunnelError

pytestmark = pytest.mark.interpreted  # a stand-in for Link

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SESSION = "s" * 24


class FakeLink:
    """A link as the gate sees it."""

    def __init__(self) -> None:
        self.address = ("192.0.2.7", 5555)
        self.session: Any = None
        self.draining = False
        self.closed: object = None
        self.active = 0
        self.messages: list[Any] = []
        self.opened = 6  # and one that has a slot but no stream yet

    def send_control(self, message: object) -> None:
        self.messages.append(message)

    def close(self, code: int = 0, reason: str = "") -> None:
        self.closed = reason

    def has_slot(self) -> bool:
        return self.closed is None and not self.draining

    def flush(self) -> None:
        self.opened = 7

    def silent_for(self) -> float:
        return 0.0


class Door:
    """A gate with its registry and its tokens."""

    def __init__(self, directory: Path, max_names: int = 1000) -> None:
        self.tokens = TokenStore(directory)
        self.tokens.load()
        self.token = self.tokens.create(["app", "team-*"], timedelta(days=30), NOW)
        self.hosted = ""  # a token for custom hosts, if there is one
        self.accepted: list[object] = []
        self.now = NOW
        self.clock = 0.0
        self.owners = Owners(directory)
        self.book = Book(self.owners, self.tokens, max_names=max_names, now=lambda: self.now, clock=lambda: self.clock)
        self.registry = Registry(RegistryLimits(max_links=4), self.book.knows, self.book.only)
        self.hosts = Hosts(self.registry.tunnel, self.book.host)
        self.gate = Gate(
            self.registry,
            self.tokens,
            self.book,
            self.hosts,
            domain="tunnel.example",
            authority=Authority("CA", "own"),
            public_urls=lambda name, hosts: [f"http://{each}" for each in (f"{name}.example", *hosts)],
            now=lambda: self.now,
        )
        self.gate.on_accepted = self.accepted.append

    def hello(self, link: FakeLink | None = None, **values: Any) -> FakeLink:
        """A link says hello; what it hears is in its ``messages``."""
        link = link or FakeLink()
        said = {"version": VERSION, "tunnel": "app", "session": SESSION, "token": self.token.secret, **values}
        self.gate.link_control(link, Hello(**said))  # type: ignore[arg-type]
        return link

    def close(self) -> None:
        self.gate.close()
        self.book.close()


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    door = Door(tmp_path)
    yield door
    door.close()


async def test_good_hello_is_welcomed_with_its_public_urls(door: Door) -> None:
    link = door.hello()
    (welcome,) = link.messages
    assert isinstance(welcome, Welcome)
    assert (welcome.tunnel, welcome.urls, welcome.max_links) == ("app", ["http://app.example"], 4)
    assert door.accepted == [link]
    assert door.registry.tunnels["app"].sessions[SESSION].links == {0: link}


async def test_second_link_of_a_session_joins_it(door: Door) -> None:
    links = [door.hello(), FakeLink()]
    said = Hello(VERSION, "app", SESSION, door.token.secret, 1)
    door.gate.link_control(links[1], said)  # type: ignore[arg-type]
    assert all(isinstance(link.messages[0], Welcome) for link in links)
    assert len(door.registry.sessions()) == 1


REFUSED: list[tuple[dict[str, Any], str, bool]] = [
    ({"token": "qtk_nothing"}, "token_unknown", True),
    ({"token": ""}, "token_unknown", True),
    ({"tunnel": "other"}, "token_scope", True),
    ({"tunnel": "../x"}, "token_scope", True),
    ({"version": VERSION + 1}, "version", True),
    ({"session": "short"}, "protocol", True),
    ({"session": "s" * 129}, "protocol", True),
]


@pytest.mark.parametrize(("values", "code", "final"), REFUSED, ids=lambda value: str(value)[:24])
async def test_bad_hello_is_refused_and_says_why(door: Door, values: dict[str, Any], code: str, final: bool) -> None:
    link = door.hello(**values)
    (refuse,) = link.messages
    assert isinstance(refuse, Refuse)
    assert (refuse.code, refuse.final) == (code, final)
    assert door.token.secret not in refuse.text
    assert not door.registry.tunnels
    assert not door.accepted


async def test_expired_and_revoked_tokens_are_told_apart(door: Door) -> None:
    door.tokens.revoke(door.token.id, NOW)
    assert door.hello().messages[0].code == "token_revoked"
    token = door.tokens.create(["*"], timedelta(days=1), NOW)
    door.now = NOW + timedelta(days=2)
    assert door.hello(token=token.secret).messages[0].code == "token_expired"


async def test_one_link_more_than_a_session_may_have_is_to_come_later(door: Door) -> None:
    link = FakeLink()
    said = Hello(VERSION, "app", SESSION, door.token.secret, 4)
    door.gate.link_control(link, said)  # type: ignore[arg-type]
    (refuse,) = link.messages
    assert (refuse.code, refuse.final) == ("limit", False)


async def test_server_full_of_tunnels_refuses_for_now(door: Door) -> None:
    door.registry.limits = RegistryLimits(tunnels=2)
    door.hello(tunnel="team-a")
    door.hello(tunnel="team-b", session="t" * 24)
    (refuse,) = door.hello(tunnel="team-c", session="u" * 24).messages
    assert (refuse.code, refuse.final) == ("limit", False)


async def test_draining_server_refuses_for_now(door: Door) -> None:
    link = door.hello()
    door.gate.drain_all()
    assert link.messages[-1] == Drain()
    (refuse,) = door.hello(session="t" * 24).messages
    assert (refuse.code, refuse.final) == ("draining", False)


async def test_unreadable_tokens_refuse_for_now(door: Door) -> None:
    door.tokens.path.write_text("not json")
    door.gate.recheck_tokens()
    (refuse,) = door.hello().messages
    assert (refuse.code, refuse.final) == ("unavailable", False)


async def test_name_belongs_to_its_token_until_that_is_no_good(door: Door) -> None:
    door.hello()
    other = door.tokens.create(["app"], None, NOW)
    assert door.hello(token=other.secret, session="t" * 24).messages[0].code == "name_taken"
    door.tokens.revoke(door.token.id, NOW)
    assert isinstance(door.hello(token=other.secret, session="t" * 24).messages[0], Welcome)


async def test_session_of_another_token_cannot_be_joined_by_its_id(door: Door) -> None:
    ours = door.hello(tunnel="team-a")
    other = door.tokens.create(["*"], None, NOW)
    link = door.hello(token=other.secret, tunnel="team-b")
    assert isinstance(link.messages[0], Welcome)
    assert link.session is not ours.session


async def test_client_without_a_wish_gets_its_tokens_first_name(door: Door) -> None:
    assert door.hello(tunnel="").messages[0].tunnel == "app"
    token = door.tokens.create(["team-*"], None, NOW)
    names = [door.hello(tunnel="", token=token.secret, session=letter * 24).messages[0].tunnel for letter in "aab"]
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("team-") for name in names)
    assert door.hello(tunnel="", token="qtk_nothing", session="c" * 24).messages[0].code == "token_unknown"


async def test_second_hello_on_a_link_is_refused(door: Door) -> None:
    link = door.hello()
    door.hello(link=link)
    assert link.messages[-1].code == "protocol"


async def test_refused_link_is_closed_after_a_moment(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quictunnel.server.gate._REFUSAL_TIME", 0.0)
    link = door.hello(token="qtk_nothing")
    assert link.closed is None
    for _ in range(5):
        await asyncio.sleep(0)
    assert link.closed


async def test_session_ends_when_its_token_does(door: Door) -> None:
    link = door.hello()
    door.gate.recheck_tokens()
    assert len(door.registry.sessions()) == 1
    door.now = NOW + timedelta(days=31)
    door.gate.recheck_tokens()
    assert not door.registry.sessions()
    assert (link.messages[-1].code, link.messages[-1].final, link.draining) == ("token_expired", True, True)


async def test_session_stays_while_the_tokens_cannot_be_read(door: Door) -> None:
    door.hello()
    door.tokens.path.write_text("not json")
    door.gate.recheck_tokens()
    door.gate.recheck_tokens()
    assert len(door.registry.sessions()) == 1


async def test_question_for_the_authority_is_answered_without_a_token(door: Door) -> None:
    link = FakeLink()
    door.gate.link_control(link, Authority())  # type: ignore[arg-type]
    assert link.messages == [Authority("CA", "own")]


async def test_link_that_drains_takes_nothing_new(door: Door) -> None:
    link = door.hello()
    door.gate.link_control(link, Drain())  # type: ignore[arg-type]
    assert link.draining
    assert link.messages[-1] == Drained(7)
    assert door.registry.tunnels["app"].choose_session(0.0) is None


@pytest.mark.parametrize("message", [Welcome("app"), Refuse("x", "y"), Grow(9), Unknown("z")], ids=lambda m: m.type)
async def test_messages_that_only_a_server_sends_change_nothing(door: Door, message: Any) -> None:
    link = door.hello()
    door.gate.link_control(link, message)  # type: ignore[arg-type]
    assert len(link.messages) == 1
    assert len(door.registry.sessions()) == 1


async def test_end_of_a_session_is_logged_and_nothing_secret_ever_is(door: Door, log_lines: list[str]) -> None:
    link = door.hello()
    door.hello(token="qtk_nothing_" + "x" * 40, session="t" * 24)
    door.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert not door.registry.sessions()
    text = "\n".join(log_lines)
    assert "serves tunnel app" in text
    assert "bye" in text
    for secret in (door.token.secret, SESSION, "x" * 40):
        assert secret not in text


async def test_link_without_a_hello_leaves_in_silence(door: Door) -> None:
    tell: Callable[..., None] = door.gate.link_closed
    tell(FakeLink(), LinkClosed(0, "bye"))
    assert not door.registry.sessions()


async def test_refused_link_is_heard_no_more(door: Door, log_lines: list[str]) -> None:
    link = door.hello(token="qtk_nothing")
    for _ in range(100):
        door.hello(link=link)
        door.gate.link_control(link, Authority())  # type: ignore[arg-type]
    assert [type(message) for message in link.messages] == [Refuse]
    assert not door.registry.tunnels
    assert len([line for line in log_lines if "refused" in line]) == 1


async def test_authority_is_told_once_and_before_any_hello(door: Door) -> None:
    link = FakeLink()
    for _ in range(3):
        door.gate.link_control(link, Authority())  # type: ignore[arg-type]
    assert [type(message) for message in link.messages] == [Authority, Refuse]
    link = door.hello()
    door.gate.link_control(link, Authority())  # type: ignore[arg-type]
    assert [type(message) for message in link.messages] == [Welcome, Refuse]


async def test_what_a_client_calls_itself_is_cut_to_a_line(door: Door, log_lines: list[str]) -> None:
    door.hello(agent="a" * 60_000)
    door.hello(tunnel="b" * 60_000, session="t" * 24)
    assert max(map(len, log_lines)) < 500
    assert len(door.registry.sessions()[0].agent) <= 80


async def test_sessions_of_a_name_end_when_it_passes_to_another_token(door: Door) -> None:
    old = door.hello()
    other = door.tokens.create(["app"], None, NOW)
    door.tokens.revoke(door.token.id, NOW)
    assert isinstance(door.hello(token=other.secret, session="t" * 24).messages[0], Welcome)
    assert [type(message) for message in old.messages] == [Welcome, Refuse]
    assert list(door.registry.tunnels["app"].sessions) == ["t" * 24]


async def test_tunnel_with_all_its_sessions_refuses_for_now(door: Door) -> None:
    door.registry.limits = RegistryLimits(sessions=2)
    door.hello()
    door.hello(session="t" * 24)
    (refuse,) = door.hello(session="u" * 24).messages
    assert (refuse.code, refuse.final) == ("limit", False)
    assert isinstance(door.hello(link=None).messages[0], Welcome), "a link of a session that is there"


# Whose names and hosts are


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[tuple[Door, Door]]:
    """Two processes of one server, or one before and one after a restart."""
    pair = Door(tmp_path), Door(tmp_path)
    yield pair
    for door in pair:
        door.close()


def code_of(link: FakeLink) -> str:
    """Of the refusal that a link has heard last, ``welcome`` if it was none."""
    message = link.messages[-1]
    return message.code if isinstance(message, Refuse) else str(message.type)


def text_of(link: FakeLink) -> str:
    """Of the only thing that a link has heard, a refusal for good."""
    (refuse,) = link.messages
    assert isinstance(refuse, Refuse)
    assert refuse.final
    return refuse.text


async def test_name_stays_its_tokens_without_any_session_and_in_another_process(doors: tuple[Door, Door]) -> None:
    here, there = doors
    link = here.hello()
    here.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    other = here.tokens.create(["*"], None, NOW)
    for door in doors:
        for name in ("app", "APP"):
            refused = door.hello(token=other.secret, tunnel=name, session="t" * 24)
            assert code_of(refused) == "name_taken"
            assert text_of(refused) == "the name app belongs to another token"
    assert code_of(there.hello(token=here.token.secret)) == "welcome"


async def test_two_processes_give_a_name_to_one_of_two_tokens(doors: tuple[Door, Door]) -> None:
    tokens = [doors[0].tokens.create(["*"], None, NOW).secret for _ in range(2)]
    for number in range(20):
        first, second = number % 2, 1 - number % 2
        links = [
            doors[which].hello(token=tokens[which], tunnel=f"n{number}", session=f"{which}" * 24)
            for which in (first, second)
        ]
        assert [code_of(link) for link in links] == ["welcome", "name_taken"]


async def test_client_that_comes_back_replaces_its_own_ghost_at_once(door: Door) -> None:
    ghost = door.hello(hosts=["app.example.com"], token=hosted(door))
    back = door.hello(hosts=["app.example.com"], token=hosted(door))
    assert [code_of(link) for link in (ghost, back)] == ["welcome", "welcome"]
    assert door.registry.tunnels["app"].sessions[SESSION].links == {0: back}
    assert ghost.closed
    door.gate.link_closed(ghost, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert leads(door, "app.example.com") == "app"


async def test_name_passes_on_when_its_token_is_not_for_it_any_more(door: Door) -> None:
    old = door.hello(tunnel="team-a")
    other = door.tokens.create(["team-a"], None, NOW)
    text = door.tokens.path.read_text().replace('"team-*"', '"group-*"')
    door.tokens.path.write_text(text)
    assert code_of(door.hello(token=other.secret, tunnel="team-a", session="t" * 24)) == "welcome"
    assert code_of(old) == "token_scope"


async def test_name_given_free_by_hand_is_the_next_tokens_and_the_old_ones_sessions_end(door: Door) -> None:
    old = door.hello()
    other = door.tokens.create(["app"], None, NOW)
    assert door.owners.release("app")
    assert code_of(door.hello(token=other.secret, session="t" * 24)) == "welcome"
    assert code_of(old) == "name_taken"
    assert "given free" in old.messages[-1].text
    assert code_of(door.hello()) == "name_taken"


async def test_one_more_name_than_a_token_may_have_is_refused_for_now(tmp_path: Path) -> None:
    door = Door(tmp_path, max_names=2)
    for name in ("team-a", "team-b", "team-a"):
        assert code_of(door.hello(tunnel=name, session=name * 4)) == "welcome"
    (refuse,) = door.hello(tunnel="team-c", session="c" * 24).messages
    assert (refuse.code, refuse.final) == ("limit", False)
    assert "holds 2 names" in refuse.text
    door.close()


async def test_clients_without_a_wish_never_run_out_of_names(tmp_path: Path) -> None:
    """Each run of such a client has a name of its own, which nobody asks for again."""
    door = Door(tmp_path, max_names=3)
    token = door.tokens.create(["*"], None, NOW).secret
    assert code_of(door.hello(token=token, tunnel="mine")) == "welcome"
    for number in range(10):
        name = door.hello(token=token, tunnel="", session=f"{number:024}").messages[0].tunnel
        # As a client says it on its further links.
        assert code_of(door.hello(token=token, tunnel=name, session=f"{number:024}")) == "welcome"
        door.registry.tunnels[name].sessions.clear()
        door.now += timedelta(minutes=2)
    assert door.owners.look("tunnel", "mine")
    assert len(door.owners.all()) == 3


async def test_book_that_is_damaged_refuses_for_now_and_gives_nothing_away(door: Door) -> None:
    door.hello()
    door.owners.path.unlink()
    for name in ("app", "team-a"):
        link = door.hello(tunnel=name, session="t" * 24, token=door.tokens.create(["*"], None, NOW).secret)
        assert code_of(link) in ("unavailable", "name_taken")
        assert not isinstance(link.messages[0], Welcome)
    (refuse,) = door.hello(tunnel="team-b").messages
    assert (refuse.code, refuse.final) == ("unavailable", False)


async def test_names_are_not_given_away_while_tokens_cannot_be_read(door: Door) -> None:
    door.hello()
    other = door.tokens.create(["*"], None, NOW)
    door.tokens.path.write_text("not json")
    assert code_of(door.hello(token=other.secret, session="t" * 24)) == "unavailable"
    assert door.owners.look("tunnel", "app").token == door.token.id  # type: ignore[union-attr]


# Custom hosts


def hosted(door: Door) -> str:
    """A token for ``app`` and ``web``, and hosts below example.com."""
    if not door.hosted:
        door.hosted = door.tokens.create(["app", "web"], None, NOW, hosts=HOSTS).secret
    return door.hosted


HOSTS = ["app.example.com", "*.example.com", "example.com", "*.wild.example", "xn--bcher-kva.example"]


def leads(door: Door, host: str) -> str:
    """The tunnel that a host leads to, empty for none."""
    tunnel = door.hosts.tunnel(host)
    return tunnel.name if tunnel is not None else ""


async def test_hosts_of_a_client_lead_to_its_tunnel_and_are_among_its_urls(door: Door) -> None:
    link = door.hello(token=hosted(door), hosts=["*.Wild.example.", "APP.example.com", "app.example.com."])
    assert link.messages[0].urls == ["http://app.example", "http://*.wild.example", "http://app.example.com"]
    assert leads(door, "app.example.com") == leads(door, "any.wild.example") == "app"
    for host in ("example.com", "a.app.example.com", "wild.example", "a.b.wild.example", "192.0.2.1", "[::1]", "com"):
        assert leads(door, host) == "", host


HOSTS_REFUSED: list[tuple[str, str, str]] = [
    ("other.example.org", "token_scope", "not for the host other.example.org; it is for app.example.com, "),
    ("*.app.example.com", "token_scope", r"not for the host \*\.app\.example\.com"),
    ("a.b.example.com", "token_scope", "not for the host"),
    ("*.example", "token_scope", "not for the host"),
    ("tunnel.example", "token_scope", "the host tunnel.example is the server's own: a tunnel there is NAME.tunnel"),
    ("Victim.Tunnel.example.", "token_scope", "the server's own"),
    ("*.tunnel.example", "token_scope", "the server's own"),
    ("a.b.tunnel.example", "token_scope", "the server's own"),
    ("", "token_scope", "0 characters"),
    ("app.example.com..", "token_scope", "not a host name"),
    ("b\u00fccher.example", "token_scope", "write it in its xn-- form"),
    ("\u212aelvin.example.com", "token_scope", "outside ASCII"),
    ("app.example.com:80", "token_scope", "not a host name"),
    ("http://app.example.com", "token_scope", "not a host name"),
    ("192.0.2.1", "token_scope", "as in an address"),
    ("[2001:db8::1]", "token_scope", "not a host name"),
    ("app\r\n.example.com", "token_scope", "not a host name"),
    ("a*.example.com", "token_scope", "not a host name"),
    ("*.*.example.com", "token_scope", "not a host name"),
    ("*", "token_scope", "not a host name"),
    ("x" * 60_000, "token_scope", "characters"),
]


@pytest.mark.parametrize(("host", "code", "text"), HOSTS_REFUSED, ids=lambda value: ascii(value)[:30])
async def test_host_that_is_not_to_be_had_is_refused_and_says_why(door: Door, host: str, code: str, text: str) -> None:
    link = door.hello(token=hosted(door), hosts=["app.example.com", host])
    assert code_of(link) == code
    assert re.search(text, text_of(link))
    assert len(link.messages[0].text) < 400
    assert not door.registry.tunnels
    assert not door.owners.all()


async def test_token_that_was_made_without_hosts_says_so(door: Door) -> None:
    link = door.hello(hosts=["app.example.com"])
    assert text_of(link) == f"token {door.token.id} is not for the host app.example.com; it was made without --host"


async def test_more_hosts_than_a_session_may_have_are_refused(door: Door) -> None:
    names = [f"h{number}.example.com" for number in range(17)]
    assert code_of(door.hello(token=hosted(door), hosts=names[:16])) == "welcome"
    assert "at most 16 custom hosts" in text_of(door.hello(token=hosted(door), hosts=names))


async def test_international_host_is_taken_in_its_one_form(door: Door) -> None:
    assert code_of(door.hello(token=hosted(door), hosts=["XN--Bcher-KVA.example"])) == "welcome"
    assert leads(door, "xn--bcher-kva.example") == "app"


async def test_host_of_one_token_is_not_to_be_had_by_another(doors: tuple[Door, Door]) -> None:
    here = doors[0]
    link = here.hello(token=hosted(here), hosts=["app.example.com", "*.wild.example"])
    here.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    other = here.tokens.create(["*"], None, NOW, hosts=["app.example.com", "*.wild.example", "one.wild.example"]).secret
    for door in doors:
        for host in ("App.Example.com.", "*.WILD.example", "one.wild.example"):
            refused = door.hello(token=other, tunnel="mine", session="t" * 24, hosts=[host])
            assert code_of(refused) == "name_taken"
            assert host.lower().rstrip(".") in text_of(refused)
        assert leads(door, "app.example.com") == leads(door, "one.wild.example") == "app"


async def test_host_held_by_name_is_never_served_by_anothers_wildcard(doors: tuple[Door, Door]) -> None:
    here = doors[0]
    link = here.hello(token=hosted(here), hosts=["app.example.com"])
    wild = here.tokens.create(["wild"], None, NOW, hosts=["*.example.com"]).secret
    for door in doors:
        assert code_of(door.hello(token=wild, tunnel="wild", session="w" * 24, hosts=["*.example.com"])) == "welcome"
        assert leads(door, "other.example.com") == "wild"
        assert leads(door, "app.example.com") == "app"
    here.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert leads(here, "app.example.com") == "app"
    # Its client is back and does not want the host: still nobody else gets what visitors send there.
    assert code_of(here.hello(token=here.hosted)) == "welcome"
    here.clock += 2
    assert leads(here, "app.example.com") == ""


async def test_wildcard_serves_what_its_own_token_holds_by_name_and_does_not_use(door: Door) -> None:
    door.hello(token=hosted(door), hosts=["app.example.com"])
    door.hello(token=hosted(door), hosts=["*.example.com"])
    assert leads(door, "app.example.com") == "app"


async def test_hosts_are_what_the_live_sessions_say(door: Door) -> None:
    one = door.hello(token=hosted(door), hosts=["one.example.com", "both.example.com"])
    door.hello(token=hosted(door), hosts=["two.example.com", "both.example.com"], session="t" * 24)
    assert [leads(door, f"{name}.example.com") for name in ("one", "two", "both")] == ["app"] * 3
    door.gate.link_closed(one, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert [leads(door, f"{name}.example.com") for name in ("one", "two", "both")] == ["", "app", "app"]


async def test_hosts_of_several_sessions_all_stay_when_the_last_goes(door: Door) -> None:
    claims: list[str] = []
    door.owners._book.set_trace_callback(lambda statement: claims.append(statement) if "BEGIN" in statement else None)
    links = []
    for session, host in (("a", "one"), ("b", "two"), ("a", "one"), ("b", "two")):
        links.append(door.hello(token=hosted(door), hosts=[f"{host}.example.com"], session=session * 24))
    assert len(claims) == 2, "there is nothing to write for what is so already"
    for link in links:
        door.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert not door.registry.sessions()
    assert [leads(door, f"{name}.example.com") for name in ("one", "two")] == ["app", "app"]


async def test_hosts_stay_when_the_last_session_goes_until_one_comes_without_them(door: Door) -> None:
    link = door.hello(token=hosted(door), hosts=["app.example.com", "*.wild.example"])
    door.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert leads(door, "app.example.com") == leads(door, "a.wild.example") == "app"
    link = door.hello(token=hosted(door), hosts=["app.example.com"])
    door.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert leads(door, "app.example.com") == "app"
    assert leads(door, "a.wild.example") == ""


async def test_host_moves_to_another_tunnel_of_its_token_when_the_first_is_not_served(door: Door) -> None:
    link = door.hello(token=hosted(door), hosts=["app.example.com"])
    (refuse,) = door.hello(token=hosted(door), tunnel="web", session="w" * 24, hosts=["app.example.com"]).messages
    assert (refuse.code, refuse.final) == ("name_taken", False)
    assert refuse.text == "the host app.example.com is served by tunnel app of the same token now"
    door.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert leads(door, "app.example.com") == "app"
    door.hello(token=hosted(door), tunnel="web", session="w" * 24, hosts=["app.example.com"])
    assert leads(door, "app.example.com") == "web"


async def test_host_of_a_client_that_is_not_heard_moves_and_does_not_come_back_by_chance(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghost = door.hello(token=hosted(door), hosts=["app.example.com"])
    second = door.hello(token=hosted(door), session="u" * 24, hosts=["app.example.com"])
    for link in (ghost, second):
        monkeypatch.setattr(link, "silent_for", lambda: 9.0)
    door.hello(token=hosted(door), tunnel="web", session="w" * 24, hosts=["app.example.com"])
    assert leads(door, "app.example.com") == "web"
    for link in (ghost, second):
        door.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
        assert leads(door, "app.example.com") == "web"


async def test_session_ends_when_its_token_is_not_for_its_host_any_more(door: Door) -> None:
    link = door.hello(token=hosted(door), hosts=["app.example.com"])
    other = door.hello(token=hosted(door), tunnel="web", session="w" * 24)
    text = door.tokens.path.read_text().replace('"app.example.com"', '"gone.example.org"').replace("*.example.com", "x")
    door.tokens.path.write_text(text)
    door.gate.recheck_tokens()
    assert (code_of(link), code_of(other)) == ("token_scope", "welcome")
    door.clock += 2
    assert leads(door, "app.example.com") == ""


async def test_session_says_its_hosts_in_the_log(door: Door, log_lines: list[str]) -> None:
    door.hello(token=hosted(door), hosts=["App.example.com"])
    assert any("serves tunnel app and app.example.com from" in line for line in log_lines)


# What another process, or one before a restart, knew


async def test_names_and_hosts_of_before_a_restart_are_known_without_a_client(doors: tuple[Door, Door]) -> None:
    here, there = doors
    here.hello(token=hosted(here), hosts=["app.example.com", "*.wild.example"])
    there.tokens.reload_if_changed()
    for find in (lambda: there.registry.tunnel("app"), lambda: there.hosts.tunnel("app.example.com")):
        tunnel = find()
        assert tunnel is not None
        assert (tunnel.name, tunnel.sessions) == ("app", {})
    assert leads(there, "a.wild.example") == "app"
    assert there.registry.tunnel("web") is None
    assert leads(there, "other.example.com") == ""
    there.hello(token=here.hosted)
    there.clock += 2
    assert leads(there, "app.example.com") == "", "its client has come back without the host"
    assert there.registry.tunnel("app") is there.registry.tunnels["app"]


async def test_only_name_there_is_stays_the_default_in_another_process(doors: tuple[Door, Door]) -> None:
    here, there = doors
    assert there.registry.only_tunnel() is None
    here.hello()
    there.clock += 1
    there.tokens.reload_if_changed()
    tunnel = there.registry.only_tunnel()
    assert tunnel is not None
    assert (tunnel.name, tunnel.sessions) == ("app", {})
    there.registry.tunnels.clear()
    here.hello(tunnel="team-a", session="t" * 24)
    there.clock += 1
    assert there.registry.only_tunnel() is None
    here.owners.release("team-a")
    here.tokens.revoke(here.token.id, NOW)
    there.tokens.reload_if_changed()
    there.clock += 1
    assert there.registry.only_tunnel() is None


async def test_name_whose_token_is_no_good_is_not_known_after_a_restart(doors: tuple[Door, Door]) -> None:
    here, there = doors
    here.hello(tunnel="team-a")
    here.tokens.revoke(here.token.id, NOW)
    there.tokens.reload_if_changed()
    assert there.registry.tunnel("team-a") is None


async def test_what_nobody_has_costs_one_look_a_second_and_no_memory(door: Door) -> None:
    looks: list[tuple[str, str]] = []
    look = door.owners.look

    def counted(kind: Any, name: str) -> Any:
        looks.append((kind, name))
        return look(kind, name)

    door.owners.look = counted  # type: ignore[method-assign]
    for _ in range(100):
        assert door.registry.tunnel("nobody") is None
    assert len(looks) == 1
    door.clock += 1
    assert door.registry.tunnel("nobody") is None
    assert len(looks) == 2
    for number in range(10_000):
        assert door.registry.tunnel(f"random-{number}") is None
        assert door.hosts.tunnel(f"random-{number}.example.net") is None
    assert len(door.book._recent) <= 4096
    assert not door.registry.tunnels


async def test_name_is_known_as_soon_as_it_is_claimed_here(door: Door) -> None:
    assert door.registry.tunnel("app") is None
    assert leads(door, "app.example.com") == ""
    link = door.hello(token=hosted(door), hosts=["app.example.com"])
    door.gate.link_closed(link, LinkClosed(0, "bye"))  # type: ignore[arg-type]
    assert leads(door, "app.example.com") == "app"


async def test_book_that_cannot_be_read_makes_names_unavailable_not_unknown(door: Door, log_lines: list[str]) -> None:
    door.owners.close()
    for name in ("app", "web", "app"):
        with pytest.raises(TunnelError) as error:
            door.registry.tunnel(name)
        assert error.value.code == ErrorCode.DESTINATION_UNAVAILABLE
    with pytest.raises(TunnelError):
        door.hosts.tunnel("app.example.com")  # perhaps somebody's: not to be taken for nobody's
    assert door.hosts.tunnel("192.0.2.1") is door.hosts.tunnel("[2001:db8::1]") is None
    assert len([line for line in log_lines if "names.db" in line]) == 1
