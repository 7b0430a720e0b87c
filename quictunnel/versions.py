"""What ``quictunnel --version`` prints; loaded without all that reads options."""

import importlib.metadata
import importlib.util

from quictunnel import __version__

__all__ = ["versions"]


def versions() -> str:
    """The program's version, and those of the libraries that it is as fast as."""
    parts = [f"{name} {version}" for name in ("aioquic", "qh3", "uvloop") if (version := _version_of(name))]
    parts.append("compiled" if _is_compiled() else "not compiled")
    return f"quictunnel {__version__} ({', '.join(parts)})"


def _is_compiled() -> bool:
    """Whether what every request passes through was compiled when this was installed."""
    spec = importlib.util.find_spec("quictunnel.exchange")
    return spec is not None and spec.origin is not None and not spec.origin.endswith(".py")


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
