"""Tunnels and proxies side by side in one run: `make bench`, or `python -m benchmarks.sidebyside --help`."""
