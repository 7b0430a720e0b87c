"""What is kept of a request so that it can be asked a second time, whatever HTTP the backend speaks."""

from typing import Final

from mypy_extensions import mypyc_attr

from quictunnel.exchange import Leg
from quictunnel.wire.frames import Data, Frame

__all__ = ["IDEMPOTENT", "ReplayLeg"]

# RFC 9110 section 9.2.2: what may be sent again when nobody knows whether it arrived.
IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})
# Bytes of a request's body kept for a second attempt; a larger one is not repeated.
_LIMIT: Final = 16 * 1024


@mypyc_attr(allow_interpreted_subclasses=True)
class ReplayLeg(Leg):
    """A leg that remembers what it sent after the head, as long as that is little."""

    __slots__ = ("_replay", "_replay_size")

    def __init__(self) -> None:
        super().__init__()
        self._replay: list[Frame] | None = None  # None: nothing is remembered, or no longer all
        self._replay_size = 0

    def _remember(self, frame: Frame) -> None:
        """Keep ``frame`` for a second attempt, or give that up."""
        assert self._replay is not None
        if type(frame) is Data:
            self._replay_size += len(frame.data)
        if self._replay_size > _LIMIT:
            self._replay = None
        else:
            self._replay.append(frame)
