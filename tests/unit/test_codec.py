import time
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.wire.codec import (
    EMPTY_DATA,
    FrameType,
    StreamDecoder,
    encode_data,
    encode_head,
    encode_trailers,
    pull_varint,
    push_varint,
)
from quictunnel.wire.errors import ProtocolError
from quictunnel.wire.frames import PROBE, Data, End, Frame, RequestHead, ResponseHead

LIMIT = 65536

names = st.from_regex(rb"[a-z][a-z0-9-]{0,20}", fullmatch=True)
values = st.binary(max_size=60).map(lambda value: value.replace(b"\0", b" "))
fields = st.lists(st.tuples(names, values), max_size=8)
requests = st.builds(
    RequestHead,
    st.sampled_from([b"GET", b"POST", b"brew"]),
    st.sampled_from([b"http", b"https"]),
    st.binary(max_size=20),
    st.binary(max_size=40).map(lambda path: b"/" + path) | st.just(b"*"),
    fields,
    st.booleans(),
    st.sampled_from([b"", b"websocket"]),
)
responses = st.builds(ResponseHead, st.integers(200, 999), fields)
bodies = st.lists(st.binary(min_size=1, max_size=50), max_size=5)


def decode(data: bytes, *, is_request: bool, cuts: list[int] | None = None, fin: bool = True) -> list[Frame]:
    decoder = StreamDecoder(is_request=is_request, head_limit=LIMIT)
    frames: list[Frame] = []
    edges = sorted({cut % (len(data) + 1) for cut in cuts or []} | {0, len(data)})
    for start, end in pairwise(edges):
        frames += decoder.feed(data[start:end], False)
    if fin:
        frames += decoder.feed(b"", True)
    return merged(frames)


def merged(frames: list[Frame]) -> list[Frame]:
    """Frames with neighbouring Data made one: where a body is cut says nothing."""
    result: list[Frame] = []
    for frame in frames:
        if isinstance(frame, Data) and result and isinstance(result[-1], Data):
            result[-1] = Data(result[-1].data + frame.data)
        else:
            result.append(frame)
    return result


@given(st.integers(0, 2**62 - 1), st.binary(max_size=3))
def test_a_varint_comes_back_and_ends_where_it_ended(value: int, rest: bytes) -> None:
    encoded = push_varint(value)
    assert pull_varint(b"x" + encoded + rest, 1) == (value, 1 + len(encoded))
    assert all(pull_varint(encoded[:size], 0)[1] == -1 for size in range(len(encoded)))


@pytest.mark.parametrize("value", [-1, 2**62])
def test_a_number_that_fits_no_varint_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        push_varint(value)


