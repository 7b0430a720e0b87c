"""Two HTTP/2 sessions joined in memory, under a clock the test turns; and one of them against bytes of a test's own."""

from collections.abc import Callable

import pytest
from h2.errors import ErrorCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from quictunnel.exchange import Leg
from quictunnel.http.http2 import STREAMS, Http2Error, Http2Session, Http2Stream
from quictunnel.wire.credit import INITIAL_WINDOW, WindowBudget
from quictunnel.wire.errors import TunnelError
from quictunnel.wire.frames import Fields, Frame
from tests.support.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Wire,
    frame,
    settings_frame,
)

HEAD_LIMIT = 16_384
REQUEST: Fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]
OK: Fields = [(b":status", b"200")]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source(Leg):
    """The leg behind a user: whether it may hand over."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.on_pause: Callable[[], None] = lambda: None

    def receive(self, frame: Frame) -> None:
        raise AssertionError

    def pause(self) -> None:
        self.paused = True
        self.on_pause()

    def resume(self) -> None:
        self.paused = False

    def abort(self, error: TunnelError) -> None:
        raise AssertionError


class User:
    """What happens on one stream."""

    def __init__(self, stream: Http2Stream | None = None) -> None:
        self.peer = Source()
        self.stream = stream
        self.heads: list[tuple[Fields, bool]] = []
        self.interim: list[Fields] = []
        self.data = b""
        self.trailers: Fields | None = None
        self.reset: int | None = None
        self.sent = False
        self.on_data: Callable[[], None] = lambda: None

    def stream_head(self, fields: Fields, ended: bool) -> None:
        self.heads.append((fields, ended))

    def stream_interim(self, fields: Fields) -> None:
        self.interim.append(fields)

    def stream_data(self, data: bytes) -> None:
        assert data
        self.data += data
        self.on_data()

    def stream_end(self, trailers: Fields) -> None:
        assert self.trailers is None
        self.trailers = trailers

    def stream_reset(self, code: int) -> None:
        self.reset = code

    def stream_sent(self) -> None:
        self.sent = True


class End:
    """One end of a connection. The owner of its session."""

    def __init__(self, *, is_client: bool, clock: Clock, budget: int = 1 << 26) -> None:
        self.woken = False
        self.requests: list[tuple[Http2Stream, Fields, bool]] = []
        self.users: list[User] = []
        self.goaways: list[tuple[int, int]] = []
        self.rooms = 0
        self.session = Http2Session(
            self, is_client=is_client, head_limit=HEAD_LIMIT, budget=WindowBudget(budget), clock=clock
        )

    def wake(self) -> None:
        self.woken = True

    def session_request(self, stream: Http2Stream, fields: Fields, ended: bool) -> None:
        user = User(stream)
        stream.user = user
        self.users.append(user)
        self.requests.append((stream, fields, ended))

    def session_goaway(self, last_stream_id: int, code: int) -> None:
        self.goaways.append((last_stream_id, code))

    def session_room(self) -> None:
        self.rooms += 1

    def ask(self, fields: Fields = REQUEST, *, end: bool = True) -> User:
        """A request on a new stream."""
        user = User()
        stream = user.stream = self.session.open_stream(user)
        stream.send_head(fields, end=end)
        return user

    @property
    def left(self) -> tuple[int, int, int]:
        """Streams, streams that hold something, and bytes of the budget that are out."""
        session = self.session
        return len(session.streams), len(session._held), session.budget.total - session.budget.left


class Joined:
    """A client and a server."""

    def __init__(self, budget: int = 1 << 26) -> None:
        self.clock = Clock()
        self.client = End(is_client=True, clock=self.clock, budget=budget)
        self.server = End(is_client=False, clock=self.clock, budget=budget)
        self.run()

    def turn(self, pace: float = 0.0) -> bool:
        """One turn of both event loops, ``pace`` seconds long; whether anything went."""
        went = False
        for here, there in ((self.client, self.server), (self.server, self.client)):
            data = here.session.take()
            self.clock.now += pace / 2
            if data:
                went = True
                there.session.feed(data)
        return went

    def run(self, pace: float = 0.0) -> None:
        """Until nothing more goes."""
        for _ in range(100_000):
            if not self.turn(pace):
                return
        raise AssertionError("it never comes to rest")

    def request(self, *, end: bool = True) -> tuple[User, User]:
        """A stream's two users."""
        asked = self.client.ask(end=end)
        self.run()
        return asked, self.server.users[-1]


