"""What visitors may ask of the public side, and what backends are given."""

from dataclasses import dataclass

__all__ = ["OriginLimits", "VisitorLimits"]


@dataclass(frozen=True, slots=True)
class VisitorLimits:
    """Bounds on what one visitor, and all of them together, can hold. Times are looked at about once a second."""

    head_size: int = 64 * 1024
    "bytes of a request line and header section, of a trailer section, and of what is kept of the requests that follow"

    head_fields: int = 128
    "fields of a header or trailer section"

    target_length: int = 8192
    "bytes of a request target"

    head_time: float = 15.0
    "seconds for a head to arrive, from the connection's first moment or the head's first byte"

    idle_time: float = 75.0
    "seconds that a connection is kept between two requests, and that a half-closed upgraded one may be silent"

    body_idle_time: float = 60.0
    "seconds of silence within an upload while it is not held back"

    write_idle_time: float = 300.0
    "seconds in which a visitor takes none of what is waiting for it; kernels buffer megabytes, so slow is not silent"

    connections: int = 10_000
    "visitor connections at a time; those beyond are told so and closed"


@dataclass(frozen=True, slots=True)
class OriginLimits:
    """What a backend is given."""

    connect_time: float = 10.0
    "seconds to connect, TLS included"

    head_time: float = 60.0
    "seconds from the end of the request to the head of the answer; an interim answer starts them anew"

    body_idle_time: float | None = None
    "seconds of silence within an answer's body, None for no limit; an upgraded connection has none"

    half_close_time: float = 60.0
    "seconds of silence once one direction of an upgraded connection has ended"

    idle_keep_alive: float = 30.0
    "seconds that a connection is kept for the next request"

    idle_connections: int = 512
    "connections kept at most"

    head_size: int = 65536
    "bytes of an answer's head, and of its trailers"

    head_fields: int = 256
    "fields in an answer's head, and in its trailers"
