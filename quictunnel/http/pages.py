"""What a visitor reads when the tunnel itself has to answer: a status, why in Proxy-Status, and a short page."""

import json
from html import escape
from http import HTTPStatus
from typing import Final

from quictunnel.http.reply import status_line
from quictunnel.wire.errors import TunnelError
from quictunnel.wire.fields import field_lines
from quictunnel.wire.frames import Fields

__all__ = ["error_answer", "error_page"]

_DETAILS_LIMIT: Final = 200
"characters of a details parameter: some servers take no more than 4 kB of header"

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{status} {phrase}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36em;margin:15vh auto;padding:0
1em}}small{{color:#777}}</style> <h1>{status} {phrase}</h1> <p>{text}</p> <p><small>quictunnel: {error}</small></p>
</html>
"""


def error_answer(error: TunnelError, accept: bytes, date: bytes) -> tuple[Fields, bytes]:
    """The fields and the body of an answer with ``error``'s status, for any version of HTTP.

    A web page for those who accept HTML, problem details (RFC 9457) for those who accept JSON, plain text for all
    others.
    """
    fault = error.fault
    kind, body = _body(error, accept.lower())
    fields = [
        (b"content-type", kind),
        (b"content-length", b"%d" % len(body)),
        (
            b"proxy-status",
            b"quictunnel; error=%b; details=%b" % (fault.proxy_status.encode(), _sf_string(error.details)),
        ),
        # A 404 or 414 may be kept by any cache (RFC 9110 section 15.1), and the tunnel may be up in a second.
        (b"cache-control", b"no-store"),
        (b"date", date),
    ]
    if fault.retry_after is not None:
        fields.append((b"retry-after", b"%d" % fault.retry_after))
    return fields, body


def error_page(
    error: TunnelError, accept: bytes, date: bytes, *, version: bytes, keep_alive: bool, with_body: bool
) -> tuple[bytes, int]:
    """A whole answer in HTTP/1.x, and how many of its bytes are its body.

    ``with_body`` is False for an answer to HEAD; ``version`` is that of the visitor's HTTP, ``1.0`` or ``1.1``.
    """
    fields, body = error_answer(error, accept, date)
    if not keep_alive:
        fields.append((b"connection", b"close"))
    elif version == b"1.0":
        fields.append((b"connection", b"keep-alive"))
    page = b"%b%b\r\n" % (status_line(error.fault.status), field_lines(fields))
    return (page + body, len(body)) if with_body else (page, 0)


def _body(error: TunnelError, accept: bytes) -> tuple[bytes, bytes]:
    fault = error.fault
    phrase = HTTPStatus(fault.status).phrase
    details = _printable(error.details)
    if b"text/html" in accept:
        page = _PAGE.format(
            status=fault.status, phrase=phrase, text=escape(_sentences(error)), error=fault.proxy_status
        )
        return b"text/html; charset=utf-8", page.encode("ascii")
    if b"application/json" in accept or b"application/problem+json" in accept:
        problem = {
            "type": "about:blank",
            "title": phrase,
            "status": fault.status,
            "detail": details,
            "error": fault.proxy_status,
        }
        return b"application/problem+json", json.dumps(problem).encode("ascii") + b"\n"
    return b"text/plain; charset=utf-8", f"{fault.status} {phrase}\n\n{_sentences(error)}\n".encode("ascii")


def _sentences(error: TunnelError) -> str:
    details = _printable(error.details)
    return details if details == error.fault.text else f"{error.fault.text} ({details})"


def _sf_string(text: str) -> bytes:
    """A String of RFC 8941 section 3.3.3, which holds visible ASCII and spaces alone."""
    escaped = _printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'.encode("ascii")


def _printable(text: str) -> str:
    return "".join(character if " " <= character <= "~" else "?" for character in text[:_DETAILS_LIMIT])
