"""What the public port lets in and what it refuses: a table, and exactly what the backend saw of each row.

Every row's bytes are followed by a request for ``/smuggled``: whoever mistakes where a refused request ends, or goes on
after it, would pass that on. Sections are of RFC 9112 where nothing else is said; they hold a MUST that the row shows.
"""

import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypeVar

import pytest

from tests.support.backends import Connection, RawBackend
from tests.support.processes import Processes, Tunnel, poll
from tests.support.visits import RawVisitor

pytestmark = pytest.mark.either

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
ORDINARY = b"GET /ordinary HTTP/1.1\r\nHost: a\r\n\r\n"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"


def at_backend(
    line: bytes,
    *fields: bytes,
    host: bytes = b"a",
    via: bytes = b"1.1",
    ours: tuple[bytes, ...] = (),
    body: bytes = b"",
) -> bytes:
    """A request as the backend gets it: ``fields``, what the tunnel says of the visitor, ``ours`` of the framing."""
    told = [b"x-forwarded-for: 127.0.0.1", b"x-forwarded-proto: http"]
    forwarded = b"forwarded: for=127.0.0.1;proto=http"
    if host:
        told.append(b"x-forwarded-host: " + host)
        forwarded = b'forwarded: for=127.0.0.1;host="' + host + b'";proto=http'
    told += [forwarded, b"via: " + via + b" quictunnel"]
    return b"\r\n".join([line + b" HTTP/1.1", b"Host: " + host, *fields, *told, *ours, b"", body])


class Recorder:
    """A backend that writes down whole requests byte for byte, and what was left of those that were cut."""

    def __init__(self) -> None:
        self.whole: list[bytes] = []
        self.cut: list[bytes] = []
        self.begun = b""
        "what there is of a request that is not whole yet"

    def __call__(self, connection: Connection) -> None:
        data = b""
        try:
            while True:
                while not (end := _end(data)):
                    self.begun = data
                    more = connection.sock.recv(65536)
                    if not more:
                        return
                    data += more
                self.whole.append(_with_one_chunk(data[:end]))
                data = data[end:]
                connection.answer(200, b"" if self.whole[-1].startswith(b"HEAD ") else b"ok")
        finally:
            if data:
                self.cut.append(data)

    def clear(self) -> None:
        self.whole.clear()
        self.cut.clear()
        self.begun = b""


_CHUNKS = re.compile(rb"([1-9a-f][0-9a-f]*)\r\n")
_LAST = re.compile(rb"0\r\n((?:[^\r\n]+\r\n)*)\r\n")


def _end(data: bytes) -> int:
    """Where a whole request ends, 0 for nowhere; anything that is not framed as the tunnel does it is an error."""
    head, mark, rest = data.partition(b"\r\n\r\n")
    if not mark:
        return 0
    start = len(head) + 4
    if b"\r\nTransfer-Encoding: chunked" in head:
        chunks = _split(rest)
        return start + chunks[2] if chunks else 0
    found = re.search(rb"\r\ncontent-length: ([0-9]+)", head)
    length = int(found[1]) if found else 0
    return start + length if len(rest) >= length else 0


def _split(rest: bytes) -> tuple[bytes, bytes, int] | None:
    """The content, the trailers and the size of a whole chunked body."""
    content, position = b"", 0
    while chunk := _CHUNKS.match(rest, position):
        position = chunk.end() + int(chunk[1], 16)
        content += rest[chunk.end() : position]
        if rest[position : position + 2] != b"\r\n":
            return None
        position += 2
    last = _LAST.match(rest, position)
    return (content, last[1], last.end()) if last else None


def _with_one_chunk(request: bytes) -> bytes:
    """The same with its chunks as one: how bytes are cut is nobody's promise."""
    head, mark, rest = request.partition(b"\r\n\r\n")
    if b"\r\nTransfer-Encoding: chunked" not in head:
        return request
    chunks = _split(rest)
    assert chunks
    content, trailers, _ = chunks
    body = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
    return head + mark + body + b"0\r\n" + trailers + b"\r\n"


recorder = Recorder()


@pytest.fixture(scope="module")
def backend() -> Iterator[RawBackend]:
    with RawBackend(recorder) as backend:
        yield backend


@pytest.fixture(scope="module")
def tunnels(tmp_path_factory: pytest.TempPathFactory, backend: RawBackend) -> Iterator[Callable[[str], Tunnel]]:
    """One tunnel of each engine, which takes requests for any host."""
    made: dict[str, Tunnel] = {}
    with Processes(tmp_path_factory.mktemp("processes")) as processes:

        def tunnel(engine: str) -> Tunnel:
            if engine not in made:
                made[engine] = processes.tunnel(backend.target, (engine, engine))
            return made[engine]

        yield tunnel


@pytest.fixture
def tunnel(engine: str, tunnels: Callable[[str], Tunnel]) -> Tunnel:
    found = tunnels(engine)
    recorder.clear()
    return found


@pytest.fixture
def one_tunnel(tunnels: Callable[[str], Tunnel]) -> Tunnel:
    """For what ends before it comes near QUIC."""
    found = tunnels("aioquic")
    recorder.clear()
    return found


# Refused


Row = TypeVar("Row", "Refused", "Passed")


class Refused(NamedTuple):
    """Bytes that get an error and a close, and of which the backend sees nothing."""

    name: str
    data: bytes
    section: str = ""
    status: int = 400


