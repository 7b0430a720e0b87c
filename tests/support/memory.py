"""Two ends of a link joined in memory: a network that delivers, delays, or loses."""

import asyncio
import functools
import gc
import heapq
import math
import resource
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quictunnel.exchange import Leg
from quictunnel.quic.engine import ClientTrust, ServerIdentity, select_engine
from quictunnel.quic.link import Link, LinkClosed, LinkOwner
from quictunnel.quic.listen import LinkListener
from quictunnel.quic.stream import StreamLeg
from quictunnel.trust.certificates import ensure_server_certificate
from quictunnel.wire.control import ControlMessage, Hello
from quictunnel.wire.credit import WindowBudget
from quictunnel.wire.errors import TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead

HELLO = Hello(1, "app", "s" * 32, "qtk_x")
SERVER = ("10.0.0.1", 4433)
PAIRS = [("aioquic", "aioquic"), ("qh3", "qh3"), ("aioquic", "qh3"), ("qh3", "aioquic")]
"server engine, client engine"


@functools.cache
def identity() -> tuple[ServerIdentity, bytes]:
    """A server certificate for localhost and its CA (PEM), made once a run."""
    directory = Path(tempfile.mkdtemp(prefix="quictunnel-test-"))
    made = ensure_server_certificate(directory, ["localhost", "127.0.0.1"], datetime.now(UTC))
    return ServerIdentity(str(made.certificate), str(made.key)), made.authority.read_bytes()