def stream_of(user: User) -> Http2Stream:
    assert user.stream is not None
    return user.stream


def answer(user: User, body: bytes = b"", trailers: Fields | None = None) -> None:
    stream = stream_of(user)
    stream.send_head(OK, end=False)
    if body:
        stream.send_data(body)
    stream.send_end(trailers or [])


def finish(*users: User) -> None:
    """What every leg does once both directions are over."""
    for user in users:
        stream_of(user).leave()


# A request and its answer


def test_an_exchange_leaves_nothing_behind() -> None:
    joined = Joined()
    asked, served = joined.request(end=False)
    _, fields, ended = joined.server.requests[0]
    assert (fields, ended) == (REQUEST, False)
    stream_of(asked).send_data(b"up")
    stream_of(asked).send_end([(b"x-sum", b"1")])
    stream_of(served).send_head([(b":status", b"103"), (b"link", b"x")], end=False)
    answer(served, b"down", [(b"grpc-status", b"0")])
    joined.run()
    assert (served.data, served.trailers) == (b"up", [(b"x-sum", b"1")])
    assert asked.interim == [[(b":status", b"103"), (b"link", b"x")]]
    assert (asked.heads, asked.data, asked.trailers) == ([(OK, False)], b"down", [(b"grpc-status", b"0")])
    assert asked.sent and served.sent
    finish(asked, served)
    assert joined.client.left == joined.server.left == (0, 0, 0)


def test_a_head_may_be_all() -> None:
    joined = Joined()
    asked, served = joined.request()
    assert joined.server.requests[0][2]
    stream_of(served).send_head(OK, end=True)
    joined.run()
    assert asked.heads == [(OK, True)]
    assert served.sent


def test_content_length_is_handed_on_and_left_to_those_who_read_heads() -> None:
    """For h2 a length that does not add up ends the connection, and everybody's exchanges with it."""
    joined = Joined()
    for length in (b"9", b"0", b"x", b""):
        asked = joined.client.ask([*REQUEST, (b"content-length", length)], end=False)
        joined.run()
        served = joined.server.users[-1]
        assert joined.server.requests[-1][1][-1] == (b"content-length", length)
        stream_of(asked).send_data(b"hello")
        stream_of(asked).send_end([])
        stream_of(served).send_head([*OK, (b"content-length", length)], end=False)
        stream_of(served).send_data(b"hello")
        stream_of(served).send_end([])
        joined.run()
        assert asked.heads == [([*OK, (b"content-length", length)], False)]
        assert (asked.data, served.data) == (b"hello", b"hello")
        finish(asked, served)


def test_secrets_are_never_put_into_the_shared_table() -> None:
    joined = Joined()
    joined.client.ask([*REQUEST, (b"authorization", b"Basic c2VjcmV0"), (b"cookie", b"a=b"), (b"x-plain", b"seen")])
    table = [name for name, _ in joined.client.session.h2.encoder.header_table.dynamic_entries]
    assert b"x-plain" in table
    assert not {b"authorization", b"cookie"} & set(table)


# Flow control


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_what_nobody_reads_stops_at_the_window_and_goes_on_when_read(up: bool) -> None:
    joined = Joined()
    asked, served = joined.request(end=False)
    if not up:
        stream_of(served).send_head(OK, end=False)
    writer, reader = (asked, served) if up else (served, asked)
    stream_of(reader).pause()
    data = bytes(range(256)) * 4096  # 1 MiB
    for start in range(0, len(data), 65536):
        stream_of(writer).send_data(data[start : start + 65536])
    joined.run()
    assert len(reader.data) == INITIAL_WINDOW
    assert writer.peer.paused
    stream_of(writer).send_end([])
    assert not writer.sent
    stream_of(reader).resume()
    joined.run()
    assert reader.data == data
    assert reader.trailers == []
    assert writer.sent
    finish(asked, served)
    assert joined.client.left == joined.server.left == (0, 0, 0)


