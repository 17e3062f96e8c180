"""NCCL's calls that a pair of ranks needs, through ctypes, from the library that torch has loaded.

Communicators are made non-blocking (ncclConfig_t.blocking = 0): every call may answer "in progress", and none keeps its
thread when the other rank is gone. See NCCL's user guide, "Fault Tolerance".
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

_IN_PROGRESS = 7
_UINT8 = 1
_UNDEFINED = -(2**31)  # NCCL_CONFIG_UNDEF_INT
_ID_BYTES = 128


class NcclError(Exception):
    """A call failed; the text is NCCL's own."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t as of 2.18; later versions fill up what is behind it with their defaults, by `size`."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libnccl.so.2")
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _check(name: str, status: int) -> None:
    if status not in (0, _IN_PROGRESS):
        raise NcclError(f"{name}: {_library().ncclGetErrorString(status).decode()}")


def new_id() -> bytes:
    """Names a communicator to be; both ranks join with it. NcclError if NCCL finds no network interface."""
    made = _UniqueId()
    _check("ncclGetUniqueId", _library().ncclGetUniqueId(ctypes.byref(made)))
    return ctypes.string_at(ctypes.addressof(made), _ID_BYTES)


class Communicator:
    """Two ranks. Used by one thread; after every call but `abort`, nothing else until `is_settled`."""

    def __init__(self, name: bytes, rank: int) -> None:
        """Begins to join."""
        joined = _UniqueId()
        ctypes.memmove(ctypes.addressof(joined), name, _ID_BYTES)
        undefined = ctypes.c_int(_UNDEFINED)
        config = _Config(ctypes.sizeof(_Config), 0xCAFEBEEF, 21800, 0, undefined, undefined, undefined, None, undefined)
        self._peer = 1 - rank
        self._handle = ctypes.c_void_p()
        status = _library().ncclCommInitRankConfig(ctypes.byref(self._handle), 2, joined, rank, ctypes.byref(config))
        _check("ncclCommInitRankConfig", status)

    def is_settled(self) -> bool:
        """Whether the last call is through. Raises NcclError if it failed, or the other rank is lost."""
        state = ctypes.c_int()
        _check("ncclCommGetAsyncError", _library().ncclCommGetAsyncError(self._handle, ctypes.byref(state)))
        _check("NCCL", state.value)
        return state.value == 0

    def send(self, address: int, size_bytes: int, stream: torch.cuda.Stream) -> None:
        self._move("ncclSend", address, size_bytes, stream)

    def receive(self, address: int, size_bytes: int, stream: torch.cuda.Stream) -> None:
        self._move("ncclRecv", address, size_bytes, stream)

    def _move(self, call: str, address: int, size_bytes: int, stream: torch.cuda.Stream) -> None:
        status = getattr(_library(), call)(
            ctypes.c_void_p(address),
            ctypes.c_size_t(size_bytes),
            _UINT8,
            self._peer,
            self._handle,
            ctypes.c_void_p(stream.cuda_stream),
        )
        _check(call, status)

    def abort(self) -> None:
        """Ends the kernels that wait for the other rank, and the communicator. Idempotent."""
        if self._handle:
            _library().ncclCommAbort(self._handle)
            self._handle = ctypes.c_void_p()