@given(requests, bodies, fields, st.lists(st.integers(0, 10_000), max_size=12))
def test_a_request_is_the_same_however_its_bytes_are_split(
    head: RequestHead, body: list[bytes], trailers: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    encoded = encode_head(head)
    expected: list[Frame] = [head]
    if head.body:
        encoded += EMPTY_DATA + b"".join(encode_data(part) + part for part in body)
        expected += [Data(b"".join(body))] if body else []
        if trailers:
            encoded += encode_trailers(trailers)
    expected.append(End(trailers if head.body else []))
    assert decode(encoded, is_request=True, cuts=cuts) == expected


@given(st.lists(st.integers(100, 199).filter(lambda status: status != 101), max_size=3), responses, bodies,
       st.lists(st.integers(0, 10_000), max_size=12))  # fmt: skip
def test_a_response_is_the_same_however_its_bytes_are_split(
    informational: list[int], head: ResponseHead, body: list[bytes], cuts: list[int]
) -> None:
    heads: list[Frame] = [*(ResponseHead(status, []) for status in informational), head]
    encoded = b"".join(encode_head(each) for each in heads if isinstance(each, ResponseHead))
    encoded += b"".join(encode_data(part) + part for part in body)
    expected = [*heads, *([Data(b"".join(body))] if body else []), End()]
    assert decode(encoded, is_request=False, cuts=cuts) == expected


@given(st.binary(max_size=200), st.booleans(), st.lists(st.integers(0, 200), max_size=4))
def test_garbage_gives_a_protocol_error_and_nothing_else(data: bytes, is_request: bool, cuts: list[int]) -> None:
    with suppress(ProtocolError):
        decode(data, is_request=is_request, cuts=cuts)


@given(responses, bodies, st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_gives_frames_or_a_protocol_error(
    head: ResponseHead, body: list[bytes], at: int, by: int
) -> None:
    encoded = bytearray(encode_head(head) + b"".join(encode_data(part) + part for part in body))
    encoded[at % len(encoded)] ^= by
    with suppress(ProtocolError):
        decode(bytes(encoded), is_request=False)


def test_a_request_waits_until_it_is_known_whether_a_body_follows() -> None:
    head = RequestHead(b"GET", b"http", b"a", b"/", [])
    decoder = StreamDecoder(is_request=True, head_limit=LIMIT)
    assert decoder.feed(encode_head(head), False) == []
    assert decoder.feed(b"", True) == [head, End()]
    decoder = StreamDecoder(is_request=True, head_limit=LIMIT)
    assert decoder.feed(encode_head(head) + EMPTY_DATA, False) == [head._replace(body=True)]


def test_a_frame_of_an_unknown_type_is_skipped_wherever_it_stands() -> None:
    unknown = push_varint(0x21) + push_varint(5) + b"12345"
    head = ResponseHead(200, [])
    data = unknown + encode_head(head) + unknown + encode_data(b"ab") + b"ab" + unknown
    assert decode(data, is_request=False, cuts=list(range(len(data)))) == [head, Data(b"ab"), End()]


HEAD = encode_head(ResponseHead(200, []))
SCHEME = [(b":scheme", b"http")]
PLACE = [(b":authority", b"a"), (b":path", b"/")]


@pytest.mark.parametrize(
    ("data", "is_request", "says"),
    [
        (encode_data(b"x") + b"x", False, "DATA where none may be"),
        (HEAD + encode_data(b"xy") + b"x", False, "ends within a frame"),
        (HEAD[:-1], False, "ends within a frame"),
        (b"", False, "before its head"),
        (encode_head(ResponseHead(103, [])), False, "before its head"),
        (HEAD + encode_trailers([(b"a", b"b")]) * 2, False, "after the trailers"),
        (HEAD + encode_trailers([(b"a", b"b")]) + encode_data(b"x") + b"x", False, "DATA where none may be"),
        (HEAD + HEAD, False, "pseudo-header"),
        (encode_trailers([(b"a", b"b")]), False, ":status first"),
        (encode_trailers([(b":status", b"20")]), False, ":status is"),
        (encode_trailers([(b":status", b"099")]), False, ":status is"),
        (encode_trailers([(b":status", b"+20")]), False, ":status is"),
        (encode_trailers([(b":status", b"200"), (b":status", b"200")]), False, "pseudo-header"),
        (push_varint(FrameType.HEADERS) + b"\x07\x00\x00\xd9\x20\x01x\x00"[:8], False, "field|within a frame"),
        (encode_trailers([(b":method", b"GET")]), True, "needs :method"),
        (encode_trailers([(b":method", b""), *SCHEME, *PLACE]), True, "needs :method"),
        (encode_trailers([(b":method", b"GET"), (b":scheme", b"ftp"), *PLACE]), True, "neither http"),
        (encode_trailers([(b":method", b"GET"), (b":scheme", b"quictunnel"), *PLACE]), True, "neither http"),
        (encode_head(PROBE._replace(fields=[(b"a", b"b")])), True, "neither http"),
        (encode_trailers([*PLACE, (b":method", b"GET"), *SCHEME]), True, "in this order"),
        (push_varint(FrameType.HEADERS) + push_varint(LIMIT + 1), False, "over the limit"),
        (push_varint(0x21) + push_varint(1 << 21), False, "unknown type"),
        (push_varint(FrameType.HEADERS) + push_varint(3) + b"\x02\x00\x80", False, "field section"),
    ],
)  # fmt: skip
def test_what_the_table_does_not_allow_is_a_protocol_error(data: bytes, is_request: bool, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode(data, is_request=is_request)


def test_a_blocked_section_does_not_spoil_the_decoder_for_others() -> None:
    with pytest.raises(ProtocolError):
        decode(push_varint(FrameType.HEADERS) + push_varint(3) + b"\x02\x00\x80", is_request=False)
    assert decode(HEAD, is_request=False) == [ResponseHead(200, []), End()]


def test_a_fin_after_the_end_changes_nothing() -> None:
    decoder = StreamDecoder(is_request=False, head_limit=LIMIT)
    assert decoder.feed(HEAD, True) == [ResponseHead(200, []), End()]
    assert decoder.feed(b"", True) == []


# What a peer can make a decoder hold and do


def outcome(data: bytes, *, is_request: bool, cuts: list[int]) -> tuple[list[Frame], str]:
    """The frames before an error, those of the piece that it came in left out, and the error."""
    decoder = StreamDecoder(is_request=is_request, head_limit=LIMIT)
    frames: list[Frame] = []
    edges = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    try:
        for start, end in pairwise(edges):
            frames += decoder.feed(data[start:end], False)
        frames += decoder.feed(b"", True)
    except ProtocolError as error:
        return merged(frames), str(error)
    return merged(frames), ""


messy = st.lists(
    st.one_of(
        responses.map(encode_head),
        requests.map(encode_head),
        fields.map(encode_trailers),
        st.binary(max_size=30).map(lambda part: encode_data(part) + part),
        st.binary(max_size=12),
        st.binary(max_size=20).map(lambda part: push_varint(0x21) + push_varint(len(part)) + part),
    ),
    max_size=6,
).map(b"".join)


@given(messy, st.booleans(), st.lists(st.integers(0, 10_000), max_size=12))
def test_what_is_wrong_is_as_wrong_however_its_bytes_are_split(data: bytes, is_request: bool, cuts: list[int]) -> None:
    whole, error = outcome(data, is_request=is_request, cuts=[])
    split, split_error = outcome(data, is_request=is_request, cuts=cuts)
    single, single_error = outcome(data, is_request=is_request, cuts=list(range(len(data))))
    assert error == split_error == single_error
    if not error:
        assert whole == split == single


@given(messy, st.booleans())
def test_nothing_more_is_kept_than_the_frame_that_is_not_whole(data: bytes, is_request: bool) -> None:
    decoder = StreamDecoder(is_request=is_request, head_limit=100)
    with suppress(ProtocolError):
        for at in range(len(data)):
            decoder.feed(data[at : at + 1], False)
            assert len(decoder._buffer) <= 100 + 16


def test_head_that_comes_byte_by_byte_costs_no_more_than_its_bytes() -> None:
    def seconds(size: int) -> float:
        data = push_varint(FrameType.HEADERS) + push_varint(size) + bytes(size)
        decoder = StreamDecoder(is_request=False, head_limit=1 << 18)
        began = time.thread_time()
        for at in range(len(data) - 1):
            decoder.feed(data[at : at + 1], False)
        return time.thread_time() - began

    # Eight times the bytes: 64 times the work if each byte copied what is there.
    assert min(seconds(1 << 18) for _ in range(2)) < 24 * min(seconds(1 << 15) for _ in range(3))


def test_section_that_is_small_and_decodes_to_megabytes_is_refused() -> None:
    # Static index 57: strict-transport-security with a long value, in one byte.
    data = push_varint(FrameType.HEADERS) + push_varint(50_003) + b"\x00\x00\xd9" + b"\xf9" * 50_000
    with pytest.raises(ProtocolError, match="over the limit"):
        StreamDecoder(is_request=False, head_limit=LIMIT).feed(data, False)


def test_informational_heads_have_room_for_one_head_together() -> None:
    decoder = StreamDecoder(is_request=False, head_limit=LIMIT)
    interim = encode_head(ResponseHead(103, [(b"link", b"x" * 4000)]))
    with pytest.raises(ProtocolError, match="informational"):
        for _ in range(1000):
            assert decoder.feed(interim, False)
    heartbeat = encode_head(ResponseHead(102, []))
    decoder = StreamDecoder(is_request=False, head_limit=LIMIT)
    for _ in range(1000):
        assert decoder.feed(heartbeat, False) == [ResponseHead(102, [])]


@pytest.mark.parametrize("target", [b"http://elsewhere.example/", b"elsewhere.example:80", b"x", b"*x", b"", b" /"])
def test_path_is_absolute_or_a_star(target: bytes) -> None:
    with pytest.raises(ProtocolError, match="absolute"):
        decode(encode_head(RequestHead(b"GET", b"http", b"a", target, [])), is_request=True)


def test_a_probe_comes_back_as_what_it_is() -> None:
    assert decode(encode_head(PROBE), is_request=True) == [PROBE, End()]