def test_a_stream_that_nobody_reads_stops_no_other() -> None:
    joined = Joined()
    asked, served = joined.request()
    stream_of(asked).pause()
    answer(served, bytes(16 * 1024 * 1024))
    joined.run()
    for _ in range(5):
        other, served_other = joined.request()
        answer(served_other, bytes(INITIAL_WINDOW * 4))
        joined.run()
        assert len(other.data) == INITIAL_WINDOW * 4
        finish(other, served_other)
    assert len(asked.data) == INITIAL_WINDOW


def test_bulk_and_small_take_turns() -> None:
    """No turn of the loop carries more than a batch, and each stream that waits has its part of it."""
    joined = Joined()
    bulk, served_bulk = joined.request()
    small, served_small = joined.request()
    stream_of(served_bulk).send_head(OK, end=False)
    stream_of(served_bulk).send_data(bytes(200_000))
    answer(served_small, b"x" * 30_000)
    turns = 0
    while small.trailers is None:
        turns += 1
        assert joined.turn()
        joined.turn()
    assert turns <= 3
    assert len(bulk.data) < 200_000
    joined.run()
    assert len(bulk.data) == 200_000


def test_a_source_that_keeps_pace_is_never_paused() -> None:
    joined = Joined()
    asked, served = joined.request()
    pauses: list[int] = []
    served.peer.on_pause = lambda: pauses.append(len(asked.data))
    stream_of(served).send_head(OK, end=False)
    for number in range(1, 20):
        for _ in range(4):
            stream_of(served).send_data(bytes(8_000))
        joined.run()
        assert len(asked.data) == number * 32_000
    assert pauses == []
    stream_of(served).send_data(bytes(64 * 1024))
    assert pauses == [19 * 32_000]


def test_streams_that_wait_for_the_connections_window_take_turns() -> None:
    clock = Clock()
    end = End(is_client=False, clock=clock)
    wire = Wire()
    end.session.feed(wire.hello({4: 2**31 - 1}) + b"".join(wire.get() for _ in range(10)))
    for user in end.users:
        answer(user, bytes(100_000))
    wire.takes(end.session.take())
    for _ in range(20):
        end.session.take()
    # The connection's own window is 65,535 bytes and was used up by the first; each grant is for the next in turn.
    before = {user: len(wire.body(stream_of(user).id)) for user in end.users}
    assert sum(before.values()) <= 65_535
    for _ in range(10):
        end.session.feed(frame(WINDOW_UPDATE, 0, 0, (16_384).to_bytes(4, "big")))
        wire.takes(end.session.take())
    got = [len(wire.body(stream_of(user).id)) for user in end.users]
    assert all(size >= 16_384 for size in got), got


def test_nothing_is_written_while_the_socket_takes_nothing() -> None:
    joined = Joined()
    asked, served = joined.request()
    joined.server.session.write_paused = True
    answer(served, b"x" * 100)
    assert served.peer.paused
    joined.run()
    assert asked.data == b""
    joined.server.woken = False
    joined.server.session.resume()
    assert joined.server.woken
    joined.run()
    assert asked.data == b"x" * 100
    assert not joined.server.left[1]


def test_windows_grow_out_of_the_budget_and_give_it_back() -> None:
    joined = Joined(budget=1 << 20)
    asked, served = joined.request()
    stream_of(served).send_head(OK, end=False)
    for _ in range(64):
        stream_of(served).send_data(bytes(65_536))
    for _ in range(30):  # turns of the loop are short against a round trip of 20 ms
        flight = b"".join(joined.server.session.take() for _ in range(16))
        joined.clock.now += 0.01
        joined.client.session.feed(flight)
        flight = joined.client.session.take()
        joined.clock.now += 0.01
        joined.server.session.feed(flight)
    assert len(asked.data) == 64 * 65_536
    streams, held, out = joined.client.left
    assert (streams, held) == (1, 0)
    assert 0 < out <= 1 << 20
    stream_of(asked).reset(ErrorCodes.CANCEL)
    assert joined.client.left == (0, 0, 0)
    joined.run()
    assert served.reset == ErrorCodes.CANCEL
    assert joined.server.left == (0, 0, 0)


