"""Small real processes in place of proxy and engine, for what the supervisor does with processes."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ports import free_port
from twolane.launch.plan import Plan, Role, ServedModel, ServiceSpec

# Answers like a proxy and like an instance; argv: port, then the addresses that /stats shows as ready.
SERVER = """
import http.server, json, sys
port, addresses = int(sys.argv[1]), sys.argv[2:]

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        rest = {"state": "ready", "in_flight": 0, "control_address": "", "kind": "twolane", "epoch": ""}
        self.answer({"instances": [{"address": address, **rest} for address in addresses]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"usage": {"completion_tokens": 1}})

    def log_message(self, *args):
        pass

print("serving", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
DIES_AT_ONCE = "import sys; print('loading'); print('the reason why', flush=True); sys.exit(7)"
IGNORES_SIGTERM = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
LEAVES_A_GRANDCHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""


def make_spec(folder: Path, code: str, *, name: str = "prefill", role: Role = "prefill", port: int = 0) -> ServiceSpec:
    return ServiceSpec(
        name=name,
        role=role,
        argv=(sys.executable, "-c", code),
        env={},
        host="127.0.0.1",
        http_port=port or free_port(),
        log=str(folder / f"{name}.log"),
    )


def server_spec(folder: Path, name: str, role: Role, shows: tuple[str, ...] = ()) -> ServiceSpec:
    port = free_port()
    return ServiceSpec(
        name=name,
        role=role,
        argv=(sys.executable, "-c", SERVER, str(port), *shows),
        env={},
        host="127.0.0.1",
        http_port=port,
        log=str(folder / f"{name}.log"),
    )


def make_run(folder: Path, *instances: ServiceSpec) -> Plan:
    """A plan with a proxy that shows all the instances as ready."""
    proxy = server_spec(folder, "proxy", "proxy", tuple(spec.address for spec in instances))
    return Plan(
        services=(proxy, *instances),
        model=ServedModel(source="fake", names=("fake",)),
        proxy_address=proxy.address,
        discovery_port=free_port(),
        start_timeout_s=30.0,
    )
