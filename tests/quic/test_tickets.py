"""TLS session resumption: a later link of a client needs no certificate, and nothing is lost where it cannot be."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quictunnel.quic.engine import ClientTrust, select_engine
from quictunnel.quic.tickets import Tickets
from quictunnel.wire.codec import pull_varint
from tests.support.clock import run
from tests.support.ends import Ends, play
from tests.support.hostile import Workers
from tests.support.memory import Network, identity

pytestmark = pytest.mark.either

Play = Callable[..., None]


@pytest.fixture
def on_all(engines: tuple[str, str], tmp_path: Path) -> Play:
    return lambda scenario, **options: play(scenario, engines, tmp_path, **options)


def test_second_link_of_a_client_is_resumed(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        (first,) = agent.links
        assert not first.resumed
        await asyncio.sleep(1)
        ends.server.links.links[0].close()
        await ends.until(lambda: agent.links and agent.links[0] is not first, 5)
        assert agent.links[0].resumed
        assert ends.session().links[0].resumed
        assert (await ends.visited()).status == 200

    on_all(scenario)


def test_server_that_has_forgotten_its_tickets_is_reached_all_the_same(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        await asyncio.sleep(1)
        ends.kill_server()
        await ends.serve()
        await ends.until(lambda: ends.server.registry.sessions(), 5)
        assert not agent.links[-1].resumed
        assert (await ends.visited()).status == 200

    on_all(scenario)


def test_new_certificate_of_a_server_is_checked_by_everyone(on_all: Play) -> None:
    async def scenario(ends: Ends) -> None:
        agent = await ends.connected()
        (first,) = agent.links
        await asyncio.sleep(1)
        ends.server.links.replace_identity(identity()[0])
        ends.server.links.links[0].close()
        await ends.until(lambda: agent.links and agent.links[0] is not first, 5)
        assert not agent.links[0].resumed

    on_all(scenario)


def test_ticket_of_one_process_is_not_shown_to_another(engine: str, tmp_path: Path) -> None:
    async def scenario(ends: Ends) -> None:
        workers = await Workers(ends, engine, 3).start()
        agent = await ends.connected()
        await asyncio.sleep(1)
        for server in workers.servers:
            server.links[0].close()
        await ends.until(lambda: workers.numbers == [[0]] * 3, 5)
        again = [server.links[1] for server in workers.servers]
        # The very first link was to none of them in particular: its ticket is not looked for again.
        assert sum(link.resumed for link in again) == 2
        await ends.until(lambda: agent.serving, 1)

    play(scenario, (engine, engine), tmp_path, serve=False)


def test_nothing_is_sent_early(engines: tuple[str, str]) -> None:
    """Neither does a client offer early data, nor is there any ticket that would allow it."""

    async def work() -> None:
        network = Network(*engines)
        engine, trust = network.client_engine, ClientTrust("localhost", network.authority)
        tickets: list[Any] = []
        network.client_engine = _with_tickets(engine, {"on_ticket": tickets.append})
        await network.joined()
        await network.until(lambda: bool(tickets))
        kept = Tickets()
        kept.keep("server", tickets[0])
        assert tickets[0].max_early_data_size is not None
        assert kept.find("server").max_early_data_size is None
        for ticket, early in ((tickets[0], True), (kept.find("server"), False)):
            connection: Any = engine.dial(trust, 1200, ticket=ticket)
            connection.connect(("10.0.0.1", 4433), now=0.0)
            connection.send_stream_data(0, b"secret")
            sent = [data for data, _ in connection.datagrams_to_send(now=0.0)]
            assert any(_types(data) & {1} for data in sent) == early
        await network.close()

    run(work())


def _types(datagram: bytes) -> set[int]:
    """The types of the packets in a datagram (RFC 9000 section 17.2): 0 is Initial, 1 is 0-RTT."""
    types, position = set(), 0
    while position < len(datagram) and datagram[position] & 0x80:
        types.add((datagram[position] & 0x30) >> 4)
        at = position + 5
        for _ in range(2):  # connection ids
            at += 1 + datagram[at]
        if datagram[position] & 0x30 == 0:
            at += 1 + datagram[at]  # the token, none here
        length, at = pull_varint(datagram, at)
        position = at + length
    return types


def _with_tickets(engine: Any, options: dict[str, Any]) -> Any:
    def connection(**given: Any) -> Any:
        return engine.connection(**{**given, "session_ticket_handler": options["on_ticket"]})

    return dataclasses.replace(engine, connection=connection)


def test_tickets_that_were_not_used_for_longest_are_forgotten() -> None:
    ticket = _Ticket()
    tickets = Tickets(3)
    for key in "abc":
        tickets.keep(key, ticket)
    assert tickets.find("a") == ticket
    tickets.keep("d", ticket)
    assert [tickets.find(key) is not None for key in "abcd"] == [True, False, True, True]
    assert len(tickets) == 3
    tickets.clear()
    assert tickets.find("a") is None


@dataclasses.dataclass
class _Ticket:
    max_early_data_size: int | None = None


def test_id_of_a_first_packet_says_which_process_it_is_for(engine: str) -> None:
    trust = ClientTrust("localhost", identity()[1])
    for worker in range(5):
        connection = select_engine(engine).dial(trust, 1200, (worker, 5))
        assert connection.original_destination_connection_id[0] % 5 == worker
