"""A running server that is told to read its settings, certificates and tokens again."""

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import load_der_x509_certificate
from loguru import logger

from quictunnel import log
from quictunnel.app import reload as module
from quictunnel.app import renewal
from quictunnel.app.identity import Identity, identity_of
from quictunnel.app.reload import Reloader
from quictunnel.app.serve import make_server
from quictunnel.log import AccessLog
from quictunnel.options import load_settings
from quictunnel.quic.engine import select_engine
from quictunnel.settings import ServeSettings
from quictunnel.trust.certificates import init, issue
from quictunnel.trust.tokens import TokenStore


class Site:
    """A running server, the file of its settings, and what reads that."""

    def __init__(self, directory: Path, flags: dict[str, Any], text: str) -> None:
        self.directory = directory
        self.file = directory / "tunnel.toml"
        self.flags = {
            "http": "127.0.0.1:0", "quic": "127.0.0.1:0", "state_dir": str(directory / "state"),
            "config": str(self.file), "engine": "aioquic",
        } | flags  # fmt: skip
        self.announced: list[tuple[ServeSettings, Identity]] = []
        self.write(text)

    def write(self, text: str) -> None:
        self.file.write_text(text)

    async def start(self) -> None:
        settings = load_settings(ServeSettings, self.flags)
        settings.state_dir.mkdir(exist_ok=True)
        self.tokens = TokenStore(settings.state_dir)
        self.tokens.load()
        identity = identity_of(settings, settings.quic[0])
        self.access = AccessLog()
        self.server = make_server(settings, select_engine(settings.engine), self.tokens, identity, self.access)
        self.reloader = Reloader(
            settings, lambda: load_settings(ServeSettings, self.flags), self.server, self.tokens, self.access, identity,
            lambda settings, identity: self.announced.append((settings, identity)),
        )  # fmt: skip
        await self.server.start()


@pytest.fixture
async def site(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    flags, text = getattr(request, "param", ({}, "[serve]\n"))
    site = Site(tmp_path, flags, text)
    await site.start()
    yield site
    site.server.close()


def last(lines: list[str], count: int = 1) -> list[str]:
    return [line for line in lines if not line.startswith("DEBUG")][-count:]


async def status(site: Site, *fields: str) -> int:
    reader, writer = await asyncio.open_connection(*site.server.http_address)
    writer.write("\r\n".join(["GET / HTTP/1.1", "Host: nobody.localhost", *fields, "", ""]).encode())
    answer = await reader.readuntil(b"\r\n")
    writer.close()
    return int(answer.split()[1])


async def test_limits_change_for_the_next_request(site: Site, log_lines: list[str]) -> None:
    fields = [f"X-{number}: 1" for number in range(20)]
    assert await status(site, *fields) == 404
    said = "head-fields = 10\nhold = '7s'\ngrace = '5s'\nretry = 'always'\nmax-names = 7\ndefault-tunnel = false\n"
    site.write(f"[serve]\n{said}")
    site.reloader.reload()
    changed = "--default-tunnel, --grace, --head-fields, --hold, --max-names, --retry"
    assert last(log_lines) == [f"INFO = reloaded; changed: {changed}"]
    assert site.server._book.max_names == 7
    assert await status(site, *fields) == 431
    assert site.server.registry.limits.hold == 7.0
    assert site.server.links.retry == "always"
    assert site.server.entry.default_tunnel is False
    assert site.reloader.settings.grace == 5.0
    site.write("[serve]\n")
    site.reloader.reload()
    assert await status(site, *fields) == 404


async def test_trusted_proxies_change_for_the_next_connection(site: Site) -> None:
    assert site.server.visitors.forwarding("127.0.0.1", b"http").trusted is False
    site.write("[serve]\ntrusted-proxies = ['127.0.0.1']\n")
    site.reloader.reload()
    assert site.server.visitors.forwarding("127.0.0.1", b"http").trusted is True


async def test_what_needs_a_new_process_is_named_and_stays(site: Site, log_lines: list[str]) -> None:
    site.flags |= {"http": "127.0.0.1:1"}
    site.write("[serve]\ndomain = 'example.com'\nwindow-budget = '1MiB'\nhead-time = '3s'\n")
    site.reloader.reload()
    assert last(log_lines, 2) == [
        "INFO = reloaded; changed: --head-time",
        "WARNING these need a new process (quictunnel serve --takeover): --domain, --http, --window-budget",
    ]
    assert site.reloader.settings.domain == "localhost"
    assert site.server.public_urls("app")[0].startswith("http://app.localhost:")
    assert site.server.visitors.limits.head_time == 3.0
    site.reloader.reload()
    assert last(log_lines, 2)[0] == "INFO = reloaded; no option has changed", "they are named again, and are no change"


@pytest.mark.parametrize("site", [({"head_fields": "50"}, "[serve]\nhead-fields = 20\n")], indirect=True)
async def test_a_flag_goes_on_winning_over_the_file(site: Site, log_lines: list[str]) -> None:
    site.write("[serve]\nhead-fields = 10\n")
    site.reloader.reload()
    assert site.server.visitors.limits.head_fields == 50
    assert last(log_lines) == ["INFO = reloaded; no option has changed"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serve", "is not TOML: "),
        ("[serve]\nhed-time = '3s'\n", "unknown option 'hed-time' in [serve] (did you mean 'head-time'?)"),
        ("[serve]\nhead-time = 'soon'\n", "serve.head-time: 'soon': "),
        ("[serve]\nhead-time = '3s'\ncert = '/nowhere/cert.pem'\nkey = '/nowhere/key.pem'\n", "/nowhere/"),
        ("[serve]\nhead-time = '3s'\nlog-file = '/dev/null/log'\n", "/dev/null"),
    ],
    ids=["no TOML", "unknown", "bad value", "no certificate", "no log"],
)
async def test_a_file_that_cannot_be_used_is_one_line_and_changes_nothing(
    site: Site, log_lines: list[str], text: str, said: str
) -> None:
    before = site.reloader.settings, site.server._config, len(log_lines)
    site.write(text)
    site.reloader.reload()
    assert (site.reloader.settings, site.server._config) == before[:2]
    [line] = log_lines[before[2] :]
    assert line.startswith("ERROR not reloaded, all stays as it was: ")
    assert said in line
    assert await status(site) == 404


