"""Which transports a worker has, from its settings and from where its KV lies."""

from __future__ import annotations

import zmq

from twolane.connector.layout import KVLayout
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport.base import Wake
from twolane.connector.transport.copier import HostCopier
from twolane.connector.transport.hub import Receivers, ReceiveWay, Senders, SendWay
from twolane.connector.transport.shm import ShmReceive, ShmSend
from twolane.connector.transport.tcp import tcp_send
from twolane.connector.transport.tcp_receive import tcp_receive
from twolane.errors import ConfigError


def senders_for(layout: KVLayout, settings: ConnectorSettings, wake: Wake, poller: zmq.Poller | None = None) -> Senders:
    """P's. `poller`: the agent's, which calls `poll` whenever a socket in it has something. Raises ConfigError for a
    transport that this memory can't have."""
    zero = settings.fault == "zero_kv"
    if _is_on_gpu(layout, settings):
        from twolane.connector.transport.cuda import ways  # noqa: PLC0415 - needs torch with CUDA

        return ways.senders(layout, settings, wake, poller, zero=zero)
    copier = HostCopier(layout, wake)
    made: list[SendWay] = []
    if settings.transport in ("auto", "shm"):
        made.append(ShmSend(layout, copier, slot_bytes=settings.slot_bytes, num_slots=settings.num_slots, zero=zero))
    if settings.transport in ("auto", "tcp"):
        made.append(tcp_send(layout, copier, settings, poller, zero=zero))
    return Senders(copier, made)


def receivers_for(
    layout: KVLayout, settings: ConnectorSettings, wake: Wake, poller: zmq.Poller | None = None
) -> Receivers:
    """D's, best first. Raises ConfigError for a transport that this memory can't have."""
    if _is_on_gpu(layout, settings):
        from twolane.connector.transport.cuda import ways  # noqa: PLC0415 - needs torch with CUDA

        return ways.receivers(layout, settings, wake, poller)
    copier = HostCopier(layout, wake)
    made: list[ReceiveWay] = []
    if settings.transport in ("auto", "shm"):
        made.append(ShmReceive(layout, copier))
    if settings.transport in ("auto", "tcp"):
        made.append(tcp_receive(layout, copier, settings, poller))
    return Receivers(copier, made)


def _is_on_gpu(layout: KVLayout, settings: ConnectorSettings) -> bool:
    if layout.device.startswith("cuda"):
        return True
    if layout.device != "cpu":
        raise ConfigError(f"KV caches on {layout.device}: TwoLane moves KV of cpu and cuda only.")
    if settings.transport in ("cuda_ipc", "nccl"):
        raise ConfigError(
            f"transport {settings.transport} moves KV of GPUs, this one lies on the CPU: use auto, shm or tcp."
        )
    return False