def test_a_visitor_past_its_window_ends_the_connection() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello() + wire.get(end=False))
    stream_of(end.users[0]).pause()
    chunk = frame(DATA, 0, 1, bytes(16_384))
    with pytest.raises(Http2Error) as caught:
        for _ in range(INITIAL_WINDOW // 16_384 + 1):
            end.session.feed(chunk)
    assert caught.value.code == ErrorCodes.FLOW_CONTROL_ERROR
    assert len(end.users[0].data) == INITIAL_WINDOW


def test_padding_counts_for_the_window_and_is_given_back() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello() + wire.get(end=False))
    for _ in range(5000):
        end.session.feed(frame(DATA, 0x8, 1, b"\xff" + b"x" + bytes(255)))
        wire.takes(end.session.take())
    assert end.users[0].data == b"x" * 5000
    granted = sum(int.from_bytes(seen.payload, "big") for seen in wire.of(1) if seen.kind == WINDOW_UPDATE)
    assert granted >= 5000 * 257 - INITIAL_WINDOW


def test_a_smaller_initial_window_in_the_middle_may_be_negative_and_is_waited_for() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello({4: 10_000}) + wire.get())
    answer(end.users[0], b"x" * 20_000)
    wire.takes(end.session.take())
    assert len(wire.body(1)) == 10_000
    end.session.feed(settings_frame({4: 1}))
    end.session.feed(frame(WINDOW_UPDATE, 0, 1, (9_999).to_bytes(4, "big")))
    wire.takes(end.session.take())
    assert len(wire.body(1)) == 10_000
    end.session.feed(frame(WINDOW_UPDATE, 0, 1, (10_000).to_bytes(4, "big")))
    wire.takes(end.session.take())
    assert wire.body(1) == b"x" * 20_000
    assert wire.ended(1)


def test_larger_frames_are_used_when_they_are_allowed() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello({4: 2**20, 5: 40_000}) + wire.get())
    end.session.feed(frame(WINDOW_UPDATE, 0, 0, (2**20).to_bytes(4, "big")))
    answer(end.users[0], b"x" * 60_000)
    for _ in range(3):
        wire.takes(end.session.take())
    assert max(len(seen.payload) for seen in wire.of(1)) == 40_000
    assert wire.body(1) == b"x" * 60_000


def test_who_grants_a_byte_at_a_time_runs_out_of_chores() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello({4: 0}) + wire.get())
    answer(end.users[0], b"x" * 60_000)
    with pytest.raises(Http2Error) as caught:
        for _ in range(20_000):
            end.session.feed(frame(WINDOW_UPDATE, 0, 1, (1).to_bytes(4, "big")))
            end.session.take()
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_stream_knows_since_when_it_is_stuck() -> None:
    joined = Joined()
    asked, served = joined.request()
    stream = stream_of(served)
    assert stream.stuck_since == float("inf")
    stream_of(asked).pause()
    stream.send_head(OK, end=False)
    stream.send_data(bytes(INITIAL_WINDOW + 1))
    joined.run()
    joined.clock.now += 10
    joined.run()
    assert stream.stuck_since == joined.clock.now - 10
    stream_of(asked).resume()
    joined.run()
    assert stream.stuck_since == float("inf")


# Resets


@pytest.mark.parametrize("by_client", [True, False])
def test_a_reset_reaches_the_other_user_with_its_code_and_frees_everything(by_client: bool) -> None:
    joined = Joined()
    asked, served = joined.request(end=False)
    stream_of(asked).send_data(bytes(INITIAL_WINDOW * 2))
    stream_of(served).pause()
    stream_of(served).send_head(OK, end=False)
    joined.run()
    here, there = (asked, served) if by_client else (served, asked)
    stream_of(here).reset(ErrorCodes.INTERNAL_ERROR)
    joined.run()
    assert (there.reset, here.reset) == (ErrorCodes.INTERNAL_ERROR, None)
    assert joined.client.left == joined.server.left == (0, 0, 0)
    stream_of(here).reset(ErrorCodes.CANCEL)  # twice is once
    assert not joined.turn()


def test_a_user_may_reset_while_its_data_is_handed_over() -> None:
    joined = Joined()
    asked, served = joined.request(end=False)
    served.on_data = lambda: stream_of(served).reset(ErrorCodes.CANCEL)
    stream_of(asked).send_data(b"x" * 40_000)
    joined.run()
    assert len(served.data) == 16_384
    assert served.trailers is None
    assert asked.reset == ErrorCodes.CANCEL
    assert joined.client.left == joined.server.left == (0, 0, 0)


