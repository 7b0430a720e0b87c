"""The peers: how each is found, configured and started. Each keeps its defaults but for what is written here.

A peer has a server, where visitors come in, and a client, which dials the server and has the backend behind it. nginx,
which is what the others are compared with, is a server only; and the way without anything between is a peer too.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.sidebyside import nginx
from benchmarks.sidebyside.lines import Line, Lines
from benchmarks.sidebyside.processes import ROOT, START_LIMIT, Process, Trouble, free_port, run
from benchmarks.sidebyside.visitors import Target, answered
from quictunnel.trust.certificates import ensure_server_certificate

__all__ = ["BASELINE", "COMPILED", "DIRECT", "Peer", "Place", "Setup", "all_peers", "chosen"]

DIRECT, BASELINE = "direct", "nginx"
COMPILED = ROOT / "build" / "compiled"


@dataclass
class Setup:
    """What a peer is put between, and how."""

    directory: Path
    backend: int
    "the backend's port"

    line: Line | None = None
    "between the peer's client and its server"

    connections: int = 0
    "how many visitors must have room at a time, where the defaults do not let in so many; 0: the defaults"

    backend_http2: int = 0
    "the backend's port for HTTP/2 in clear text, 0 if there is none"


class Place:
    """A peer's server, and its client once it has been started; ends them when its ``with`` block ends."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._stack = ExitStack()
        self.lines = self._stack.enter_context(Lines(setup.line))
        self.target = Target(setup.backend)
        self.http2: Target | None = None
        "where visitors may speak HTTP/2 in clear text"

        self.dial = 0
        "the port that the client dials"

        self.server: Process | None = None
        self.client: Process | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def processes(self) -> list[Process]:
        return [process for process in (self.server, self.client) if process is not None]

    def start(self, name: str, command: Sequence[str]) -> Process:
        """Start one of its processes, in a directory of its own."""
        directory = self.setup.directory / name
        directory.mkdir(parents=True, exist_ok=True)
        return self._stack.enter_context(Process(command, directory / "out"))

    def adopt(self, process: Process) -> Process:
        """End this one too."""
        return self._stack.enter_context(process)

    def file(self, name: str, content: str) -> str:
        """Write a file; its path."""
        path = self.setup.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return str(path)

    def alive(self) -> None:
        """Raises Trouble if one of its processes is over."""
        for process in self.processes:
            process.alive()

    def cpu(self) -> float:
        """Seconds of processor time of server and client together."""
        return sum(process.cpu() for process in self.processes)


class Peer(ABC):
    """One way to a backend."""

    name: str
    "for --peers"

    label: str
    about: str
    "what is between the server and its client, and what of HTTP it understands"

    programs: tuple[str, ...] = ()
    get_it: str = ""
    "where the programs come from"

    has_client = True
    ready_line = ""
    "what the client says when it serves (a regular expression)"

    datagrams = False
    "whether what is between them are datagrams, on which loss can be put"

    def lacks(self) -> str:
        """Why it cannot take part here, empty if it can."""
        missing = [program for program in self.programs if shutil.which(program) is None]
        return f"{' and '.join(missing)} not on PATH{f' ({self.get_it})' if self.get_it else ''}" if missing else ""

    def version(self) -> str:
        """What its program says of its version."""
        try:
            said = run((self.programs[0], "--version"), 10.0)
        except Trouble:
            return "not told"
        found = re.search(r"v?\d+\.\d+\S*", said)
        return found[0] if found else "not told"

    @abstractmethod
    def serve(self, place: Place) -> None:
        """Start the server, and set the place's target and port to dial."""

    def connect(self, place: Place) -> None:
        """Start the client, if it has one."""
        assert not self.has_client

    def ready(self, place: Place) -> None:
        """Wait until it serves, without sending a request through it. Raises Trouble when it does not."""
        if place.client is not None:
            place.client.said(self.ready_line)
        for process in place.processes[:1]:
            listening(place.target.port, process)

    @contextmanager
    def placed(self, setup: Setup, path: str, size: int) -> Iterator[Place]:
        """The peer for the time of a ``with`` block, ready: ``path`` has been answered with ``size`` bytes.

        Raises Trouble when it does not come so far.
        """
        with Place(setup) as place:
            self.serve(place)
            self.connect(place)
            answered(place.target, path, size, *place.processes)
            yield place


