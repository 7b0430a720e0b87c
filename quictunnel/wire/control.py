"""What the two ends say to each other beside the exchanges: the control stream of a link.

The layout is that of every stream (``codec``): CONTROL frames carry a JSON object with a ``type``; unknown members
are ignored, an unknown type is answered with ``unknown``. CREDIT frames carry two varints, a stream's id and the new
limit of that stream in body bytes for the direction that the receiver of the frame sends in. Credit travels here and
not on the stream itself because a request without a body ends its direction with its head: there would be nothing
left to carry the credit for a long answer.

    client -> server    authority                      send your CA's certificate (a pin will prove it)
                        hello                          this link is of this session of this tunnel; here is the token
                        drain                          choose this link no more
                        health                         whether the backend behind this session is well
    server -> client    authority                      the certificate
                        welcome | refuse               the answer to hello
                        grow                           this many links would serve the load
                        drained                        the answer to drain: so many streams were opened, no more come
                        drain                          this server goes away: nothing new comes
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Final, TypeAlias

from quictunnel.wire.codec import FrameType, pull_varint, push_varint
from quictunnel.wire.errors import ProtocolError

__all__ = [
    "CONNECT_CAPABILITY",
    "PROBE_CAPABILITY",
    "STICKY",
    "VERSION",
    "WEIGHT_LIMIT",
    "Authority",
    "ControlDecoder",
    "ControlMessage",
    "Credit",
    "Drain",
    "Drained",
    "Grow",
    "Health",
    "Hello",
    "Refuse",
    "Strange",
    "Unknown",
    "Welcome",
    "encode_control",
    "encode_credit",
]

VERSION: Final = 1
CONNECT_CAPABILITY: Final = "connect"
"in a hello: CONNECT requests may be sent to this client, whose backend is a proxy"

PROBE_CAPABILITY: Final = "probe"
"in a hello: this client answers probes, which take an exchange's way and end before the backend"

STICKY: Final = ("", "cookie", "ip")
"how a hello may ask for a visitor's requests to be kept together: not at all, by a cookie, by the visitor's address"

WEIGHT_LIMIT: Final = 1000

MESSAGE_LIMIT: Final = 65536
"bytes of one control message"


@dataclass(frozen=True, slots=True)
class Hello:
    """A client's first word on every link."""

    type: ClassVar[str] = "hello"
    version: int
    tunnel: str
    session: str
    "random, chosen by the client once per run: who knows it is this session"

    token: str = field(repr=False)
    link: int = 0
    "which of the session's links this is; a link with the same number is replaced"

    agent: str = ""
    "name and version of the client program, for logs"

    capabilities: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    "custom hosts of the tunnel beside its name, ``*.`` and a host among them"

    weight: int = 1
    "how much of the load this session takes in relation to the tunnel's others, 1 to WEIGHT_LIMIT"

    sticky: str = ""
    "one of STICKY"


@dataclass(frozen=True, slots=True)
class Welcome:
    """The link is registered."""

    type: ClassVar[str] = "welcome"
    tunnel: str
    urls: list[str] = field(default_factory=list)
    max_links: int = 1
    agent: str = ""
    capabilities: list[str] = field(default_factory=list)
    worker: int = 0
    "which of the server's processes this link has come to"

    workers: int = 1
    "how many processes the server has: a session has links to each"


@dataclass(frozen=True, slots=True)
class Refuse:
    """The link is not registered, or not any more; the server closes it."""

    type: ClassVar[str] = "refuse"
    code: str
    "a word for programs: token_unknown, token_expired, token_revoked, token_scope, name_taken, version, limit, …"

    text: str
    "a sentence for people"

    final: bool = True
    "whether trying again is pointless"

    retry_after: float | None = None
    "seconds, when it is not final"


@dataclass(frozen=True, slots=True)
class Grow:
    """How many links the server would like this session to have."""

    type: ClassVar[str] = "grow"
    links: int


@dataclass(frozen=True, slots=True)
class Drain:
    """From a client: take this link for nothing new; what is under way goes on. From a server: dial anew.

    A server goes on using the link for what visitors still ask it, and closes it when it is done.
    """

    type: ClassVar[str] = "drain"
    again: bool = False
    "from a server: the same address is to be dialled: another process answers there now, or this link cannot last"


@dataclass(frozen=True, slots=True)
class Drained:
    """The answer to a client's drain: the last word about new streams on this link."""

    type: ClassVar[str] = "drained"
    streams: int
    "how many the server has opened on it in all; a client that has seen so many and ended them all misses none"


@dataclass(frozen=True, slots=True)
class Health:
    """What a client's checks of its backend say; until it says something, the backend counts as well."""

    type: ClassVar[str] = "health"
    healthy: bool
    text: str = ""
    "why not, a sentence for people"


