"""What can go wrong in an exchange, and what each thing means to everyone who hears of it.

One table serves three readers: the peer, who sees the code in RESET_STREAM and STOP_SENDING; the visitor, who sees the
status (or, once a head has gone out, a cut connection); and the visitor's tools, who see the Proxy-Status error type
(RFC 9209 section 2.3).
"""

from enum import IntEnum
from typing import NamedTuple

__all__ = ["ErrorCode", "Fault", "ProtocolError", "TunnelError"]


class ErrorCode(IntEnum):
    """An application error code of ``quictunnel/1`` (RFC 9000 section 20.2)."""

    NO_ERROR = 0x00  # the exchange is over; what is still under way is not needed
    CANCELLED = 0x01  # the visitor went away
    INTERNAL_ERROR = 0x02
    FRAME_ERROR = 0x03  # the peer broke the rules of the stream
    NOT_ACCEPTED = 0x04  # refused before anything reached a backend: safe to send elsewhere

    DESTINATION_NOT_FOUND = 0x10
    DESTINATION_UNAVAILABLE = 0x11
    CONNECTION_LIMIT_REACHED = 0x12

    DNS_ERROR = 0x20
    CONNECTION_REFUSED = 0x21
    CONNECTION_TIMEOUT = 0x22
    CONNECTION_TERMINATED = 0x23
    TLS_ERROR = 0x24
    TLS_CERTIFICATE_ERROR = 0x25
    HTTP_PROTOCOL_ERROR = 0x26
    HTTP_RESPONSE_TIMEOUT = 0x27
    DESTINATION_IP_UNROUTABLE = 0x28

    BAD_REQUEST = 0x30
    REQUEST_TIMEOUT = 0x31
    TARGET_TOO_LONG = 0x32
    HEAD_TOO_LARGE = 0x33
    METHOD_NOT_ALLOWED = 0x34
    NOT_IMPLEMENTED = 0x35
    MISDIRECTED = 0x36
    VERSION_NOT_SUPPORTED = 0x37


class Fault(NamedTuple):
    """What a visitor is told of an error code."""

    status: int
    "the HTTP status code, if no head has gone out"

    proxy_status: str
    "the error type of RFC 9209 section 2.3"

    text: str
    "one plain sentence"

    retry_after: int | None = None
    "seconds to put into Retry-After"


_FAULTS: dict[ErrorCode, Fault] = {
    ErrorCode.NO_ERROR: Fault(502, "connection_terminated", "The exchange ended before an answer."),
    ErrorCode.CANCELLED: Fault(502, "connection_terminated", "The exchange was cancelled before an answer."),
    ErrorCode.INTERNAL_ERROR: Fault(500, "proxy_internal_error", "The tunnel failed inside itself."),
    ErrorCode.FRAME_ERROR: Fault(502, "http_protocol_error", "The tunnel's client broke the tunnel's protocol."),
    ErrorCode.NOT_ACCEPTED: Fault(503, "destination_unavailable", "The tunnel's client takes no new requests.", 1),
    ErrorCode.DESTINATION_NOT_FOUND: Fault(404, "destination_not_found", "There is no tunnel of this name."),
    ErrorCode.DESTINATION_UNAVAILABLE: Fault(503, "destination_unavailable", "No client serves this tunnel now.", 2),
    ErrorCode.CONNECTION_LIMIT_REACHED: Fault(503, "connection_limit_reached", "The tunnel is at its limit now.", 1),
    ErrorCode.DNS_ERROR: Fault(502, "dns_error", "The backend's name could not be resolved."),
    ErrorCode.CONNECTION_REFUSED: Fault(502, "connection_refused", "The backend refused the connection."),
    ErrorCode.CONNECTION_TIMEOUT: Fault(504, "connection_timeout", "The backend took too long to accept a connection."),
    ErrorCode.CONNECTION_TERMINATED: Fault(502, "connection_terminated", "The connection ended before an answer."),
    ErrorCode.TLS_ERROR: Fault(502, "tls_protocol_error", "TLS with the backend failed."),
    ErrorCode.TLS_CERTIFICATE_ERROR: Fault(502, "tls_certificate_error", "The backend's certificate is not trusted."),
    ErrorCode.HTTP_PROTOCOL_ERROR: Fault(502, "http_protocol_error", "The backend's answer is not valid HTTP."),
    ErrorCode.HTTP_RESPONSE_TIMEOUT: Fault(504, "http_response_timeout", "The backend did not answer in time."),
    ErrorCode.DESTINATION_IP_UNROUTABLE: Fault(502, "destination_ip_unroutable", "There is no route to the backend."),
    ErrorCode.BAD_REQUEST: Fault(400, "http_request_error", "The request is malformed."),
    ErrorCode.REQUEST_TIMEOUT: Fault(408, "http_request_error", "The request took too long to arrive."),
    ErrorCode.TARGET_TOO_LONG: Fault(414, "http_request_error", "The request target is too long."),
    ErrorCode.HEAD_TOO_LARGE: Fault(431, "http_request_error", "The request's header section is too large."),
    ErrorCode.METHOD_NOT_ALLOWED: Fault(405, "http_request_error", "This method is not allowed here."),
    ErrorCode.NOT_IMPLEMENTED: Fault(501, "http_request_error", "This transfer coding is not implemented."),
    ErrorCode.MISDIRECTED: Fault(421, "http_request_error", "This connection does not serve that host."),
    ErrorCode.VERSION_NOT_SUPPORTED: Fault(505, "http_request_error", "This HTTP version is not supported."),
}


class TunnelError(Exception):
    """An exchange failed: the code says how, ``details`` says what exactly, in printable ASCII fit for a header."""

    def __init__(self, code: ErrorCode, details: str = "") -> None:
        self.code = code
        self.fault = _FAULTS[code]
        self.details = details or self.fault.text
        super().__init__(code, self.details)

    def __str__(self) -> str:
        return f"{self.fault.proxy_status}: {self.details}"

    @classmethod
    def from_wire(cls, code: int) -> "TunnelError":
        """The error that a peer's RESET_STREAM or STOP_SENDING names; an unknown code is INTERNAL_ERROR.

        What a client says so, its own tunnel's visitors see; it could have answered them with that status itself.
        """
        try:
            return cls(ErrorCode(code))
        except ValueError:
            return cls(ErrorCode.INTERNAL_ERROR, f"unknown error code {code:#x}")


class ProtocolError(Exception):
    """The peer sent bytes that ``quictunnel/1`` does not allow. Garbage gives this and nothing else."""
