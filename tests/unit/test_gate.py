"""The gate: which hello is welcomed, which is refused and how, and what ends a registration."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from quictunnel.quic.link import LinkClosed
from quictunnel.server.gate import Gate
from quictunnel.server.registry import Registry, RegistryLimits
from quictunnel.trust.tokens import TokenStore
from quictunnel.wire.control import VERSION, Authority, Drain, Drained, Grow, Hello, Refuse, Unknown, Welcome

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

    def __init__(self, directory: Path) -> None:
        self.tokens = TokenStore(directory)
        self.tokens.load()
        self.token = self.tokens.create(["app", "team-*"], timedelta(days=30), NOW)
        self.registry = Registry(RegistryLimits(max_links=4))
        self.accepted: list[object] = []
        self.now = NOW
        self.gate = Gate(
            self.registry,
            self.tokens,
            authority=Authority("CA", "own"),
            public_urls=lambda name: [f"http://{name}.example"],
            now=lambda: self.now,
        )
        self.gate.on_accepted = self.accepted.append

    def hello(self, link: FakeLink | None = None, **values: Any) -> FakeLink:
        """A link says hello; what it hears is in its ``messages``."""
        link = link or FakeLink()
        said = {"version": VERSION, "tunnel": "app", "session": SESSION, "token": self.token.secret, **values}
        self.gate.link_control(link, Hello(**said))  # type: ignore[arg-type]
        return link


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    door = Door(tmp_path)
    yield door
    door.gate.close()


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
