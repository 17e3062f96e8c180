"""The calls of the CUDA driver that torch doesn't offer: memory handles for other processes, and their mapping.

Through ctypes, since they are a dozen C calls of a stable ABI (CUDA Driver API reference, "Memory Management"). Every
call works on the context that torch made current in the calling thread: see `bind`. Errors become DriverError.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

IPC_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1
_HOST_REGISTER_PORTABLE = 1
_STREAM_NON_BLOCKING = 1
_WAIT_UNTIL_EQUAL = 1
_WAIT_THEN_FLUSH = 1 << 30
_CAN_FLUSH_REMOTE_WRITES = 98  # a device attribute


class DriverError(Exception):
    """A driver call failed; the text names the call and the driver's own name for the error."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


@cache
def _library() -> ctypes.CDLL:
    """Loaded once; torch has loaded it before."""
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *args: object) -> None:
    try:
        status = getattr(_library(), name)(*args)
    except AttributeError as error:
        raise DriverError(f"{name}: this driver is too old for it") from error
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(status, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'error %d' % status).decode()}")


def bind(device: torch.device) -> None:
    """Makes torch's context of this device current in the calling thread."""
    torch.cuda.set_device(device)
    torch.cuda.current_stream(device).query()


def allocation_of(address: int) -> tuple[int, int]:
    """(base, size in bytes) of the allocation that holds a device address."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    return base.value, size.value


def export_memory(base: int) -> bytes:
    """The handle by which another process of this host maps the allocation that begins at `base`.

    DriverError for memory that has none: made by the virtual memory API (expandable segments, cumem).
    """
    handle = _IpcHandle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
    return ctypes.string_at(ctypes.addressof(handle), IPC_HANDLE_BYTES)


def map_memory(handle: bytes) -> int:
    """The address in this process. Must be unmapped as often as it was mapped."""
    exported = _IpcHandle()
    ctypes.memmove(ctypes.addressof(exported), handle, IPC_HANDLE_BYTES)
    base = ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), exported, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
    return base.value


def unmap_memory(base: int) -> None:
    """No kernel may be writing there."""
    _call("cuIpcCloseMemHandle", ctypes.c_uint64(base))


def allocate(size_bytes: int) -> int:
    """Device memory outside torch's caches, so that it can be exported by itself."""
    base = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(base), ctypes.c_size_t(size_bytes))
    return base.value


def free(base: int) -> None:
    _call("cuMemFree_v2", ctypes.c_uint64(base))


def write_words(address: int, words: list[int]) -> None:
    """Puts 64-bit words into device memory; they are there when it returns."""
    data = (ctypes.c_uint64 * len(words))(*words)
    _call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(8 * len(words)))


def make_stream(device: torch.device) -> torch.cuda.Stream:
    """One that nobody shares, as streams of torch's pool are in the end, and that waits for no other."""
    handle = ctypes.c_void_p()
    _call("cuStreamCreate", ctypes.byref(handle), ctypes.c_uint(_STREAM_NON_BLOCKING))
    return torch.cuda.ExternalStream(handle.value or 0, device=device)


def end_stream(stream: torch.cuda.Stream) -> None:
    """Of `make_stream`."""
    _call("cuStreamDestroy_v2", ctypes.c_void_p(stream.cuda_stream))


def write_word(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Enqueued: puts a 64-bit word into this device's memory."""
    _call(
        "cuStreamWriteValue64_v2",
        ctypes.c_void_p(stream.cuda_stream),
        ctypes.c_uint64(address),
        ctypes.c_uint64(value),
        ctypes.c_uint(0),
    )


def wait_word(address: int, value: int, stream: torch.cuda.Stream) -> None:
    """Enqueued: what comes behind it on the stream waits until the 64-bit word holds the value. It uses no part of the
    GPU meanwhile. What another device wrote before it wrote the word is visible then."""
    _call(
        "cuStreamWaitValue64_v2",
        ctypes.c_void_p(stream.cuda_stream),
        ctypes.c_uint64(address),
        ctypes.c_uint64(value),
        ctypes.c_uint(_WAIT_UNTIL_EQUAL | _flush_flag()),
    )


@cache
def _flush_flag() -> int:
    """Where the device may let one remote write overtake another, it must be told not to."""
    device, can_flush = ctypes.c_int(), ctypes.c_int()
    _call("cuCtxGetDevice", ctypes.byref(device))
    _call("cuDeviceGetAttribute", ctypes.byref(can_flush), ctypes.c_int(_CAN_FLUSH_REMOTE_WRITES), device)
    return _WAIT_THEN_FLUSH if can_flush.value else 0


def copy_to_host(host: int, device: int, size_bytes: int, stream: torch.cuda.Stream) -> None:
    """Enqueued; asynchronous if the host memory is pinned."""
    _call(
        "cuMemcpyDtoHAsync_v2",
        ctypes.c_void_p(host),
        ctypes.c_uint64(device),
        ctypes.c_size_t(size_bytes),
        ctypes.c_void_p(stream.cuda_stream),
    )


def copy_from_host(device: int, host: int, size_bytes: int, stream: torch.cuda.Stream) -> None:
    """Enqueued; asynchronous if the host memory is pinned."""
    _call(
        "cuMemcpyHtoDAsync_v2",
        ctypes.c_uint64(device),
        ctypes.c_void_p(host),
        ctypes.c_size_t(size_bytes),
        ctypes.c_void_p(stream.cuda_stream),
    )


def pin(address: int, size_bytes: int) -> None:
    """Locks host memory (whole pages) for direct access by the device."""
    _call(
        "cuMemHostRegister_v2",
        ctypes.c_void_p(address),
        ctypes.c_size_t(size_bytes),
        ctypes.c_uint(_HOST_REGISTER_PORTABLE),
    )


def unpin(address: int) -> None:
    _call("cuMemHostUnregister", ctypes.c_void_p(address))
