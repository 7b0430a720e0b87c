"""Two legs joined: the landing that both sides of the tunnel meet on.

A **leg** is one side of an exchange: the visitor's connection, a QUIC stream, a backend's connection, an application
in the process. Legs push; they do not await, and no task, queue or future is made for a request on the way through.

What a leg may rely on, and must keep:

- ``receive`` is called with frames in the order of ``wire.frames`` and never after this leg has aborted its peer,
  been aborted itself, or received or handed over the frame that ends the exchange.
- ``pause``, ``resume`` and ``abort`` may be called from within this leg's own call of ``peer.receive``. ``pause`` is
  advice with a bound: what a leg had already read when it was paused it may still hand over.
- No verb raises. What fails becomes an ``abort`` of the peer.
- Who ends is ``over``: ``detach`` makes every later call from a stale peer harmless, because both ends then point at
  the one ``VOID`` leg.
"""

from mypy_extensions import mypyc_attr

from quictunnel.wire.errors import TunnelError
from quictunnel.wire.frames import Frame

__all__ = ["VOID", "Leg", "join"]


@mypyc_attr(allow_interpreted_subclasses=True)
class Leg:
    """One side of an exchange."""

    __slots__ = ("peer",)

    def __init__(self) -> None:
        self.peer: Leg = VOID

    def receive(self, frame: Frame) -> None:
        """Take what the peer hands over and send it out of this leg."""
        raise NotImplementedError

    def pause(self) -> None:
        """The peer cannot take more: stop reading this leg's own source."""
        raise NotImplementedError

    def resume(self) -> None:
        """The peer can take more again."""
        raise NotImplementedError

    def abort(self, error: TunnelError) -> None:
        """The peer failed: answer with ``error``'s status if no head has gone out of this leg, else cut."""
        raise NotImplementedError

    def detach(self) -> None:
        """End this leg's part: neither leg hears of the other again."""
        peer, self.peer = self.peer, VOID
        if peer.peer is self:
            peer.peer = VOID


class _Void(Leg):
    """What a leg is joined to before and after its exchange: it takes everything and does nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        self.peer = self

    def receive(self, frame: Frame) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def abort(self, error: TunnelError) -> None:
        pass


VOID: Leg = _Void()


def join(one: Leg, other: Leg) -> None:
    """Make two legs an exchange."""
    one.peer = other
    other.peer = one