class Direct(Peer):
    name, label, about = DIRECT, "direct", "nothing between; the backend itself"
    has_client = False

    def version(self) -> str:
        return ""

    def serve(self, place: Place) -> None:
        place.target = Target(place.lines.tcp(place.setup.backend))
        if place.setup.backend_http2:
            place.http2 = Target(place.setup.backend_http2)


class Nginx(Peer):
    name, label, about = (
        BASELINE,
        "nginx",
        "reverse proxy, 1 worker, connections to the backend kept; HTTP in clear text",
    )
    programs = ("nginx",)
    has_client = False

    def version(self) -> str:
        return nginx.version()

    def serve(self, place: Place) -> None:
        port, http2 = free_port(), free_port()
        setup = place.setup
        directory = setup.directory / "server"
        directory.mkdir(parents=True, exist_ok=True)
        config = nginx.proxy_config(
            directory, port, place.lines.tcp(setup.backend), http2, setup.connections or nginx.CONNECTIONS
        )
        place.server = place.adopt(nginx.start(directory, config))
        place.target, place.http2 = Target(port), Target(http2)


class Quictunnel(Peer):
    """One engine, so many server processes (--workers) and client processes (--processes).

    Compiled, as an installation is, if `make bench` could compile it; ``plain`` is the source as it stands.
    """

    ready_line = "^ready "
    datagrams = True

    def __init__(self, engine: str, workers: int = 1, processes: int = 1, *, plain: bool = False) -> None:
        self.engine, self.workers, self.processes, self.plain = engine, workers, processes, plain
        many = f"-{workers}+{processes}" if processes > 1 else f"-{workers}" if workers > 1 else ""
        self.name = f"quictunnel-{engine}{many}{'-plain' if plain else ''}"
        self.label = f"quictunnel {engine}"
        if many:
            self.label += f", {workers} workers" + (f" + {processes} processes" if processes > 1 else "")
        if plain:
            self.label += ", not compiled"
        self.about = "QUIC (TLS 1.3); reads HTTP/1.1 and 2; INFO log into a file"

    def lacks(self) -> str:
        if not importlib.util.find_spec(self.engine):
            return f"{self.engine} is not installed (pip install {self.engine})"
        if not self.plain and not COMPILED.is_dir():
            return "it could not be compiled (make build/compiled/.made says why)"
        return ""

    def version(self) -> str:
        versions = {name: importlib.metadata.version(name) for name in ("quictunnel", self.engine)}
        return f"{versions['quictunnel']}, {self.engine} {versions[self.engine]}"

    def command(self, name: str, *args: str) -> list[str]:
        where = () if self.plain else ("env", f"PYTHONPATH={COMPILED}")
        return [*where, sys.executable, "-m", "quictunnel", name, *args, "--engine", self.engine]

    def serve_command(self, directory: Path, connections: int) -> list[str]:
        """What starts the server."""
        room = ("--max-visitors", str(2 * connections), "--max-in-flight", str(2 * connections)) if connections else ()
        return self.command(
            "serve", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0", "--state-dir", str(directory / "state"),
            "--log-file", str(directory / "serve.log"), "--workers", str(self.workers), *room,
        )  # fmt: skip

    def connect_command(self, directory: Path, dial: int, backend: int, connections: int) -> list[str]:
        """What starts the client; a link has room for about 100 streams."""
        links = str(max(16, connections // 80))
        room = ("--max-links", links, "--backend-head-time", "1h") if connections else ()
        return self.command(
            "connect", str(backend), "--tunnel", "bench", "--server", f"127.0.0.1:{dial}",
            "--state-dir", str(directory / "state"), "--log-file", str(directory / "connect.log"),
            "--processes", str(self.processes), *room,
        )  # fmt: skip

    def serve(self, place: Place) -> None:
        setup = place.setup
        place.server = place.start("server", self.serve_command(setup.directory, setup.connections))
        facts = dict(re.findall(r"(\w+)=(\S+)", place.server.said(r"^ready .*$")[0]))
        place.target = place.http2 = Target(int(facts["http"].rpartition(":")[2]))
        place.dial = place.lines.udp(int(facts["quic"].rpartition(":")[2]))

    def connect(self, place: Place) -> None:
        setup = place.setup
        command = self.connect_command(setup.directory, place.dial, setup.backend, setup.connections)
        place.client = place.start("client", command)


class Bare(Peer):
    """A tunnel without a product (``bare``): how much of the cost is Python's and the library's."""

    programs = ()
    ready_line = "^ready"

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.name, self.label = f"bare-{engine}", f"bare {engine}"
        self.about = "QUIC (TLS 1.3), one connection; GETs of a few headers pass, with no checks, limits, credit or log"

    def lacks(self) -> str:
        return "" if importlib.util.find_spec(self.engine) else f"{self.engine} is not installed"

    def version(self) -> str:
        return f"{self.engine} {importlib.metadata.version(self.engine)}"

    def command(self, role: str, setup: Setup, quic: int, http: int) -> list[str]:
        identity = ensure_server_certificate(setup.directory / "identity", ["localhost"], datetime.now(UTC))
        files = (str(identity.certificate), str(identity.key))
        return [sys.executable, "-m", "benchmarks.sidebyside.bare", role, self.engine, str(quic), str(http), *files]

    def serve(self, place: Place) -> None:
        quic, http = free_port(), free_port()
        place.server = place.start("server", self.command("server", place.setup, quic, http))
        place.server.said(self.ready_line)
        place.target, place.dial = Target(http), place.lines.udp(quic)

    def connect(self, place: Place) -> None:
        place.client = place.start("client", self.command("client", place.setup, place.dial, place.setup.backend))


class Frp(Peer):
    """frps with a virtual host, so that it reads HTTP as the others that do."""

    programs = ("frps", "frpc")
    get_it = "github.com/fatedier/frp"
    ready_line = "start proxy success"

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.name, self.label = f"frp-{transport}", f"frp {transport.upper()}"
        self.datagrams = transport == "quic"
        kind = "QUIC" if self.datagrams else "TLS on TCP, multiplexed"
        self.about = f"{kind}; reads HTTP/1.1 (type http)"

    def serve_config(self, dial: int, http: int) -> str:
        """frps.toml: the port for clients, for TCP and for QUIC, and the one for visitors."""
        return f"""bindAddr = "127.0.0.1"
bindPort = {dial}
quicBindPort = {dial}
proxyBindAddr = "127.0.0.1"
vhostHTTPPort = {http}
auth.method = "token"
auth.token = "bench"
log.to = "console"
log.disablePrintColor = true
log.level = "info"
"""

    def connect_config(self, dial: int, backend: int) -> str:
        """frpc.toml."""
        return f"""serverAddr = "127.0.0.1"
serverPort = {dial}
loginFailExit = false
transport.protocol = "{self.transport}"
auth.method = "token"
auth.token = "bench"
log.to = "console"
log.disablePrintColor = true
log.level = "info"

[[proxies]]
name = "bench"
type = "http"
localIP = "127.0.0.1"
localPort = {backend}
customDomains = ["127.0.0.1"]
"""

    def serve(self, place: Place) -> None:
        dial, http = free_port(), free_port()
        config = place.file("server/frps.toml", self.serve_config(dial, http))
        place.server = place.start("server", ("frps", "-c", config))
        listening(dial, place.server)
        place.target = Target(http)
        place.dial = place.lines.udp(dial) if self.datagrams else place.lines.tcp(dial)

    def connect(self, place: Place) -> None:
        config = place.file("client/frpc.toml", self.connect_config(place.dial, place.setup.backend))
        place.client = place.start("client", ("frpc", "-c", config))


class Rathole(Peer):
    name, label = "rathole", "rathole"
    about = "TCP in clear text, a connection for each visitor; does not read HTTP"
    programs = ("rathole",)
    get_it = "cargo install rathole"
    ready_line = "Control channel established"

    def serve_config(self, dial: int, public: int) -> str:
        """server.toml."""
        return f"""[server]
bind_addr = "127.0.0.1:{dial}"
default_token = "bench"

[server.services.bench]
bind_addr = "127.0.0.1:{public}"
"""

    def connect_config(self, dial: int, backend: int) -> str:
        """client.toml."""
        return f"""[client]
remote_addr = "127.0.0.1:{dial}"
default_token = "bench"

[client.services.bench]
local_addr = "127.0.0.1:{backend}"
"""

    def serve(self, place: Place) -> None:
        dial, public = free_port(), free_port()
        config = place.file("server/server.toml", self.serve_config(dial, public))
        place.server = place.start("server", ("rathole", "--server", config))
        listening(dial, place.server)
        place.target = Target(public)
        place.dial = place.lines.tcp(dial)

    def connect(self, place: Place) -> None:
        config = place.file("client/client.toml", self.connect_config(place.dial, place.setup.backend))
        place.client = place.start("client", ("rathole", "--client", config))


class Bore(Peer):
    name, label = "bore", "bore"
    about = "TCP in clear text, a connection for each visitor; does not read HTTP"
    programs = ("bore",)
    get_it = "cargo install bore-cli"
    ready_line = "listening at "

    PORT = 7835
    "its server's, which cannot be chosen: so the address is, of those that lead to this machine (127.0.0.0/8)"

    def serve(self, place: Place) -> None:
        self.public = free_port()
        self.host = loopback()
        place.server = place.start("server", self.serve_command(self.host, self.public))
        listening(self.PORT, place.server, self.host)
        place.target = Target(self.public)
        place.dial = self.PORT
        if place.setup.line is not None:
            relay = loopback()
            place.lines.tcp(self.PORT, self.host, relay, self.PORT)
            self.host = relay

    def serve_command(self, host: str, public: int) -> list[str]:
        return ["bore", "server", "--bind-addr", host, "--bind-tunnels", "127.0.0.1", "--min-port", str(public),
                "--max-port", str(public)]  # fmt: skip

    def connect_command(self, host: str, public: int, backend: int) -> list[str]:
        return ["bore", "local", str(backend), "--local-host", "127.0.0.1", "--to", host, "--port", str(public)]

    def connect(self, place: Place) -> None:
        place.client = place.start("client", self.connect_command(self.host, self.public, place.setup.backend))


class Chisel(Peer):
    name, label = "chisel", "chisel"
    about = "SSH in a WebSocket on TCP, multiplexed; does not read HTTP"
    programs = ("chisel",)
    get_it = "github.com/jpillora/chisel"
    ready_line = r"Connected \(Latency"

    def serve(self, place: Place) -> None:
        dial, public = free_port(), free_port()
        place.server = place.start("server", self.serve_command(dial))
        listening(dial, place.server)
        place.target = Target(public)
        place.dial = place.lines.tcp(dial)

    def serve_command(self, dial: int) -> list[str]:
        return ["chisel", "server", "--host", "127.0.0.1", "--port", str(dial), "--reverse"]

    def connect_command(self, dial: int, public: int, backend: int) -> list[str]:
        return ["chisel", "client", f"http://127.0.0.1:{dial}", f"R:127.0.0.1:{public}:127.0.0.1:{backend}"]

    def connect(self, place: Place) -> None:
        place.client = place.start("client", self.connect_command(place.dial, place.target.port, place.setup.backend))


class Piko(Peer):
    name, label = "piko", "piko"
    about = "a WebSocket on TCP in clear text, multiplexed; reads HTTP/1.1; without its log of each request"
    programs = ("piko",)
    get_it = "github.com/andydunstall/piko"
    ready_line = "starting reverse proxy"

    def serve(self, place: Place) -> None:
        proxy, upstream, admin, gossip = (free_port() for _ in range(4))
        place.server = place.start("server", self.serve_command(proxy, upstream, admin, gossip))
        listening(upstream, place.server)
        place.target = Target(proxy, (("x-piko-endpoint", "bench"),))
        place.dial = place.lines.tcp(upstream)

    def serve_command(self, proxy: int, upstream: int, admin: int, gossip: int) -> list[str]:
        ports = {"proxy": proxy, "upstream": upstream, "admin": admin, "cluster.gossip": gossip}
        binds = [word for name, port in ports.items() for word in (f"--{name}.bind-addr", f"127.0.0.1:{port}")]
        return ["piko", "server", *binds, "--proxy.access-log.disable"]

    def connect_command(self, dial: int, backend: int, admin: int) -> list[str]:
        return ["piko", "agent", "http", "bench", f"127.0.0.1:{backend}", "--connect.url", f"http://127.0.0.1:{dial}",
                "--server.bind-addr", f"127.0.0.1:{admin}", "--access-log.disable"]  # fmt: skip

    def connect(self, place: Place) -> None:
        place.client = place.start("client", self.connect_command(place.dial, place.setup.backend, free_port()))


def listening(port: int, process: Process, host: str = "127.0.0.1", limit: float = START_LIMIT) -> None:
    """Wait until a port takes connections. Raises Trouble when it does not, or the process ends."""
    deadline = time.monotonic() + limit
    while True:
        with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
            return
        process.alive()
        if time.monotonic() > deadline:
            raise Trouble(f"{process.name} does not listen within {limit:g} s")
        time.sleep(0.005)


_loopbacks = iter(range(2, 250))


def loopback() -> str:
    """An address of this machine's loopback that nothing here has had before."""
    return f"127.83.53.{next(_loopbacks)}"


def all_peers() -> list[Peer]:
    """Those that a run takes if nothing else is said, in the order of the tables."""
    engines = [
        Quictunnel(engine, workers, plain=plain)
        for engine in ("aioquic", "qh3")
        for workers, plain in ((1, False), (2, False), (1, True))
    ]
    bare = [Bare(engine) for engine in ("aioquic", "qh3")]
    return [Direct(), Nginx(), *engines, *bare, Frp("tcp"), Frp("quic"), Rathole(), Bore(), Chisel(), Piko()]


def chosen(names: str) -> list[Peer]:
    """The peers of a list such as ``nginx,quictunnel-qh3,frp``: whole names, or what several begin with.

    ``quictunnel-ENGINE-W+P`` has W server and P client processes, ``…-plain`` is not compiled. Raises ValueError for
    what is none.
    """
    found: dict[str, Peer] = {}
    for name in names.split(","):
        name = name.strip()
        matching = [peer for peer in all_peers() if peer.name == name]
        matching = matching or [peer for peer in all_peers() if peer.name.startswith(f"{name}-")]
        numbers = re.fullmatch(r"quictunnel-(aioquic|qh3)-(\d+)(?:\+(\d+))?(-plain)?", name)
        if not matching and numbers:
            matching = [Quictunnel(numbers[1], int(numbers[2]), int(numbers[3] or 1), plain=bool(numbers[4]))]
        if not matching:
            known = ", ".join(peer.name for peer in all_peers())
            raise ValueError(f"no peer {name!r}: there are {known}")
        found |= {peer.name: peer for peer in matching}
    return list(found.values())
