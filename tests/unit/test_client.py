"""The client's small parts: delays between attempts, the fan-out, and whom the options say to trust."""

import asyncio
import hashlib
import re
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from quictunnel.app import connect as module
from quictunnel.app.connect import agent_config
from quictunnel.client import reach
from quictunnel.client.agent import AgentConfig
from quictunnel.client.fan_out import FanOut, host_rule
from quictunnel.client.reach import FIRST_RETRY, LONGEST_RETRY, QUICK_FOR, QUICK_RETRY, Backoff, Place, Race
from quictunnel.exchange import Leg
from quictunnel.options import CommandError
from quictunnel.quic.dial import DialError, Way
from quictunnel.quic.stream import StreamLeg
from quictunnel.settings import ConnectSettings
from quictunnel.trust.certificates import ensure_server_certificate
from quictunnel.trust.files import TrustError
from quictunnel.trust.join import LOCAL_JOIN, JoinString
from quictunnel.values import Address
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.frames import RequestHead
from tests.support.memory import Recorder

JOIN = JoinString("tunnel.example:4434", b"p" * 32, "qtk_id_secret")
HEAD = RequestHead(b"GET", b"http", b"visitor.example:8080", b"/", [(b"accept", b"*/*")])

# Backoff


def test_first_delay_is_within_200_ms_and_none_is_longer_than_15_s() -> None:
    for _ in range(50):
        backoff = Backoff()
        delays = [backoff.delay() for _ in range(40)]
        assert delays[0] <= FIRST_RETRY == 0.2
        assert max(delays) <= LONGEST_RETRY == 15.0
        assert min(delays[10:]) >= LONGEST_RETRY / 2


def test_delays_double_and_differ_between_clients() -> None:
    firsts = set()
    for _ in range(50):
        backoff = Backoff()
        firsts.add(backoff.delay())
        assert 0.2 <= backoff.delay() <= 0.4
        assert 0.4 <= backoff.delay() <= 0.8
    assert len(firsts) > 40


def test_success_makes_the_next_delay_short_again() -> None:
    backoff = Backoff()
    for _ in range(20):
        backoff.delay()
    backoff.reset()
    assert backoff.delay() <= 0.2


def test_server_that_has_not_been_away_for_long_is_tried_every_second_and_then_less_often() -> None:
    now = 100.0
    backoff = Backoff(lambda: now, quick_for=QUICK_FOR)
    delays: list[tuple[float, float]] = []
    while now < 400:
        delay = backoff.delay()
        delays.append((now - 100, delay))
        now += delay
    assert max(delay for at, delay in delays if at < QUICK_FOR) <= QUICK_RETRY == 1.0
    assert LONGEST_RETRY / 2 <= delays[-1][1] <= LONGEST_RETRY
    backoff.reset()
    assert backoff.delay() <= FIRST_RETRY
    now += 100
    assert backoff.delay() <= 2 * FIRST_RETRY


# FanOut


class FakeBackend:
    name, authority = "fake", "backend.example"

    def __init__(self) -> None:
        self.legs: list[Recorder] = []

    def open(self) -> Leg:
        self.legs.append(Recorder())
        return self.legs[-1]

    async def aclose(self, grace: float = 0.0) -> None:
        pass


