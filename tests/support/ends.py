"""Two whole ends in memory: a server and its clients as they are, on a network and a clock that the test turns.

Only datagrams are caught, where the sockets of ``quic`` would hand them to the kernel; everything above is the product.
"""

import asyncio
import heapq
import socket
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from quictunnel.client.agent import Agent, AgentConfig
from quictunnel.client.fan_out import FanOut
from quictunnel.client.health import HealthCheck
from quictunnel.exchange import Leg
from quictunnel.http.visitor_connection import VisitorConnection
from quictunnel.log import AccessLog
from quictunnel.quic.engine import select_engine
from quictunnel.quic.link import Link
from quictunnel.quic.sockets import QUOTED, DatagramSocket, Refusal
from quictunnel.server.registry import RegistryLimits, Session
from quictunnel.server.server import Server, ServerConfig
from quictunnel.trust.owners import Owners
from quictunnel.trust.tokens import TokenStore
from quictunnel.wire.errors import TunnelError
from quictunnel.wire.frames import Data, End, Frame, RequestHead, ResponseHead
from tests.support.clock import ClockLoop
from tests.support.memory import identity
from tests.support.visitors import FakeTransport

__all__ = ["Backend", "Datagrams", "Ends", "Request", "Visit", "play"]

T = TypeVar("T")
Address = tuple[str, int]


class Endpoint:
    """A UDP socket whose datagrams go through ``Datagrams``, from where the kernel would come in."""

    def __init__(self, network: "Datagrams", owner: DatagramSocket) -> None:
        self._network = network
        self._owner = owner
        self.address: Address = owner.sock.getsockname()[:2]
        try:
            self.peer: Address | None = owner.sock.getpeername()[:2]
        except OSError:
            self.peer = None
        owner._put = self._sent
        owner._put_together = self._sent_together

    @property
    def is_open(self) -> bool:
        return not self._owner.closed

    def _sent(self, data: bytes, address: Any) -> None:
        if self.is_open:
            self._network.carry(bytes(data), self, self.peer or address[:2])

    def _sent_together(self, parts: list[bytes], size: int, address: Any) -> None:
        for data in parts:
            self._sent(data, address)

    def deliver(self, datagrams: list[bytes], source: Address) -> None:
        """Datagrams have come."""
        self._owner._received(datagrams, source)

    def fail(self, error: OSError) -> None:
        """The kernel has something to say of what was sent."""
        self._owner._note(error)

    def refuse(self, data: bytes, destination: Address) -> None:
        """Nobody listens where it sent this."""
        if self.peer is not None:
            self.fail(ConnectionRefusedError(111, "refused"))
        elif self._owner._refused is not None:
            self._owner._refused([Refusal(data[:QUOTED], destination)])

    def close(self) -> None:
        """The process that had it is gone."""
        self._owner.close()


