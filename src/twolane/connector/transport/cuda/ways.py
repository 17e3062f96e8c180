"""The transports of GPU memory, best first: straight into D's blocks; through pinned host memory; through NCCL;
through pinned host memory and a socket."""

from __future__ import annotations

import zmq

from twolane.connector.agent import logger
from twolane.connector.layout import KVLayout
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport.base import Wake
from twolane.connector.transport.cuda.copier import CudaCopier
from twolane.connector.transport.cuda.driver import DriverError
from twolane.connector.transport.cuda.ipc import IpcReceive, IpcSend
from twolane.connector.transport.cuda.nccl import NcclReceive, NcclSend
from twolane.connector.transport.hub import Receivers, ReceiveWay, Senders, SendWay
from twolane.connector.transport.shm import ShmReceive, ShmSend
from twolane.connector.transport.tcp import tcp_send
from twolane.connector.transport.tcp_receive import tcp_receive
from twolane.errors import ConfigError


def senders(
    layout: KVLayout, settings: ConnectorSettings, wake: Wake, poller: zmq.Poller | None, *, zero: bool
) -> Senders:
    copier = CudaCopier(layout, wake)
    slot_bytes, num_slots = settings.slot_bytes, settings.num_slots
    made: list[SendWay] = []
    if settings.transport in ("auto", "cuda_ipc"):
        made.append(IpcSend(copier, zero=zero))
    if settings.transport in ("auto", "shm"):
        made.append(ShmSend(layout, copier, slot_bytes=slot_bytes, num_slots=num_slots, zero=zero))
    if settings.transport in ("auto", "nccl"):
        made.append(NcclSend(copier, slot_bytes=slot_bytes, num_slots=num_slots, zero=zero))
    if settings.transport in ("auto", "tcp"):
        made.append(tcp_send(layout, copier, settings, poller, zero=zero))
    return Senders(copier, made)


def receivers(layout: KVLayout, settings: ConnectorSettings, wake: Wake, poller: zmq.Poller | None) -> Receivers:
    """ConfigError where the only transport asked for can't be had."""
    copier = CudaCopier(layout, wake)
    made: list[ReceiveWay] = []
    if settings.transport in ("auto", "cuda_ipc"):
        try:
            made.append(IpcReceive(layout, with_gates=settings.wait_on_gpu))
        except DriverError as error:
            reason = f"this GPU memory can't be mapped by other processes ({error}; expandable segments?)"
            if settings.transport == "cuda_ipc":
                raise ConfigError(f"transport cuda_ipc: {reason}: use auto.") from error
            logger.warning("transport not used cuda_ipc: %s", reason)
    if settings.transport in ("auto", "shm"):
        made.append(ShmReceive(layout, copier))
    if settings.transport in ("auto", "nccl"):
        made.append(NcclReceive(copier))
    if settings.transport in ("auto", "tcp"):
        made.append(tcp_receive(layout, copier, settings, poller))
    return Receivers(copier, made)
