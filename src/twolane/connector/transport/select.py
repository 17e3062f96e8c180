"""Which transports a worker has, from its settings and from where its KV lies."""

from __future__ import annotations

from twolane.connector.layout import KVLayout
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport.base import Wake
from twolane.connector.transport.copier import copier_for
from twolane.connector.transport.hub import Receivers, ReceiveWay, Senders, SendWay
from twolane.connector.transport.shm import ShmReceive, ShmSend
from twolane.errors import ConfigError


def _wants(settings: ConnectorSettings, layout: KVLayout, name: str) -> bool:
    on_gpu = layout.device.startswith("cuda")
    if settings.transport == "cuda_ipc" and not on_gpu:
        raise ConfigError(f"transport cuda_ipc moves KV of GPUs, this one lies on {layout.device}: use auto or shm.")
    return settings.transport == name or (settings.transport == "auto" and (name == "shm" or on_gpu))


def senders_for(layout: KVLayout, settings: ConnectorSettings, wake: Wake) -> Senders:
    """P's. Raises ConfigError for a transport that this memory can't have."""
    copier = copier_for(layout, wake)
    zero = settings.fault == "zero_kv"
    ways: list[SendWay] = []
    if _wants(settings, layout, "cuda_ipc"):
        from twolane.connector.transport.cuda.copier import CudaCopier  # noqa: PLC0415 - needs torch with CUDA
        from twolane.connector.transport.cuda.ipc import IpcSend  # noqa: PLC0415

        assert isinstance(copier, CudaCopier)
        ways.append(IpcSend(copier, zero=zero))
    if _wants(settings, layout, "shm"):
        ways.append(ShmSend(layout, copier, slot_bytes=settings.slot_bytes, num_slots=settings.num_slots, zero=zero))
    return Senders(copier, ways)


def receivers_for(layout: KVLayout, settings: ConnectorSettings, wake: Wake) -> Receivers:
    """D's, best first. Raises ConfigError for a transport that this memory can't have."""
    copier = copier_for(layout, wake)
    ways: list[ReceiveWay] = []
    if _wants(settings, layout, "cuda_ipc"):
        from twolane.connector.transport.cuda.ipc import IpcReceive  # noqa: PLC0415 - needs torch with CUDA

        ways.append(IpcReceive(layout))
    if _wants(settings, layout, "shm"):
        ways.append(ShmReceive(layout, copier))
    return Receivers(copier, ways)
