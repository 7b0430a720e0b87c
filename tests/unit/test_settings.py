"""Options: where they come from, which place wins, and what is said of a wrong one."""

import contextlib
import ipaddress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from quictunnel import values
from quictunnel.app.reload import default_tunnel_allowed
from quictunnel.app.renewal import OF_THE_LOG
from quictunnel.options import Settings, UsageError, environment_name, load_settings, option_of
from quictunnel.settings import (
    BenchSettings,
    CertsInitSettings,
    CertsIssueSettings,
    CertsShowSettings,
    ConnectSettings,
    DemoSettings,
    LoadSettings,
    LogSettings,
    ServeSettings,
    TokenCreateSettings,
    TokenListSettings,
    TokenRevokeSettings,
)
from quictunnel.trust.join import JoinString
from quictunnel.values import Address

ALL: list[type[Settings]] = [
    ServeSettings,
    ConnectSettings,
    DemoSettings,
    LoadSettings,
    BenchSettings,
    CertsInitSettings,
    CertsIssueSettings,
    CertsShowSettings,
    TokenCreateSettings,
    TokenListSettings,
    TokenRevokeSettings,
]
JOIN = JoinString("tunnel.example.com:4433", bytes(32), "qtk_secret").encode()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tunnel.toml"


def refused(settings: type[Settings], **flags: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_settings(settings, flags)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


# What comes out without anything.


def test_serve_needs_no_flags(home: Path) -> None:
    settings = load_settings(ServeSettings, {})
    assert (settings.http, settings.quic) == (Address("127.0.0.1", 8080), Address("127.0.0.1", 4433))
    assert settings.state_dir == home / ".local" / "state" / "quictunnel"
    assert (settings.grace, settings.head_size, settings.trusted_proxies) == (30.0, 65536, ())


def test_connect_needs_only_a_backend() -> None:
    settings = load_settings(ConnectSettings, {"backend": "3000"})
    assert settings.backend == "3000"
    assert (settings.join, settings.tunnel, settings.token, settings.ca) == (None,) * 4
    assert settings.server == settings.host == ()


@pytest.mark.parametrize("settings", ALL)
def test_every_option_is_described_and_has_a_word_for_its_value(settings: type[Settings]) -> None:
    for name, field in settings.model_fields.items():
        assert field.description, name
        assert option_of(field).metavar or field.annotation in (bool, bool | None), name


def test_no_variable_means_two_things() -> None:
    """Where two commands share a variable it is one type with one meaning, but for the default."""
    seen: dict[str, Any] = {}
    for settings in ALL:
        for name, field in settings.model_fields.items():
            variable = environment_name(settings, name)
            if name != "ca":  # serve's own, connect's to verify with: the same CA, and connect also knows "system"
                assert seen.setdefault(variable, field.annotation) == field.annotation, variable


# Which place wins.


def test_flag_before_environment_before_file_before_default(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[serve]\ndomain = "file.example"\ngrace = 3\nmax-visitors = 7\n')
    monkeypatch.setenv("QUICTUNNEL_DOMAIN", "environment.example")
    monkeypatch.setenv("QUICTUNNEL_GRACE", "2s")
    settings = load_settings(ServeSettings, {"config": str(file), "domain": "flag.example"})
    assert (settings.domain, settings.grace, settings.max_visitors) == ("flag.example", 2.0, 7)
    assert settings.head_fields == 128


def test_the_environment_can_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[connect]\nbackend = 3000\ntunnel = "App"\n\n[serve]\nhttp = 80\n')
    monkeypatch.setenv("QUICTUNNEL_CONFIG", str(file))
    settings = load_settings(ConnectSettings, {})
    assert (settings.backend, settings.tunnel) == ("3000", "app")


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICTUNNEL_DOMAIN", "")
    assert load_settings(ServeSettings, {}).domain == "localhost"


def test_keys_with_dashes_or_underscores(file: Path) -> None:
    file.write_text('[serve]\ntrusted_proxies = ["10.0.0.0/8", "::1"]\nlog-level = "DEBUG"\n')
    settings = load_settings(ServeSettings, {"config": str(file)})
    assert settings.trusted_proxies == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1"))
    assert settings.log_level == "debug"


def test_lists_in_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICTUNNEL_TRUSTED_PROXIES", "10.0.0.0/8, 127.0.0.1")
    assert len(load_settings(ServeSettings, {}).trusted_proxies) == 2


def test_load_has_variables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICTUNNEL_CA", "/tunnel/ca.pem")
    monkeypatch.setenv("QUICTUNNEL_LOAD_DURATION", "5")
    settings = load_settings(LoadSettings, {"url": "http://localhost:8080/"})
    assert (settings.ca, settings.duration) == (None, 5.0)


def test_token_shares_the_state_directory_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUICTUNNEL_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("QUICTUNNEL_TUNNEL", "app")
    assert load_settings(TokenListSettings, {}).state_dir == tmp_path
    assert refused(TokenCreateSettings).startswith("--tunnel is missing: ")


# What is refused, and how it is said.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"http": "localhost:99999"},
            "--http: 'localhost:99999': the port must be 1..65535, or 0 for any free one",
        ),
        ({"http": "localhost"}, "--http: 'localhost': a port is missing, as in localhost:8080"),
        ({"quic": ":4433"}, "--quic: ':4433': a host is missing"),
        ({"quic": "[::1:4433"}, "--quic: '[::1:4433': an IPv6 address and port look like [::1]:8080"),
        ({"http": "300.1.1.1:80"}, "--http: '300.1.1.1:80': '300.1.1.1' is not an IP address"),
        ({"advertise": "example.com:0"}, "--advertise: 'example.com:0': the port must be 1..65535"),
        ({"domain": "a..b"}, "--domain: 'a..b': 'a..b' is not a host name"),
        ({"engine": "quinn"}, "--engine: 'quinn': auto, aioquic or qh3 is needed"),
        ({"retry": "sometimes"}, "--retry: 'sometimes': auto, always or never is needed"),
        ({"grace": "0"}, "--grace: '0': a duration is more than 0 and at most a year"),
        ({"grace": "5x"}, "--grace: '5x': a duration looks like 30s, 500ms, 5m, 2h or 30d"),
        ({"head_size": "64 apples"}, "--head-size: '64 apples': a size looks like 65536, 64k, 1MiB or 1MB"),
        ({"head_size": "1"}, "--head-size: '1': the size must be 1024..16777216 bytes"),
        ({"max_visitors": "-1"}, "--max-visitors: '-1': the number must be 1..1000000"),
        ({"max_visitors": "many"}, "--max-visitors: 'many': a whole number 1..1000000 is needed"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "--trusted-proxies: ['10.0.0.1/8']: '10.0.0.1/8' is not an IP address"),
        ({"cert": "server.pem"}, "--cert and --key belong together: give both"),
        ({"ca": "ca.pem"}, "--ca goes with --cert and --key"),
        ({"frobnicate": "1"}, "unknown option --frobnicate"),
    ],
)
def test_wrong_flags_of_serve(flags: dict[str, Any], said: str) -> None:
    assert refused(ServeSettings, **flags).startswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "BACKEND is missing: 3000, localhost:3000"),
        ({"backend": "ftp://localhost"}, "BACKEND: 'ftp://localhost': "),
        ({"backend": "3000", "tunnel": "-x"}, "--tunnel: '-x': '-x' is not a tunnel name"),
        ({"backend": "3000", "server": ["a,b:0"]}, "--server: ['a,b:0']: b:0: the port must"),
        ({"backend": "3000", "server": ["a,b", "A.:4433"]}, "--server: ['a,b', 'A.:4433']: a:4433 stands there twice"),
        ({"backend": "3000", "server": ","}, "--server: ',': the value is empty"),
        ({"backend": "3000", "host": ["*.x,1.2.3.4"]}, "--host: ['*.x,1.2.3.4']: '1.2.3.4' is not a host name"),
        ({"backend": "3000", "weight": "0"}, "--weight: '0': the number must be 1..1000"),
        ({"backend": "3000", "sticky": "yes"}, "--sticky: 'yes': cookie or ip is needed"),
        (
            {"backend": "3000", "server": "tunnel.example.com:port"},
            "--server: 'tunnel.example.com:port': the port must",
        ),
        ({"backend": "3000", "host_header": "a b"}, "--host-header: 'a b': preserve, backend, or a host"),
        ({"backend": "3000", "backend_insecure": "perhaps"}, "--backend-insecure: 'perhaps': this is a switch"),
    ],
)
def test_wrong_flags_of_connect(flags: dict[str, Any], said: str) -> None:
    assert refused(ConnectSettings, **flags).startswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"duration": "900ms"}, "--duration: '900ms': less than 1s measures nothing"),
        ({"engine": "quiche"}, "--engine: 'quiche': auto, both, aioquic or qh3 is needed"),
        ({"tunnel": "app"}, "--tunnel goes with --join or --server"),
        ({"via": "127.0.0.1:8080"}, "--via goes with --join or --server"),
        ({"server_name": "a.example"}, "--server-name goes with --join or --server"),
        ({"path": "/healthz"}, "--path goes with --backend"),
        ({"backend": "unix:/run/app.sock"}, "--backend: 'unix:/run/app.sock': a port, HOST:PORT or URL is needed: "),
        ({"backend": "myapp:app"}, "--backend: 'myapp:app': a port, HOST:PORT or URL is needed: "),
        ({"join": "qt1_nonsense"}, "--join: "),
        ({"max_bytes": "10"}, "--max-bytes: '10': the size must be 65536.."),
        ({"server": "127.0.0.1:4433", "via": "nowhere:0"}, "--via: 'nowhere:0': the port must be 1..65535"),
    ],
)
def test_wrong_flags_of_bench(flags: dict[str, Any], said: str) -> None:
    assert refused(BenchSettings, **flags).startswith(said)


