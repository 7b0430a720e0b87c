"""FanOut: each stream that the server opens goes to the backend at once, whatever the others do."""

from collections.abc import Callable
from typing import Protocol

from quictunnel.exchange import Leg, join
from quictunnel.quic.stream import StreamLeg
from quictunnel.wire.errors import ErrorCode, TunnelError
from quictunnel.wire.frames import PROBE, End, Frame, RequestHead, ResponseHead

__all__ = ["Backend", "FanOut", "HostRule", "host_rule"]

HostRule = Callable[[RequestHead], RequestHead]


class Backend(Protocol):
    """Whatever a client forwards to."""

    @property
    def name(self) -> str:
        """For logs."""

    @property
    def authority(self) -> str:
        """The Host of its own, for ``--host-header backend``."""

    def open(self) -> Leg:
        """A leg for one exchange: join it, then hand it the head."""

    async def aclose(self, grace: float = 0.0) -> None:
        """End everything within ``grace`` seconds."""


def host_rule(rule: str, backend_authority: str) -> HostRule | None:
    """What ``--host-header`` asks for: ``preserve`` the visitor's Host, send the ``backend``'s own, or a value."""
    if rule == "preserve":
        return None
    authority = (backend_authority if rule == "backend" else rule).encode("ascii")
    return lambda head: head._replace(authority=authority)


class _ProbeLeg(Leg):
    """Answers a probe: the way of requests is open up to where the backend would be asked."""

    __slots__ = ()

    def receive(self, frame: Frame) -> None:
        if isinstance(frame, End):
            peer = self.peer
            peer.receive(ResponseHead(204, []))
            self.detach()
            peer.receive(End())

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def abort(self, error: TunnelError) -> None:
        pass


class FanOut:
    """Joins streams to backend legs."""

    def __init__(self, backend: Backend, rule: HostRule | None = None, *, allow_connect: bool = False) -> None:
        self.backend = backend
        self._rule = rule
        self._allow_connect = allow_connect
        self.count = 0

    def open_exchange(self, head: RequestHead, leg: StreamLeg) -> RequestHead:
        """Join ``leg`` to a new leg of the backend; the head that is returned goes to it next."""
        if head.scheme == PROBE.scheme:
            join(leg, _ProbeLeg())
            if leg.link is not None:
                leg.link.probed += 1
            return head
        self.count += 1
        if head.method == b"CONNECT":
            # Whatever the server asks: it is the client that says what goes to its backend.
            if self._allow_connect:
                join(leg, self.backend.open())
            else:
                leg.abort(TunnelError(ErrorCode.NOT_IMPLEMENTED))
            return head
        join(leg, self.backend.open())
        return head if self._rule is None else self._rule(head)
