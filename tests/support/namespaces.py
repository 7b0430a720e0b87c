"""Two machines on one cable, as network namespaces of Linux: for addresses and links that change. Needs root."""

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

__all__ = ["Namespace", "can_make_namespaces", "two_namespaces"]

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One of the two."""

    def __init__(self, name: str, device: str, address: str) -> None:
        self.name = name
        self.device = device
        self.address = address
        self._next = int(address.rpartition(".")[2]) + 10

    @property
    def prefix(self) -> tuple[str, ...]:
        """What makes a command run there."""
        return ("ip", "netns", "exec", self.name)

    def run(self, *command: str) -> None:
        """``ip COMMAND`` there."""
        _ip("-n", self.name, *command)

    def change_address(self) -> None:
        """Take its address away and give it another, as a new network would."""
        fresh = f"{self.address.rpartition('.')[0]}.{self._next}"
        self._next += 1
        self.run("addr", "del", f"{self.address}/24", "dev", self.device)
        self.run("addr", "add", f"{fresh}/24", "dev", self.device)
        self.address = fresh

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Until the end of the block, sockets that this thread makes belong there."""
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self.name}") as inside:
            _enter(inside.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())


def _enter(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@cache
def can_make_namespaces() -> bool:
    """Whether this user may, and the kernel can."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    try:
        with two_namespaces():
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Two of them with a cable in between, for the time of the block."""
    word = secrets.token_hex(3)
    here, there = Namespace(f"qt-{word}-a", "cable", "10.77.0.1"), Namespace(f"qt-{word}-b", "cable", "10.77.0.2")
    try:
        for each in (here, there):
            _ip("netns", "add", each.name)
        here.run("link", "add", here.device, "type", "veth", "peer", "name", there.device, "netns", there.name)
        for each in (here, there):
            each.run("addr", "add", f"{each.address}/24", "dev", each.device)
            each.run("link", "set", each.device, "up")
            each.run("link", "set", "lo", "up")
        yield here, there
    finally:
        for each in (here, there):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", each.name)


def _ip(*command: str) -> None:
    subprocess.run(("ip", *command), check=True, capture_output=True)