def test_a_bench_moves_without_limit_on_one_machine_alone() -> None:
    assert load_settings(BenchSettings, {}).most_bytes is None
    assert load_settings(BenchSettings, {"join": JOIN}).most_bytes == 2**30
    assert load_settings(BenchSettings, {"server": "a.example", "max_bytes": "64k"}).most_bytes == 65536
    assert load_settings(BenchSettings, {"max_bytes": "1m"}).most_bytes == 2**20


def test_a_bench_does_not_take_what_is_set_for_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the variables of a client set, and asks for a self-test, gets one."""
    monkeypatch.setenv("QUICTUNNEL_JOIN", JOIN)
    assert not load_settings(BenchSettings, {}).is_remote
    monkeypatch.setenv("QUICTUNNEL_BENCH_JOIN", JOIN)
    assert load_settings(BenchSettings, {}).is_remote


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICTUNNEL_GRACE", "soon")
    assert refused(ServeSettings).startswith("QUICTUNNEL_GRACE: 'soon': ")


def test_a_wrong_key_of_a_file_is_named(file: Path) -> None:
    file.write_text("[serve]\nhead_fields = 0\n")
    assert refused(ServeSettings, config=str(file)) == f"{file}: serve.head-fields: 0: the number must be 1..10000"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serve]\nhtpp = 80\n", "unknown option 'htpp' in [serve] (did you mean 'http'?)"),
        ("[serve]\nconfig = 'other.toml'\n", "unknown option 'config' in [serve]"),
        ("[serve]\nlog-level = 'info'\nlog_level = 'info'\n", "'log_level' stands twice in [serve]"),
        ("[server]\nhttp = 80\n", "unknown table 'server' (did you mean 'serve'?)"),
        ("http = 80\n", "unknown key outside the tables 'http'"),
        ("[serve\n", "is not TOML: "),
    ],
)
def test_files_that_are_refused(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    assert refused(ServeSettings, config=str(file)).startswith(f"{file}: {said}")


def test_a_file_that_is_not_there(file: Path) -> None:
    assert refused(ServeSettings, config=str(file)) == f"{file}: cannot be read: No such file or directory"


def test_a_file_that_is_not_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    assert refused(ServeSettings, config=str(file)).startswith(f"{file}: is not TOML: ")


def test_secrets_are_never_shown(file: Path) -> None:
    settings = load_settings(ConnectSettings, {"backend": "3000", "join": JOIN, "token": "qtk_hush"})
    assert JOIN not in repr(settings)
    assert "qtk_hush" not in repr(settings)
    assert isinstance(settings.join, SecretStr)
    assert settings.join.get_secret_value() == JOIN
    assert refused(ConnectSettings, backend="3000", join=JOIN[:-5]) == (
        "--join: the join string is incomplete: copy all of it"
    )
    file.write_text("[connect]\nbackend = 3000\ntoken = ['qtk_hush']\n")
    said = refused(ConnectSettings, config=str(file))
    assert said.startswith(f"{file}: connect.token: ")
    assert "qtk_hush" not in said


def test_settings_do_not_change() -> None:
    settings = load_settings(ServeSettings, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.domain = "other.example"


# What depends on another option.


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ({}, True),
        ({"domain": "example.com"}, False),
        ({"default_tunnel": False}, False),
        ({"default_tunnel": "yes", "domain": "example.com"}, True),
    ],
)
def test_the_default_tunnel_is_on_for_localhost_alone(flags: dict[str, Any], allowed: bool) -> None:
    assert default_tunnel_allowed(load_settings(ServeSettings, flags)) is allowed


def test_a_running_process_knows_the_options_of_its_log() -> None:
    assert set(LogSettings.model_fields) == OF_THE_LOG


def test_authority_is_a_file_or_the_systems() -> None:
    assert load_settings(ConnectSettings, {"backend": "1", "ca": "system"}).ca == "system"
    assert load_settings(ConnectSettings, {"backend": "1", "ca": "~/ca.pem"}).ca == Path.home() / "ca.pem"


# Values.


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8080", ("127.0.0.1", 8080)),
        (8080, ("127.0.0.1", 8080)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::]:80", ("::", 80)),
        ("[0:0::1]:80", ("::1", 80)),
        ("LocalHost:80", ("localhost", 80)),
    ],
)
def test_addresses_to_listen_on(text: object, address: tuple[str, int]) -> None:
    assert values.parse_listen_address(text) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("example.com", ("example.com", 4433)),
        ("example.com:1", ("example.com", 1)),
        ("::1", ("::1", 4433)),
        ("[::1]", ("::1", 4433)),
        ("[::1]:99", ("::1", 99)),
        ("192.0.2.1", ("192.0.2.1", 4433)),
    ],
)
def test_addresses_to_dial(text: str, address: tuple[str, int]) -> None:
    assert values.parse_address(text, 4433) == address


@given(host=st.ip_addresses().map(str), port=st.integers(1, 65535))
def test_an_address_reads_back(host: str, port: int) -> None:
    assert values.parse_address(str(Address(host, port)), 1) == (host, port)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("30", 30), (30, 30), (0.5, 0.5), ("30s", 30), ("500ms", 0.5), ("1.5m", 90), ("2h", 7200), ("30d", 2_592_000)],
)
def test_durations(value: object, seconds: float) -> None:
    assert values.parse_duration(value) == seconds


@pytest.mark.parametrize(
    "value", ["", "-1", "1e9", "nan", "inf", "1 year", "367d", 0, -1.0, float("nan"), True, None, "٣"]
)
def test_no_durations(value: object) -> None:
    with pytest.raises(ValueError, match=r"duration|text|empty"):
        values.parse_duration(value)


@pytest.mark.parametrize(
    ("value", "size"),
    [("1", 1), (65536, 65536), ("64k", 65536), ("64KiB", 65536), ("64 kB", 64000), ("1.5MiB", 1572864), ("1g", 2**30)],
)
def test_sizes(value: object, size: int) -> None:
    assert values.parse_size(value) == size


@pytest.mark.parametrize(
    ("value", "on"),
    [(True, True), ("on", True), ("Yes", True), (1, True), ("0", False), ("FALSE", False), ("off", False)],
)
def test_switches(value: object, on: bool) -> None:
    assert values.parse_switch(value) is on


@pytest.mark.parametrize(
    ("value", "bounds"),
    [("1", (1, 1)), (3, (3, 3)), ("2-5", (2, 5)), ("4-4", (4, 4)), ("auto", (1, 6)), ("64", (64, 64))],
)
def test_numbers_of_processes(value: object, bounds: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6))
    assert values.parse_processes(value) == bounds


@pytest.mark.parametrize(
    "value", ["", "0", "-1", "2-1", "1-", "-", "1-65", "65", "many", "1-2-3", "1.5", True, None, 0]
)
def test_no_numbers_of_processes(value: object) -> None:
    with pytest.raises(ValueError, match=r"1-4|empty|text"):
        values.parse_processes(value)


def test_numbers_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6))
    assert [values.parse_workers(value) for value in ("auto", "1", 64)] == [6, 1, 64]
    for value in ("0", "65", "1-2", "all", None, True):
        with pytest.raises(ValueError, match="or auto, is needed"):
            values.parse_workers(value)


@given(st.text() | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.text()))
def test_garbage_is_a_value_error_and_nothing_else(value: object) -> None:
    for parse in (
        values.parse_listen_address,
        lambda value: values.parse_address(value, 1),
        values.parse_duration,
        values.parse_size,
        values.parse_networks,
        values.parse_domain,
        values.parse_switch,
        values.parse_host_header,
        values.parse_path,
        values.parse_lines,
        lambda value: values.parse_whole(value, 1, 9),
        values.parse_processes,
        values.parse_workers,
    ):
        with contextlib.suppress(ValueError):
            parse(value)