def get(fields: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n\r\n"


def line(start: bytes) -> bytes:
    return start + b"\r\nHost: a\r\n\r\n"


def host(value: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost:" + value + b"\r\n\r\n"


def post(fields: bytes, body: bytes = b"hello", version: bytes = b"1.1") -> bytes:
    return b"POST / HTTP/" + version + b"\r\nHost: a\r\n" + fields + b"\r\n\r\n" + body


def length(value: bytes) -> bytes:
    return post(b"Content-Length:" + value)


def coding(value: bytes) -> bytes:
    return post(b"Transfer-Encoding:" + value, HELLO)


def chunks(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body)


def trailer(field: bytes) -> bytes:
    return chunks(b"5\r\nhello\r\n0\r\n" + field + b"\r\n\r\n")


def rows(
    group: str, section: str, make: Callable[[bytes], bytes], status: int = 400, **values: bytes
) -> Iterable[Refused]:
    return [
        Refused(f"{group}: {name.replace('_', ' ')}", make(value), section, status) for name, value in values.items()
    ]


def as_it_is(data: bytes) -> bytes:
    return data


CL = b"Content-Length: 5"
TE = b"Transfer-Encoding: chunked"

REFUSED = [
    *rows(
        "two framings",
        "6.3 rule 3",
        lambda fields: post(fields, HELLO),
        length_first=CL + b"\r\n" + TE,
        coding_first=TE + b"\r\n" + CL,
        length_of_0=b"Content-Length: 0\r\n" + TE,
        length_on_both_sides=CL + b"\r\n" + TE + b"\r\n" + CL,
        coding_on_both_sides=TE + b"\r\n" + CL + b"\r\n" + TE,
        coding_of_identity=CL + b"\r\nTransfer-Encoding: identity",
        empty_coding=CL + b"\r\nTransfer-Encoding:",
        empty_length=TE + b"\r\nContent-Length:",
        far_apart=CL + b"\r\nX: y" * 50 + b"\r\n" + TE,
        in_other_case=b"CONTENT-LENGTH: 5\r\ntransfer-ENCODING: chunked",
        nominated_by_connection=b"Connection: Transfer-Encoding, Content-Length\r\n" + CL + b"\r\n" + TE,
    ),
    Refused("two framings: in HTTP/1.0", post(CL + b"\r\n" + TE, HELLO, b"1.0"), "6.1"),
    Refused("two framings: CL.TE", post(b"Content-Length: 6\r\n" + TE, b"0\r\n\r\nG"), "6.3 rule 3"),
    Refused("two framings: TE.CL", post(TE + b"\r\nContent-Length: 4", b"2b\r\n" + SMUGGLED + b"\r\n0\r\n\r\n"), "6.3"),
    *rows(
        "two lengths",
        "6.3 rule 5",
        lambda fields: post(fields),
        unequal=CL + b"\r\nContent-Length: 6",
        the_smaller_last=b"Content-Length: 6\r\n" + CL,
        equal=CL + b"\r\n" + CL,
        zero_and_five=b"Content-Length: 0\r\n" + CL,
        one_with_zeros=CL + b"\r\nContent-Length: 005",
        one_empty=CL + b"\r\nContent-Length:",
        in_other_case=CL + b"\r\ncONTENT-lENGTH: 6",
        three=CL + b"\r\n" + CL + b"\r\n" + CL,
    ),
    *rows(
        "length",
        "6.3 rule 5",
        length,
        plus=b" +5",
        minus=b" -5",
        minus_0=b" -0",
        hexadecimal=b" 0x5",
        octal_python=b" 0o5",
        list=b"5,5",
        list_unequal=b" 5, 6",
        list_with_an_end=b" 5,",
        list_with_a_start=b" ,5",
        two_words=b" 5 5",
        tab_within=b" 5\t5",
        fraction=b" 5.0",
        exponent=b" 1e3",
        underscore=b" 5_0",
        quotes=b' "5"',
        words=b" five",
        parameter=b" 5;a=b",
        empty=b"",
        blank=b" \t ",
        vertical_tab_before=b"\x0b5",
        vertical_tab_after=b" 5\x0b",
        form_feed=b" 5\x0c",
        nul_after=b" 5\x00",
        next_line=b" 5\x85",
        no_break_space=b"\xa05",
        superscript=b" \xb2",
        arabic_digit=b" \xd9\xa5",
        full_width_digit=b" \xef\xbc\x95",
        just_over_63_bits=b" 9223372036854775808",
        just_over_64_bits=b" 18446744073709551621",
        nineteen_digits=b" 1000000000000000000",
        a_hundred_digits=b" " + b"9" * 100,
    ),
    *rows(
        "coding",
        "6.1",
        coding,
        xchunked=b" xchunked",
        chunkedx=b" chunkedx",
        chunked_identity=b" chunked, identity",
        identity=b" identity",
        identity_chunked=b" identity, chunked",
        gzip_chunked=b" gzip, chunked",
        gzip=b" gzip",
        chunked_gzip=b" chunked, gzip",
        twice=b" chunked, chunked",
        twice_in_lines=b" chunked\r\n" + TE,
        gzip_then_chunked_in_lines=b" gzip\r\n" + TE,
        chunked_then_identity_in_lines=b" chunked\r\nTransfer-Encoding: identity",
        chunked_then_empty=b" chunked\r\nTransfer-Encoding:",
        empty=b"",
        blank=b" \t",
        comma_before=b" ,chunked",
        comma_after=b" chunked,",
        semicolon=b" chunked;",
        parameter=b" chunked;q=1",
        quotes=b' "chunked"',
        apostrophes=b" 'chunked'",
        two_words=b" chunked x",
        tab_within=b" chun\tked",
        tab_and_comma=b"\tchunked\t,",
        odd_case_with_junk=b" cHuNkEd\tx",
        vertical_tab_before=b"\x0bchunked",
        vertical_tab_after=b" chunked\x0b",
        form_feed=b" \x0cchunked",
        nul_after=b" chunked\x00",
        next_line=b" chunked\x85",
        no_break_space=b" \xa0chunked",
        kelvin_sign=b" chun\xe2\x84\xaaed",
        bare_cr_after=b" chunked\rX",
        bare_cr_before_the_end=b" chunked\r",
        bare_lf_before=b"\nchunked",
        folded=b"\r\n chunked",
        folded_after=b" chunked\r\n , identity",
        equals=b" =chunked",
        half=b" chunk",
    ),
    Refused("coding: in HTTP/1.0", post(TE, HELLO, b"1.0"), "6.1"),
    Refused("coding: in HTTP/1.0 that stays", post(b"Connection: keep-alive\r\n" + TE, HELLO, b"1.0"), "6.1"),
    Refused("coding: name with a space", post(b"Transfer-Encoding : chunked", HELLO), "5.1"),
    Refused("coding: name with a tab", post(b"Transfer-Encoding\t: chunked", HELLO), "5.1"),
    Refused("coding: space before the name", post(b" Transfer-Encoding: chunked", HELLO), "2.2"),
    Refused("coding: behind a fold", post(b"X: y\r\n Transfer-Encoding: chunked", HELLO), "5.2"),
    Refused("coding: behind a bare LF", post(b"X: y\nTransfer-Encoding: chunked", HELLO), "2.2"),
    Refused("coding: behind a bare CR", post(b"X: y\rTransfer-Encoding: chunked", HELLO), "2.2"),
    Refused("coding: behind a NUL", post(b"X: y\x00\r\nTransfer-Encoding: chunked", HELLO), "RFC 9110 5.5"),
    Refused("coding: without a colon", post(b"Transfer-Encoding chunked", HELLO), "5"),
    Refused("coding: after an end by CR alone", b"POST / HTTP/1.1\r\nHost: a\r\n\r" + TE + b"\r\n\r\n" + HELLO, "2.2"),
    *rows(
        "line end",
        "2.2",
        as_it_is,
        LF_everywhere=b"GET / HTTP/1.1\nHost: a\n\n",
        LF_after_the_request_line=b"GET / HTTP/1.1\nHost: a\r\n\r\n",
        LF_after_a_field=b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
        LF_after_the_last_field=b"GET / HTTP/1.1\r\nHost: a\n\r\n",
        LF_as_the_end_of_the_head=b"GET / HTTP/1.1\r\nHost: a\r\n\n",
        LF_before_the_request=b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        CR_everywhere=b"GET / HTTP/1.1\rHost: a\r\r",
        CR_after_the_request_line=b"GET / HTTP/1.1\rHost: a\r\n\r\n",
        CR_after_a_field=b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n",
        CR_twice=b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n",
        CR_as_the_end_of_the_head=b"GET / HTTP/1.1\r\nHost: a\r\n\r",
        CR_before_the_request=b"\rGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        LF_CR=b"GET / HTTP/1.1\n\rHost: a\n\r\n\r",
        next_line=b"GET / HTTP/1.1\x85Host: a\x85\x85\r\n\r\n",
        next_line_in_UTF_8=b"GET / HTTP/1.1\xc2\x85Host: a\r\n\r\n",
        line_separator=b"GET / HTTP/1.1\xe2\x80\xa8Host: a\r\n\r\n",
        vertical_tab=b"GET / HTTP/1.1\x0bHost: a\r\n\r\n",
        form_feed=b"GET / HTTP/1.1\x0cHost: a\r\n\r\n",
        three_empty_lines_before=b"\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        CR_in_a_value=get(b"X: a\rb"),
        LF_in_a_value=get(b"X: a\nb"),
        CR_at_the_end_of_a_value=get(b"X: a\r"),
    ),
    *rows(
        "folded",
        "5.2",
        get,
        by_space=b"X: a\r\n b",
        by_tab=b"X: a\r\n\tb",
        blank=b"X: a\r\n \r\nY: z",
        first_line=b" X: a",
        first_line_by_tab=b"\tX: a",
        blank_first_line=b" \r\nX: a",
        last_line=b"X: a\r\n ",
        Content_Length=b"Content-Length:\r\n 5",
    ),
    Refused("folded: Host", b"GET / HTTP/1.1\r\nHost:\r\n a\r\n\r\n", "5.2"),
    *rows(
        "name",
        "5.1",
        get,
        space_before_the_colon=b"X : a",
        tab_before_the_colon=b"X\t: a",
        spaces_before_the_colon=b"X  : a",
        no_colon=b"X",
        space_within=b"X y: a",
        empty=b": a",
        blank=b" : a",
        space_after_Host=b"X: y\r\nHost : b",
        Content_Length_and_space=b"Content-Length : 5",
    ),
    *rows(
        "name",
        "RFC 9110 5.1",
        get,
        NUL=b"X\x00: a",
        control=b"X\x01: a",
        escape=b"X\x1b: a",
        vertical_tab=b"X\x0b: a",
        delete=b"X\x7f: a",
        obs_text=b"X\x80: a",
        UTF_8=b"X\xc3\xa9: a",
        next_line=b"\x85X: a",
        parenthesis=b"X(: a",
        comma=b"X,: a",
        slash=b"X/: a",
        at=b"X@: a",
        quote=b'"X": a',
        brackets=b"X[0]: a",
        braces=b"X{: a",
        backslash=b"X\\: a",
        semicolon=b"X;a: b",
        equals=b"X=a: b",
        question_mark=b"X?: a",
        less_than=b"<X>: a",
        pseudo_header=b":path: /smuggled",
    ),
    *rows(
        "value",
        "RFC 9110 5.5",
        get,
        NUL=b"X: a\x00b",
        NUL_alone=b"X: \x00",
        control=b"X: a\x01b",
        bell=b"X: a\x07b",
        backspace=b"X: a\x08b",
        vertical_tab=b"X: a\x0bb",
        form_feed=b"X: a\x0cb",
        escape=b"X: \x1b[2J",
        unit_separator=b"X: a\x1fb",
        delete=b"X: a\x7fb",
        in_a_cookie=b"Cookie: a=\x00",
        control_at_the_start=b"X:\x01a",
        control_at_the_end=b"X: a\x01",
    ),
    *rows(
        "chunk size",
        "7.1",
        chunks,
        plus=b"+" + HELLO,
        minus=b"-" + HELLO,
        prefix=b"0x" + HELLO,
        X_prefix=b"0X" + HELLO,
        space_before=b" " + HELLO,
        tab_before=b"\t" + HELLO,
        space_after=b"5 \r\nhello\r\n0\r\n\r\n",
        tab_after=b"5\t\r\nhello\r\n0\r\n\r\n",
        space_after_the_last=b"5\r\nhello\r\n0 \r\n\r\n",
        underscore=b"0_5\r\nhello\r\n0\r\n\r\n",
        no_digit=b"g\r\nhello\r\n0\r\n\r\n",
        suffix=b"5h\r\nhello\r\n0\r\n\r\n",
        empty=b"\r\nhello\r\n0\r\n\r\n",
        list=b"5,5\r\nhello\r\n0\r\n\r\n",
        dot=b"5.0\r\nhello\r\n0\r\n\r\n",
        NUL=b"5\x00\r\nhello\r\n0\r\n\r\n",
        next_line=b"5\x85\r\nhello\r\n0\r\n\r\n",
        vertical_tab=b"5\x0b\r\nhello\r\n0\r\n\r\n",
        full_width=b"\xef\xbc\x95\r\nhello\r\n0\r\n\r\n",
        seventeen_digits=b"10000000000000005\r\nhello\r\n0\r\n\r\n",
        overflow_to_0=b"10000000000000000\r\n\r\n" + SMUGGLED,
        quotes=b'"5"\r\nhello\r\n0\r\n\r\n',
        line_before=b"\r\n5\r\nhello\r\n0\r\n\r\n",
        last_with_a_sign=b"5\r\nhello\r\n-0\r\n\r\n",
    ),
    *rows(
        "chunk line",
        "2.2",
        chunks,
        LF_after_the_size=b"5\nhello\r\n0\r\n\r\n",
        LF_after_the_data=b"5\r\nhello\n0\r\n\r\n",
        LF_after_the_last=b"5\r\nhello\r\n0\n\r\n",
        LF_as_the_end=b"5\r\nhello\r\n0\r\n\n",
        LF_everywhere=b"5\nhello\n0\n\n",
        CR_after_the_size=b"5\rhello\r\n0\r\n\r\n",
        CR_after_the_data=b"5\r\nhello\r0\r\n\r\n",
        CR_after_the_last=b"5\r\nhello\r\n0\r\r\n",
        CR_twice=b"5\r\r\nhello\r\n0\r\n\r\n",
        LF_CR=b"5\n\rhello\n\r0\n\r\n\r",
    ),
    *rows(
        "chunk",
        "7.1",
        chunks,
        shorter_than_said=b"6\r\nhello\r\n0\r\n\r\n",
        longer_than_said=b"4\r\nhello\r\n0\r\n\r\n",
        no_line_end=b"5\r\nhello0\r\n\r\n",
        junk_after=b"5\r\nhelloX\r\n0\r\n\r\n",
        empty_line_after=b"5\r\nhello\r\n\r\n0\r\n\r\n",
    ),
    *rows(
        "extension",
        "7.1.1",
        chunks,
        empty=b"5;\r\nhello\r\n0\r\n\r\n",
        LF=b"5;a\nb\r\nhello\r\n0\r\n\r\n",
        LF_as_the_end=b"5;a\nhello\r\n0\r\n\r\n",
        CR=b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        NUL=b"5;a\x00\r\nhello\r\n0\r\n\r\n",
        space=b"5;a b\r\nhello\r\n0\r\n\r\n",
        open_quote=b'5;a="b\r\nhello\r\n0\r\n\r\n',
        line_end_in_quotes=b'5;a="\r\n"\r\nhello\r\n0\r\n\r\n',
        control_in_quotes=b'5;a="\x01"\r\nhello\r\n0\r\n\r\n',
        next_line=b"5;a\x85\r\nhello\r\n0\r\n\r\n",
    ),
    *rows(
        "trailer",
        "7.1.2",
        trailer,
        space_before_the_colon=b"X : a",
        folded=b"X: a\r\n b",
        NUL=b"X: \x00",
        CR=b"X: a\rb",
        LF=b"X: a\nb",
        empty_name=b": a",
        no_colon=b"X",
        bad_name=b"X(: a",
        space_first=b" X: a",
        length=CL,
        coding=TE,
        request=b"GET /smuggled HTTP/1.1",
    ),
    Refused("trailer: 129 fields", trailer(b"\r\n".join([b"X: a"] * 129)), status=431),
    Refused("Host: missing", b"GET / HTTP/1.1\r\n\r\n", "3.2"),
    Refused("Host: missing beside an absolute URL", b"GET http://a/ HTTP/1.1\r\n\r\n", "3.2"),
    *rows(
        "Host",
        "3.2",
        host,
        two=b" a\r\nHost: b",
        two_equal=b" a\r\nHost: a",
        two_far_apart=b" a\r\nX: y\r\nhost: b",
        second_empty=b" a\r\nHost:",
        empty=b"",
        blank=b" \t",
        userinfo=b" u@a",
        password=b" u:p@a",
        space=b" a b",
        tab=b" a\tb",
        comma=b" a,b",
        comma_and_space=b" a, b",
        path=b" a/b",
        slash=b" a/",
        query=b" a?b",
        fragment=b" a#b",
        URL=b" http://a",
        port_of_letters=b" a:x",
        port_with_a_sign=b" a:+80",
        negative_port=b" a:-1",
        large_port=b" a:65536",
        six_digits=b" a:000080",
        two_ports=b" a:80:80",
        port_alone=b" :80",
        dots=b" a..b",
        two_final_dots=b" a..",
        dot=b" .",
        percent=b" a%20b",
        quotes=b' "a"',
        backslash=b" a\\b",
        open_bracket=b" [::1",
        bracket_and_text=b" [::1]a",
        bad_address=b" [zz]",
        address_without_brackets=b" ::1",
        zone=b" [fe80::1%25eth0]",
        NUL=b" a\x00",
        next_line=b" a\x85",
        UTF_8=b" \xc3\xa9",
        underscore_and_space=b" a_ b",
        hyphen_first=b" -a",
        angle=b" <a>",
        too_long=b" " + b"a" * 254,
        semicolon=b" a;b",
        star=b" *",
    ),
    Refused("Host: two in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", "3.2"),
    Refused("Host: malformed in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n", "3.2"),
    *rows(
        "target",
        "3",
        line,
        space=b"GET /a b HTTP/1.1",
        two_spaces=b"GET  / HTTP/1.1",
        space_after=b"GET /  HTTP/1.1",
        tab=b"GET /a\tb HTTP/1.1",
        missing=b"GET HTTP/1.1",
        blank=b"GET  HTTP/1.1",
        request_in_it=b"GET / HTTP/1.1 HTTP/1.1",
    ),
    *rows(
        "target",
        "3.2",
        line,
        NUL=b"GET /\x00 HTTP/1.1",
        control=b"GET /\x01 HTTP/1.1",
        escape=b"GET /\x1b HTTP/1.1",
        delete=b"GET /\x7f HTTP/1.1",
        obs_text=b"GET /\x80 HTTP/1.1",
        UTF_8=b"GET /\xc3\xa9 HTTP/1.1",
        next_line=b"GET /\x85 HTTP/1.1",
        fragment=b"GET /#f HTTP/1.1",
        fragment_after_a_query=b"GET /?a#b HTTP/1.1",
        fragment_alone=b"GET # HTTP/1.1",
        no_slash=b"GET a HTTP/1.1",
        dots=b"GET ../a HTTP/1.1",
        query_alone=b"GET ?a HTTP/1.1",
        backslash=b"GET \\a HTTP/1.1",
        CR=b"GET /\r HTTP/1.1",
        LF=b"GET /\n HTTP/1.1",
    ),
    *rows(
        "absolute URL",
        "3.2.2",
        line,
        of_another_host=b"GET http://b/ HTTP/1.1",
        of_another_port=b"GET http://a:81/ HTTP/1.1",
        with_userinfo=b"GET http://u@a/ HTTP/1.1",
        without_a_host=b"GET http:///x HTTP/1.1",
        without_slashes=b"GET http:a HTTP/1.1",
        with_one_slash=b"GET http:/a HTTP/1.1",
        of_two_hosts=b"GET http://a,b/ HTTP/1.1",
        with_a_backslash=b"GET http://a\\@b/ HTTP/1.1",
        with_a_fragment=b"GET http://a/#f HTTP/1.1",
        with_a_bad_port=b"GET http://a:x/ HTTP/1.1",
        ftp=b"GET ftp://a/ HTTP/1.1",
        file=b"GET file:///etc/passwd HTTP/1.1",
        ws=b"GET ws://a/ HTTP/1.1",
        percent_in_the_host=b"GET http://%61/ HTTP/1.1",
    ),
    Refused("absolute URL: https without TLS", line(b"GET https://a/ HTTP/1.1"), "RFC 9110 7.4", 421),
    *rows(
        "method",
        "3.1",
        line,
        asterisk_of_GET=b"GET * HTTP/1.1",
        asterisk_of_TRACE=b"TRACE * HTTP/1.1",
        authority_of_GET=b"GET a:80 HTTP/1.1",
        space_first=b" GET / HTTP/1.1",
        NUL=b"G\x00T / HTTP/1.1",
        NUL_first=b"\x00GET / HTTP/1.1",
        parenthesis=b"G(T / HTTP/1.1",
        colon=b"G:T / HTTP/1.1",
        slash=b"G/T / HTTP/1.1",
        obs_text=b"G\x80T / HTTP/1.1",
        byte_order_mark=b"\xef\xbb\xbfGET / HTTP/1.1",
        missing=b"/ HTTP/1.1",
        tab=b"GET\t/ HTTP/1.1",
        answer=b"HTTP/1.1 200 OK",
        asterisk_of_PRI=b"PRI * HTTP/1.1",
        comma=b"GET,POST / HTTP/1.1",
    ),
    Refused("method: CONNECT", line(b"CONNECT a:80 HTTP/1.1"), "RFC 9110 9.3.6", 501),
    Refused("method: CONNECT of a path", line(b"CONNECT / HTTP/1.1"), "RFC 9112 3.2.3"),
    Refused("method: TRACE that goes no further", line(b"TRACE / HTTP/1.1\r\nMax-Forwards: 0"), "RFC 9110 7.6.2", 501),
    Refused(
        "method: OPTIONS that goes no further", line(b"OPTIONS * HTTP/1.1\r\nMax-Forwards: 0"), "RFC 9110 7.6.2", 501
    ),
    Refused("method: OPTIONS that goes -1 further", line(b"OPTIONS * HTTP/1.1\r\nMax-Forwards: -1"), "RFC 9110 7.6.2"),
    Refused(
        "method: two Max-Forwards", line(b"TRACE / HTTP/1.1\r\nMax-Forwards: 1\r\nMax-Forwards: 2"), "RFC 9110 7.6.2"
    ),
    *rows(
        "version",
        "2.3",
        line,
        HTTP_0_9_simple=b"GET /",
        HTTP_0_9=b"GET / HTTP/0.9",
        HTTP_1_2=b"GET / HTTP/1.2",
        HTTP_1_10=b"GET / HTTP/1.10",
        HTTP_2=b"GET / HTTP/2",
        HTTP_2_0=b"GET / HTTP/2.0",
        HTTP_3=b"GET / HTTP/3.0",
        lower_case=b"GET / http/1.1",
        mixed_case=b"GET / Http/1.1",
        no_minor=b"GET / HTTP/1.",
        no_digits=b"GET / HTTP/",
        leading_zero=b"GET / HTTP/01.1",
        sign=b"GET / HTTP/+1.1",
        comma=b"GET / HTTP/1,1",
        space_within=b"GET / HTTP/1. 1",
        space_after=b"GET / HTTP/1.1 ",
        tab_after=b"GET / HTTP/1.1\t",
        word_after=b"GET / HTTP/1.1 X",
        vertical_tab_after=b"GET / HTTP/1.1\x0b",
        RTSP=b"GET / RTSP/1.0",
        ICE=b"SOURCE / ICE/1.0",
        preface_of_HTTP_2=b"PRI * HTTP/2.0",
        HTTPS=b"GET / HTTPS/1.1",
        NUL=b"GET / HTTP/1.1\x00",
    ),
    Refused("not HTTP: a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    Refused("not HTTP: nearly the HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\n"),
    Refused("not HTTP: PROXY protocol", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    Refused("size: target", line(b"GET /" + b"a" * 8192 + b" HTTP/1.1"), status=414),
    Refused("size: line", line(b"GET /" + b"a" * 70_000 + b" HTTP/1.1"), status=414),
    Refused("size: method", line(b"A" * 70_000 + b" / HTTP/1.1"), status=414),
    Refused("size: field", get(b"X: " + b"a" * 65_536), status=431),
    Refused("size: name", get(b"X" * 65_536 + b": a"), status=431),
    Refused("size: fields", get(b"\r\n".join([b"X: a"] * 128)), status=431),
    Refused("size: head", get(b"\r\n".join([b"X: " + b"a" * 1000] * 70)), status=431),
    Refused("tunnel: two named", get(b"X-Tunnel-Session: app\r\nX-Tunnel-Session: app")),
]


def groups(table: list[Row]) -> dict[str, list[Row]]:
    """The rows by what comes before the colon of their names: a test of its own for each row would cost more time."""
    found: dict[str, list[Row]] = {}
    for row in table:
        found.setdefault(row.name.partition(":")[0], []).append(row)
    return found


BY_GROUP = groups(REFUSED)


@pytest.mark.parametrize("group", BY_GROUP)
def test_refused_request_is_never_seen_nor_is_what_follows_it(group: str, one_tunnel: Tunnel) -> None:
    for row in BY_GROUP[group]:
        recorder.clear()
        with RawVisitor(one_tunnel.address) as visitor:
            visitor.send(row.data + SMUGGLED)
            got = visitor.read_answer()
            said = (got.status, got.error, got["connection"])
            assert (row.name, *said) == (row.name, row.status, "http_request_error", "close")
            assert (row.name, visitor.read_all()) == (row.name, b""), "another answer"
            with suppress(OSError):
                visitor.send(SMUGGLED)
            ordinary(one_tunnel)
        assert (row.name, recorder.whole, recorder.cut) == (row.name, [at_backend(b"GET /ordinary")], [])


def ordinary(tunnel: Tunnel) -> None:
    """An ordinary request on a connection of its own is answered."""
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(ORDINARY)
        assert visitor.read_answer().status == 200


def test_request_is_refused_however_it_is_split(one_tunnel: Tunnel) -> None:
    for row in [row for row in REFUSED if len(row.data) < 1000][::5]:
        recorder.clear()
        head = row.data.partition(b"\r\n\r\n")[0]
        with RawVisitor(one_tunnel.address) as visitor:
            visitor.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError):  # refused already
                for at in range(len(head)):
                    visitor.send(head[at : at + 1])
                visitor.send(row.data[len(head) :] + SMUGGLED)
            got = visitor.read_answer()
            assert (row.name, got.status, got["connection"]) == (row.name, row.status, "close")
            ordinary(one_tunnel)
        assert (row.name, recorder.whole, recorder.cut) == (row.name, [at_backend(b"GET /ordinary")], [])


def test_refused_connection_is_dead_for_good(one_tunnel: Tunnel) -> None:
    """The first of two requests is answered, the second refused; nothing after that counts."""
    with RawVisitor(one_tunnel.address) as visitor:
        visitor.send(ORDINARY)
        assert visitor.read_answer().status == 200
        visitor.send(post(CL + b"\r\n" + TE, HELLO))
        assert visitor.read_answer().status == 400
        for _ in range(3):
            with suppress(OSError):
                visitor.send(SMUGGLED)
        assert visitor.read_all() == b""
    ordinary(one_tunnel)
    assert recorder.whole == [at_backend(b"GET /ordinary")] * 2
    assert recorder.cut == []


# Refused when the backend has the beginning already

LATE = {
    "size with a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "size with a prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "size that overflows": b"10000000000000000\r\n\r\n",
    "size of junk": b"zz\r\n0\r\n\r\n",
    "LF after the size": b"5\nhello\r\n0\r\n\r\n",
    "LF after the data": b"5\r\nhello\n0\r\n\r\n",
    "LF as the end": b"0\r\n\n",
    "longer than said": b"1\r\nhello\r\n0\r\n\r\n",
    "CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "NUL in a trailer": b"0\r\nX: \x00\r\n\r\n",
    "length in a trailer": b"0\r\nContent-Length: 5\r\n\r\n",
    "extension without end": b"5;" + b"a" * 70_000,
    "extensions without content": b"1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n" * 4000,
    "trailers without end": b"0\r\nX: " + b"a" * 70_000,
}


@pytest.mark.parametrize("rest", LATE.values(), ids=LATE.keys())
def test_request_that_goes_wrong_late_is_cut_at_the_backend(rest: bytes, tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(chunks(b"3\r\nabc\r\n"))
        poll(lambda: recorder.begun.endswith(b"3\r\nabc\r\n"), what="the beginning at the backend")
        with suppress(OSError):
            visitor.send(rest + SMUGGLED)
        got = visitor.read_answer()
        assert (got.status in (400, 431), got.error, got["connection"]) == (True, "http_request_error", "close")
    poll(lambda: recorder.cut, what="the end at the backend")
    ordinary(tunnel)
    assert recorder.whole == [at_backend(b"GET /ordinary")], "a cut request that looked whole, or a smuggled one"
    [cut] = recorder.cut
    head = at_backend(b"POST /", ours=(TE,))
    assert cut.startswith(head + b"3\r\nabc\r\n")
    assert b"smuggled" not in cut


# What passes


class Passed(NamedTuple):
    """Bytes of which the backend sees exactly ``seen``; each of them is answered."""

    name: str
    data: bytes
    seen: tuple[bytes, ...]
    closed: bool = False
    "afterwards"


def passes(name: str, data: bytes, *seen: bytes, closed: bool = False) -> Passed:
    return Passed(name, data, seen, closed)


def target(name: str, sent: bytes) -> Passed:
    return passes(f"target: {name}", line(b"GET " + sent + b" HTTP/1.1"), at_backend(b"GET " + sent))


def fields(name: str, sent: bytes, *seen: bytes, ours: tuple[bytes, ...] = (), closed: bool = False) -> Passed:
    return passes(name, get(sent), at_backend(b"GET /", *seen, ours=ours), closed=closed)


def upload(name: str, sent: bytes, *seen: bytes, ours: tuple[bytes, ...] = (), body: bytes = b"hello") -> Passed:
    return passes(name, post(sent, body), at_backend(b"POST /", *seen, ours=ours, body=body))


def chunked(name: str, sent: bytes, seen: bytes = HELLO) -> Passed:
    return passes(f"chunks: {name}", chunks(sent), at_backend(b"POST /", ours=(TE,), body=seen))


def gone(group: str, *sent: bytes) -> list[Passed]:
    """Fields that the backend does not get."""
    return [fields(f"{group}: {each.decode('latin-1')}", each) for each in sent]


NOT_IN_TRAILERS = (
    b"Host Authorization Cookie Expect Connection TE Upgrade Proxy X-Tunnel-Session X-Forwarded-For X-Forwarded-User "
    b"Forwarded Via X-Real-IP Content_Length X_Forwarded_For X_Forwarded_User HTTP2-Settings Proxy-Status"
)
PASSED = [
    # Byte-exact: the target (RFC 9112 section 3.2), the method, fields in their order, repeats, values.
    target("dots and slashes", b"//a/../b/%2e%2E/;x=1?q=a%20b&c"),
    target("NUL in an escape", b"/%00"),
    target("line end in an escape", b"/%0d%0aX:%20y"),
    target("escapes in either case", b"/%c3%A9/%7e/%2F%2f"),
    target("broken escapes", b"/%/%2/%zz"),
    target("brackets and quotes", b"/\"<>\\^`{|}[]'"),
    target("question marks", b"/??a=?&&=;b"),
    target("plus and spaces", b"/a+b%20c"),
    target("URL in the path", b"/http://b/"),
    target("at sign", b"/@b:80//c"),
    target("dot segments", b"/./../..//."),
    target("tilde and colons", b"/~a:b;c,d=$e!f*(g)"),
    target("empty query", b"/?"),
    target("very long query", b"/?" + b"a=%20&" * 1360),
    target("backslashes", b"/..\\..\\a"),
    *(
        passes(f"method: {method.decode()}", line(method + b" /x HTTP/1.1"), at_backend(method + b" /x"))
        for method in b"get Get DELETE OPTIONS TRACE PATCH PROPFIND M-SEARCH QUERY FOO PRI a!#$%&'*+-.^_`|~".split()
    ),
    passes("asterisk-form", line(b"OPTIONS * HTTP/1.1"), at_backend(b"OPTIONS *")),
    passes("absolute-form", line(b"GET http://a/x?y HTTP/1.1"), at_backend(b"GET /x?y")),
    passes("absolute-form: no path", line(b"GET http://a HTTP/1.1"), at_backend(b"GET /")),
    passes("absolute-form: query alone", line(b"GET http://a?y HTTP/1.1"), at_backend(b"GET /?y")),
    passes("absolute-form: in capitals", line(b"GET HTTP://A/ HTTP/1.1"), at_backend(b"GET /", host=b"A")),
    passes("absolute-form: dots", line(b"GET http://a/../%2e//b HTTP/1.1"), at_backend(b"GET /../%2e//b")),
    passes("absolute-form: OPTIONS of a server", line(b"OPTIONS http://a HTTP/1.1"), at_backend(b"OPTIONS *")),
    passes("absolute-form: OPTIONS of a path", line(b"OPTIONS http://a/ HTTP/1.1"), at_backend(b"OPTIONS /")),
    passes(
        "absolute-form: without Host in HTTP/1.0",
        b"GET http://b/x HTTP/1.0\r\n\r\n",
        at_backend(b"GET /x", host=b"b", via=b"1.0"),
        closed=True,
    ),
    *(
        passes(f"Host: {name.decode()}", host(b" " + name), at_backend(b"GET /", host=name))
        for name in (
            b"A.Example.COM",
            b"a.",
            b"a:8080",
            b"a:",
            b"A.:80",
            b"[::1]",
            b"[::1]:80",
            b"127.0.0.1",
            b"a_b.c-d",
            b"xn--bcher-kva.example",
        )
    ),
    passes("Host: white space around it", host(b"\t a \t"), at_backend(b"GET /")),
    passes("Host: not first", b"GET / HTTP/1.1\r\nX: y\r\nhOST:a\r\n\r\n", at_backend(b"GET /", b"x: y")),
    fields(
        "fields: repeats in order",
        b"Cookie: a\r\nX: 1\r\nX: 2\r\nCookie: b\r\nx: 1",
        b"cookie: a",
        b"x: 1",
        b"x: 2",
        b"cookie: b",
        b"x: 1",
    ),
    fields("fields: empty values", b"X:\r\nY: \r\nZ:\t", b"x: ", b"y: ", b"z: "),
    fields("fields: obs-text", b"X: \x80\xff\xc3\xa9\x85\xa0", b"x: \x80\xff\xc3\xa9\x85\xa0"),
    fields("fields: white space", b"X:a\r\nY:  \ta  b\tc \t", b"x: a", b"y: a  b\tc"),
    fields("fields: tabs and commas", b'X: ,a,,\tb;"c, d"', b'x: ,a,,\tb;"c, d"'),
    fields("fields: odd names", b"!#$%&'*+-.^_`|~09: x", b"!#$%&'*+-.^_`|~09: x"),
    fields("fields: own underscores", b"My_Own: 1\r\nContent_Type: a", b"my_own: 1", b"content_type: a"),
    fields("fields: colons in a value", b"X: :a: b", b"x: :a: b"),
    fields("fields: a request in a value", b"X: GET /smuggled HTTP/1.1", b"x: GET /smuggled HTTP/1.1"),
    fields(
        "fields: credentials and conditions",
        b'Authorization: B x\r\nIf-None-Match: "a"\r\nRange: bytes=0-',
        b"authorization: B x",
        b'if-none-match: "a"',
        b"range: bytes=0-",
    ),
    fields("fields: as many as may be", b"\r\n".join([b"X: y"] * 127), *[b"x: y"] * 127),
    fields("fields: large", b"X: " + b"y" * 60_000, b"x: " + b"y" * 60_000),
    # Hop by hop (RFC 9110 section 7.6.1).
    *gone(
        "hop by hop",
        b"Connection: keep-alive",
        b"Keep-Alive: timeout=5",
        b"Proxy-Connection: close",
        b"Proxy-Connection: keep-alive",
        b"Proxy-Authorization: x",
        b"Proxy-Authenticate: x",
        b"TE: gzip",
        b"Connection: TE\r\nTE: gzip;q=1",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
    ),
    fields("hop by hop: TE", b"Connection: TE\r\nTE: gzip, Trailers", ours=(b"te: trailers", b"Connection: TE")),
    fields("nominated: one", b"Connection: X-Hop\r\nX-Hop: 1\r\nY: 2", b"y: 2"),
    fields("nominated: in lists and lines", b"Connection: , x ,\tY\r\nconnection: Z\r\nX: 1\r\nZ: 3\r\ny: 2"),
    fields("nominated: Host stays", b"Connection: Host"),
    fields("nominated: what the tunnel says stays", b"Connection: X-Forwarded-For, Forwarded, Via, X-Forwarded-Host"),
    fields("nominated: Cookie", b"Connection: cookie\r\nCookie: a"),
    fields("nominated: close", b"Connection: X, close\r\nX: y", closed=True),
    upload("nominated: Content-Length stays", b"Connection: Content-Length\r\n" + CL, b"content-length: 5"),
    upload(
        "nominated: Transfer-Encoding is made anew", b"Connection: Transfer-Encoding\r\n" + TE, ours=(TE,), body=HELLO
    ),
    # Claims (RFC 9110 section 17.3.3): what the tunnel says itself, or nobody.
    *gone(
        "claim",
        b"X-Forwarded-For: 1.2.3.4",
        b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 5.6.7.8",
        b"X-Forwarded-Host: b",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Port: 1",
        b"X-Forwarded-Prefix: /b",
        b"X-Forwarded-Server: b",
        b"X-Forwarded-Ssl: on",
        b"X-Forwarded-Scheme: https",
        b"X-Forwarded-User: root",
        b"X-Forwarded-Client-Cert: By=b",
        b"X-Forwarded-Anything: b",
        b"X-Forwarded: b",
        b"Forwarded: for=1.2.3.4;host=b",
        b"Via: 1.1 b",
        b"Proxy-Status: b; error=dns_error",
        b"X-Real-IP: 1.2.3.4",
        b"x-FORWARDED-for: 1.2.3.4",
        b"Proxy: http://b",
        b"PROXY: b",
    ),
    fields("claim: the tunnel's name", b"X-Tunnel-Session: app"),
    # Shadows: an application behind CGI or WSGI takes them for the field itself.
    *gone(
        "shadow",
        b"Content_Length: 5",
        b"Transfer_Encoding: chunked",
        b"X_Forwarded_For: 1.2.3.4",
        b"X-Forwarded_For: 1.2.3.4",
        b"X_Forwarded-For: 1.2.3.4",
        b"X_Forwarded_Host: b",
        b"X_Forwarded_Proto: https",
        b"X_Forwarded_User: root",
        b"X-Forwarded_Client_Cert: b",
        b"X_Real_IP: 1.2.3.4",
        b"X_Real-IP: 1.2.3.4",
        b"X_Tunnel_Session: b",
        b"X-Tunnel_Session: b",
        b"Proxy_Status: b",
        b"Proxy_Authorization: b",
        b"Proxy_Connection: close",
        b"Keep_Alive: b",
        b"HTTP2_Settings: AAAA",
        b"cONTENT_lENGTH: 5",
    ),
    upload(
        "shadow: beside the field itself",
        CL + b"\r\nContent_Length: 50\r\nTransfer_Encoding: chunked",
        b"content-length: 5",
    ),
    # Another protocol (RFC 9110 section 7.8).
    *gone(
        "protocol",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
        b"HTTP2-Settings: AAAA",
        b"Connection: upgrade\r\nUpgrade: H2C",
        b"Connection: upgrade\r\nUpgrade: h2c\r\nUpgrade: h2",
        b'Connection: upgrade\r\nUpgrade: "h2c"',
        b"Connection: upgrade\r\nUpgrade: h2c;q=1",
        b"Connection: upgrade\r\nUpgrade: h2c x",
        b"Connection: upgrade\r\nUpgrade: h2c/1.0",
        b"Connection: upgrade\r\nUpgrade:",
        b"Connection: upgrade\r\nUpgrade: ,",
    ),
    fields(
        "protocol: a better one beside h2c",
        b"Connection: Upgrade\r\nUpgrade: h2c, websocket",
        ours=(b"Connection: Upgrade", b"Upgrade: websocket"),
    ),
    upload("protocol: with a body", b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + CL, b"content-length: 5"),
    passes(
        "protocol: in HTTP/1.0",
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        at_backend(b"GET /", via=b"1.0"),
        closed=True,
    ),
    # Bodies (RFC 9112 sections 6 and 7).
    upload("length", CL, b"content-length: 5"),
    upload("length: with zeros", b"Content-Length:\t0005 ", b"content-length: 0005"),
    upload("length: 0", b"Content-Length: 0", b"content-length: 0", body=b""),
    passes("length: of GET", get(CL) + b"hello", at_backend(b"GET /", b"content-length: 5", body=b"hello")),
    upload(
        "length: a request as the body",
        b"Content-Length: %d" % len(SMUGGLED),
        b"content-length: %d" % len(SMUGGLED),
        body=SMUGGLED,
    ),
    passes("no length", line(b"POST / HTTP/1.1"), at_backend(b"POST /")),
    upload("coding: in capitals", b"Transfer-Encoding:\tCHUNKED ", ours=(TE,), body=HELLO),
    chunked("several", b"2\r\nhe\r\n03\r\nllo\r\n0\r\n\r\n"),
    chunked("none", b"0\r\n\r\n", b"0\r\n\r\n"),
    chunked("many zeros", b"000000000005\r\nhello\r\n0000\r\n\r\n"),
    chunked("size in capitals", b"A\r\n0123456789\r\n0\r\n\r\n", b"a\r\n0123456789\r\n0\r\n\r\n"),
    chunked("extensions", b'5;a;b=c;d="e f\\"";g=1\r\nhello\r\n0;last\r\n\r\n'),
    chunked("extension of 1000 bytes", b"5;" + b"a" * 1000 + b"\r\nhello\r\n0\r\n\r\n"),
    *(
        chunked(name, content, content)
        for name, content in {
            "line ends as content": b"8\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n",
            "an end as content": b"7\r\n0\r\n\r\n\r\n\r\n0\r\n\r\n",
            "a request as content": b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
        }.items()
    ),
    chunked(
        "trailers",
        b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-Sum: 2\r\nY:\r\n\r\n",
        b"5\r\nhello\r\n0\r\nx-sum: 1\r\nx-sum: 2\r\ny: \r\n\r\n",
    ),
    chunked(
        "trailers of a head",
        b"5\r\nhello\r\n0\r\n%b\r\n" % b"".join(b"%b: b\r\n" % name for name in NOT_IN_TRAILERS.split()),
    ),
    passes(
        "body in HTTP/1.0",
        post(CL, version=b"1.0"),
        at_backend(b"POST /", b"content-length: 5", via=b"1.0", body=b"hello"),
        closed=True,
    ),
    passes("no body in HTTP/1.0", post(b"X: y", b"", b"1.0"), at_backend(b"POST /", b"x: y", via=b"1.0"), closed=True),
    # Expectations (RFC 9110 section 10.1.1).
    upload("expectation", b"Expect: 100-continue\r\n" + CL, b"expect: 100-continue", b"content-length: 5"),
    upload("expectation: unknown", b"Expect: x 100-continue\r\n" + CL, b"expect: x 100-continue", b"content-length: 5"),
    upload("expectation: in chunks", b"Expect: 100-continue\r\n" + TE, b"expect: 100-continue", ours=(TE,), body=HELLO),
    fields("expectation: of no body", b"Expect: 100-continue", b"expect: 100-continue"),
    passes(
        "expectation: in HTTP/1.0",
        post(b"Expect: 100-continue\r\n" + CL, version=b"1.0"),
        at_backend(b"POST /", b"content-length: 5", via=b"1.0", body=b"hello"),
        closed=True,
    ),
    # How far it may go (RFC 9110 section 7.6.2).
    passes(
        "Max-Forwards: of TRACE",
        line(b"TRACE / HTTP/1.1\r\nMax-Forwards: 1"),
        at_backend(b"TRACE /", b"max-forwards: 0"),
    ),
    fields("Max-Forwards: of GET", b"Max-Forwards: 0", b"max-forwards: 0"),
    # The connection (RFC 9112 section 9.3) and what follows.
    fields("close", b"Connection: close", closed=True),
    fields("close: in a list", b"Connection: keep-alive, CLOSE", closed=True),
    fields("close: something like it", b"Connection: closed, close-x"),
    passes("HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", at_backend(b"GET /", via=b"1.0"), closed=True),
    passes(
        "HTTP/1.0: kept",
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n",
        at_backend(b"GET /", via=b"1.0"),
    ),
    passes("empty lines before", b"\r\n\r\n" + line(b"GET / HTTP/1.1"), at_backend(b"GET /")),
    passes("empty line after a body", post(CL) + b"\r\n", at_backend(b"POST /", b"content-length: 5", body=b"hello")),
    passes(
        "two",
        post(TE, HELLO) + line(b"GET /2 HTTP/1.1"),
        at_backend(b"POST /", ours=(TE,), body=HELLO),
        at_backend(b"GET /2"),
    ),
    passes(
        "two: after a length",
        post(CL) + line(b"GET /2 HTTP/1.1"),
        at_backend(b"POST /", b"content-length: 5", body=b"hello"),
        at_backend(b"GET /2"),
    ),
    passes(
        "two: after one whose proxy would close",
        get(b"Proxy-Connection: close") + line(b"GET /2 HTTP/1.1"),
        at_backend(b"GET /"),
        at_backend(b"GET /2"),
    ),
    passes(
        "two: after h2c",
        get(b"Connection: upgrade\r\nUpgrade: h2c") + line(b"GET /2 HTTP/1.1"),
        at_backend(b"GET /"),
        at_backend(b"GET /2"),
    ),
    passes(
        "two: the first closes", get(b"Connection: close") + line(b"GET /2 HTTP/1.1"), at_backend(b"GET /"), closed=True
    ),
    passes(
        "two: a GET with no body and bytes that look like one",
        line(b"GET / HTTP/1.1") + b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
        at_backend(b"GET /"),
        at_backend(b"GET /2"),
    ),
]


PASSED_BY_GROUP = groups(PASSED)


@pytest.mark.parametrize("group", PASSED_BY_GROUP)
def test_request_reaches_the_backend_byte_for_byte(group: str, tunnel: Tunnel) -> None:
    for row in PASSED_BY_GROUP[group]:
        recorder.clear()
        seen = list(row.seen)
        with RawVisitor(tunnel.address) as visitor:
            visitor.send(row.data)
            for _ in row.seen:
                assert (row.name, visitor.read_answer().status) == (row.name, 200)
            if row.closed:
                assert (row.name, visitor.read_all()) == (row.name, b"")
            else:
                visitor.send(ORDINARY)
                assert (row.name, visitor.read_answer().status) == (row.name, 200)
                seen.append(at_backend(b"GET /ordinary"))
        assert (row.name, recorder.whole, recorder.cut) == (row.name, seen, [])


def test_answer_to_head_request_leaves_the_connection_in_step(tunnel: Tunnel) -> None:
    with RawVisitor(tunnel.address) as visitor:
        visitor.send(line(b"HEAD /x HTTP/1.1") + ORDINARY)
        assert visitor.read_answer("HEAD").status == 200
        assert visitor.read_answer().status == 200
    assert recorder.whole == [at_backend(b"HEAD /x"), at_backend(b"GET /ordinary")]


def test_the_tables_are_as_long_as_they_should_be() -> None:
    names = [row.name for row in REFUSED] + [row.name for row in PASSED]
    assert len(REFUSED) >= 300
    assert len(PASSED) >= 150
    assert len(set(names)) == len(names)
    assert len({row.data for row in REFUSED}) == len(REFUSED)
