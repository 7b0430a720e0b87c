"""Much that goes both ways at once over a path with loss: neither end may wait for the other for ever."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.ends import Backend, Ends, Request, Visit, play

pytestmark = pytest.mark.either

BODY = random.Random(1).randbytes(12_000)


class Echo(Backend):
    """Answers each upload with as much."""

    def on_request(self, request: Request) -> None:
        self.loop.call_soon(request.answer, 200, BODY)

    def __init__(self, loop: Any) -> None:
        super().__init__()
        self.loop = loop


def has_answer(visit: Visit) -> bool:
    return visit.status != 0 and len(visit.answer.partition("\r\n\r\n")[2]) >= len(BODY)


@pytest.mark.parametrize(("loss", "busy"), [(0.0, False), (0.01, False), (0.03, False), (0.01, True)])
def test_eighty_uploads_and_their_answers_pass_each_other_on_one_link(
    loss: float, busy: bool, engine: str, tmp_path: Path
) -> None:
    """Also where each end has other work, and then reads all that has come."""

    async def scenario(ends: Ends) -> None:
        await ends.connected(Echo(ends.loop))
        ends.network.busy = busy
        chance = random.Random(1)
        ends.network.lose = lambda source, destination: chance.random() < loss
        visits = [ends.visit(f"/{number}", f"Content-Length: {len(BODY)}", method="POST") for number in range(80)]
        for visit in visits:
            visit.send(BODY)
        await ends.until(lambda: all(has_answer(visit) or visit.transport.closed for visit in visits), 60.0)
        assert [visit.status for visit in visits] == [200] * 80
        assert all(visit.answer.endswith(BODY.decode("latin-1")) for visit in visits)

    play(scenario, (engine, engine), tmp_path)