@pytest.mark.parametrize("size", [INITIAL_WINDOW * 2, 1000], ids=["at once", "at the end of the turn"])
def test_a_user_may_reset_while_what_it_sends_pauses_its_source(size: int) -> None:
    joined = Joined()
    joined.client.session.h2.update_settings({4: 0})
    joined.run()
    asked, served = joined.request()
    stream = stream_of(served)
    stream.send_head(OK, end=False)
    served.peer.on_pause = lambda: stream.reset(ErrorCodes.CANCEL)
    stream.send_data(bytes(size))
    joined.run()
    stream.send_data(b"late")
    stream.send_end([])
    joined.run()
    assert asked.reset == ErrorCodes.CANCEL
    assert not served.sent
    assert joined.client.left == joined.server.left == (0, 0, 0)


@pytest.mark.parametrize("is_client", [True, False], ids=["client", "server"])
def test_a_window_of_late_data_is_ignored_and_given_back(is_client: bool) -> None:
    """It is under way when a stream is reset: no answer for each frame, no chore, and the window stays whole."""
    end = End(is_client=is_client, clock=Clock())
    wire = Wire(is_client=not is_client)
    end.session.feed(wire.hello())
    end.session.take()
    sent = 0
    for number in range(1, 401, 2):
        if is_client:
            stream_of(end.ask()).reset(ErrorCodes.CANCEL)
        else:
            end.session.feed(wire.get(end=False))
            stream_of(end.users[-1]).reset(ErrorCodes.NO_ERROR)
        for _ in range(100):
            end.session.feed(frame(DATA, 0, number, bytes(16_384)))
            sent += 16_384
        wire.takes(end.session.take())
    resets = [seen for seen in wire.frames if seen.kind == RST_STREAM]
    assert len(resets) == 200
    granted = sum(int.from_bytes(seen.payload, "big") for seen in wire.of(0) if seen.kind == WINDOW_UPDATE)
    assert granted >= sent - 4 * 1024 * 1024


def test_small_late_frames_run_out() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello() + wire.get(end=False))
    stream_of(end.users[0]).reset(ErrorCodes.NO_ERROR)
    with pytest.raises(Http2Error) as caught:
        for _ in range(20_000):
            end.session.feed(frame(DATA, 0, 1, b"x"))
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM


MADE_RESETS: dict[str, bytes] = {
    "data after the end": frame(DATA, 0, 1, b"x"),
    "a head after the end": frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x82"),
    "a window over the edge": frame(WINDOW_UPDATE, 0, 1, (2**31 - 1).to_bytes(4, "big")),
}


@pytest.mark.parametrize("name", MADE_RESETS)
def test_streams_that_a_visitor_makes_us_reset_run_out(name: str) -> None:
    """CVE-2025-8671: what resets a stream is counted, whoever sends the RST_STREAM."""
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello())
    with pytest.raises(Http2Error):
        for _ in range(2000):
            end.session.feed(wire.get())
            bad = MADE_RESETS[name]
            end.session.feed(bad[:5] + wire.last.to_bytes(4, "big") + bad[9:])
            end.session.take()
    assert len(end.users) <= 1001
    assert len(end.session.streams) <= 1


def test_streams_beyond_the_limit_are_refused_one_by_one() -> None:
    """RFC 9113 section 5.1.2: a visitor may not have seen the limit yet."""
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello() + b"".join(wire.get() for _ in range(STREAMS + 50)))
    wire.takes(end.session.take())
    assert len(end.users) == STREAMS
    assert [wire.reset(number) for number in range(1, 2 * STREAMS, 2)] == [None] * STREAMS
    late = range(2 * STREAMS + 1, 2 * STREAMS + 100, 2)
    assert [wire.reset(number) for number in late] == [ErrorCodes.REFUSED_STREAM] * 50
    for user in end.users:
        answer(user, b"ok")
        finish(user)
    end.session.feed(wire.get())
    assert len(end.users) == STREAMS + 1
    with pytest.raises(Http2Error):
        for _ in range(3000):
            end.session.feed(wire.get())


