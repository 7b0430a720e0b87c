"""What the commands do: settings become plain values, rooms are put together, the process is started and stopped."""

from quictunnel.app.connect import connect
from quictunnel.app.demo import demo
from quictunnel.app.serve import serve

__all__ = ["connect", "demo", "serve"]
