"""The gate of HTTP/2's frames: any split of the bytes gives the same frames, and idle ones run out."""

import pytest
from h2.errors import ErrorCodes
from hypothesis import given
from hypothesis import strategies as st

from quictunnel.http.http2_frames import (
    CONTINUATION,
    DATA,
    FRAME_SIZE,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SUBSTANCE,
    WINDOW_UPDATE,
    Allowance,
    FrameGate,
    Http2Error,
    RawFrame,
    goaway_frame,
    known_settings,
    window_frame,
)
from tests.support.http2 import frame, settings_frame

BLOCK = 1000
HELLO = frame(SETTINGS)
END_HEADERS = 0x4


def gate(*, is_server: bool = False) -> FrameGate:
    """A gate that has had the greeting."""
    made = FrameGate(is_server=is_server, block_limit=BLOCK)
    fed(made, (PREFACE if is_server else b"") + HELLO, 0.0)
    return made


def fed(gate: FrameGate, data: bytes, now: float) -> list[RawFrame]:
    """All the frames that ``data`` completes."""
    return list(gate.feed(data, now))


def refused(gate: FrameGate, data: bytes, code: ErrorCodes, now: float = 0.0) -> str:
    """What ``data`` is refused with; the code must be the one expected."""
    with pytest.raises(Http2Error) as caught:
        fed(gate, data, now)
    assert caught.value.code == code
    return str(caught.value)


# Cutting

KINDS = st.sampled_from([DATA, SETTINGS, PING, WINDOW_UPDATE, RST_STREAM, 0x0A, 0xFF])
FRAMES = st.lists(
    st.builds(frame, KINDS, st.integers(0, 255), st.integers(0, 2**31 - 1), st.binary(max_size=60)), max_size=12
)


@given(FRAMES, st.sets(st.integers(0, 900), max_size=20), st.booleans())
def test_any_split_of_the_bytes_gives_the_same_frames(frames: list[bytes], cuts: set[int], is_server: bool) -> None:
    data = (PREFACE if is_server else b"") + b"".join([HELLO, *frames])
    made = FrameGate(is_server=is_server, block_limit=BLOCK)
    seen: list[RawFrame] = []
    places = sorted({cut for cut in cuts if cut < len(data)} | {len(data)})
    start = 0
    for end in places:
        seen += fed(made, data[start:end], 0.0)
        start = end
    assert b"".join(each.raw for each in seen) == data
    assert not made.is_waiting
    bare = seen[1:] if is_server else seen
    assert [each.raw for each in bare] == [HELLO, *frames]
    for each in bare:
        assert each.kind == each.raw[3]
        assert each.stream_id == int.from_bytes(each.raw[5:9], "big") & (2**31 - 1)
    if is_server:
        assert seen[0] == RawFrame(-1, 0, PREFACE)


def test_one_byte_at_a_time_is_a_split_too() -> None:
    data = PREFACE + HELLO + frame(PING, payload=bytes(8)) + frame(DATA, 1, 3, b"x" * FRAME_SIZE)
    made = FrameGate(is_server=True, block_limit=BLOCK)
    seen = [each for index in range(len(data)) for each in fed(made, data[index : index + 1], 0.0)]
    assert [each.kind for each in seen] == [-1, SETTINGS, PING, DATA]


def test_it_waits_within_the_preface_a_frame_and_a_field_section() -> None:
    made = FrameGate(is_server=True, block_limit=BLOCK)
    assert made.is_waiting
    assert fed(made, PREFACE[:-1], 0.0) == []
    assert made.is_waiting
    fed(made, PREFACE[-1:] + HELLO, 0.0)
    assert not made.is_waiting
    fed(made, HELLO[:5], 0.0)
    assert made.is_waiting
    fed(made, HELLO[5:], 0.0)
    assert not made.is_waiting
    fed(made, frame(HEADERS, 0, 1, b"x"), 0.0)
    assert made.is_waiting
    fed(made, frame(CONTINUATION, END_HEADERS, 1, b"x"), 0.0)
    assert not made.is_waiting


def test_a_reserved_bit_of_a_stream_id_means_nothing() -> None:
    made = gate()
    [seen] = fed(made, frame(DATA, 0, 2**31 | 7, b"x"), 0.0)
    assert seen.stream_id == 7