@pytest.mark.usefixtures("no_task_left")
async def test_server_that_never_answers_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts make room for others before their own time is over; each of those has failed too, and says so."""
    monkeypatch.setattr(reach, "QUICK_RETRY", 0.001)
    loop = asyncio.get_running_loop()
    given_up = loop.create_future()
    complaints: list[str] = []

    def complain(error: DialError, pause: float | None) -> None:
        complaints.append(str(error))
        if len(complaints) == 3:
            given_up.set_result(None)

    async def silence(place: Place, number: int, on_way: Callable[[Way], None]) -> Way:
        await asyncio.Event().wait()
        raise AssertionError

    async with asyncio.timeout(10):
        race = Race(Backoff(loop.time, quick_for=60), complain)
        assert await race.run(lambda: [Place("a", 4433, "a")], silence, given_up) is None
    assert len(complaints) == 3
    assert all(re.fullmatch(r"a:4433: no answer within \d\.\d s \(is UDP let through\?\)", text) for text in complaints)


@pytest.mark.parametrize(
    ("rule", "host"),
    [("preserve", b"visitor.example:8080"), ("backend", b"backend.example"), ("set.example:1", b"set.example:1")],
)
def test_fan_out_joins_each_stream_to_a_leg_of_its_own(rule: str, host: bytes) -> None:
    backend = FakeBackend()
    fan_out = FanOut(backend, host_rule(rule, backend.authority))
    streams = [StreamLeg(WindowBudget(0), 1000, is_opener=False) for _ in range(3)]
    heads = [fan_out.open_exchange(HEAD, stream) for stream in streams]
    assert heads == [HEAD._replace(authority=host)] * 3
    assert [stream.peer for stream in streams] == backend.legs
    assert [leg.peer for leg in backend.legs] == streams
    assert fan_out.count == 3


# Whom to dial and whom to trust


def config(directory: Path, **options: Any) -> AgentConfig:
    for secret in ("join", "token"):
        if secret in options:
            options[secret] = SecretStr(options[secret])
    return agent_config(ConnectSettings(**{"backend": "3000", "state_dir": directory, **options}))


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return ensure_server_certificate(tmp_path / "certs", ["localhost"], datetime.now(UTC)).authority


def test_join_string_says_everything(tmp_path: Path) -> None:
    made = config(tmp_path, join=JOIN.encode(), tunnel="app")
    assert (made.host, made.port, made.server_name) == ("tunnel.example", 4434, "tunnel.example")
    assert (made.token, made.tunnel, made.pin, made.authority) == ("qtk_id_secret", "app", b"p" * 32, None)
    assert "secret" not in repr(made)


def test_options_win_over_the_join_string(tmp_path: Path, authority: Path) -> None:
    made = config(
        tmp_path,
        join=JOIN.encode(),
        server=Address("192.0.2.1", 5000),
        token="qtk_other_word",
        ca=authority,
        server_name="name.example",
        max_links=3,
    )
    assert (made.host, made.port, made.server_name) == ("192.0.2.1", 5000, "name.example")
    assert (made.token, made.pin, made.max_links) == ("qtk_other_word", None, 3)
    pem = authority.read_text()
    assert made.authority is not None
    assert ssl.PEM_cert_to_DER_cert(made.authority.decode()) == ssl.PEM_cert_to_DER_cert(pem)


def test_several_servers_are_dialled_in_order_each_by_its_own_name(tmp_path: Path) -> None:
    servers = (Address("a.example", 1), Address("b.example", 2))
    made = config(tmp_path, join=JOIN.encode(), server=servers)
    assert made.places == [Place("a.example", 1, "a.example"), Place("b.example", 2, "b.example")]
    made = config(tmp_path, join=JOIN.encode(), server=servers, server_name="c.example")
    assert made.places == [Place("a.example", 1, "c.example"), Place("b.example", 2, "c.example")]


def test_what_the_tunnel_is_to_be_is_passed_on(tmp_path: Path) -> None:
    made = config(tmp_path, join=JOIN.encode(), host="App.Example.com.,*.example.com", weight="3", sticky="cookie")
    assert (made.hosts, made.weight, made.sticky) == (("app.example.com", "*.example.com"), 3, "cookie")
    plain = config(tmp_path, join=JOIN.encode())
    assert (plain.hosts, plain.weight, plain.sticky) == ((), 1, "")


def test_server_on_this_machine_needs_no_options(tmp_path: Path) -> None:
    pin = hashlib.sha256(b"certificate").digest()
    local = JoinString("127.0.0.1:4433", pin, "qtk_local_word")
    (tmp_path / LOCAL_JOIN).write_text(local.encode() + "\n")
    made = config(tmp_path)
    assert (made.host, made.port, made.pin, made.token) == ("127.0.0.1", 4433, pin, "qtk_local_word")


def test_no_server_on_this_machine_asks_for_the_join_string(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--join"):
        config(tmp_path)


def test_local_join_string_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCAL_JOIN).write_text("qt1_damaged")
    with pytest.raises(CommandError, match=LOCAL_JOIN):
        config(tmp_path)


def test_token_without_trust_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="whom to trust"):
        config(tmp_path, token="qtk_id_secret")


def test_systems_trust_may_be_asked_for(tmp_path: Path) -> None:
    made = config(tmp_path, token="qtk_id_secret", ca="system", server=Address("tunnel.example", 4433))
    assert (made.authority, made.pin, made.server_name) == (None, None, "tunnel.example")


def test_authority_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(TrustError):
        config(tmp_path, token="qtk_id_secret", ca=tmp_path / "ca.pem")


def test_every_option_that_is_said_to_change_live_exists_and_the_others_are_known() -> None:
    """Whoever adds an option decides here whether a running client can change it."""
    fields = {name for name in ConnectSettings.model_fields if not name.startswith("backend")}
    assert fields >= module.LIVE
    fixed = fields - module.LIVE - {"config"}
    words = {"allow_connect", "engine", "grace", "host_header", "processes", "state_dir", "tunnel", "window_budget"}
    assert fixed == words