class Datagrams:
    """Carries datagrams in ``delay`` seconds; ``lose`` is asked of each with its source and its destination."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.delay = 0.005
        self.endpoints: dict[Address, Endpoint] = {}
        self.lose: Callable[[Address, Address], bool] = lambda source, destination: False
        self.busy = False
        "whether each end reads only every ``delay`` seconds, and then all that is there"
        self.dials: list[float] = []
        "when clients opened their sockets"
        self.tells = True
        "whether a sender learns that nobody listens where it sends (ICMP)"

        # A loop calls what is due at the same moment in any order, and a network keeps a burst's.
        self._under_way: list[tuple[float, int, list[bytes], Endpoint, Address]] = []
        self._carried = 0
        self._unread: dict[tuple[Endpoint, Address], list[bytes]] = {}
        self._held: dict[Address, list[tuple[list[bytes], Endpoint]]] = {}  # what waits in sockets that nobody reads
        self._waiting = dict(self._held)  # and in those that are read again
        self._outside: dict[Address, Address] = {}  # as what others see an address, where a NAT is before it
        self._inside: dict[Address, Address] = {}

    def rebind(self, address: Address) -> None:
        """The NAT before an address forgets it, and what comes from there is seen as from another."""
        outside = ("127.0.0.2", self._outside.get(address, ("", 1024))[1] + 1)
        self._inside = {seen: inside for seen, inside in self._inside.items() if inside != address}
        self._outside[address] = outside
        self._inside[outside] = address

    def hold(self, address: Address) -> None:
        """From now on nobody reads what comes there, which waits, and nothing is heard from there."""
        self._held[address] = []

    async def release(self, address: Address, at_once: int = 32, every: float = 0.01) -> None:
        """It is read, in the order in which it came: so much at once, and every so many seconds."""
        waiting = self._waiting[address] = self._held.pop(address)
        while waiting:
            some, waiting[:at_once] = waiting[:at_once], []
            for datagrams, source in some:
                self._hand_over(datagrams, source, address)
            await asyncio.sleep(every)
        del self._waiting[address]

    def carry(self, data: bytes, source: Endpoint, destination: Address) -> None:
        if source.address in self._held or self.lose(source.address, destination):
            return
        unread = self._unread.get((source, destination)) if self.busy else None
        if unread is not None:
            unread.append(data)
            return
        datagrams = [data]
        if self.busy:
            self._unread[source, destination] = datagrams
        due = self._loop.time() + self.delay
        self._carried += 1
        heapq.heappush(self._under_way, (due, self._carried, datagrams, source, destination))
        self._loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        _, _, datagrams, source, destination = heapq.heappop(self._under_way)
        self._unread.pop((source, destination), None)
        waiting = self._held.get(destination, self._waiting.get(destination))
        if waiting is not None:
            waiting.append((datagrams, source))
        else:
            self._hand_over(datagrams, source, destination)

    def _hand_over(self, datagrams: list[bytes], source: Endpoint, destination: Address) -> None:
        inside = self._inside.get(destination, destination)
        hidden = inside == destination and destination in self._outside
        endpoint = None if hidden else self.endpoints.get(inside)
        if endpoint is not None:
            endpoint.deliver(datagrams, self._outside.get(source.address, source.address))
        elif self.tells and source.is_open:
            for data in datagrams:
                source.refuse(data, destination)


class EndsLoop(ClockLoop):
    """A turned clock, names without threads, and sockets whose datagrams go through ``datagrams``."""

    def __init__(self) -> None:
        self._endpoints: dict[int, Endpoint] = {}  # by file descriptor
        super().__init__()
        self.datagrams = Datagrams(self)

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        return socket.getaddrinfo(host, port, **options)

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        owner = getattr(callback, "__self__", None)
        if not isinstance(owner, DatagramSocket):
            super().add_reader(fd, callback, *args)
            return
        endpoint = self._endpoints[fd] = Endpoint(self.datagrams, owner)
        self.datagrams.endpoints[endpoint.address] = endpoint
        if endpoint.peer is not None:
            self.datagrams.dials.append(self.time())

    def remove_reader(self, fd: Any) -> bool:
        endpoint = self._endpoints.pop(fd, None)
        if endpoint is None:
            return super().remove_reader(fd)
        if self.datagrams.endpoints.get(endpoint.address) is endpoint:
            del self.datagrams.endpoints[endpoint.address]
        return True


class Request(Leg):
    """A request as it came to the backend, which answers when the test says so."""

    def __init__(self, backend: "Backend") -> None:
        super().__init__()
        self._backend = backend
        self.frames: list[Frame] = []
        self.error: TunnelError | None = None
        self.paused = False

    @property
    def head(self) -> RequestHead:
        head = self.frames[0]
        assert isinstance(head, RequestHead)
        return head

    def receive(self, frame: Frame) -> None:
        self.frames.append(frame)
        if isinstance(frame, End):
            self._backend.on_request(self)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self, error: TunnelError) -> None:
        self.error = error
        self._backend.open_requests.discard(self)

    def answer(self, status: int = 200, body: bytes = b"ok") -> None:
        """Send a whole answer, if anyone still waits for it."""
        if self in self._backend.open_requests:
            self._backend.open_requests.discard(self)
            peer = self.peer
            peer.receive(ResponseHead(status, [(b"content-length", b"%d" % len(body))]))
            if body:
                peer.receive(Data(body))
            self.detach()
            peer.receive(End())


class Backend:
    """What a client forwards to: it holds every request until it is told to answer, unless ``after`` says how long."""

    def __init__(self, after: float | None = 0.0) -> None:
        self.after = after
        self.requests: list[Request] = []
        self.open_requests: set[Request] = set()
        self.name = "memory"
        self.authority = "backend.example"

    def open(self) -> Leg:
        request = Request(self)
        self.requests.append(request)
        self.open_requests.add(request)
        return request

    def on_request(self, request: Request) -> None:
        """A request is whole."""
        if self.after is not None:
            asyncio.get_running_loop().call_later(self.after, request.answer)

    def answer_all(self) -> None:
        """Answer what waits, and from now on everything at once."""
        self.after = 0.0
        for request in list(self.open_requests):
            request.answer()

    async def aclose(self, grace: float = 0.0) -> None:
        pass


class VisitorTransport(FakeTransport):
    """What is written to it after its end is dropped, as a socket's transport does."""

    def write(self, data: Any) -> None:
        if not self.closed:
            super().write(data)


