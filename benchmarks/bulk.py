"""MB/s and CPU seconds per GB of large bodies: `.venv/bin/python benchmarks/bulk.py [--megabytes 100] ...`.

Down and up, directly, through nginx as a reverse proxy, and through the tunnel on each engine; interleaved, medians.
CPU is that of both of the tunnel's processes, or of nginx; a machine that does other things too changes it little.
Needs nginx.
"""

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ends import Place, process, tunnel

BLOCK = 1 << 20
MEGABYTE = 1_000_000

NGINX = """
worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_max_body_size 0; proxy_request_buffering off; proxy_buffering on; proxy_max_temp_file_size 0;
  client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  server {{ listen 127.0.0.1:{proxy};
    location / {{ proxy_pass http://{origin}; proxy_http_version 1.1; proxy_set_header Connection ""; }} }}
}}
"""


def serve(connection: socket.socket) -> None:
    """A backend's connection: GET /N is answered with N bytes, what is PUT is thrown away."""
    buffer = bytearray(BLOCK)
    kept = b""
    with connection, contextlib.suppress(OSError):
        while True:
            while b"\r\n\r\n" not in kept:
                more = connection.recv(65536)
                if not more:
                    return
                kept += more
            head, _, kept = kept.partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            method, target, _ = lines[0].split(b" ")
            left = next((int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")), 0)
            left -= len(kept)
            kept = b""
            while left > 0:
                count = connection.recv_into(buffer, min(left, BLOCK))
                if not count:
                    return
                left -= count
            size = int(target[1:]) if method == b"GET" else 0
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            while size:
                size -= connection.send(memoryview(buffer)[:size])


def backend() -> str:
    """Start one, in threads of this process, whose CPU time is not counted; its address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


def transfer(address: str, size: int, up: bool) -> None:
    """One body, down or up."""
    host, _, port = address.rpartition(":")
    buffer = bytearray(BLOCK)
    with socket.create_connection((host, int(port)), timeout=600) as visitor:
        if up:
            visitor.sendall(b"PUT / HTTP/1.1\r\nHost: bench.localhost\r\nContent-Length: %d\r\n\r\n" % size)
            left = size
            while left:
                left -= visitor.send(memoryview(buffer)[: min(left, BLOCK)])
        else:
            visitor.sendall(b"GET /%d HTTP/1.1\r\nHost: bench.localhost\r\n\r\n" % size)
        got = b""
        while b"\r\n\r\n" not in got:
            more = visitor.recv(65536)
            assert more, "closed before an answer"
            got += more
        assert b" 200 " in got.partition(b"\r\n")[0], got[:200]
        left = 0 if up else size - len(got.partition(b"\r\n\r\n")[2])
        while left:
            count = visitor.recv_into(buffer, min(left, BLOCK))
            assert count, f"{left} bytes are missing"
            left -= count


def measure(place: Place, size: int, up: bool, at_once: int) -> tuple[float, float]:
    """MB/s, and CPU seconds per GB."""
    before, began = place.busy(), time.monotonic()
    threads = [threading.Thread(target=transfer, args=(place.address, size // at_once, up)) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    return size / took / MEGABYTE, (place.busy() - before) / (size / MEGABYTE / 1000)


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="aioquic,qh3")
    parser.add_argument("--megabytes", type=int, default=100, help="in all")
    parser.add_argument("--at-once", type=int, default=1, help="bodies side by side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", default="down,up")
    arguments = parser.parse_args()
    if shutil.which("nginx") is None:
        sys.exit("nginx is not installed")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        origin = backend()
        with socket.create_server(("127.0.0.1", 0)) as free:
            proxy = free.getsockname()[1]
        config = directory / "nginx.conf"
        config.write_text(NGINX.format(directory=directory, origin=origin, proxy=proxy))
        nginx = stack.enter_context(process("nginx", "-c", str(config)))
        places = {"direct": Place(origin), "nginx": Place(f"127.0.0.1:{proxy}", (int(nginx["pid"]),))}
        for engine in arguments.engine.split(","):
            places[engine] = stack.enter_context(tunnel(directory, engine, origin))
        time.sleep(1.0)
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(arguments.repeats):
            for way in arguments.ways.split(","):
                for label, place in places.items():
                    size = arguments.megabytes * MEGABYTE
                    figures = measure(place, size, way == "up", arguments.at_once)
                    found.setdefault((way, label), []).append(figures)
        print(f"{arguments.megabytes} MB, {arguments.at_once} at once, {arguments.repeats} interleaved repeats, "
              f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")  # fmt: skip
        print("| | | MB/s (median) | range | CPU s per GB |\n|---|---|---|---|---|")
        for (way, label), figures_found in found.items():
            speeds = [speed for speed, _ in figures_found]
            cost = statistics.median(cost for _, cost in figures_found)
            print(
                f"| {way} | {label} | {statistics.median(speeds):.0f} | {min(speeds):.0f}-{max(speeds):.0f} "
                f"| {cost:.1f} |" if places[label].pids else
                f"| {way} | {label} | {statistics.median(speeds):.0f} | {min(speeds):.0f}-{max(speeds):.0f} | |"
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
