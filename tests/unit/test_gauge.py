"""What a process of a pool reports of itself."""

import asyncio
from typing import Any

import pytest

from quictunnel.app.gauge import REPORT_TIME, Gauge
from quictunnel.app.supervise import Parent
from tests.support.clock import ClockLoop


class Heard(Parent):
    def __init__(self) -> None:
        super().__init__(-1, -1)
        self.reports: list[dict[str, Any]] = []

    def tell(self, kind: str, **facts: Any) -> bool:
        self.reports.append({"kind": kind, **facts})
        return True


def measured(seconds: float, blocked: float = 0.0, served: int = 0) -> list[dict[str, Any]]:
    """What is reported in that time by a loop that does something for ``blocked`` seconds every tenth of a second."""
    heard = Heard()

    async def work() -> None:
        count = 0
        with Gauge(heard, lambda: count):
            for _ in range(round(seconds / 0.1)):
                await asyncio.sleep(0.1 - blocked)
                count += served
                loop.now += blocked
        before = len(heard.reports)
        await asyncio.sleep(10 * REPORT_TIME)
        assert len(heard.reports) == before, "nothing is measured any more"

    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, ClockLoop)
        runner.run(work())
    return heard.reports


def test_idle_process_reports_that_it_is_idle() -> None:
    reports = measured(3.0)
    assert 5 <= len(reports) <= 6
    for report in reports:
        assert report["kind"] == "load"
        assert report["lag"] == report["worst"] == pytest.approx(0, abs=0.001)
        assert report["served"] == 0
        assert report["cpu"] >= 0


def test_blocked_event_loop_shows_in_how_late_it_is() -> None:
    report = measured(3.0, blocked=0.08)[-1]
    assert report["worst"] == pytest.approx(0.05, abs=0.031)
    assert 0.01 < report["lag"] <= report["worst"]


def test_requests_are_counted_by_the_second() -> None:
    assert [round(report["served"], -1) for report in measured(3.0, served=5)] == [50] * 5


def test_processor_time_is_a_share_of_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr("time.process_time", lambda: next(times) * REPORT_TIME * 0.4)
    assert measured(1.0)[0]["cpu"] == pytest.approx(0.4, rel=0.1)