class Visit:
    """A visitor with one request under way."""

    def __init__(self, server: Server, target: str, host: str, fields: tuple[str, ...], method: str = "GET") -> None:
        self.transport = VisitorTransport()
        self.connection = VisitorConnection(server.visitors)
        self.transport.protocol = self.connection
        self.connection.connection_made(self.transport)
        lines = (f"{method} {target} HTTP/1.1", f"Host: {host}", *fields, "", "")
        self.connection.data_received("\r\n".join(lines).encode())

    @property
    def answer(self) -> str:
        """What came so far."""
        return self.transport.written.decode("latin-1")

    @property
    def status(self) -> int:
        """Of the answer, 0 as long as there is none."""
        return int(self.final[9:12]) if self.answer else 0

    @property
    def final(self) -> str:
        """The answer without the informational ones before it."""
        answer = self.answer
        while answer[9:10] == "1" and answer[9:12] != "101" and answer.partition("\r\n\r\n")[2]:
            answer = answer.partition("\r\n\r\n")[2]
        return answer

    @property
    def error(self) -> str:
        """The error type of Proxy-Status."""
        _, _, rest = self.answer.partition("quictunnel; error=")
        return rest.partition(";")[0].partition("\r")[0]

    def send(self, body: bytes) -> None:
        """More of the request."""
        self.connection.data_received(body)

    def leave(self) -> None:
        """Go away."""
        self.transport.abort()


