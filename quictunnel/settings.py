"""Every option of the product, each declared once; ``options`` says how a field becomes flag, variable and key."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import platformdirs
from annotated_types import MinLen
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from quictunnel.options import Option, Settings
from quictunnel.values import (
    Address,
    Network,
    Range,
    parse_address,
    parse_addresses,
    parse_domain,
    parse_duration,
    parse_host_header,
    parse_lines,
    parse_listen_address,
    parse_networks,
    parse_path,
    parse_processes,
    parse_size,
    parse_switch,
    parse_target,
    parse_text,
    parse_whole,
    parse_word,
    parse_workers,
    split_list,
)

__all__ = [
    "BenchSettings",
    "CertsInitSettings",
    "CertsIssueSettings",
    "CertsShowSettings",
    "ConnectSettings",
    "DemoSettings",
    "LoadSettings",
    "LogSettings",
    "ServeSettings",
    "StatusSettings",
    "TokenCreateSettings",
    "TokenListSettings",
    "TokenReleaseSettings",
    "TokenRevokeSettings",
]

DEFAULT_QUIC_PORT: Final = 4433


def _default(value: object, description: str) -> Any:
    """A field whose default is written as a user would write it; the field's type is what that is parsed into."""
    return Field(value, description=description)


def _required(description: str) -> Any:
    return Field(description=description)


def _state_dir(description: str) -> Any:
    return Field(default_factory=lambda: platformdirs.user_state_path("quictunnel"), description=description)


# Types: a parser, and the word that --help shows for the value.


