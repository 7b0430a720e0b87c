"""The vocabulary that every leg of an exchange speaks.

    request    RequestHead  Data*  End
    response   ResponseHead(1xx)*  ResponseHead  Data*  End

The response's End ends the exchange, whether or not the request's End has passed: an answer may end before the upload
has. After a ResponseHead with status 101 the bytes are opaque both ways and the exchange ends with the second End; a
CONNECT (RFC 9110 section 9.3.6) is a request for the protocol ``connect``, and any 2xx answer to it is that 101.

Fields are a list of ``(name, value)`` in their order, names in lower case, values byte-exact. They hold no
pseudo-header fields, no ``host`` (that is ``authority``) and nothing hop-by-hop; ``content-length`` is there when a
length was announced.
"""

from typing import Final, NamedTuple, TypeAlias

__all__ = ["CONNECT", "PROBE", "Data", "End", "Fields", "Frame", "RequestHead", "ResponseHead"]

Fields: TypeAlias = list[tuple[bytes, bytes]]

CONNECT: Final = b"connect"
"the ``protocol`` of a CONNECT request: its success is carried as a switch to it, as a 101"


class RequestHead(NamedTuple):
    """A request without its body (RFC 9114 section 4.3.1 names the parts)."""

    method: bytes
    scheme: bytes
    "``http`` or ``https``: how the visitor came; ``quictunnel`` for a probe"

    authority: bytes
    "the Host the visitor asked for, byte-exact; empty if HTTP/1.0 gave none"

    target: bytes
    "origin-form or ``*``, byte-exact, never normalised; authority-form for CONNECT"

    fields: Fields

    body: bool = False
    "whether a body follows, of zero bytes or more; without one End follows at once"

    protocol: bytes = b""
    "the protocols asked for by Upgrade (RFC 9110 section 7.8), empty for none"


PROBE: Final = RequestHead(b"PROBE", b"quictunnel", b"", b"*", [])
"goes a request's way and is answered by the client itself: no visitor can ask it, for none comes by this scheme"


class ResponseHead(NamedTuple):
    """A response without its body; with a status of 1xx an informational one."""

    status: int
    fields: Fields


class Data(NamedTuple):
    """Some bytes of a body, never none."""

    data: bytes


class End(NamedTuple):
    """The direction is complete, and with it everything that was announced."""

    trailers: Fields = []  # noqa: RUF012  (shared and never changed)


Frame: TypeAlias = RequestHead | ResponseHead | Data | End