class Ends:
    """A server, its clients and its visitors."""

    def __init__(self, engines: tuple[str, str], directory: Path) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, EndsLoop)
        self.loop = loop
        self.network = loop.datagrams
        self._engines = [select_engine(name) for name in engines]
        self._files, self._authority = identity()
        self.tokens = TokenStore(directory)
        self.tokens.load()
        self.token = self.tokens.create(["*"], None, datetime.now(UTC))
        self.limits = RegistryLimits(slot_wait=2.0)
        self.default_tunnel = False
        self.trusted_proxies: tuple[IPv4Network, ...] = ()
        self.server: Server
        self._servers: list[Server] = []
        self._agents: dict[Agent, asyncio.Task[None]] = {}
        self._port = 0

    # The server

    async def serve(self) -> Server:
        """Start the server, or another one at the same address in its place."""
        config = ServerConfig(
            http=("127.0.0.1", 0),
            quic=("127.0.0.1", self._port),
            domain="localhost",
            identity=self._files,
            authority=self._authority.decode(),
            default_tunnel=self.default_tunnel,
            trusted_proxies=self.trusted_proxies,
            registry=self.limits,
        )
        self.server = Server(
            config, self._engines[0], self.tokens, Owners(self.tokens.path.parent), AccessLog("text", enabled=False)
        )
        self._servers.append(self.server)
        await self.server.start()
        self._port = self.server.quic_address[1]
        return self.server

    def kill_server(self) -> None:
        """It is gone and has told nobody."""
        self.network.endpoints[self.quic_address].close()

    def part(self, link: Link) -> Callable[[], None]:
        """Have nothing pass on one of the server's links, whatever address its client has; what joins it again."""
        listener, send = self.server.links, link._send
        known = {cid: each for cid, each in listener._links.items() if each is link}
        for cid in known:
            del listener._links[cid]
        link._send = lambda datagrams: None

        def join() -> None:
            listener._links.update(known)
            link._send = send

        return join

    @property
    def quic_address(self) -> Address:
        return ("127.0.0.1", self._port)

    def session(self, tunnel: str = "app") -> Session:
        """The only session of a tunnel."""
        (session,) = self.server.registry.tunnels[tunnel].sessions.values()
        return session

    # Clients

    def config(self) -> AgentConfig:
        """What a client is told."""
        return AgentConfig(
            host="127.0.0.1",
            port=self._port,
            server_name="127.0.0.1",
            token=self.token.secret,
            tunnel="app",
            authority=self._authority,
        )

    def connect(self, backend: Backend | None = None, *, health: HealthCheck | None = None, **options: Any) -> Agent:
        """Start a client; ``options`` are those of AgentConfig."""
        agent = Agent(replace(self.config(), **options), self._engines[1], FanOut(backend or Backend()), health=health)
        self._agents[agent] = self.loop.create_task(agent.run())
        return agent

    async def connected(self, backend: Backend | None = None, **options: Any) -> Agent:
        """Start a client and wait until it serves."""
        agent = self.connect(backend, **options)
        await self.until(lambda: agent.serving or self._agents[agent].done())
        if self._agents[agent].done():
            await self._agents[agent]
        return agent

    async def ended(self, agent: Agent) -> None:
        """Wait until a client has ended by itself. Raises what it ended with."""
        async with asyncio.timeout(300):
            await self._agents.pop(agent)

    def client_addresses(self) -> set[Address]:
        return set(self.network.endpoints) - {self.quic_address}

    # Visitors

    def visit(self, target: str = "/", *fields: str, host: str = "app.localhost", method: str = "GET") -> Visit:
        """A visitor comes with a request."""
        return Visit(self.server, target, host, fields, method)

    async def visited(self, target: str = "/", *fields: str, host: str = "app.localhost") -> Visit:
        """A visitor comes and has its answer."""
        visit = self.visit(target, *fields, host=host)
        await self.until(lambda: visit.status != 0)
        return visit

    # Time

    async def until(self, condition: Callable[[], object], seconds: float = 120.0) -> float:
        """Let time pass until the condition holds; how much it took."""
        began = self.loop.time()
        while not condition():
            assert self.loop.time() < began + seconds, "it did not come true in time"
            await asyncio.sleep(0.002)
        return self.loop.time() - began

    async def close(self) -> None:
        """End everything, whatever its state."""
        for task in self._agents.values():
            task.cancel()
        await asyncio.gather(*self._agents.values(), return_exceptions=True)
        for server in self._servers:
            server.close()
        for endpoint in list(self.network.endpoints.values()):
            endpoint.close()  # of links that were saying goodbye
        await asyncio.sleep(0)


def play(
    scenario: Callable[[Ends], Coroutine[Any, Any, T]], engines: tuple[str, str], directory: Path, *, serve: bool = True
) -> T:
    """Run a scenario to its end under the turned clock, with a running server unless ``serve`` is False."""

    async def work() -> T:
        ends = Ends(engines, directory)
        try:
            if serve:
                await ends.serve()
            return await scenario(ends)
        finally:
            await ends.close()

    with asyncio.Runner(loop_factory=EndsLoop) as runner:
        return runner.run(work())
