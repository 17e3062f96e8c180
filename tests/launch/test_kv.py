"""Instances that don't register by themselves are registered on their behalf."""

from __future__ import annotations

from pathlib import Path

import msgspec
import zmq

from tests.launch.fakes import make_run, server_spec
from twolane.launch.registrar import Registrar, needs_registrar
from twolane.protocol import decode_registration


def test_a_nixl_instance_is_registered_with_its_kind_and_addresses(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(server_spec(tmp_path, "decode", "decode"), kv_port=22001)
    plan = make_run(tmp_path, spec)
    assert not needs_registrar(plan, spec)
    assert needs_registrar(msgspec.structs.replace(plan, kv="nixl"), spec)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as proxy:
        port = proxy.bind_to_random_port("tcp://127.0.0.1")
        registrar = Registrar(spec, f"127.0.0.1:{port}")
        try:
            while not proxy.poll(50):
                registrar.tick()
            frames = proxy.recv_multipart()
        finally:
            registrar.close()
    registration = decode_registration(frames[-1])
    assert frames[0] == b"127.0.0.1:22001"
    assert (registration.type, registration.kind) == ("D", "nixl")
    assert (registration.http_address, registration.zmq_address) == (spec.address, "127.0.0.1:22001")
