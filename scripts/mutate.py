"""Breaks the connector on purpose, one rule at a time, and shows which test notices: `make mutants`.

    python scripts/mutate.py [WORD ...]     only mutants whose name holds one of the words; then nothing is written

Each mutant is a small change of one file, made in a temporary copy of the tree. Exit code 1 if one is not noticed, or
if its text isn't found any more. The table goes to docs/RELIABILITY.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- made by `make mutants` -->\n", "<!-- end of what `make mutants` made -->\n"
COPIED = ("src", "tests", "pyproject.toml")
STAGES = (  # the next one runs where nobody noticed
    ("tests/connector/test_transfer.py", "tests/connector/test_conversation_cases.py", "tests/connector/test_tcp.py"),
    ("tests/connector/test_conversation.py",),
    ("tests/connector/test_head_start.py",),
)
TIMEOUT_S = 300  # a mutant that makes the tests hang is noticed too
NOTICED = re.compile(r"^(?:FAILED|ERROR) \S*?(\w+\.py)::([^\s\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # under src/twolane/connector
    old: str
    new: str


P, D = "prefill_side.py", "decode_side.py"
OUT, IN = "outgoing.py", "incoming.py"
P_PEERS, D_PEERS = "prefill_peers.py", "decode_peers.py"
SLOTS, TCP, INBOX = "transport/slots.py", "transport/tcp.py", "transport/inbox.py"
MUTANTS = (
    Mutant("fence: D announces before its forward passes are through", D, "if passed.done:", "if passed:"),
    Mutant(
        "fence: D doesn't wait for P's word at the end",
        IN,
        "self.is_fenced |= self.state is IncomingState.ALLOCATED",
        "self.is_fenced = True",
    ),
    Mutant("fence: P doesn't quiesce at a preemption", P, "self._transports.quiesce()", "pass"),
    Mutant("fence: a preempted request's blocks are still sent", P, "preempted.retract()", "pass"),
    Mutant("fence: P answers a Cancel while it still writes", P, "if outgoing.in_flight:", "if not outgoing:"),
    Mutant(
        "fence: P gives blocks back while they are read",
        OUT,
        "return self.ended is not None and self.in_flight == 0",
        "return self.ended is not None",
    ),
    Mutant("fence: D gives blocks back while it writes them", IN, "and self.is_fenced and self.in_flight == 0", ""),
    Mutant("epoch: the old connection of a D stays at its new Hello", D_PEERS, "if peer.epoch == epoch", "if not peer"),
    Mutant("epoch: what comes late or twice is heard", "numbering.py", "message.number > self.heard", "True"),
    Mutant("lease: never runs out", OUT, "return now_s - max(self.done_at_s, last_word_s) > lease_s", "return False"),
    Mutant("lease: runs out at once", OUT, "return now_s - max(self.done_at_s, last_word_s) > lease_s", "return True"),
    Mutant("digest: another prompt's KV is taken", OUT, "if announce.digest != self.digest:", "if not announce:"),
    Mutant("gap: D doesn't see that a push is missing", IN, "not self.cursor.is_at(part) or ", ""),
    Mutant("order: P tells of its pushes in another order", P, "in flights:\n", "in reversed(flights):\n"),
    Mutant(
        "order: P sends a block before it is full",
        OUT,
        "max(0, num_valid_tokens // self.block_size - ",
        "max(0, -(-num_valid_tokens // self.block_size) - ",
    ),
    Mutant(
        "landed: D takes a block of which a layer is missing",
        IN,
        "self.announce.block_ids[self.landed.block :]",
        "self.announce.block_ids[self.landed.block + self.landed.num_open :]",
    ),
    Mutant(
        "layers: D takes those of other blocks than it has begun",
        "parts.py",
        "part.num_blocks == self.num_open if self.layer else part.num_blocks > 0",
        "True",
    ),
    Mutant("layers: P goes on with blocks that were taken from it", OUT, "if num_final < open_:", "if not self:"),
    Mutant(
        "layers: P holds them back for a later pass",
        OUT,
        "return self.open_fence or self.fence",
        "return self.fence",
    ),
    Mutant("revoke: D lets P write on", P_PEERS, "now_s + peer.channel.revoke()", "now_s"),
    Mutant(
        "revoke: D doesn't wait for the grace",
        P_PEERS,
        "now_s + peer.channel.revoke()",
        "now_s + 0 * peer.channel.revoke()",
    ),
    Mutant("slots: D doesn't look whether it still has the slot", D, "if read.ticket.is_intact()", "if read"),
    Mutant(
        "slots: D gives them back out of order",
        P_PEERS,
        "while self.reads and ",
        "self.reads.sort(key=lambda read: not read.ticket.done)\n        while self.reads and ",
    ),
    Mutant(
        "slots: lent again while they are written",
        SLOTS,
        "return self.owner is None and not self.is_busy()",
        "return self.owner is None",
    ),
    Mutant(
        "data: D reads a slot before all of its bytes are there", INBOX, " and loan.received == loan.size.total", ""
    ),
    Mutant(
        "data: D keeps bytes that nobody wants",
        P_PEERS,
        "self.channel.discard(push.slot, part.size_bytes(layer_bytes))",
        "ticket",
    ),
    Mutant(
        "data: D keeps bytes whose push was lost", INBOX, "if one < number and one not in self._wanted", "if not one"
    ),
    Mutant(
        "data: D takes bytes that nobody wants any more", INBOX, "and head.loan < self._next and", "and not head and"
    ),
    Mutant("data: a slot is lent again while it is sent", TCP, "not all(is_sent() for is_sent in sent)", "False"),
    Mutant(
        "data: P doesn't tell that the connection is lost",
        D_PEERS,
        'return self.channel.error if self.channel is not None else ""',
        'return ""',
    ),
    Mutant("deadline: P waits for a slot for ever", D_PEERS, "if self.lent and now_s", "if not self and now_s"),
    Mutant("deadline: D waits for a silent P for ever", P_PEERS, "now_s - self.last_word_s > timeout_s", "False"),
    Mutant(
        "head start: an idle step doesn't hear of forecasts",
        "decode_agent.py",
        "self._arrivals.next_due_s(now_s) if may_start_early else math.inf",
        "math.inf",
    ),
    Mutant(
        "head start: nobody remembers how long a pass took",
        "transport/cuda/pace_maker.py",
        "self._history.add(mark.of.size, now_s - max(mark.of.at_s, self._ended_s))",
        "pass",
    ),
    Mutant(
        "head start: a pass begins though the one before still runs",
        "transport/cuda/pace_maker.py",
        "max(now_s, before.at_s) if before else now_s",
        "now_s",
    ),
)


def apply(mutant: Mutant, tree: Path) -> None:
    """Exits where the text isn't there exactly once."""
    path = tree / "src/twolane/connector" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: {mutant.old!r} is {text.count(mutant.old)} times in {mutant.file}; adapt the mutant")
    path.write_text(text.replace(mutant.old, mutant.new))


