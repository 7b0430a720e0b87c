"""Custom hosts and whose names are, with real processes: from the making of a token to a restart of the server."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from quictunnel.trust.join import JoinString
from tests.support.backends import RawBackend, answer
from tests.support.processes import Processes, poll
from tests.support.visits import visit

pytestmark = pytest.mark.slow  # a dozen processes


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as processes:
        yield processes


def test_hosts_of_a_token_lead_to_its_client_and_are_nobody_elses_after_a_restart(
    engine: str, processes: Processes
) -> None:
    server = processes.server("--no-default-tunnel", engine=engine)
    state = ("--state-dir", str(server.state))
    hosts = ("--host", "shop.example.org", "--host", "*.example.net")
    made = processes.run("token", "create", "--tunnel", "shop", *hosts, *state)
    pin = JoinString.parse(server.join).ca_pin
    join = JoinString(f"127.0.0.1:{server.quic_port}", pin, made.stdout.strip()).encode()
    with RawBackend(answer()) as backend:
        connect = ("connect", backend.target, "--engine", engine)
        client = processes.start(*connect, "--join", join, "--tunnel", "shop", *hosts)
        client.said(r"https?://shop\.example\.org")
        for host in ("Shop.example.org.", "any.example.net", "shop.localhost"):
            assert visit(server.http, host=host).status == 200
        assert visit(server.http, host="a.b.example.net").status == 404
        [row] = [row for row in json.loads(processes.run("token", "list", "--json", *state).stdout) if row["hosts"]]
        assert row["holds"] == ["shop", "*.example.net", "shop.example.org"]

        client.kill()
        server.process.kill()
        again = processes.server("--no-default-tunnel", "--hold", "1ms", engine=engine, state=server.state)
        for host in ("shop.example.org", "any.example.net", "shop.localhost"):
            assert visit(again.http, host=host).status == 503
        stranger = processes.run(*connect, "--join", again.join, "--tunnel", "SHOP")
        assert (stranger.status, stranger.stdout) == (1, "")
        assert "the name shop belongs to another token" in stranger.stderr

        assert processes.run("token", "release", "shop", *state).status == 0
        client = processes.start(*connect, "--join", again.join, "--tunnel", "shop")
        client.ready()
        poll(lambda: visit(again.http, host="shop.localhost").status == 200, what="the new owner's answer")
        assert visit(again.http, host="shop.example.org").status == 404, "the hosts are still the old token's"