# Beginnings


@pytest.mark.parametrize("data", [b"X", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"])
def test_a_server_wants_the_preface(data: bytes) -> None:
    made = FrameGate(is_server=True, block_limit=BLOCK)
    assert "preface" in refused(made, data, ErrorCodes.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    "data",
    [
        frame(PING, payload=bytes(8)),
        frame(SETTINGS, 1),
        frame(HEADERS, END_HEADERS, 1, b"x"),
        b"HTTP/1.1 ",  # a backend of HTTP/1.1: what it says is not waited for to its end
        b"\x00\x40\x00\x00\x00\x00\x00\x00\x01",
    ],
)
def test_the_first_frame_is_settings(data: bytes) -> None:
    made = FrameGate(is_server=False, block_limit=BLOCK)
    with pytest.raises(Http2Error) as caught:
        fed(made, data, 0.0)
    assert caught.value.code in (ErrorCodes.PROTOCOL_ERROR, ErrorCodes.FRAME_SIZE_ERROR)


# Sizes


def test_a_frame_of_the_largest_size_passes_and_a_byte_more_is_refused_before_it_has_come() -> None:
    made = gate()
    assert len(fed(made, frame(DATA, 0, 1, bytes(FRAME_SIZE)), 0.0)) == 1
    refused(made, (FRAME_SIZE + 1).to_bytes(3, "big") + bytes(6), ErrorCodes.FRAME_SIZE_ERROR)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(PRIORITY, 0, 0, bytes(5)), ErrorCodes.PROTOCOL_ERROR),
        (frame(PRIORITY, 0, 1, bytes(4)), ErrorCodes.FRAME_SIZE_ERROR),
        (frame(PRIORITY, 0, 1, bytes(6)), ErrorCodes.FRAME_SIZE_ERROR),
        (frame(GOAWAY, 0, 1, bytes(8)), ErrorCodes.PROTOCOL_ERROR),
        (frame(GOAWAY, 0, 0, bytes(7)), ErrorCodes.FRAME_SIZE_ERROR),
    ],
)
def test_frames_that_h2_never_gets_are_checked_here(data: bytes, code: ErrorCodes) -> None:
    refused(gate(), data, code)


# Field sections


@pytest.mark.parametrize("kind", [DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, 8, 0xFA])
def test_nothing_interrupts_a_field_section(kind: int) -> None:
    made = gate()
    fed(made, frame(HEADERS, 0, 1, b"x"), 0.0)
    assert "within a field section" in refused(made, frame(kind, 0, 1, bytes(8)), ErrorCodes.PROTOCOL_ERROR)


def test_a_field_section_is_bounded_over_all_its_frames() -> None:
    made = gate()
    fed(made, frame(HEADERS, 0, 1, bytes(BLOCK - 10)), 0.0)
    fed(made, frame(CONTINUATION, 0, 1, bytes(10)), 0.0)
    refused(made, frame(CONTINUATION, END_HEADERS, 1, b"x"), ErrorCodes.ENHANCE_YOUR_CALM)
    refused(gate(), frame(HEADERS, END_HEADERS, 1, bytes(BLOCK + 1)), ErrorCodes.ENHANCE_YOUR_CALM)


def test_each_field_section_has_the_whole_bound() -> None:
    made = gate()
    for number in range(1, 100, 2):
        fed(made, frame(HEADERS, END_HEADERS, number, bytes(BLOCK)), 0.0)


def test_a_continuation_of_nothing_is_left_to_the_state_machine() -> None:
    assert [each.kind for each in fed(gate(), frame(CONTINUATION, END_HEADERS, 1, b"x"), 0.0)] == [CONTINUATION]


# Allowances


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60))
def test_an_allowance_never_gives_more_than_its_burst_and_its_rate(steps: list[tuple[float, bool]]) -> None:
    allowance = Allowance(5, 2.0)
    now, spent, began = 100.0, 0, 100.0
    for after, _ in steps:
        now += after
        spent += allowance.spend(now)
        assert spent <= 5 + 2.0 * (now - began) + 1e-6


