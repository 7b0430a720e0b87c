"""Which of several processes gets a datagram: the one that its connection id names.

The sockets of all workers are a reuse-port group, and the kernel would choose among them by the sender's address and
port. A link whose client gets another address (a NAT that forgot, another network) would end at a worker that knows
nothing of it. So a small program in the kernel chooses instead: by the first byte of the destination connection id, to
which all but the first packet's are chosen by the server, modulo the number of sockets. Worker ``k`` is the socket that
was bound as number ``k``, and uses connection ids that lead to it.

Ids that a library issues later (NEW_CONNECTION_ID) lead anywhere. A client that changes to one of them may lose its
link; ours never does, also when its address changes (tests/quic/test_steering.py).
"""

import ctypes
import os
import socket
import struct
from typing import Final, NamedTuple

from quictunnel.quic.engine import CONNECTION_ID_LENGTH

__all__ = ["Steering", "steer"]

_SO_ATTACH_REUSEPORT_CBPF: Final = 51
"of Linux; the socket module has no name for it"

# Classic BPF (linux/bpf_common.h): operation, jump if true, jump if false, operand.
_LOAD_BYTE: Final = 0x30
_JUMP: Final = 0x05
_JUMP_IF_SET: Final = 0x45
_MODULO: Final = 0x94
_RETURN: Final = 0x16

_LONG_HEADER: Final = 0x80
_ID_IN_LONG_HEADER: Final = 6
_ID_IN_SHORT_HEADER: Final = 1
"where the id begins (RFC 9000 sections 17.2 and 17.3.1)"


class Steering(NamedTuple):
    """One worker's part of all connection ids."""

    worker: int = 0
    workers: int = 1

    def fits(self, cid: bytes) -> bool:
        """Whether datagrams with this id come to this worker."""
        return cid[0] % self.workers == self.worker

    def new_id(self) -> bytes:
        """A random one that does."""
        while True:
            cid = os.urandom(CONNECTION_ID_LENGTH)
            if self.fits(cid):
                return cid


def steer(sock: socket.socket, workers: int) -> None:
    """Have the kernel choose among the group of ``sock``, by connection ids. Raises OSError where it cannot."""
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD_BYTE, 0, 0, 0),
            (_JUMP_IF_SET, 0, 2, _LONG_HEADER),
            (_LOAD_BYTE, 0, 0, _ID_IN_LONG_HEADER),
            (_JUMP, 0, 0, 1),
            (_LOAD_BYTE, 0, 0, _ID_IN_SHORT_HEADER),
            (_MODULO, 0, 0, workers),
            (_RETURN, 0, 0, 0),
        )
    )
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, header)