# GOAWAY


def test_a_server_that_goes_away_finishes_what_is_under_way() -> None:
    joined = Joined()
    asked, served = joined.request()
    joined.server.session.go_away(1)
    joined.run()
    assert joined.client.goaways == [(1, 0)]
    answer(served, bytes(INITIAL_WINDOW * 3))
    joined.run()
    assert len(asked.data) == INITIAL_WINDOW * 3
    assert asked.trailers == []


def test_a_client_that_goes_away_finishes_what_is_under_way() -> None:
    joined = Joined()
    asked, served = joined.request(end=False)
    joined.client.session.go_away()
    joined.run()
    assert joined.server.goaways == [(2**31 - 1, 0)]
    stream_of(asked).send_data(b"up")
    stream_of(asked).send_end([])
    answer(served, b"down")
    joined.run()
    assert (served.data, asked.data) == (b"up", b"down")


# Signs of life


def test_a_ping_tells_the_round_trip_and_that_the_other_side_lives() -> None:
    joined = Joined()
    session = joined.client.session
    session.ping()
    session.ping()  # one at a time
    data = session.take()
    assert data.count(b"quictunl") == 1
    joined.clock.now += 0.25
    joined.server.session.feed(data)
    joined.run()
    assert session.round_trip == 0.25
    assert session.heard_at == joined.clock.now


def test_pings_are_answered() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello() + frame(PING, 0, 0, b"12345678"))
    wire.takes(end.session.take())
    assert [(seen.flags, seen.payload) for seen in wire.of(0) if seen.kind == PING] == [(ACK, b"12345678")]


# What a peer may make us keep


def test_settings_that_nobody_knows_are_not_kept() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello())
    for start in range(256, 65_536, 2048):
        end.session.feed(settings_frame(dict.fromkeys(range(start, min(start + 2048, 65_536)), 1)))
    assert len(end.session.h2.remote_settings) < 10
    wire.takes(end.session.take())
    assert len([seen for seen in wire.of(0) if seen.kind == SETTINGS and seen.flags & ACK]) == 33


def test_a_peers_table_is_never_larger_than_ours_by_default() -> None:
    """A table of four gigabytes would be filled by answers, and searched for each of them."""
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello({1: 2**32 - 1}))
    wire.takes(end.session.take())
    for number in range(200):
        end.session.feed(wire.get())
        stream_of(end.users[-1]).send_head([*OK, (b"x-%d" % number, b"y" * 500)], end=True)
        finish(end.users[-1])
        wire.takes(end.session.take())
    assert end.session.h2.encoder.header_table_size == 4096
    assert len(end.session.h2.encoder.header_table.dynamic_entries) < 20
    assert dict(wire.heads[2 * 200 - 1][0])[b"x-199"] == b"y" * 500
    end.session.feed(settings_frame({1: 0}))
    end.session.feed(wire.get())
    stream_of(end.users[-1]).send_head([*OK, (b"x", b"y")], end=True)
    wire.takes(end.session.take())
    assert dict(wire.heads[wire.last][0])[b"x"] == b"y"


def test_a_header_bomb_ends_the_connection() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    # One literal of 4,000 bytes that is put into the table, then that entry over and over: one byte each.
    bomb = b"\x40\x01x\x7f" + bytes([4000 - 127 & 0x7F | 0x80, (4000 - 127) >> 7]) + b"y" * 4000 + b"\xbe" * 10_000
    with pytest.raises(Http2Error) as caught:
        end.session.feed(wire.hello() + frame(HEADERS, END_HEADERS | END_STREAM, 1, bomb))
    assert caught.value.code == ErrorCodes.ENHANCE_YOUR_CALM
    assert not end.users


def test_closed_streams_are_forgotten() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello())
    for number in range(1500):
        end.session.feed(wire.get(end=False))
        stream_of(end.users[-1]).reset(ErrorCodes.NO_ERROR)
        end.session.take()
        if number % 100 == 0:
            end.users.clear()
    h2 = end.session.h2
    assert (len(h2.streams), len(end.session.streams)) == (1, 0)
    assert len(h2._closed_streams) <= 1024
    assert len(end.session._given_up) <= 1024


# The end


