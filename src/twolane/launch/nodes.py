"""Pure: whether the nodes of a Ray cluster are fit for what is planned, and which of them the instances aim at."""

from __future__ import annotations

import msgspec

from twolane.errors import ConfigError
from twolane.launch.actor import NodeFacts
from twolane.launch.options import tensor_parallel_size
from twolane.launch.plan import ServedModel, ServiceSpec

Need = dict[str, float]


class Node(msgspec.Struct, frozen=True):
    id: str
    facts: NodeFacts
    free: Need


def need_of(spec: ServiceSpec) -> Need:
    """What Ray is asked for. A CPU instance's command line says so."""
    gpus = 0 if "VLLM_CPU_KVCACHE_SPACE" in spec.env else int(tensor_parallel_size(spec.argv))
    return {"CPU": 1.0, "GPU": float(gpus)} if gpus else {"CPU": 1.0}


def check_nodes(nodes: list[Node], model: ServedModel) -> None:
    """ConfigError names the node that differs, and the remedy."""
    mine = nodes[0].facts
    for facts in (node.facts for node in nodes):
        if not facts.engine:
            raise ConfigError(f"node {facts.host} has no vLLM beside TwoLane: install it there as on the others")
        for what, theirs, ours in (
            ("vLLM", f"{facts.vllm} ({facts.engine})", f"{mine.vllm} ({mine.engine})"),
            ("Python", facts.python.rpartition(".")[0], mine.python.rpartition(".")[0]),
            ("TwoLane", facts.twolane, mine.twolane),
        ):
            if theirs != ours:
                raise ConfigError(
                    f"node {facts.host} has {what} {theirs}, but node {mine.host} has {ours}: install the same on all"
                )
        if not facts.has_model:
            raise ConfigError(
                f"node {facts.host} has no {model.source}: copy the model there, or put it on storage that all share"
            )


def fits(free: Need, need: Need) -> bool:
    return all(free.get(what, 0.0) >= amount for what, amount in need.items())


def _left(free: Need, need: Need) -> Need:
    return {what: amount - need.get(what, 0.0) for what, amount in free.items()}


def num_fitting(free: Need, needs: list[Need]) -> int:
    """How many of them, in order, a node takes."""
    count = 0
    for need in needs:
        if fits(free, need):
            free, count = _left(free, need), count + 1
    return count


def target(free: dict[str, Need], needs: list[Need]) -> str | None:
    """The node that takes the most of them."""
    return max(free, key=lambda node: num_fitting(free[node], needs), default=None)


def check_room(nodes: list[Node], needs: list[Need]) -> None:
    """ConfigError if there is none for all of them."""
    if sum(num_fitting(node.free, needs) for node in nodes) >= len(needs):
        return
    what = "GPU" if any("GPU" in need for need in needs) else "CPU"
    free = ", ".join(f"{node.facts.host}: {node.free.get(what, 0.0):g}" for node in nodes)
    wanted = sum(need.get(what, 0.0) for need in needs)
    raise ConfigError(
        f"{len(needs)} instances need {wanted:g} {what}s of the cluster, each its own on one node; free are {free}: "
        "add a node (`ray start --address=...`), or lower --prefill or --decode"
    )
