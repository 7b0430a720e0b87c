"""Names and custom hosts with whole ends, in memory: what visitors and strangers notice in the gap of a restart."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from quictunnel.wire.control import Refuse, Welcome
from tests.server.conftest import Play
from tests.support.ends import Ends
from tests.support.hostile import HostileClient

pytestmark = pytest.mark.either

HOSTS = ["*.example.org", "shop.example.com"]


def test_host_of_a_client_leads_to_it_and_to_nobody_else(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        token = ends.tokens.create(["*"], None, datetime.now(UTC), hosts=HOSTS).secret
        client = await HostileClient(ends, "aioquic").connect()
        welcome = await client.hello(token=token, tunnel="shop", session="h" * 32, hosts=HOSTS)
        assert isinstance(welcome, Welcome)
        assert [url.partition("//")[2].partition(":")[0] for url in welcome.urls] == [
            "shop.example.com",
            "shop.localhost",
            "*.example.org",
        ]
        for count, host in enumerate(("Shop.example.com.:80", "any.example.org", "shop.localhost"), 1):
            ends.visit(host=host)
            await client.asked(count)
        for host in ("example.org", "a.b.example.org", "shop.example.com.localhost"):
            assert (await ends.visited(host=host)).status == 404
        assert (await ends.visited()).status == 200
        assert len(client.requests) == 3

    on_each(scenario)


def test_name_is_known_and_its_owners_alone_before_the_client_is_back_from_a_restart(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        token = ends.tokens.create(["shop"], None, datetime.now(UTC), hosts=HOSTS).secret
        client = await HostileClient(ends, "aioquic").connect()
        assert isinstance(await client.hello(token=token, tunnel="shop", session="h" * 32, hosts=HOSTS), Welcome)
        ends.kill_server()
        ends.limits = replace(ends.limits, hold=0.0)
        await ends.serve()
        for host in ("shop.localhost", "shop.example.com", "any.example.org"):
            visit = await ends.visited(host=host)
            assert (visit.status, visit.error) == (503, "destination_unavailable"), host
        for host in ("other.localhost", "other.example.com"):
            assert (await ends.visited(host=host)).status == 404
        thief = ends.tokens.create(["*"], None, datetime.now(UTC), hosts=["*.example.com", *HOSTS]).secret
        for asked in ({"tunnel": "SHOP"}, *({"tunnel": "mine", "hosts": [host.upper()]} for host in HOSTS)):
            stranger = await HostileClient(ends, "aioquic").connect()
            answer = await stranger.hello(token=thief, session="t" * 32, **asked)
            assert isinstance(answer, Refuse)
            assert (answer.code, answer.final) == ("name_taken", True)
        back = await HostileClient(ends, "aioquic").connect()
        assert isinstance(await back.hello(token=token, tunnel="shop", session="h" * 32, hosts=HOSTS[:1]), Welcome)
        ends.visit(host="any.example.org")
        await back.asked()
        await ends.until(lambda: ends.server._hosts.tunnel("shop.example.com") is None, 2)
        assert (await ends.visited(host="shop.example.com")).status == 404

    on_each(scenario)


def test_request_in_the_gap_of_a_restart_waits_for_the_client(on_each: Play) -> None:
    async def scenario(ends: Ends) -> None:
        await ends.connected()
        ends.kill_server()
        ends.limits = replace(ends.limits, hold=5.0)
        await ends.serve()
        assert not ends.server.registry.tunnels
        visit = await ends.visited()
        assert visit.status == 200

    on_each(scenario)
