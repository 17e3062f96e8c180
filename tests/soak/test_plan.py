"""What the soak asks and breaks: the same for the same seed, and as much of each as it says."""

from __future__ import annotations

from collections import Counter

import pytest
from benchmarks.soak.phases import PHASES, SOAK, STOP_S, fault_schedule
from benchmarks.soak.workload import LEAVE_POINTS, make_prompts, make_requests

LENGTHS = [len(prompt) for prompt in make_prompts(seed=1, count=100, max_tokens=1400)]


def test_the_seed_decides() -> None:
    assert make_prompts(1, 20, 500) == make_prompts(1, 20, 500) != make_prompts(2, 20, 500)
    once, again, other = (make_requests(seed, 50, LENGTHS, [24] * 100) for seed in ("a", "a", "b"))
    assert once == again != other
    assert fault_schedule(1, PHASES["kills"]) == fault_schedule(1, PHASES["kills"])


def test_prompts_are_mostly_short_but_some_take_many_chunks() -> None:
    assert len(LENGTHS) == 100
    assert sum(length <= 160 for length in LENGTHS) == 85
    assert sum(length > 500 for length in LENGTHS) == 3


def test_a_fifth_of_the_clients_leaves_at_all_points() -> None:
    requests = make_requests("a", 2000, LENGTHS, [24] * 100)
    leaving = Counter(request.leave.point for request in requests if request.leave)
    assert 350 < sum(leaving.values()) < 450
    assert set(leaving) == set(LEAVE_POINTS)
    assert min(leaving.values()) > 70


def test_no_more_is_asked_than_the_reference_knows() -> None:
    answers = [index % 5 for index in range(100)]
    requests = make_requests("a", 500, LENGTHS, answers)
    assert all(1 <= request.max_tokens <= answers[request.prompt] for request in requests)


def test_every_prompt_is_asked_as_often_as_the_others() -> None:
    asked = Counter(request.prompt for request in make_requests("a", 500, LENGTHS, [24] * 100))
    assert set(asked.values()) == {5}


@pytest.mark.parametrize("name", PHASES)
def test_every_fault_comes_in_its_phase(name: str) -> None:
    phase = PHASES[name]
    faults = fault_schedule(1, phase)
    assert {fault.kind for fault in faults} == {*phase.kills, *phase.stops}
    assert all(0 < fault.at_s < phase.max_s for fault in faults)
    assert faults == sorted(faults, key=lambda fault: fault.at_s)


def test_no_instance_is_stopped_again_before_it_goes_on() -> None:
    for phase in PHASES.values():
        stops = [fault.at_s for fault in fault_schedule(3, phase) if fault.kind.startswith("stop")]
        same_role = zip(stops, stops[len(phase.stops) :], strict=False)
        assert all(after - before > STOP_S for before, after in same_role)


def test_the_soak_does_all_that_it_should() -> None:
    phases = [PHASES[name] for name in SOAK]
    assert sum(phase.share for phase in phases) == pytest.approx(1.0)
    assert {(phase.prefill, phase.decode) for phase in phases} == {(1, 1), (2, 2)}
    assert {kind for phase in phases for kind in (*phase.kills, *phase.stops)} == {
        "kill P",
        "kill D",
        "stop P",
        "stop D",
    }
    assert any("--no-enable-prefix-caching" in phase.vllm_args for phase in phases)
    assert any("--no-enable-prefix-caching" not in phase.vllm_args for phase in phases)
    assert any("--num-gpu-blocks-override" in phase.vllm_args for phase in phases)
    assert any(phase.drops for phase in phases)
    assert any(phase.hang_rounds for phase in phases)
    assert sum(phase.max_s for phase in phases) < 27 * 60
