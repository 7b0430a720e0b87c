"""The server's leg of an exchange on a stream: it remembers its request until an answer begins.

So what a client never got, or may get twice, can be given to another.

A request **never reached a backend** when its stream was never opened, when nothing of what was written to it has
left, when the client says so (it takes nothing more, or could not connect), or when the client's host refused the very
datagrams that it went out in. Such a request is sent again whatever its method. Any other may have reached one: it is
sent again only if its method is idempotent (RFC 9110 section 9.2.2) and all of it is still here.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from quictunnel.exchange import VOID, Leg
from quictunnel.http.replay import IDEMPOTENT
from quictunnel.quic.engine import STREAM_OVER
from quictunnel.quic.stream import StreamLeg
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import Data, Frame, RequestHead, ResponseHead

if TYPE_CHECKING:
    from quictunnel.server.registry import Session

__all__ = ["NO_BACKEND", "Memory", "RequestLeg"]

NO_BACKEND: Final = frozenset(
    {
        ErrorCode.DNS_ERROR,
        ErrorCode.CONNECTION_REFUSED,
        ErrorCode.CONNECTION_TIMEOUT,
        ErrorCode.TLS_ERROR,
        ErrorCode.TLS_CERTIFICATE_ERROR,
        ErrorCode.DESTINATION_IP_UNROUTABLE,
    }
)
"what a client says when it could not connect to its backend"

# Bytes of body; a larger one, once on its way, is not kept for a second attempt.
_KEPT: Final = 64 * 1024

KEPT_TOTAL: Final = 32 * 1024 * 1024
"bytes of the bodies of all requests together; beyond it none is kept"

# Attempts after the first. What is refused everywhere must not go round for ever.
_AGAIN: Final = 3


class Memory:
    """How many bytes of bodies are kept by all legs of a server."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = KEPT_TOTAL) -> None:
        self.limit = limit
        self.used = 0


Again = Callable[["RequestLeg", Leg, TunnelError], bool]


class RequestLeg(StreamLeg):
    """A visitor's request on a stream, or on its way to one."""

    __slots__ = (
        "_again",
        "_kept",
        "_kept_size",
        "_memory",
        "failure",
        "lost",
        "prefers",
        "session",
        "tried",
        "tries",
        "unreached",
    )

    def __init__(
        self, budget: WindowBudget, head_limit: int, again: Again | None = None, memory: Memory | None = None
    ) -> None:
        """``again(leg, visitor, error)`` gives the request to another leg, or says that it did not."""
        super().__init__(budget, head_limit, is_opener=True)
        self._again = again
        self._memory = memory or Memory()
        self._kept: list[Frame] | None = None if again is None else []
        self._kept_size = 0
        self.tries = 0
        self.tried: frozenset[Session] = frozenset()  # those that are not to have it again
        self.prefers: Session | None = None  # whose visitor it is
        self.session: Session | None = None  # which has it
        self.failure: TunnelError | None = None  # what the attempt before this one ended with
        self.lost = False  # it was the link that failed it
        self.unreached = False  # and not a byte had come through

    # The verbs

    def receive(self, frame: Frame) -> None:
        kept = self._kept
        if kept is not None:
            kept.append(frame)
            if type(frame) is Data:
                self._keep(len(frame.data))
        StreamLeg.receive(self, frame)

    def abort(self, error: TunnelError) -> None:
        StreamLeg.abort(self, error)
        self._forget()

    # What is kept

    def _keep(self, size: int) -> None:
        memory = self._memory
        self._kept_size += size
        memory.used += size
        if self._kept_size > _KEPT or memory.used > memory.limit:
            self._forget()

    def _forget(self) -> None:
        self._kept = None
        self._memory.used -= self._kept_size
        self._kept_size = 0

    # A second attempt

    @property
    def is_repeatable(self) -> bool:
        """Whether all of it is still here, and it may be asked again at all."""
        kept = self._kept
        # An upgrade's bytes have no end that could be waited for.
        return bool(kept) and self.tries < _AGAIN and not kept[0].protocol  # type: ignore[index,union-attr]

    @property
    def is_idempotent(self) -> bool:
        """Whether it may reach a backend twice."""
        kept = self._kept
        return bool(kept) and kept[0].method in IDEMPOTENT  # type: ignore[index,union-attr]

    def _never_left(self) -> bool:
        """Whether no byte of it can have reached the client."""
        link = self.link
        if link is None or self.stream_id < 0:
            return True
        if link.refused and self.first_sent >= link.refused_from:
            return True
        with suppress(*STREAM_OVER):
            return link.queued(self.stream_id) >= self.written
        return False

    def repeat_on(self, leg: "RequestLeg") -> None:
        """Hand all that was received here to ``leg``, which is joined to this one's former peer."""
        assert self._kept is not None
        kept = self._kept
        self._forget()
        leg.tries = self.tries + 1
        leg.prefers = self.prefers
        for frame in kept:
            leg.receive(frame)
        if self._paused:
            leg.pause()
        if self._peer_paused and not leg._peer_paused:
            leg.peer.resume()

    def rescue(self, *, only_unreached: bool = False) -> None:
        """Its link is dead, or as good as dead: have the request repeated if that is safe, else leave it there.

        With ``only_unreached`` only if the client cannot have got any of it.
        """
        if not self.ended and self.is_repeatable:
            unreached = self._never_left()
            if only_unreached and not unreached:
                return
            self.lost, self.unreached = True, unreached
            if self.unreached or self.is_idempotent:
                if self.link is not None and self.stream_id >= 0 and not self.may_send:
                    # Though all has been said: whatever the library would repeat must not come to a backend any more.
                    self.link.cut_stream(self.stream_id, ErrorCode.NOT_ACCEPTED, sending=True, receiving=False)
                self._fail(TunnelError(ErrorCode.CONNECTION_TERMINATED, "the tunnel's client does not answer"))

    def link_lost(self) -> None:
        self.lost, self.unreached = True, self._never_left()
        StreamLeg.link_lost(self)

    def _fail(self, error: TunnelError) -> None:
        peer = self.peer
        StreamLeg.abort(self, error)
        self._tell(peer, error)

    def _tell(self, peer: Leg, error: TunnelError) -> None:
        if not self.is_repeatable or peer is VOID or self._again is None or not self._again(self, peer, error):
            peer.abort(error)
        self._forget()

    def _head_received(self, head: RequestHead | ResponseHead) -> None:
        # What the visitor begins to get must be one answer.
        self._forget()
        session = self.session
        if session is not None and session.failures:
            session.works()
        StreamLeg._head_received(self, head)
