"""nginx twice: as the origin that serves what is asked for, and as the reverse proxy that others are compared with."""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.sidebyside.processes import Process, free_port
from benchmarks.sidebyside.visitors import Target, answered

__all__ = ["CONNECTIONS", "SIZES", "origin", "origin_config", "proxy_config", "start", "version"]

SIZES = {"100B": 100, "10kB": 10_000, "1MB": 1_000_000, "100MB": 100_000_000, "1GB": 1_000_000_000}
"bytes of the answer to /NAME"

CONNECTIONS = 4096
"visitors at a time, unless more are asked for"

COMMON = """
worker_processes 1; daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log;
worker_rlimit_nofile {files};
events {{ worker_connections {connections}; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 1h; sendfile on; tcp_nodelay on;
  client_max_body_size 0; default_type application/octet-stream;
  client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
"""

ORIGIN = """
  open_file_cache max=16;
  server {{ listen 127.0.0.1:{port} backlog=4096; {more}
    location = /100B {{ return 200 "{small}"; }}
    location / {{ root {directory}/files; }}
  }}
}}
"""

# Nothing goes through files: a proxy that writes to the disk would be compared with others that do not.
PROXY = """
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 1024; keepalive_requests 100000000; keepalive_timeout 1h; }}
  map $http_upgrade $keep {{ default upgrade; "" ""; }}
  server {{ listen 127.0.0.1:{port} backlog=4096; {more}
    location / {{
      proxy_pass http://origin; proxy_http_version 1.1; proxy_read_timeout 1h; proxy_send_timeout 1h;
      proxy_set_header Connection $keep; proxy_set_header Upgrade $http_upgrade;
      proxy_max_temp_file_size 0; proxy_request_buffering off;
    }}
  }}
}}
"""


def common(directory: Path, connections: int) -> str:
    """What both configurations begin with."""
    # Each visitor of a proxy takes two of each, and nginx closes what idles when less than a sixteenth is left.
    return COMMON.format(directory=directory, files=3 * connections + 200, connections=3 * connections + 100)


def origin_config(directory: Path, port: int, http2: int = 0, connections: int = CONNECTIONS) -> str:
    """The origin's configuration; ``http2`` is a further port, for HTTP/2 without TLS."""
    more = f"listen 127.0.0.1:{http2} http2 backlog=4096;" if http2 else ""
    body = ORIGIN.format(directory=directory, port=port, more=more, small="x" * SIZES["100B"])
    return common(directory, connections) + body


def proxy_config(directory: Path, port: int, origin: int, http2: int = 0, connections: int = CONNECTIONS) -> str:
    """The reverse proxy's configuration: one worker, and connections to the origin that are kept."""
    more = f"listen 127.0.0.1:{http2} http2 backlog=4096;" if http2 else ""
    return common(directory, connections) + PROXY.format(port=port, more=more, origin=origin)


def make_files(directory: Path) -> None:
    """The files that are asked for; the large ones take no room on the disk."""
    files = directory / "files"
    files.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        with (files / name).open("wb") as file:
            file.truncate(size)


def version() -> str:
    """What nginx calls its version."""
    said = subprocess.run(("nginx", "-v"), capture_output=True, text=True, timeout=10, check=False).stderr
    found = re.search(r"nginx/(\S+)", said)
    return found[1] if found else "?"


def start(directory: Path, config: str) -> Process:
    """nginx with a configuration of this file; not yet ready."""
    directory.chmod(0o755)
    path = directory / "nginx.conf"
    path.write_text(config)
    return Process(("nginx", "-e", str(directory / "error.log"), "-c", str(path)), directory / "nginx.out")


@contextlib.contextmanager
def origin(directory: Path) -> Iterator[tuple[int, int]]:
    """An origin for the time of a ``with`` block: its port, and its port for HTTP/2."""
    directory.mkdir(parents=True, exist_ok=True)
    make_files(directory)
    port, http2 = free_port(), free_port()
    with start(directory, origin_config(directory, port, http2)) as process:
        answered(Target(port), "/100B", SIZES["100B"], process)
        yield port, http2