def test_what_is_held_is_not_written_after_the_connection_is_broken() -> None:
    """h2 refuses every frame after an error; what streams hold must not be tried."""
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello({4: 2**20}) + frame(WINDOW_UPDATE, 0, 0, (2**20).to_bytes(4, "big")) + wire.get())
    answer(end.users[0], bytes(200_000))
    end.session.take()
    assert end.session._held
    with pytest.raises(Http2Error) as caught:
        end.session.feed(frame(DATA, 0, 0, b"x"))
    end.session.terminate(caught.value)
    wire.takes(end.session.take())
    assert wire.goaways == [(1, ErrorCodes.PROTOCOL_ERROR)]
    end.session.close()
    assert end.left == (0, 0, 0)
    end.session.ping()
    assert end.session.take() == b""


@pytest.mark.parametrize("by_gate", [True, False])
def test_a_broken_connection_is_told_why_once(by_gate: bool) -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session.feed(wire.hello() + wire.get())
    wire.takes(end.session.take())
    with pytest.raises(Http2Error) as caught:
        end.session.feed(frame(PRIORITY, 0, 0, bytes(5)) if by_gate else frame(WINDOW_UPDATE, 0, 0, bytes(4)))
    end.session.terminate(caught.value)
    wire.takes(end.session.take())
    assert wire.goaways == [(1, ErrorCodes.PROTOCOL_ERROR)]


def test_what_came_before_a_wrong_frame_in_one_read_counts() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    with pytest.raises(Http2Error) as caught:
        end.session.feed(wire.hello() + wire.get() + frame(PING, 0, 0, bytes(8)) * 10_001)
    assert len(end.users) == 1
    end.session.terminate(caught.value)
    wire.takes(end.session.take())
    assert wire.goaways == [(1, ErrorCodes.ENHANCE_YOUR_CALM)]


def test_frames_after_the_one_that_ended_it_are_not_looked_at() -> None:
    end = End(is_client=False, clock=Clock())
    wire = Wire()
    end.session_goaway = lambda last, code: end.session.close()  # type: ignore[method-assign]
    end.session.feed(wire.hello() + frame(GOAWAY, 0, 0, bytes(8)) + wire.get())
    assert not end.users


