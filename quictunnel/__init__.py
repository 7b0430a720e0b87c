"""A reverse HTTP tunnel over QUIC.

>>> import quictunnel
>>> quictunnel.connect("myapp:app", join="qt1_…").run()  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quictunnel.app.tunnel import Tunnel as Tunnel
    from quictunnel.app.tunnel import connect as connect

__all__ = ["Tunnel", "__version__", "connect"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The whole client is imported by whoever uses it, not by every `quictunnel --help`.
    if name in ("Tunnel", "connect"):
        from quictunnel.app import tunnel

        return getattr(tunnel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
