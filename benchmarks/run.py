"""The load that the tunnel's predecessor failed: `.venv/bin/python -m benchmarks.run [--engine qh3]`.

One client, a backend that takes 35 ms, stages of 20,50,100,200,500,1000 requests/s, on this machine, over loopback,
with the tunnel's defaults and its log at INFO into a file. Its exit status is that of `quictunnel load`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.sidebyside.bench import Bench, Scale
from benchmarks.sidebyside.peers import COMPILED, Quictunnel


def main() -> int:
    """Run it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="aioquic")
    parser.add_argument("--stages", default="20,50,100,200,500,1000")
    parser.add_argument("--duration", type=float, default=30)
    arguments = parser.parse_args()
    peer = Quictunnel(arguments.engine, plain=not COMPILED.is_dir())
    with tempfile.TemporaryDirectory() as name:
        bench = Bench([peer], Scale(), Path(name))
        with bench.backend(35) as port, peer.placed(bench.setup(port), "/", 100) as place:
            print(f"engine {arguments.engine}", flush=True)
            return subprocess.run(
                (sys.executable, "-m", "quictunnel", "load", f"http://{place.target.address}/",
                 "--stages", arguments.stages, "--duration", str(arguments.duration), "--max-errors", "0",
                 "--max-p99", "60"),
                check=False,
            ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
