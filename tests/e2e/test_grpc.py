"""An unmodified gRPC client and server, with the tunnel between them and without: the same calls, the same outcomes."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Processes, Tunnel, poll

grpc = pytest.importorskip("grpc")

pytestmark = pytest.mark.either

SERVICE = "test.Echo"
LIMIT = 20.0


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Echoes bytes in every shape of a call; what each call does is told by its message or its metadata."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.cancelled = threading.Event()
        self.active = 0

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]
        self.calls.append(details.method)
        shapes = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Many": grpc.unary_stream_rpc_method_handler(self.many),
            "Collect": grpc.stream_unary_rpc_method_handler(self.collect),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait),
            "Tick": grpc.unary_stream_rpc_method_handler(self.tick),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "FailLater": grpc.unary_stream_rpc_method_handler(self.fail_later),
        }
        return shapes.get(name)

    def unary(self, request: bytes, context: Any) -> bytes:
        sent = dict(context.invocation_metadata())
        context.send_initial_metadata((("x-initial", sent.get("x-sent", "none")),))
        context.set_trailing_metadata((("x-trailing", "late"), ("x-bytes-bin", b"\x00\xff\r\n")))
        return request[::-1]

    def many(self, request: bytes, context: Any) -> Iterator[bytes]:
        for index in range(int(request)):
            yield b"%d" % index

    def collect(self, requests: Iterator[bytes], context: Any) -> bytes:
        return b"|".join(requests)

    def chat(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            yield b"re: " + request

    def wait(self, request: bytes, context: Any) -> bytes:
        context.add_callback(self.cancelled.set)
        self.cancelled.wait(float(request))
        return b"waited"

    def tick(self, request: bytes, context: Any) -> Iterator[bytes]:
        context.add_callback(self.cancelled.set)
        while context.is_active():
            yield b"tick"
            self.cancelled.wait(0.02)

    def fail(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-why", "because"),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not like this: \u00fc % \n")
        raise AssertionError

    def fail_later(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield b"one"
        yield b"two"
        context.abort(grpc.StatusCode.DATA_LOSS, "no more")


@pytest.fixture(scope="module")
def service() -> Service:
    return Service()


@pytest.fixture(scope="module")
def backend(service: Service) -> Iterator[int]:
    """The port of a gRPC server in clear text."""
    server = grpc.server(ThreadPoolExecutor(32), handlers=(service,))
    port: int = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.fixture(scope="module")
def tunnels(tmp_path_factory: pytest.TempPathFactory, backend: int) -> Iterator[Callable[[str], Tunnel]]:
    made: dict[str, Tunnel] = {}
    with Processes(tmp_path_factory.mktemp("processes")) as processes:

        def tunnel(engine: str) -> Tunnel:
            if engine not in made:
                made[engine] = processes.tunnel(
                    str(backend), (engine, engine), connect=("--backend-http", "2"), name="app"
                )
            return made[engine]

        yield tunnel


@pytest.fixture
def tunnel(engine: str, tunnels: Callable[[str], Tunnel], service: Service) -> Tunnel:
    service.calls.clear()
    service.cancelled.clear()
    return tunnels(engine)


@pytest.fixture
def channel(tunnel: Tunnel) -> Iterator[Any]:
    """A channel through the tunnel, by prior knowledge of HTTP/2."""
    host, port = tunnel.address
    with grpc.insecure_channel(f"{host}:{port}", options=(("grpc.default_authority", tunnel.host),)) as channel:
        yield channel


@pytest.fixture
def direct(backend: int) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{backend}") as channel:
        yield channel


def unary(channel: Any, method: str) -> Any:
    return channel.unary_unary(f"/{SERVICE}/{method}")


def failed(call: Callable[[], Any]) -> tuple[Any, str | None, list[tuple[str, Any]]]:
    """Code, details and trailing metadata of a call that fails.

    Without ``date``: a gateway must add it to an answer that has none (RFC 9110 section 6.6.1), and the head of a call
    that fails at once is its metadata.
    """
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    return error.code(), error.details(), [tuple(item) for item in error.trailing_metadata() if item[0] != "date"]


def test_a_unary_call_keeps_its_metadata_both_ways(channel: Any) -> None:
    answer, call = unary(channel, "Unary").with_call(b"hello", metadata=(("x-sent", "this"),), timeout=LIMIT)
    assert answer == b"olleh"
    assert dict(call.initial_metadata())["x-initial"] == "this"
    trailing = dict(call.trailing_metadata())
    assert (trailing["x-trailing"], trailing["x-bytes-bin"]) == ("late", b"\x00\xff\r\n")
    assert call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("size", [0, 1, 16_384, 300_000, 3_000_000])
def test_messages_of_any_size_pass(channel: Any, size: int) -> None:
    message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert unary(channel, "Unary")(message, timeout=LIMIT) == message[::-1]


def test_a_server_stream_brings_every_message_in_order(channel: Any) -> None:
    call = channel.unary_stream(f"/{SERVICE}/Many")(b"1000", timeout=LIMIT)
    assert [int(message) for message in call] == list(range(1000))


def test_a_client_stream_is_collected(channel: Any) -> None:
    call = channel.stream_unary(f"/{SERVICE}/Collect")
    assert call((b"%d" % index for index in range(500)), timeout=LIMIT) == b"|".join(b"%d" % i for i in range(500))


def test_both_sides_of_a_call_talk_at_the_same_time(channel: Any) -> None:
    """Each message is answered before the next is sent: nothing may wait for the end of a stream."""
    turn = threading.Semaphore(1)

    def say() -> Iterator[bytes]:
        for index in range(100):
            assert turn.acquire(timeout=LIMIT)
            yield b"%d" % index

    heard = []
    for message in channel.stream_stream(f"/{SERVICE}/Chat")(say(), timeout=LIMIT):
        heard.append(message)
        turn.release()
    assert heard == [b"re: %d" % index for index in range(100)]


def test_a_deadline_ends_the_call_on_both_ends(channel: Any, service: Service) -> None:
    code, _, _ = failed(lambda: unary(channel, "Wait")(b"20", timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert service.cancelled.wait(LIMIT)


def test_a_cancelled_call_is_cancelled_at_the_server(channel: Any, service: Service) -> None:
    call = channel.unary_stream(f"/{SERVICE}/Tick")(b"", timeout=LIMIT)
    assert [next(call) for _ in range(3)] == [b"tick"] * 3
    assert not service.cancelled.is_set()
    since = time.monotonic()
    call.cancel()
    assert service.cancelled.wait(LIMIT)
    assert time.monotonic() - since < 5  # milliseconds on an idle machine
    with pytest.raises(grpc.RpcError):
        next(call)


@pytest.mark.parametrize("method", ["Fail", "NotThere"])
def test_a_status_is_the_same_as_without_the_tunnel(channel: Any, direct: Any, method: str) -> None:
    """A call that fails at once is all trailers: a head that ends its stream."""
    through = failed(lambda: unary(channel, method)(b"", timeout=LIMIT))
    assert through == failed(lambda: unary(direct, method)(b"", timeout=LIMIT))
    assert through[0] in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)


def test_a_stream_that_fails_brings_what_came_before(channel: Any, direct: Any) -> None:
    def outcome(channel: Any) -> tuple[list[bytes], Any]:
        heard: list[bytes] = []

        def collect() -> None:
            heard.extend(channel.unary_stream(f"/{SERVICE}/FailLater")(b"", timeout=LIMIT))

        return heard, failed(collect)

    through = outcome(channel)
    assert through == outcome(direct)
    assert through[0] == [b"one", b"two"] and through[1][0] is grpc.StatusCode.DATA_LOSS


def test_hundreds_of_calls_run_at_the_same_time(channel: Any) -> None:
    """More than one connection of HTTP/2, and more than one link, may carry at a time."""
    calls = [unary(channel, "Wait").future(b"0.2", timeout=LIMIT) for _ in range(300)]
    assert [call.result() for call in calls] == [b"waited"] * 300


def test_a_tunnel_that_is_not_there_is_unimplemented(tunnel: Tunnel) -> None:
    """gRPC's own reading of 404."""
    host, port = tunnel.address
    with grpc.insecure_channel(f"{host}:{port}", options=(("grpc.default_authority", "nobody.localhost"),)) as channel:
        code, _, _ = failed(lambda: unary(channel, "Unary")(b"", timeout=LIMIT))
    assert code is grpc.StatusCode.UNIMPLEMENTED


def test_a_backend_that_is_gone_is_unavailable(tmp_path: Path, engine: str) -> None:
    server = grpc.server(ThreadPoolExecutor(4), handlers=(Service(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Processes(tmp_path) as processes:
        tunnel = processes.tunnel(str(port), (engine, engine), connect=("--backend-http", "2"))
        host, public = tunnel.address
        options = (("grpc.default_authority", tunnel.host),)
        with grpc.insecure_channel(f"{host}:{public}", options=options) as channel:
            assert unary(channel, "Unary")(b"ab", timeout=LIMIT) == b"ba"
            server.stop(None).wait()

            def refused() -> bool:
                code, details, _ = failed(lambda: unary(channel, "Unary")(b"ab", timeout=LIMIT))
                assert code is grpc.StatusCode.UNAVAILABLE, (code, details)
                return True

            assert poll(refused)