async def test_a_file_that_is_gone_changes_nothing(site: Site, log_lines: list[str]) -> None:
    site.file.unlink()
    site.reloader.reload()
    assert last(log_lines)[0].endswith("tunnel.toml: cannot be read: No such file or directory")


async def shown(site: Site) -> int:
    """The serial number of the certificate that a visitor is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    assert site.server.https_address is not None
    _, writer = await asyncio.open_connection(*site.server.https_address, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return load_der_x509_certificate(der).serial_number


async def test_a_certificate_of_ones_own_is_read_again_and_connections_live_on(tmp_path: Path) -> None:
    authority = init(tmp_path / "ca")
    pair = issue(tmp_path / "ca", ["localhost", "app.localhost", "127.0.0.1"])
    flags = {"https": "127.0.0.1:0", "cert": str(pair.certificate), "key": str(pair.key), "ca": str(authority)}
    site = Site(tmp_path, flags, "[serve]\n")
    await site.start()
    try:
        first = await shown(site)
        reader, writer = await asyncio.open_connection(*site.server.http_address)
        issue(tmp_path / "ca", ["localhost", "app.localhost", "127.0.0.1"])
        assert await shown(site) == first
        site.reloader.reload()
        assert await shown(site) != first
        writer.write(b"GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 404 ")
        writer.close()
        assert site.announced == [], "the pin is of the CA, and that is the same"
        pair.key.write_text("no key")
        before = await shown(site)
        site.reloader.reload()
        site.reloader.renew()
        assert await shown(site) == before
    finally:
        site.server.close()


async def test_a_token_of_a_moment_ago_is_known(site: Site) -> None:
    other = TokenStore(site.directory / "state")
    other.load()
    secret = other.create(["app"], None, datetime.now(UTC)).secret
    site.reloader.reload()
    assert site.tokens.verify(secret, "app", datetime.now(UTC)).tunnel == "app"


async def test_clients_are_told_another_address(site: Site) -> None:
    site.write("[serve]\nadvertise = 'tunnel.example.com:4433'\n")
    site.reloader.reload()
    [(settings, _)] = site.announced
    assert settings.advertise is not None
    assert settings.advertise.host == "tunnel.example.com"


async def test_the_log_changes_its_level_form_and_place(site: Site) -> None:
    take_down = log.set_up("info")
    try:
        path = site.directory / "logs" / "server.log"
        site.write(f"[serve]\nlog-file = '{path}'\nlog-format = 'json'\nlog-level = 'warning'\n")
        site.reloader.reload()
        logger.info("not seen")
        logger.warning("seen")
        assert re.fullmatch(r'\{.*"message": "seen"\}\n', path.read_text())
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert site.access.enabled is False
        site.write(f"[serve]\nlog-file = '{path}'\nlog-format = 'json'\n")
        site.reloader.reload()
        assert await status(site) == 404
        await asyncio.sleep(0)  # the answer is there before the exchange is noted
        site.access.flush()
        assert '"logger": "quictunnel.access"' in path.read_text()
    finally:
        take_down()


def test_every_option_that_is_said_to_change_live_exists_and_the_others_are_known() -> None:
    """Whoever adds an option decides here whether a running server can change it."""
    fields = set(ServeSettings.model_fields)
    assert fields >= module._LIVE
    fixed = fields - module._LIVE - renewal.OF_THE_START
    assert fixed == {"domain", "engine", "http", "https", "quic", "state_dir", "window_budget", "workers"}
