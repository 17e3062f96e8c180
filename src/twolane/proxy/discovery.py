"""Registrations over ZMQ: instances say every 3 s that they are there, as P2pNcclConnector's did."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from time import monotonic

import msgspec
import zmq

from twolane.addresses import is_loopback, split_address
from twolane.config import ProxySettings
from twolane.curve import LOCKED_OUT, Door, derive_keys, overhead_bytes
from twolane.errors import ConfigError
from twolane.protocol import Registration, Story, decode_from_instance
from twolane.proxy.pool import Pool
from twolane.proxy.ports import port_in_use
from twolane.proxy.stats import Stats

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

logger = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 * 1024
_MESSAGES_A_TURN = 64  # then other callbacks of the loop get theirs
_COMPLAIN_EVERY_S = 10.0
_LOOK_EVERY_S = 1.0  # for connections that are counted late


class Discovery:
    """Owns the ROUTER socket, which is read from the event loop's callbacks; nothing here blocks."""

    def __init__(self, settings: ProxySettings, pool: Pool, stats: Stats) -> None:
        """Raises ConfigError if anybody could register, or a network is not one."""
        if not is_loopback(settings.discovery_host) and not settings.registration_secret:
            raise ConfigError(
                f"registrations at {settings.discovery_host} need a shared secret (--registration-secret-file), "
                "or anybody who can reach that address could have prompts sent to itself"
            )
        self._settings = settings
        self._pool = pool
        self._stats = stats
        self._networks = [parse_network(text) for text in settings.allowed_networks]
        keys = derive_keys(settings.registration_secret)
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._door = Door(self._socket, keys)
        self._overhead_bytes = overhead_bytes(keys)
        self._complain_after = 0.0
        self._num_unlogged = 0
        self.port = settings.discovery_port

    def bind(self) -> None:
        """Raises ConfigError if the port is taken."""
        host, port = self._settings.discovery_host, self._settings.discovery_port
        socket = self._socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES + self._overhead_bytes)
        # An instance that comes back uses the same identity, maybe before we know that the old one is gone.
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.IPV6, 1 if ":" in host else 0)
        address = f"[{host}]" if ":" in host else "127.0.0.1" if host == "localhost" else host
        try:
            socket.bind(f"tcp://{address}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            if error.errno == zmq.EADDRINUSE:
                raise port_in_use("discovery", port, "--discovery-port") from error
            raise ConfigError(f"can't listen for registrations on {host}:{port}: {error}") from error
        endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.port = int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._readable)
        for socket in self._door.sockets:
            loop.add_reader(socket.fileno(), self._look_at_door)
        self._readable()  # the descriptors only tell of changes
        self._look_now_and_then()

    def close(self) -> None:
        self._door.close()
        self._socket.close()
        self._context.term()

    def stop(self) -> None:
        self._next_look.cancel()
        for socket in (self._socket, *self._door.sockets):
            asyncio.get_running_loop().remove_reader(socket.fileno())
        self.close()

    def _look_now_and_then(self) -> None:
        self._look_at_door()
        self._next_look = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look_now_and_then)

    def _look_at_door(self) -> None:
        num_before = self._stats.registrants.refused
        self._door.look()
        self._stats.registrants = self._door.counts
        if self._door.counts.refused > num_before:
            self._complain(f"a connection without the key: {LOCKED_OUT}; or a stranger knocks")

    def _readable(self) -> None:
        """Reads until nothing is left: ZMQ's descriptor is edge-triggered."""
        for _ in range(_MESSAGES_A_TURN):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if not self._socket.closed:
                    self._complain(f"can't read: {error}")
                return
            self.take(frames)
        asyncio.get_running_loop().call_soon(self._readable)

    def take(self, frames: list[bytes]) -> None:
        """One message: the sender's identity, and a registration or what happened to some requests."""
        if self._socket.closed:
            return
        try:
            message = decode_from_instance(frames[-1])
            self._check(message)
        except (msgspec.MsgspecError, ValueError) as error:
            self._stats.num_registrations_refused += 1
            self._complain(f"from {frames[0][:64]!r}: {error}")
            return
        if isinstance(message, Story):
            self._stats.stories.hear(message, monotonic())
        else:
            self._pool.register(message, monotonic())

    def _check(self, message: Registration | Story) -> None:
        """Raises ValueError, which says what is wrong with it."""
        if isinstance(message, Story):
            return  # it changes nothing but the records of requests that went to that address
        for address in (message.http_address, message.zmq_address):
            host, _ = split_address(address)
            if not is_allowed(host, self._networks):
                raise ValueError(f"{address} is in no allowed network; see --allow-network")

    def _complain(self, what: str) -> None:
        """Logs, but not for everyone who can send garbage at will."""
        now = monotonic()
        if now < self._complain_after:
            self._num_unlogged += 1
            return
        logger.warning('registration refused reason="%s" more_not_logged=%d', what, self._num_unlogged)
        self._complain_after = now + _COMPLAIN_EVERY_S
        self._num_unlogged = 0


def parse_network(text: str) -> Network:
    """Raises ConfigError."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no network such as 10.0.0.0/8: {error}") from error


def is_allowed(host: str, networks: list[Network]) -> bool:
    """Names are refused, whatever they may mean at the moment, but for `localhost`."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return False
    return any(address in network for network in networks)