def failures(tree: Path) -> list[str]:
    """Names of the tests that failed, from the first stage in which any did."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "TWOLANE_CONVERSATION": "find"}
    for stage in STAGES:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=120", *stage]
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return [f"{Path(stage[0]).name}: hangs"]
        if noticed := [f"{file}: {name.replace('_', ' ')}" for file, name in NOTICED.findall(done.stdout)]:
            return list(dict.fromkeys(noticed))
        if done.returncode:
            sys.exit(f"the tests didn't run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return []


def try_out(mutant: Mutant | None) -> list[str]:
    """None: the tree as it is."""
    with tempfile.TemporaryDirectory(prefix="twolane-mutant-") as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        if mutant is not None:
            apply(mutant, tree)
        return failures(tree)


def table(noticed: dict[str, list[str]]) -> str:
    rows = ["| what was broken | which test noticed |", "|---|---|"]
    for name, tests in noticed.items():
        more = f", and {len(tests) - 1} more" if len(tests) > 1 else ""
        rows.append(f"| {name} | {tests[0]}{more} |" if tests else f"| {name} | **none** |")
    return "\n".join(rows) + "\n"


def main() -> int:
    wanted = [one for one in MUTANTS if not sys.argv[1:] or any(word in one.name for word in sys.argv[1:])]
    if broken := try_out(None):
        sys.exit(f"the tests fail without a mutant: {broken}")
    noticed = {}
    for mutant in wanted:
        noticed[mutant.name] = try_out(mutant)
        print(f"{mutant.name}: {', '.join(noticed[mutant.name][:2]) or 'NOT NOTICED'}", flush=True)
    if not sys.argv[1:]:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(noticed) + END + rest.partition(END)[2])
    missed = sum(not tests for tests in noticed.values())
    print(f"{len(noticed)} mutants, {missed} not noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