def resident() -> int:
    """Bytes of memory that this process has in use, what is only garbage left out."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Recorder(Leg):
    """A leg that writes down what happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.errors: list[TunnelError] = []
        self.paused = False
        self.pauses = 0
        self.on_frame: Callable[[Frame], None] = lambda frame: None

    def receive(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.on_frame(frame)

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        self.paused = False

    def abort(self, error: TunnelError) -> None:
        self.errors.append(error)

    @property
    def body(self) -> bytes:
        return b"".join(frame.data for frame in self.frames if isinstance(frame, Data))

    @property
    def ended(self) -> bool:
        return any(isinstance(frame, End) for frame in self.frames)


class Owner(LinkOwner):
    """A link owner that writes down what it is told and answers requests as it is told to."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.messages: list[ControlMessage] = []
        self.closed: list[LinkClosed] = []
        self.legs: list[Recorder] = []
        self.free = 0
        self.on_request: Callable[[StreamLeg, RequestHead, Recorder], None] = lambda leg, head, backend: None

    def link_ready(self, link: Link) -> None:
        self.links.append(link)

    def link_control(self, link: Link, message: ControlMessage) -> None:
        self.messages.append(message)

    def link_request(self, link: Link, leg: StreamLeg, head: RequestHead) -> RequestHead:
        backend = Recorder()
        self.legs.append(backend)
        leg.peer, backend.peer = backend, leg
        self.on_request(leg, head, backend)
        return head

    def link_slot_free(self, link: Link, leg: StreamLeg) -> None:
        self.free += 1

    def link_closed(self, link: Link, why: LinkClosed) -> None:
        self.closed.append(why)


class _Socket:
    """In place of a listener's."""

    def __init__(self, send: Callable[[bytes, Any], None]) -> None:
        self.send = send

    def send_all(self, datagrams: list[tuple[bytes, Any]]) -> None:
        for data, address in datagrams:
            self.send(data, address)

    def close(self) -> None:
        pass


class Network:
    """A server's listener and any number of clients, with ``delay`` seconds each way; ``lose`` says what gets lost.

    Datagrams larger than ``mtu`` are dropped on the way, and the ends think that the first hop carries ``first_hop``.
    It carries ``rate`` bytes a second in each direction; what comes faster waits, without a limit.
    """

    def __init__(self, server_engine: str, client_engine: str, *, delay: float = 0.005, retry: str = "auto") -> None:
        self.loop = asyncio.get_running_loop()
        self.delay = delay
        self.rate = math.inf
        self._free_at = {True: 0.0, False: 0.0}
        self.mtu = 65_535
        self.first_hop = 1200
        self.largest = {True: 0, False: 0}
        self.lose: Callable[[bytes, bool], bool] = lambda data, to_server: False
        self.datagrams = {True: 0, False: 0}
        self.bytes = {True: 0, False: 0}
        self.client_engine = select_engine(client_engine)
        self.server_owner, self.client_owner = Owner(), Owner()
        self.server_budget, self.client_budget = WindowBudget(1 << 26), WindowBudget(1 << 26)
        server_identity, self.authority = identity()
        self.listener = LinkListener(
            select_engine(server_engine), server_identity, self.server_owner, self.server_budget, retry=retry
        )
        self.listener._socket = _Socket(lambda data, address: self._to_client(bytes(data), address))  # type: ignore[assignment]
        self.listener._datagram_limit = lambda address: self.first_hop  # type: ignore[method-assign]
        self.clients: dict[Any, Link] = {}
        # A loop calls what is due at the same moment in any order, and a network keeps a burst's.
        self._under_way: list[tuple[float, int, Callable[[bytes, Any], None], bytes, Any]] = []
        self._carried = 0

    def dial(self, trust: ClientTrust | None = None) -> Link:
        """A client's link, its handshake begun."""
        address = ("10.0.0.2", 50_000 + len(self.clients))
        link = Link(
            self.client_engine,
            self.client_engine.dial(trust or ClientTrust("localhost", self.authority), 1200),
            _Socket(lambda data, _: self._carry(data, True, self.listener.datagram_received, address)).send_all,
            self.client_owner,
            self.client_budget,
            is_client=True,
            datagram_limit=lambda address: self.first_hop,
        )
        self.clients[address] = link
        link.connect(SERVER)
        return link

    async def joined(self) -> tuple[Link, Link]:
        """A client's and the server's end of a new link, the client's hello said."""
        before = len(self.server_owner.links)
        client = self.dial()
        await self.until(lambda: client.ready and len(self.server_owner.links) > before)
        client.send_control(HELLO)
        await self.until(lambda: HELLO in self.server_owner.messages)
        self.server_owner.messages.clear()
        return client, self.server_owner.links[-1]

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Let time pass until the condition holds."""
        end = self.loop.time() + seconds
        while not condition():
            assert self.loop.time() < end, "it did not come true in time"
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        for link in self.clients.values():
            link.close()
            link.abandon(LinkClosed(0, ""))
        self.listener.close()
        await asyncio.sleep(0)

    def _to_client(self, data: bytes, address: Any) -> None:
        client = self.clients.get(tuple(address[:2]))
        if client is not None:
            self._carry(data, False, client.datagram_received, SERVER)

    def _carry(self, data: bytes, to_server: bool, receive: Callable[[bytes, Any], None], source: Any) -> None:
        self.datagrams[to_server] += 1
        self.bytes[to_server] += len(data)
        if len(data) > self.mtu:
            return
        self.largest[to_server] = max(self.largest[to_server], len(data))
        if not self.lose(data, to_server):
            now = self.loop.time()
            self._free_at[to_server] = max(now, self._free_at[to_server]) + len(data) / self.rate
            due = self._free_at[to_server] + self.delay
            self._carried += 1
            heapq.heappush(self._under_way, (due, self._carried, receive, data, source))
            self.loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        _, _, receive, data, source = heapq.heappop(self._under_way)
        receive(data, source)


def opened(network: Network, link: Link, *frames: Frame) -> tuple[StreamLeg, Recorder]:
    """A stream leg on one of the server's slots that was handed ``frames``, and the visitor it is joined to."""
    leg = StreamLeg(network.server_budget, 65536, is_opener=True)
    visitor = Recorder()
    leg.peer, visitor.peer = visitor, leg
    link.attach(leg)
    for frame in frames:
        leg.receive(frame)
    return leg, visitor
