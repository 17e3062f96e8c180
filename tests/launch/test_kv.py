"""Instances that don't register by themselves are registered on their behalf."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.launch.fakes import make_run, server_spec
from tests.ports import free_ports_of
from twolane.config import Kv, ProxySettings
from twolane.launch.configuration import resolve
from twolane.launch.plan import Machine, Plan, ServedModel, ServiceSpec, make_plan
from twolane.launch.registrar import Registrar, make_registrar
from twolane.protocol import decode_registration
from twolane.proxy.flags import parse_instances
from twolane.proxy.service import Service

TWO_GPUS = Machine(engine="cuda", python="python", num_cpus=8, gpus=(0, 1), gpu_uuids={0: "GPU-a", 1: "GPU-b"})
PORTS = ("PREFILL_HTTP_PORT", "DECODE_HTTP_PORT", "PREFILL_KV_PORT", "DECODE_KV_PORT")
MODEL = ServedModel(source="/m", names=("m",))


def test_a_nixl_instance_is_registered_with_its_kind_and_addresses(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(server_spec(tmp_path, "decode", "decode"), kv_port=22001)
    plan = make_run(tmp_path, spec)
    assert make_registrar(plan, spec) is None
    with zmq.Context() as context, context.socket(zmq.ROUTER) as proxy:
        port = proxy.bind_to_random_port("tcp://127.0.0.1")
        registrar = Registrar(spec, f"127.0.0.1:{port}", "nixl")
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


def planned(kv: Kv, discovery_port: int) -> Plan:
    env = free_ports_of(("HTTP_PROXY_PORT", *PORTS)) | {"TWOLANE_KV": kv}
    return make_plan(resolve({"proxy_port": discovery_port}, env, None).settings, TWO_GPUS, MODEL)


def register_as_vllm_does(context: zmq.Context[zmq.Socket[bytes]], spec: ServiceSpec) -> zmq.Socket[bytes]:
    """What P2pNcclEngine (vLLM 0.9.2 to 0.23) sends, from what the launcher tells it: no kind, its own IP."""
    config = json.loads(spec.argv[spec.argv.index("--kv-transfer-config") + 1])
    extra, host = config["kv_connector_extra_config"], spec.env["VLLM_HOST_IP"]
    zmq_address = f"{host}:{config['kv_port']}"
    kind = "P" if config["kv_role"] == "kv_producer" else "D"
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt_string(zmq.IDENTITY, zmq_address)
    socket.connect(f"tcp://{extra['proxy_ip']}:{extra['proxy_port']}")
    message = {"type": kind, "http_address": f"{host}:{extra['http_port']}", "zmq_address": zmq_address}
    socket.send(msgspec.msgpack.encode(message))
    return socket


@pytest.mark.parametrize("kv", ["nixl", "p2pnccl"])
async def test_what_the_launcher_starts_is_of_the_right_kind_at_the_proxy(kv: Kv) -> None:
    async with Service(ProxySettings(http_port=0, discovery_port=0)) as service:
        plan = planned(kv, service.discovery_port)
        with zmq.Context() as context:
            own = [register_as_vllm_does(context, spec) for spec in plan.instances() if kv == "p2pnccl"]
            registrars = [r for spec in plan.instances() if (r := make_registrar(plan, spec)) is not None]
            async with asyncio.timeout(30):
                while len(service.pool) < 2 or not all(instance.gpus for instance in service.pool):
                    for registrar in registrars:
                        registrar.tick()
                    await asyncio.sleep(0.02)
            if kv == "p2pnccl":
                own += [register_as_vllm_does(context, spec) for spec in plan.instances()]
                assert {registrar._me.epoch for registrar in registrars} == {""}
                await asyncio.sleep(0.1)  # for what must not happen
            for socket in own:
                socket.close()
            for registrar in registrars:
                registrar.close()
        assert {(i.name, *i.gpus) for i in service.pool} == {("prefill", "GPU-a"), ("decode", "GPU-b")}
        found = {(instance.role, instance.address, instance.kind) for instance in service.pool}
        prefill, decode = plan.instances()
        assert found == {("P", prefill.address, kv), ("D", decode.address, kv)}
        p, d = (f"http://{spec.address}=127.0.0.1:{spec.kv_port}" for spec in plan.instances())
        static = parse_instances([p], [d], kv)
        assert {(instance.role, instance.address, instance.kind) for instance in static} == found
