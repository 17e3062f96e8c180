"""`twolane test`: asks what runs, through the proxy, and proves that the KV cache moved. Knows its address only."""

from __future__ import annotations

import http.client
import json
import statistics
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from twolane.errors import StartError, TwoLaneError
from twolane.launch import ask, probes
from twolane.launch.firstlight import sources_of

NUM_AT_ONCE = 8
MAX_TOKENS = 16
ANSWER_TIMEOUT_S = 300.0
PROMPT = "Run {}. A short story about two trains that meet at a station in the mountains. It was"


class FailedCheckError(TwoLaneError):
    """What came instead of what should have."""


@dataclass
class Tester:
    """One run of all checks. Mutates what it has learned: the model's name and the timed answers."""

    address: str
    model: str = ""
    answers: list[ask.Timed] = field(default_factory=list)

    def health(self) -> str:
        report = self._json("GET", "/health")
        if report.get("status") != "ok":
            raise FailedCheckError(f"{report.get('status')}: {report.get('reason')}")
        return f"{report['prefill']} prefill and {report['decode']} decode instances ready"

    def models(self) -> str:
        names = [entry["id"] for entry in self._json("GET", "/v1/models")["data"]]
        self.model = names[0]
        return ", ".join(names)

    def completion(self) -> str:
        answer = self._json("POST", "/v1/completions", self._body())
        return _whole(answer["choices"][0]["text"], answer["usage"])

    def chat(self) -> str:
        answer = self._json("POST", "/v1/chat/completions", self._chat_body())
        return _whole(answer["choices"][0]["message"]["content"], answer["usage"])

    def stream(self) -> str:
        timed = ask.stream(self.address, "/v1/completions", self._body(), ANSWER_TIMEOUT_S)
        self.answers.append(timed)
        _whole(timed.text, timed.usage)
        return f"TTFT {timed.ttft_s * 1000:.0f} ms, {timed.tokens_per_s:.1f} tokens/s"

    def at_once(self) -> str:
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            bodies = [self._body() for _ in range(NUM_AT_ONCE)]
            timed = list(pool.map(lambda b: ask.stream(self.address, "/v1/completions", b, ANSWER_TIMEOUT_S), bodies))
        for answer in timed:
            _whole(answer.text, answer.usage)
        ttft_ms = statistics.median(answer.ttft_s for answer in timed) * 1000
        tokens = sum(answer.usage["completion_tokens"] for answer in timed)
        return f"TTFT p50 {ttft_ms:.0f} ms, {tokens / max(answer.total_s for answer in timed):.1f} tokens/s together"

    def kv_moved(self) -> str:
        """One more prompt that nobody has cached; D's own counters must say that its KV came from P."""
        before = self._sources()
        answer = self._json("POST", "/v1/completions", self._body())
        after = self._sources()
        moved = after.get("external_kv_transfer", 0) - before.get("external_kv_transfer", 0)
        computed = after.get("local_compute", 0) - before.get("local_compute", 0)
        if moved < 1:
            raise FailedCheckError(
                f"decode instances computed all {answer['usage']['prompt_tokens']} prompt tokens themselves; "
                "`twolane logs` tells why"
            )
        return f"of {answer['usage']['prompt_tokens']} prompt tokens {moved} came from P, D computed {computed}"

    def _sources(self) -> dict[str, int]:
        known = probes.instances(self.address) or []
        return sources_of([str(entry["address"]) for entry in known if entry["role"] == "D"])

    def _body(self) -> dict[str, Any]:
        prompt = PROMPT.format(uuid.uuid4().hex)
        return {"model": self.model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}

    def _chat_body(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Name a colour."}]
        return {"model": self.model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            status, answer = probes.request(self.address, method, path, body, ANSWER_TIMEOUT_S)
            parsed: dict[str, Any] = json.loads(answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FailedCheckError(f"no answer from {self.address}: {error!r}") from error
        if status != 200 and path != "/health":
            raise FailedCheckError(f"status {status}: {answer[:300]!r}")
        return parsed


def _whole(text: str, usage: dict[str, int]) -> str:
    if not text or usage["completion_tokens"] < 1:
        raise FailedCheckError(f"an empty answer: {text!r}, {usage}")
    return repr(text.strip()[:40])


def run_checks(address: str, say: Callable[[bool, str, str], None]) -> bool:
    """Says each result as it comes. Ends early where nothing answers. True if all passed."""
    tester = Tester(address)
    checks = {
        "health": tester.health,
        "models": tester.models,
        "completion": tester.completion,
        "chat": tester.chat,
        "stream": tester.stream,
        f"{NUM_AT_ONCE} at once": tester.at_once,
        "KV moved": tester.kv_moved,
    }
    all_passed = True
    for name, check in checks.items():
        passed, detail = _run(check)
        say(passed, name, detail)
        all_passed = all_passed and passed
        if not passed and name == "models":
            break  # without a name there is nothing to ask for
    return all_passed


def _run(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except (FailedCheckError, StartError) as error:
        return False, str(error)
    except (KeyError, IndexError, TypeError) as error:
        return False, f"an answer of another form than OpenAI's: {error!r}"
