"""What a visitor reads when the tunnel itself has to answer: a status, why in Proxy-Status, and a short page."""

import json
from html import escape
from http import HTTPStatus
from typing import Final

from quictunnel.http.reply import status_line
from quictunnel.wire.errors import TunnelError

__all__ = ["error_page"]

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


def error_page(
    error: TunnelError, accept: bytes, date: bytes, *, version: bytes, keep_alive: bool, with_body: bool
) -> tuple[bytes, int]:
    """A whole answer, and how many of its bytes are its body.

    A web page for those who accept HTML, problem details (RFC 9457) for those who accept JSON, plain text for all
    others. ``with_body`` is False for an answer to HEAD; ``version`` is that of the visitor's HTTP, ``1.0`` or
    ``1.1``.
    """
    fault = error.fault
    kind, body = _body(error, accept.lower())
    lines = [
        status_line(fault.status),
        b"content-type: %b\r\n" % kind,
        b"content-length: %d\r\n" % len(body),
        b"proxy-status: quictunnel; error=%b; details=%b\r\n"
        % (fault.proxy_status.encode(), _sf_string(error.details)),
        # A 404 or 414 may be kept by any cache (RFC 9110 section 15.1), and the tunnel may be up in a second.
        b"cache-control: no-store\r\n",
        b"date: %b\r\n" % date,
    ]
    if fault.retry_after is not None:
        lines.append(b"retry-after: %d\r\n" % fault.retry_after)
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    elif version == b"1.0":
        lines.append(b"connection: keep-alive\r\n")
    lines.append(b"\r\n")
    if with_body:
        lines.append(body)
    return b"".join(lines), len(body) if with_body else 0


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
