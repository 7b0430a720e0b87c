import json
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.wire.codec import FrameType, push_varint
from quictunnel.wire.control import (
    MESSAGE_LIMIT,
    Authority,
    ControlDecoder,
    ControlMessage,
    Credit,
    Drain,
    Drained,
    Grow,
    Health,
    Hello,
    Refuse,
    Strange,
    Unknown,
    Welcome,
    encode_control,
    encode_credit,
)
from quictunnel.wire.errors import ProtocolError

MESSAGES: list[ControlMessage] = [
    Hello(1, "app", "s" * 32, "qtk_x", 3, "quictunnel/0.1.0", ["a"], ["app.example.com", "*.example.com"], 3, "ip"),
    Welcome("app", ["http://app.localhost:8080"], 8, "x", [], 1, 2),
    Refuse("token_unknown", "no such token", True, None),
    Refuse("limit", "later", False, 2.5),
    Grow(4),
    Drain(),
    Drained(7),
    Health(False, "connection refused"),
    Authority("-----BEGIN", ""),
    Unknown("dance"),
]


def frame(payload: bytes) -> bytes:
    return push_varint(FrameType.CONTROL) + push_varint(len(payload)) + payload


@given(st.lists(st.sampled_from([*MESSAGES, Credit(5, 1 << 40)]), max_size=6), st.integers(1, 40))
def test_messages_come_back_however_their_bytes_are_split(messages: list[ControlMessage | Credit], step: int) -> None:
    data = b"".join(
        encode_credit(each.stream, each.limit) if isinstance(each, Credit) else encode_control(each)
        for each in messages
    )
    decoder = ControlDecoder()
    found = [message for at in range(0, len(data), step) for message in decoder.feed(data[at : at + step])]
    assert found == messages


def test_unknown_members_are_ignored_and_an_unknown_type_is_named() -> None:
    decoder = ControlDecoder()
    assert decoder.feed(frame(b'{"type":"grow","links":2,"colour":"red"}')) == [Grow(2)]
    assert decoder.feed(frame(b'{"type":"dance","links":[]}')) == [Strange("dance")]
    assert decoder.feed(push_varint(0x21) + b"\x01x" + encode_control(Grow(1))) == [Grow(1)]


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{", b"[]", b"1", b"null", b"{}", b'{"type":1}', b'{"type":"grow"}', b'{"type":"grow","links":"2"}',
        b'{"type":"grow","links":-1}', b'{"type":"grow","links":true}', b'{"type":"grow","links":1e999}',
        b'{"type":"hello","version":1,"tunnel":null,"session":"s","token":"t"}', b"\xff\xfe",
        b'{"type":"welcome","tunnel":"a","urls":[1]}', b'{"type":"welcome","tunnel":"a","urls":"x"}',
        b'{"type":"refuse","code":"a","text":"b","final":1}',
        b'{"type":"refuse","code":"a","text":"b","retry_after":NaN}', b"[" * 50_000, b"9" * 10_000,
    ],
)  # fmt: skip
def test_a_message_that_is_not_one_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        ControlDecoder().feed(frame(payload))


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x01\x02\x03", b"\x01\xc0"])
def test_credit_that_is_not_two_integers_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        ControlDecoder().feed(push_varint(FrameType.CREDIT) + push_varint(len(payload)) + payload)


def test_a_message_over_the_limit_is_refused_before_it_is_collected() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        ControlDecoder().feed(push_varint(FrameType.CONTROL) + push_varint(MESSAGE_LIMIT + 1))


@given(st.binary(max_size=100))
def test_garbage_gives_a_protocol_error_and_nothing_else(data: bytes) -> None:
    with suppress(ProtocolError):
        ControlDecoder().feed(data)


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
members = st.sampled_from(["version", "tunnel", "session", "token", "link", "links", "urls", "code", "text", "final"])
objects = st.dictionaries(members, scalars | st.lists(scalars))


@given(objects, st.sampled_from(["hello", "welcome", "refuse", "grow", "drain", "authority", "unknown"]))
def test_any_members_give_a_message_or_a_protocol_error(content: dict[str, object], kind: str) -> None:
    with suppress(ProtocolError):
        ControlDecoder().feed(frame(json.dumps({**content, "type": kind}).encode()))


def test_a_token_does_not_show_in_a_message_that_is_printed() -> None:
    assert "secret" not in repr(Hello(1, "a", "s", "secret-token"))


def outcome(data: bytes, step: int) -> str:
    """The messages before an error, those of the piece that it came in left out, and the error."""
    decoder, found = ControlDecoder(), []
    try:
        for at in range(0, len(data), step):
            found += decoder.feed(data[at : at + step])
    except ProtocolError as error:
        return str(error)
    return repr(found)


messy = st.lists(
    st.one_of(
        st.sampled_from(MESSAGES).map(encode_control),
        st.builds(encode_credit, st.integers(0, 2**62 - 1), st.integers(0, 2**62 - 1)),
        st.binary(max_size=12),
        st.binary(max_size=12).map(frame),
        st.binary(max_size=20).map(lambda part: push_varint(0x21) + push_varint(len(part)) + part),
        objects.map(lambda content: frame(json.dumps(content).encode())),
    ),
    max_size=6,
).map(b"".join)


@given(messy, st.integers(1, 40))
def test_what_is_wrong_is_as_wrong_however_its_bytes_are_split(data: bytes, step: int) -> None:
    assert outcome(data, step) == outcome(data, 1) == outcome(data, max(1, len(data)))


def test_message_that_comes_byte_by_byte_costs_no_more_than_its_bytes() -> None:
    def seconds(size: int) -> float:
        data = frame(b" " * size)
        decoder = ControlDecoder()
        began = time.thread_time()
        for at in range(len(data) - 1):
            decoder.feed(data[at : at + 1])
        assert len(decoder._buffer) == len(data) - 1
        return time.thread_time() - began

    # Sixteen times the bytes: 256 times the work if each byte copied what is there.
    assert min(seconds(1 << 16) for _ in range(3)) < 64 * min(seconds(1 << 12) for _ in range(9))


@pytest.mark.parametrize("text", ['{"type":"grow","links":2}', '{"type":"dance"}'])
def test_only_utf_8_is_json_here(text: str) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig"):
        with pytest.raises(ProtocolError):
            ControlDecoder().feed(frame(text.encode(encoding)))


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"hello","version":1,"tunnel":"","session":"\\ud800","token":"t"}',
        '{"type":"welcome","tunnel":"a","urls":["\\udfff"]}',
        '{"type":"\\ud800"}',
    ],
)
def test_half_a_character_is_no_text(text: str) -> None:
    with pytest.raises(ProtocolError):
        ControlDecoder().feed(frame(text.encode()))


def test_answer_to_an_unknown_message_is_told_from_one() -> None:
    """Or two ends would answer each other for ever."""
    assert ControlDecoder().feed(encode_control(Unknown("dance"))) == [Unknown("dance")]
    assert ControlDecoder().feed(frame(b'{"type":"dance"}')) == [Strange("dance")]
