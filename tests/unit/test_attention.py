"""Silence is counted only while it could be broken."""

import asyncio
from typing import Any

from quictunnel.quic.attention import Attention
from tests.support.clock import ClockLoop


def play(work: Any) -> None:
    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        runner.run(work())


def hold_up(seconds: float) -> None:
    """Nothing of this process runs for so long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ClockLoop)
    loop.now += seconds


class Unread:
    """A socket that has been read up to some moment."""

    def __init__(self) -> None:
        self.until: float | None = None

    def read_until(self, now: float) -> float:
        return now if self.until is None else self.until


def test_all_time_counts_in_which_nothing_held_the_process_up() -> None:
    async def work() -> None:
        attention = Attention()
        attention.start()
        then = asyncio.get_running_loop().time()
        await asyncio.sleep(10.0)
        assert attention.seconds_since(then) == 10.0
        assert attention.seconds_since(then + 4.0) == 6.0
        attention.close()

    play(work)


def test_time_before_the_process_could_listen_again_does_not_count() -> None:
    async def work() -> None:
        attention = Attention()
        attention.start()
        then = asyncio.get_running_loop().time()
        await asyncio.sleep(3.0)
        hold_up(20.0)
        assert attention.seconds_since(then) == 0.0, "whoever asks first finds out"
        await asyncio.sleep(2.0)
        assert attention.seconds_since(then) == 2.0
        hold_up(0.4)
        await asyncio.sleep(1.0)
        assert 3.3 < attention.seconds_since(then) < 3.5, "a moment is no hold-up"
        attention.close()

    play(work)


def test_pause_is_found_though_nobody_asks_in_it() -> None:
    async def work() -> None:
        attention = Attention()
        attention.start()
        then = asyncio.get_running_loop().time()
        hold_up(20.0)
        await asyncio.sleep(5.0)
        assert 4.4 < attention.seconds_since(then) <= 5.0
        attention.close()

    play(work)


def test_time_since_which_something_waits_unread_does_not_count() -> None:
    async def work() -> None:
        attention = Attention()
        socket: Any = Unread()
        attention.socket = socket
        attention.start()
        then = asyncio.get_running_loop().time()
        await asyncio.sleep(5.0)
        socket.until = then + 3.0
        assert attention.seconds_since(then) == 3.0
        assert attention.seconds_since(then + 4.0) == 0.0
        socket.until = None
        assert attention.seconds_since(then) == 5.0
        attention.close()

    play(work)


def test_who_does_not_watch_counts_all_time() -> None:
    async def work() -> None:
        attention = Attention()
        then = asyncio.get_running_loop().time()
        hold_up(20.0)
        assert attention.seconds_since(then) == 20.0
        attention.start()
        attention.close()
        hold_up(20.0)
        assert attention.seconds_since(then) == 40.0

    play(work)