@dataclass(frozen=True, slots=True)
class Authority:
    """Asks for, or carries, certificates (PEM): only what a pin proves of them is believed."""

    type: ClassVar[str] = "authority"
    certificate: str = ""
    "the CA's"

    server: str = ""
    "the server's own: lets a client that refused it say why"


@dataclass(frozen=True, slots=True)
class Unknown:
    """The answer to a message whose type is not known."""

    type: ClassVar[str] = "unknown"
    of: str


@dataclass(frozen=True, slots=True)
class Strange:
    """A message whose type is not known, as it comes in; it is answered with ``Unknown``, and that never is."""

    of: str


@dataclass(frozen=True, slots=True)
class Credit:
    """A stream's new limit, in body bytes from its direction's start."""

    stream: int
    limit: int


ControlMessage: TypeAlias = Hello | Welcome | Refuse | Grow | Drain | Drained | Health | Authority | Unknown

_TYPES: Final[dict[str, type[Any]]] = {
    kind.type: kind for kind in (Hello, Welcome, Refuse, Grow, Drain, Drained, Health, Authority, Unknown)
}


def _is_text(value: str) -> bool:
    """Whether it has no lone surrogates, which JSON can write and nothing else can."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


_CHECKS: Final[dict[Any, Any]] = {
    int: lambda value: type(value) is int and 0 <= value < 2**62,
    str: lambda value: type(value) is str and _is_text(value),
    bool: lambda value: type(value) is bool,
    list[str]: lambda value: type(value) is list and all(type(item) is str and _is_text(item) for item in value),
    float | None: lambda value: value is None or (type(value) in (int, float) and 0 <= value < 1e9),
}


def encode_control(message: ControlMessage) -> bytes:
    """The CONTROL frame of a message."""
    payload = json.dumps({"type": message.type, **asdict(message)}, separators=(",", ":")).encode()
    return push_varint(FrameType.CONTROL) + push_varint(len(payload)) + payload


def encode_credit(stream: int, limit: int) -> bytes:
    """The CREDIT frame of a stream's new limit."""
    payload = push_varint(stream) + push_varint(limit)
    return push_varint(FrameType.CREDIT) + push_varint(len(payload)) + payload


class ControlDecoder:
    """Bytes of a control stream in, messages out, and for any garbage a ProtocolError."""

    __slots__ = ("_buffer", "_wanted")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = 0  # how much the buffer must hold before it is worth another look

    def feed(self, data: bytes) -> list[ControlMessage | Credit | Strange]:
        """The messages that ``data`` completes; one of an unknown type comes as ``Strange``. Raises ProtocolError."""
        messages: list[ControlMessage | Credit | Strange] = []
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return messages
            data = bytes(self._buffer)
            self._buffer.clear()
        position = 0
        self._wanted = 0
        while position < len(data):
            kind, after = pull_varint(data, position)
            length, start = pull_varint(data, after) if after >= 0 else (0, -1)
            if start < 0:
                break
            if length > MESSAGE_LIMIT:
                raise ProtocolError(f"a control frame of {length} bytes is over the limit of {MESSAGE_LIMIT}")
            end = start + length
            if end > len(data):
                self._wanted = end - position
                break
            if kind == FrameType.CREDIT:
                messages.append(_credit(data[start:end]))
            elif kind == FrameType.CONTROL:
                messages.append(_message(data[start:end]))
            position = end
        self._buffer += data[position:]
        return messages


def _credit(payload: bytes) -> Credit:
    stream, middle = pull_varint(payload, 0)
    limit, end = pull_varint(payload, middle) if middle >= 0 else (0, -1)
    if end != len(payload):
        raise ProtocolError("a CREDIT frame is not two integers")
    return Credit(stream, limit)


def _message(payload: bytes) -> ControlMessage | Strange:
    try:
        value = json.loads(payload.decode())  # of bytes it would guess the encoding
    except (ValueError, RecursionError):
        raise ProtocolError("a control message is not JSON") from None
    if not isinstance(value, dict) or not _CHECKS[str](value.get("type")):
        raise ProtocolError("a control message is not an object with a type")
    kind = _TYPES.get(value["type"])
    if kind is None:
        return Strange(value["type"][:64])
    known: dict[str, Any] = {}
    for each in fields(kind):
        if each.name in value:
            if not _CHECKS[each.type](value[each.name]):
                raise ProtocolError(f"a {kind.type} message has a {each.name} of the wrong kind")
            known[each.name] = value[each.name]
    try:
        message: ControlMessage = kind(**known)
    except TypeError:
        raise ProtocolError(f"a {kind.type} message lacks a member") from None
    return message