BROKEN: dict[str, tuple[bytes, ErrorCodes]] = {
    "data on stream 0": (frame(DATA, 0, 0, b"x"), ErrorCodes.PROTOCOL_ERROR),
    "data on an idle stream": (frame(DATA, 0, 99, b"x"), ErrorCodes.PROTOCOL_ERROR),
    "a window for an idle stream": (frame(WINDOW_UPDATE, 0, 99, b"\0\0\0\1"), ErrorCodes.PROTOCOL_ERROR),
    "head on stream 0": (frame(HEADERS, 5, 0, b"\x82"), ErrorCodes.PROTOCOL_ERROR),
    "an even stream": (frame(HEADERS, 5, 2, b"\x82"), ErrorCodes.PROTOCOL_ERROR),
    "an old stream": (frame(HEADERS, 5, 3, b"\x82") + frame(HEADERS, 5, 1, b"\x82"), ErrorCodes.PROTOCOL_ERROR),
    "garbage for HPACK": (frame(HEADERS, 5, 1, b"\xff\xff\xff\xff\xff\xff"), ErrorCodes.PROTOCOL_ERROR),
    "an index out of the table": (frame(HEADERS, 5, 1, b"\xfe"), ErrorCodes.PROTOCOL_ERROR),
    "a long integer": (frame(HEADERS, 5, 1, b"\xff" * 5000), ErrorCodes.PROTOCOL_ERROR),
    "padding longer than the frame": (frame(DATA, 8, 1, b"\xff"), ErrorCodes.PROTOCOL_ERROR),
    "a short PING": (frame(PING, 0, 0, bytes(7)), ErrorCodes.FRAME_SIZE_ERROR),
    "a short RST_STREAM": (frame(RST_STREAM, 0, 1, bytes(3)), ErrorCodes.FRAME_SIZE_ERROR),
    "SETTINGS of 7 bytes": (frame(SETTINGS, 0, 0, bytes(7)), ErrorCodes.FRAME_SIZE_ERROR),
    "SETTINGS of a stream": (frame(SETTINGS, 0, 1, bytes(6)), ErrorCodes.PROTOCOL_ERROR),
    "an initial window too large": (settings_frame({4: 2**31}), ErrorCodes.FLOW_CONTROL_ERROR),
    "a frame size too small": (settings_frame({5: 16_383}), ErrorCodes.PROTOCOL_ERROR),
    "push of 2": (settings_frame({2: 2}), ErrorCodes.PROTOCOL_ERROR),
    "a pushed stream": (frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2\x82"), ErrorCodes.PROTOCOL_ERROR),
    "a window of 0": (frame(WINDOW_UPDATE, 0, 0, bytes(4)), ErrorCodes.PROTOCOL_ERROR),
    "a window over the edge": (frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), ErrorCodes.FLOW_CONTROL_ERROR),
    "a naked continuation": (frame(CONTINUATION, 4, 1, b"\x82"), ErrorCodes.PROTOCOL_ERROR),
    "a continuation of another stream": (
        frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 4, 3, b"\x82"),
        ErrorCodes.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_connection_that_is_broken_ends_with_the_right_code(name: str) -> None:
    data, code = BROKEN[name]
    end = End(is_client=False, clock=Clock())
    with pytest.raises(Http2Error) as caught:
        end.session.feed(Wire().hello() + data)
    acceptable = {code, ErrorCodes.PROTOCOL_ERROR} if code == ErrorCodes.FRAME_SIZE_ERROR else {code}
    assert caught.value.code in acceptable
    end.session.terminate(caught.value)
    assert end.session.take()


@given(
    st.lists(
        st.builds(
            frame,
            st.integers(0, 11),
            st.integers(0, 255),
            st.sampled_from([0, 1, 3, 5, 2, 99]),
            st.one_of(
                st.binary(max_size=20),
                st.sampled_from([bytes(4), bytes(5), bytes(8), b"\x82\x86\x84\x41\x01a", b"\0\0\0\1", b"\x88"]),
            ),
        ),
        max_size=15,
    ),
    st.booleans(),
)
@settings(max_examples=150)
def test_whatever_frames_come_only_one_kind_of_error_comes_out(frames: list[bytes], is_client: bool) -> None:
    end = End(is_client=is_client, clock=Clock())
    wire = Wire(is_client=not is_client)
    if is_client:
        for _ in range(2):
            end.ask(end=False)
    end.session.take()
    try:
        end.session.feed(wire.hello())
        for data in frames:
            end.session.feed(data)
            for user in end.users:
                if stream_of(user).may_send:
                    answer(user, b"ok")
            wire.takes(end.session.take().removeprefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
    except Http2Error as error:
        end.session.terminate(error)
        assert end.session.take()
    end.session.close()
    assert end.left == (0, 0, 0)


@given(st.data())
@settings(max_examples=40)
def test_any_order_of_writing_reading_and_pausing_brings_every_byte(data: st.DataObject) -> None:
    joined = Joined(budget=1 << 20)
    pairs = [joined.request(end=False) for _ in range(3)]
    for _, served in pairs:
        stream_of(served).send_head(OK, end=False)
    expected = {user: b"" for pair in pairs for user in pair}
    other = {user: mate for asked, served in pairs for user, mate in ((asked, served), (served, asked))}
    users = list(expected)
    for step in range(data.draw(st.integers(0, 25))):
        user = data.draw(st.sampled_from(users))
        match data.draw(st.sampled_from(["write", "pause", "resume", "turn", "block", "unblock"])):
            case "write":
                chunk = bytes([step]) * data.draw(st.sampled_from([1, 1000, 70_000, 300_000]))
                stream_of(user).send_data(chunk)
                expected[other[user]] += chunk
            case "pause":
                stream_of(user).pause()
            case "resume":
                stream_of(user).resume()
            case "block":
                joined.client.session.write_paused = True
            case "unblock":
                joined.client.session.resume()
            case _:
                joined.turn()
    joined.client.session.resume()
    for user in users:
        stream_of(user).resume()
        stream_of(user).send_end([])
    joined.run(pace=0.001)
    for user in users:
        assert user.data == expected[user]
        assert user.trailers == []
        assert not user.peer.paused or user.sent
    finish(*users)
    assert joined.client.left == joined.server.left == (0, 0, 0)
