"""What a running server asks of the book of names: whose a name is now, and which names it knows but does not serve.

A server that was started a moment ago, or is one process of several, has not seen every name that there is. What the
book says is believed for a second, so that visitors asking for nothing that exists cost no more than those who do.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Final

from loguru import logger

from quictunnel.trust.files import TrustError
from quictunnel.trust.owners import Claim, Held, Owners
from quictunnel.trust.tokens import NameKind, TokenStore
from quictunnel.wire.errors import ErrorCode, TunnelError

__all__ = ["Book"]

_BELIEVED: Final = 1.0
"seconds"

_REMEMBERED: Final = 4096
"answers kept for that time"


class Book:
    """The book of names, read by the light of the tokens that are good now."""

    def __init__(
        self,
        owners: Owners,
        tokens: TokenStore,
        *,
        max_names: int,
        now: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        """``max_names`` is how many one token may have; ``now`` is the wall clock, ``clock`` the event loop's."""
        self._owners = owners
        self._tokens = tokens
        self.max_names = max_names
        self._now = now
        self._clock = clock
        self._recent: dict[tuple[NameKind, str], Held | None] = {}  # without a name: the only one
        self._until = 0.0
        self._fault = ""

    def claim(self, claim: Claim, in_use: Callable[[str], bool]) -> None:
        """Have a tunnel's name and hosts be a token's. Raises NameTaken, NamesFull and TrustError."""
        now = self._now()
        self._owners.claim(
            claim,
            now.timestamp(),
            limit=self.max_names,
            stands=lambda token, kind, name: self._tokens.holds(token, kind, name, now),
            in_use=in_use,
        )
        self._recent.clear()

    def knows(self, tunnel: str) -> bool:
        """Whether a name in its one form is somebody's. Raises TunnelError when that cannot be told now."""
        return bool(tunnel) and self._held("tunnel", tunnel) is not None

    def only(self) -> str:
        """The only name that anybody has, empty if there is not just one. Raises TunnelError."""
        held = self._held("tunnel", "")
        return "" if held is None else held.name

    def host(self, host: str) -> Held | None:
        """Whose a host, or a wildcard of hosts, is. Raises TunnelError when that cannot be told now."""
        return self._held("host", host)

    def close(self) -> None:
        """Let go of the file."""
        self._owners.close()

    def _held(self, kind: NameKind, name: str) -> Held | None:
        recent, now = self._recent, self._clock()
        if now >= self._until or len(recent) >= _REMEMBERED:
            recent.clear()
            self._until = now + _BELIEVED
        key = (kind, name)
        if key not in recent:
            recent[key] = self._look(kind, name)
        return recent[key]

    def _look(self, kind: NameKind, name: str) -> Held | None:
        try:
            held = self._owners.look(kind, name) if name else self._owners.only()
            if held is not None and not self._tokens.holds(held.token, kind, held.name, self._now()):
                held = None
        except TrustError as error:
            if str(error) != self._fault:
                self._fault = str(error)
                logger.error("{}", error)
            raise TunnelError(ErrorCode.DESTINATION_UNAVAILABLE, "The server cannot look names up now.") from None
        self._fault = ""
        return held