def test_an_allowance_comes_back_with_time_and_by_merit_up_to_its_burst() -> None:
    allowance = Allowance(2, 1.0)
    assert [allowance.spend(0.0) for _ in range(3)] == [True, True, False]
    allowance = Allowance(2, 1.0)
    allowance.spend(0.0)
    allowance.spend(0.0)
    assert allowance.spend(1.0)
    allowance.earn(100)
    assert [allowance.spend(1.0) for _ in range(3)] == [True, True, False]


IDLE = {
    "PING": frame(PING, payload=bytes(8)),
    "SETTINGS": frame(SETTINGS),
    "SETTINGS of one": settings_frame({4: 1}),
    "PRIORITY": frame(PRIORITY, 0, 1, bytes(5)),
    "WINDOW_UPDATE": window_frame(1),
    "GOAWAY": goaway_frame(0, 0),
    "unknown": frame(0xFA, 0, 0, b"x"),
    "PUSH_PROMISE": frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)),
    "naked CONTINUATION": frame(CONTINUATION, 0, 1),
}


@pytest.mark.parametrize("name", IDLE)
def test_frames_that_carry_nothing_run_out(name: str) -> None:
    made = gate()
    for _ in range(9999):  # the greeting was the first
        fed(made, IDLE[name], 0.0)
    assert "carry nothing" in refused(made, IDLE[name], ErrorCodes.ENHANCE_YOUR_CALM)


def test_idle_frames_at_the_pace_of_the_long_run_never_run_out() -> None:
    made = gate()
    for index in range(30_000):
        fed(made, IDLE["PING"], index * 0.0101)


def test_small_continuations_run_out_and_large_ones_do_not() -> None:
    def section(made: FrameGate, part: bytes, number: int) -> None:
        fed(made, frame(HEADERS, 0, number) + frame(CONTINUATION, END_HEADERS, number, part), 0.0)

    made = FrameGate(is_server=False, block_limit=4 * SUBSTANCE)
    fed(made, HELLO, 0.0)
    for number in range(1, 30_001, 2):
        section(made, bytes(SUBSTANCE), number)
    for number in range(9999):
        section(made, b"x", number)
    with pytest.raises(Http2Error):
        section(made, b"x", 1)


def test_headers_and_data_are_no_chores() -> None:
    made = gate()
    for _ in range(20_000):
        fed(made, frame(HEADERS, END_HEADERS, 1, b"x") + frame(DATA, 0, 1, b"x"), 0.0)


def test_window_updates_are_earned_by_the_data_that_went_out() -> None:
    made = gate()
    for _ in range(30_000):
        made.sent_data()
        fed(made, window_frame(1) + window_frame(1), 0.0)


@pytest.mark.parametrize("by", ["its own", "ours"])
def test_resets_run_out(by: str) -> None:
    made = gate()

    def reset(now: float) -> None:
        if by == "ours":
            made.reset(now)
        else:
            fed(made, frame(RST_STREAM, 0, 1, bytes(4)), now)

    for _ in range(1000):
        reset(0.0)
    with pytest.raises(Http2Error) as caught:
        reset(0.0)
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM
    assert "too many streams were reset" in str(caught.value)


# Frames of our own


def test_frames_of_our_own_are_read_as_what_they_are() -> None:
    [goaway, window] = fed(gate(), goaway_frame(2**31 - 1, 11) + window_frame(5), 0.0)
    assert (goaway.kind, goaway.stream_id, goaway.raw[9:]) == (GOAWAY, 0, b"\x7f\xff\xff\xff\x00\x00\x00\x0b")
    assert (window.kind, window.stream_id, window.raw[9:]) == (WINDOW_UPDATE, 0, b"\0\0\0\5")


@given(st.dictionaries(st.integers(0, 65535), st.integers(0, 2**32 - 1), max_size=20))
def test_only_settings_that_mean_something_pass(values: dict[int, int]) -> None:
    data = settings_frame(values)
    known = {code: value for code, value in values.items() if code in (1, 2, 3, 4, 5, 6, 8)}
    assert known_settings(RawFrame(SETTINGS, 0, data)) == settings_frame(known)


def test_a_settings_frame_of_a_broken_size_is_left_to_the_state_machine() -> None:
    data = frame(SETTINGS, 0, 0, bytes(7))
    assert known_settings(RawFrame(SETTINGS, 0, data)) == data