def _optional(parse: Callable[[object], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else parse(value))


def _whole(lowest: int, highest: int) -> BeforeValidator:
    return BeforeValidator(lambda value: parse_whole(value, lowest, highest))


def _size(lowest: int, highest: int) -> BeforeValidator:
    return BeforeValidator(lambda value: parse_size(value, lowest, highest))


# These parsers belong to rooms that not every command needs: imported when used, so that --help is quick.


def _parse_tunnel_name(value: object) -> str:
    from quictunnel.wire.names import normalise_tunnel_name

    return normalise_tunnel_name(parse_text(value))


def _parse_owned_name(value: object) -> str:
    from quictunnel.wire.names import normalise_host_pattern, normalise_tunnel_name

    text = parse_text(value)
    return normalise_tunnel_name(text) if text.isdigit() else normalise_host_pattern(text)


def _parse_hosts(value: object) -> tuple[str, ...]:
    from quictunnel.wire.names import normalise_host_pattern

    return tuple(dict.fromkeys(normalise_host_pattern(item) for item in split_list(value)))


def _check_backend(value: object) -> str:
    from quictunnel.backends.target import parse_backend

    parse_backend(parse_text(value))
    return parse_text(value)


def _kind_of(backend: str) -> str:
    from quictunnel.backends.target import parse_backend

    return parse_backend(backend).kind


def _check_join_string(value: object) -> object:
    from quictunnel.trust.join import JoinString

    JoinString.parse(value.get_secret_value() if isinstance(value, SecretStr) else parse_text(value))
    return value


def _check_socket_backend(value: object) -> str:
    text = _check_backend(value)
    if _kind_of(text) not in ("http", "https"):
        raise ValueError("a port, HOST:PORT or URL is needed: what is measured is asked directly too")
    return text


def _enough(seconds: float) -> float:
    if seconds < 1:
        raise ValueError("less than 1s measures nothing")
    return seconds


def _check_stages(value: object) -> str:
    from quictunnel.load.plan import parse_stages

    parse_stages(parse_text(value))
    return parse_text(value)


def _check_expiry(value: object) -> str:
    from quictunnel.trust.tokens import parse_duration as parse_expiry

    parse_expiry(parse_text(value))
    return parse_text(value)


def _parse_authority(value: object) -> Path | Literal["system"]:
    return "system" if value == "system" else parse_path(value)


Listen = Annotated[Address, BeforeValidator(parse_listen_address), Option("HOST:PORT")]
ListenToo = Annotated[Address | None, _optional(parse_listen_address), Option("HOST:PORT")]
Dial = Annotated[
    Address | None, _optional(lambda value: parse_address(value, DEFAULT_QUIC_PORT)), Option("HOST[:PORT]")
]
Servers = Annotated[
    tuple[Address, ...],
    BeforeValidator(lambda value: parse_addresses(value, DEFAULT_QUIC_PORT)),
    Option("HOST[:PORT],…"),
]
Duration = Annotated[float, BeforeValidator(parse_duration), Option("TIME")]
DurationOrNone = Annotated[
    float, BeforeValidator(lambda value: 0.0 if str(value) in ("0", "0s") else parse_duration(value)), Option("TIME")
]
OptionalDuration = Annotated[float | None, _optional(parse_duration), Option("TIME")]
Directory = Annotated[Path, BeforeValidator(parse_path), Option("DIR")]
File = Annotated[Path | None, _optional(parse_path), Option("FILE")]
Authority = Annotated[Path | Literal["system"] | None, _optional(_parse_authority), Option("FILE|system")]
Switch = Annotated[bool, BeforeValidator(parse_switch)]
TriState = Annotated[bool | None, _optional(parse_switch)]
Word = BeforeValidator(parse_word)
Text = Annotated[str, BeforeValidator(parse_text), Option("TEXT")]
OptionalText = Annotated[str | None, _optional(parse_text), Option("TEXT")]
Texts = Annotated[tuple[str, ...], BeforeValidator(split_list)]
Engine = Annotated[Literal["auto", "aioquic", "qh3"], Word, Option("auto|aioquic|qh3")]
TunnelName = Annotated[str | None, _optional(_parse_tunnel_name), Option("NAME")]
Secret = Annotated[SecretStr | None, Option("STRING")]

# The commands. A group is a heading of --help.

LIMITS = Option(group="limits")
LOG = Option(group="log")
HEALTH = Option(group="health of the backend")


Level = Annotated[
    Literal["trace", "debug", "info", "warning", "error"], Word, LOG, Option("trace|debug|info|warning|error")
]


class LogSettings(Settings):
    """What every command that stays running says, and where."""

    log_level: Level = _default("info", "the least that is logged")
    log_format: Annotated[Literal["text", "json"], Word, LOG, Option("text|json")] = _default(
        "text", "lines for people, or one JSON object a line"
    )
    log_file: Annotated[File, LOG] = _default(None, "log into this file, rotated, instead of standard error")


class ServeSettings(LogSettings):
    """Options of ``quictunnel serve``."""

    table: ClassVar[str] = "serve"

    http: Listen = _default(
        "127.0.0.1:8080", "where visitors come in; 0.0.0.0:8080 is port 8080 on every address of this machine"
    )
    https: ListenToo = _default(None, "where visitors come in by TLS, beside --http (default: nowhere)")
    quic: Listen = _default(f"127.0.0.1:{DEFAULT_QUIC_PORT}", "where clients come in (UDP)")
    domain: Annotated[str, BeforeValidator(parse_domain), Option("NAME")] = _default(
        "localhost", "tunnels are reached as NAME.DOMAIN"
    )
    default_tunnel: TriState = _default(
        None,
        "send requests that name no tunnel to the only one there is (default: on for the domain localhost)",
    )
    state_dir: Directory = _state_dir("where certificates and tokens are kept")
    config: File = _default(None, "read options from this TOML file's [serve] table")
    advertise: Dial = _default(None, "the address that the join string tells clients to dial (default: that of --quic)")
    cert: File = _default(None, "a server certificate (PEM chain) of your own instead of the automatic one")
    key: File = _default(None, "the private key (PEM) of --cert")
    ca: File = _default(None, "the CA certificate (PEM) that clients are to pin when --cert is given")
    trusted_proxies: Annotated[tuple[Network, ...], BeforeValidator(parse_networks), Option("NETWORK")] = _default(
        (), "addresses whose X-Forwarded-* and Forwarded fields are believed; may be repeated"
    )
    engine: Engine = _default("auto", "the QUIC library; auto takes qh3 when it is installed")
    retry: Annotated[Literal["auto", "always", "never"], Word, Option("auto|always|never")] = _default(
        "auto", "when a client's address is validated by Retry; auto: when many handshakes are half open"
    )
    takeover: Switch = _default(
        False, "serve in the place of the server that runs with the state directory; nothing is dropped"
    )
    grace: Duration = _default("30s", "how long requests in flight may take to finish after SIGTERM")
    workers: Annotated[int, BeforeValidator(parse_workers), Option("N|auto")] = _default(
        "1", "server processes that share the ports, each with an equal part of the limits; auto: one on each processor"
    )

    head_size: Annotated[int, _size(1024, 2**24), LIMITS, Option("SIZE")] = _default(
        "64KiB", "request line and header section"
    )
    head_fields: Annotated[int, _whole(1, 10_000), LIMITS, Option("N")] = _default(128, "header fields of a request")
    target_length: Annotated[int, _size(64, 2**20), LIMITS, Option("SIZE")] = _default(
        "8KiB", "length of a request target"
    )
    head_time: Annotated[Duration, LIMITS] = _default("15s", "for a request's head to arrive")
    body_idle: Annotated[Duration, LIMITS] = _default("60s", "silence within an upload")
    write_idle: Annotated[Duration, LIMITS] = _default("5m", "for a visitor to take something of what waits for it")
    keep_alive: Annotated[Duration, LIMITS] = _default("75s", "idle visitor connections are kept this long")
    max_visitors: Annotated[int, _whole(1, 1_000_000), LIMITS, Option("N")] = _default(
        10_000, "visitor connections at a time"
    )
    max_in_flight: Annotated[int, _whole(1, 1_000_000), LIMITS, Option("N")] = _default(
        4096, "requests in flight per tunnel"
    )
    max_names: Annotated[int, _whole(1, 100_000), LIMITS, Option("N")] = _default(
        1000, "tunnel names and custom hosts that one token may hold"
    )
    slot_wait: Annotated[Duration, LIMITS] = _default("5s", "how long a request may wait for a free stream")
    hold: Annotated[DurationOrNone, LIMITS] = _default(
        "3s", "how long a request may wait for a client that was lost to come back; 0s: not at all"
    )
    max_held: Annotated[int, _whole(1, 1_000_000), LIMITS, Option("N")] = _default(
        1024, "requests per tunnel that wait so at a time"
    )
    window_budget: Annotated[int, _size(0, 2**40), LIMITS, Option("SIZE")] = _default(
        "32MiB", "what all flow-control windows may grow by together"
    )

    @model_validator(mode="after")
    def _certificate_is_whole(self) -> "ServeSettings":
        if (self.cert is None) != (self.key is None):
            raise ValueError("--cert and --key belong together: give both")
        if self.ca is not None and self.cert is None:
            raise ValueError("--ca goes with --cert and --key: without them the server makes its own CA")
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> "ServeSettings":
        if self.https == self.http and self.http.port:
            raise ValueError(f"--https and --http are both {self.http}: each needs a port of its own")
        return self


class ConnectSettings(LogSettings):
    """Options of ``quictunnel connect``."""

    table: ClassVar[str] = "connect"

    backend: Annotated[str, BeforeValidator(_check_backend), Option("BACKEND", positional=True)] = _required(
        "3000, localhost:3000, http://…, https://…, unix:/path, or module:app for an ASGI application"
    )
    join: Annotated[Secret, _optional(_check_join_string)] = _default(
        None, "the join string that serve printed: address, CA pin and token in one"
    )
    server: Servers = _default(
        (),
        "the server, or several in the order in which they are tried; may be repeated "
        f"(default: the join string's, or 127.0.0.1:{DEFAULT_QUIC_PORT})",
    )
    tunnel: TunnelName = _default(None, "the public name (default: what the server gives)")
    host: Annotated[tuple[str, ...], BeforeValidator(_parse_hosts), Option("HOST")] = _default(
        (), "a host of your own beside the name, such as app.example.com or *.example.com; may be repeated"
    )
    weight: Annotated[int, _whole(1, 1000), Option("N")] = _default(
        1, "how much of the load this client takes in relation to the tunnel's others"
    )
    sticky: Annotated[Literal["cookie", "ip"] | None, _optional(parse_word), Option("cookie|ip")] = _default(
        None, "keep a visitor with one of the tunnel's clients, by a cookie or by its address (default: no)"
    )
    state_dir: Directory = _state_dir("where a server on the same machine keeps its certificates and tokens")
    config: File = _default(None, "read options from this TOML file's [connect] table")
    token: Secret = _default(None, "a token instead of the join string's; better given as QUICTUNNEL_TOKEN")
    ca: Authority = _default(None, "the CA (PEM) that the server's certificate must come from, or the system's trust")
    server_name: Annotated[OptionalText, Option("NAME")] = _default(
        None, "the name the server's certificate must have (default: the host that is dialled)"
    )
    host_header: Annotated[str, BeforeValidator(parse_host_header), Option("preserve|backend|VALUE")] = _default(
        "preserve", "the Host that the backend sees"
    )
    allow_connect: Switch = _default(
        False, "pass CONNECT requests on: for a backend that is a forward proxy, and lets in whom it wants"
    )
    engine: Engine = _default("auto", "the QUIC library; auto takes qh3 when it is installed")
    grace: Duration = _default("30s", "how long requests in flight may take to finish after SIGTERM")
    processes: Annotated[Range, BeforeValidator(parse_processes), Option("N|MIN-MAX|auto")] = _default(
        "1", "client processes on the tunnel; as many as the load needs between two bounds; auto: 1 to the processors"
    )
    backend_http: Annotated[Literal["1.1", "2"], Word, Option("1.1|2", group="backend")] = _default(
        "1.1", "the HTTP version that the backend speaks; 2 for gRPC (in clear text without negotiation)"
    )
    backend_ca: Annotated[File, Option(group="backend")] = _default(
        None, "the CA (PEM) of an https:// backend (default: the system's trust)"
    )
    backend_insecure: Annotated[Switch, Option(group="backend")] = _default(
        False, "do not verify an https:// backend's certificate"
    )
    backend_connect_time: Annotated[Duration, Option(group="backend")] = _default(
        "10s", "for the backend to accept a connection"
    )
    backend_head_time: Annotated[Duration, Option(group="backend")] = _default(
        "60s", "for the backend's response head to arrive"
    )
    backend_body_idle: Annotated[OptionalDuration, Option(group="backend")] = _default(
        None, "silence within the backend's answer; not for an application or a transport (default: no limit)"
    )
    backend_keep_alive: Annotated[Duration, Option(group="backend")] = _default(
        "30s", "idle backend connections are kept this long"
    )
    health_path: Annotated[str | None, _optional(parse_target), HEALTH, Option("PATH")] = _default(
        None, "ask the backend for this path, such as /healthz: 2xx and 3xx are well (default: it is not asked)"
    )
    health_interval: Annotated[Duration, HEALTH] = _default("5s", "how often")
    health_timeout: Annotated[Duration, HEALTH] = _default("2s", "for the answer")
    health_fall: Annotated[int, _whole(1, 100), HEALTH, Option("N")] = _default(
        3, "failures in a row after which the server is told to choose another client"
    )
    health_rise: Annotated[int, _whole(1, 100), HEALTH, Option("N")] = _default(
        2, "good answers in a row after which it is told that all is well"
    )
    max_links: Annotated[int, _whole(1, 1024), LIMITS, Option("N")] = _default(
        64, "QUIC connections that are opened as the load needs them, each of 100 streams"
    )
    window_budget: Annotated[int, _size(0, 2**40), LIMITS, Option("SIZE")] = _default(
        "32MiB", "what all flow-control windows may grow by together"
    )

    @model_validator(mode="after")
    def _connect_has_a_proxy(self) -> "ConnectSettings":
        if self.allow_connect and (self.backend_http != "1.1" or _kind_of(self.backend) == "asgi"):
            raise ValueError("--allow-connect needs a backend on a socket that speaks HTTP/1.1")
        return self


class DemoSettings(LogSettings):
    """Options of ``quictunnel demo``."""

    log_level: Level = _default("warning", "the least that is logged")
    once: Switch = _default(False, "send requests through, then exit with 0 if all were answered")
    http: Listen = _default("127.0.0.1:8080", "where visitors come in")
    quic: Listen = _default("127.0.0.1:0", "where the client comes in (UDP)")
    engine: Engine = _default("auto", "the QUIC library; auto takes qh3 when it is installed")


class StatusSettings(Settings):
    """Options of ``quictunnel status``."""

    prefix: ClassVar[str] = "QUICTUNNEL_STATUS_"

    state_dir: Annotated[Directory, Option(shared=True)] = _state_dir("the server's --state-dir")
    json_: Switch = _default(False, "print all of it as JSON")


class LoadSettings(Settings):
    """Options of ``quictunnel load``."""

    table: ClassVar[str] = "load"
    prefix: ClassVar[str] = "QUICTUNNEL_LOAD_"

    url: Annotated[Text, Option("URL", positional=True)] = _required("http:// or https://")
    stages: Annotated[str, BeforeValidator(_check_stages), Option("RATE,…")] = _default(
        "20,50,100,200,500,1000", "requests a second of each stage"
    )
    duration: Duration = _default("30s", "of each stage")
    timeout: Duration = _default("30s", "after which a request has failed")
    method: Annotated[Text, Option("METHOD")] = _default("GET", "of each request")
    header: Annotated[tuple[str, ...], BeforeValidator(parse_lines), Option("'NAME: VALUE'")] = _default(
        (), "sent with each request; may be repeated"
    )
    body: OptionalText = _default(None, "sent with each request; @FILE is a file's content")
    body_size: Annotated[int | None, _optional(lambda value: parse_size(value, 0, 2**30)), Option("SIZE")] = _default(
        None, "bytes of a made-up body sent with each request"
    )
    connections: Annotated[int, _whole(1, 60_000), Option("N")] = _default(4096, "connections at a time")
    ca: File = _default(None, "the CA (PEM) of an https:// target (default: the system's trust)")
    insecure: Switch = _default(False, "do not verify an https:// target's certificate")
    max_errors: Annotated[OptionalText, Option("N|N%")] = _default(
        None, "exit with 1 when more requests than this fail"
    )
    max_p99: Annotated[OptionalText, Option("MS")] = _default(
        None, "exit with 1 when a stage's 99th percentile is above this many milliseconds"
    )
    json_: Switch = _default(False, "print the result as JSON")
    config: Annotated[File, Option(shared=True)] = _default(None, "read options from this TOML file's [load] table")


class BenchSettings(Settings):
    """Options of ``quictunnel bench``."""

    table: ClassVar[str] = "bench"
    prefix: ClassVar[str] = "QUICTUNNEL_BENCH_"

    duration: Annotated[Duration, AfterValidator(_enough)] = _default("20s", "that measuring takes in all; at least 1s")
    engine: Annotated[Literal["auto", "both", "aioquic", "qh3"], Word, Option("auto|both|aioquic|qh3")] = _default(
        "auto", "the QUIC library; both: one after the other, each in half of the time; auto takes qh3 when installed"
    )
    join: Annotated[Secret, _optional(_check_join_string)] = _default(
        None, "measure the way to this server, and back to its public URL, instead of a server made for the purpose"
    )
    server: Servers = _default((), "the same, by address; trusted and shown a token as by connect")
    tunnel: TunnelName = _default(
        None, "the public name there; nobody else may serve it (default: what the server gives)"
    )
    token: Secret = _default(None, "a token instead of the join string's; better given as QUICTUNNEL_BENCH_TOKEN")
    ca: Authority = _default(None, "the CA (PEM) that the server's certificate must come from, or the system's trust")
    server_name: Annotated[OptionalText, Option("NAME")] = _default(
        None, "the name the server's certificate must have (default: the host that is dialled)"
    )
    state_dir: Directory = _state_dir("where a server on the same machine keeps its certificates and tokens")
    via: Annotated[Address | None, _optional(lambda value: parse_address(value, 80)), Option("HOST:PORT")] = _default(
        None, "where visitors' requests are sent instead of where the public URL points to"
    )
    max_bytes: Annotated[int | None, _optional(lambda value: parse_size(value, 2**16, 2**40)), Option("SIZE")] = (
        _default(
            None, "bytes that bulk transfers may move each way (default: 1GiB to a server, no limit on one machine)"
        )
    )
    backend: Annotated[str | None, _optional(_check_socket_backend), Option("BACKEND")] = _default(
        None, "a backend of your own, by port, HOST:PORT or URL, instead of one made for the purpose; no bulk transfers"
    )
    path: Annotated[str, BeforeValidator(parse_target), Option("PATH")] = _default("/", "what --backend is asked for")
    json_: Switch = _default(False, "print the result as JSON")
    config: Annotated[File, Option(shared=True)] = _default(None, "read options from this TOML file's [bench] table")

    @property
    def is_remote(self) -> bool:
        """Whether there is a server to go to."""
        return self.join is not None or bool(self.server)

    @property
    def most_bytes(self) -> int | None:
        """``max_bytes``, or what it is by default; None for no limit."""
        return 2**30 if self.max_bytes is None and self.is_remote else self.max_bytes

    @model_validator(mode="after")
    def _server_is_named(self) -> "BenchSettings":
        for name in ("tunnel", "token", "ca", "server_name", "via"):
            if getattr(self, name) is not None and not self.is_remote:
                raise ValueError(f"--{name.replace('_', '-')} goes with --join or --server")
        if self.path != "/" and self.backend is None:
            raise ValueError("--path goes with --backend")
        return self


class _CertsSettings(Settings):
    prefix: ClassVar[str] = "QUICTUNNEL_CERTS_"

    dir: Directory = _default("certs", "where the CA and what it issues are kept")


class CertsInitSettings(_CertsSettings):
    """Options of ``quictunnel certs init``."""

    name: Annotated[Text, Option("NAME")] = _default("quictunnel CA", "the CA's common name")
    days: Annotated[int, _whole(1, 36_500), Option("N")] = _default(3650, "how long it is valid")


class CertsIssueSettings(_CertsSettings):
    """Options of ``quictunnel certs issue``."""

    names: Annotated[Texts, MinLen(1), Option("NAME", positional=True)] = _required(
        "DNS names (a wildcard too) and IP addresses of the server"
    )
    days: Annotated[int, _whole(1, 397), Option("N")] = _default(90, "how long it is valid")
    out: File = _default(None, "the certificate's file, its key beside it (default: server.pem in --dir)")


class CertsShowSettings(_CertsSettings):
    """Options of ``quictunnel certs show``."""

    file: Annotated[File, Option("FILE", positional=True)] = _default(None, "a certificate (default: those in --dir)")


class _TokenSettings(Settings):
    prefix: ClassVar[str] = "QUICTUNNEL_TOKEN_"

    state_dir: Annotated[Directory, Option(shared=True)] = _state_dir("the server's --state-dir")


class TokenCreateSettings(_TokenSettings):
    """Options of ``quictunnel token create``."""

    tunnel: Annotated[Texts, MinLen(1), Option("PATTERN")] = _required(
        "the tunnel names it is good for, such as app or 'team-*'; may be repeated"
    )
    host: Annotated[Texts, Option("PATTERN")] = _default(
        (), "the custom hosts it is good for, such as app.example.com or '*.example.com'; may be repeated"
    )
    expires: Annotated[str, BeforeValidator(_check_expiry), Option("AGE")] = _default(
        "never", "how long it is good for: 90m, 12h, 30d, 2w, 1d12h or never"
    )
    note: Annotated[str, Option("TEXT")] = _default("", "what it is for, shown by list")


class TokenListSettings(_TokenSettings):
    """Options of ``quictunnel token list``."""

    json_: Switch = _default(False, "print the list as JSON")


class TokenRevokeSettings(_TokenSettings):
    """Options of ``quictunnel token revoke``."""

    id: Annotated[Text, Option("ID", positional=True)] = _required("as shown by list")


class TokenReleaseSettings(_TokenSettings):
    """Options of ``quictunnel token release``."""

    name: Annotated[str, BeforeValidator(_parse_owned_name), Option("NAME", positional=True)] = _required(
        "a tunnel's name or a custom host that a token holds, as shown by list"
    )
