"""Stands in for vLLM in tests of the launcher: the same command line, an HTTP server, the registration, and counters.

On PYTHONPATH before the real one. Starts in a moment, answers every request with the same words.
"""

from __future__ import annotations

import argparse
import http.server
import json
import threading
import time
import uuid
from typing import Any

import zmq

from twolane.connector.plan import Ended
from twolane.connector.settings import keys_of, parse_settings
from twolane.connector.story import Event, Story
from twolane.curve import speak
from twolane.protocol import Registration, Role, encode

TEXT = " two trains met"
TOKENS = len(TEXT.split())
PREFILL_EVENTS: tuple[Event, ...] = ("offered", "announced", "launched", "computed", "pushed")
DECODE_EVENTS: tuple[Event, ...] = ("allocated", "announce_sent", "landed", "reported", "stepped")


class Engine:
    """Counts the prompt tokens that came from P, as a decode instance's /metrics shows them."""

    def __init__(self, config: dict[str, Any], names: list[str], model: str) -> None:
        self.config = config
        self.names = names
        self.model = model
        self.moved = 0
        self.running: list[object] = []
        self.epoch = uuid.uuid4().hex
        trace_file = (config or {}).get("kv_connector_extra_config", {}).get("trace_file", "")
        self.story = Story("P" if trace_file and config["kv_role"] == "kv_producer" else "D", 0, trace_file)

    def note_transfer(self, params: dict[str, Any]) -> None:
        """As the connector would, all of it at once."""
        prefill = bool(params.get("do_remote_decode"))
        for event in PREFILL_EVENTS if prefill else DECODE_EVENTS:
            self.story.note(Ended(params["transfer_id"], 0.0), event)
        if not prefill:
            self.moved += 4

    def register(self) -> None:
        extra = self.config["kv_connector_extra_config"]
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        address = f"{extra['host']}:{self.config['kv_port']}"
        socket.setsockopt(zmq.IDENTITY, address.encode())
        speak(socket, keys_of(parse_settings(extra)))
        socket.connect(f"tcp://{extra['discovery_address']}")
        role: Role = "P" if self.config["kv_role"] == "kv_producer" else "D"
        me = Registration(role, extra["http_address"], address, "twolane", self.epoch)
        while True:
            socket.send(encode(me))
            time.sleep(1)

    def usage(self, max_tokens: int) -> dict[str, int]:
        num_tokens = min(TOKENS, max_tokens)
        return {"prompt_tokens": 5, "completion_tokens": num_tokens, "total_tokens": 5 + num_tokens}

    def metrics(self) -> str:
        moved = f'vllm:prompt_tokens_by_source_total{{engine="0",source="external_kv_transfer"}} {self.moved}.0\n'
        return moved + f'vllm:num_requests_running{{engine="0"}} {len(self.running)}.0\n'


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(self.engine.metrics().encode(), "text/plain")
        elif self.path == "/v1/models":
            data = [{"id": name, "root": self.engine.model} for name in self.engine.names]
            self.answer(json.dumps({"data": data}).encode())
        else:
            self.answer(b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if params := body.get("kv_transfer_params"):
            self.engine.note_transfer(params)
        if body.get("slow_s"):  # no parameter of vLLM's
            self.engine.running.append(body)
            self.stream_slowly(float(body["slow_s"]))
            self.engine.running.remove(body)
            return
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"content": TEXT}} if "messages" in body else {"text": TEXT}
        usage = self.engine.usage(body.get("max_tokens", TOKENS))
        if not body.get("stream"):
            self.answer(json.dumps({"choices": [choice], "usage": usage}).encode())
            return
        events = [{"choices": [choice]}, {"choices": [], "usage": usage}]
        data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self.answer(data.encode(), "text/event-stream")

    def stream_slowly(self, for_s: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s:
            self.wfile.write(b'data: {"choices": [{"index": 0, "text": " two"}]}\n\n')
            self.wfile.flush()
            time.sleep(0.1)
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, data: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(prog="api_server.py")
    parser.add_argument("--model")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--port", type=int)
    parser.add_argument("--kv-transfer-config", type=json.loads)
    parser.add_argument("--seed")
    parser.add_argument("--host")
    for ignored in ("--dtype", "--max-model-len", "--distributed-executor-backend"):
        parser.add_argument(ignored)
    parser.add_argument("--enforce-eager", action="store_true")
    given, others = parser.parse_known_args()  # vLLM knows more than these
    if "--nope" in others:
        parser.error("unrecognized arguments: --nope")
    Handler.engine = Engine(given.kv_transfer_config, given.served_model_name, given.model)
    print(f"INFO 11-22 16:12:01 [fake] non-default args: seed={given.seed}", flush=True)
    if given.seed != "99" and given.kv_transfer_config:  # else an instance that nobody hears of
        threading.Thread(target=Handler.engine.register, daemon=True).start()
    Server((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
