"""benchmarks.beside without a GPU: its rows, its modes, and what it says where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from benchmarks import beside
from benchmarks.beside_moves import MODES, NONE


@dataclass
class Stamps:
    """Stands in for beside_gpu.Timed."""

    pass_ms: float
    tail_ms: float = 0.5
    launch_ms: float = 0.1


def pairs(*times: tuple[float, float]) -> Any:
    return [(Stamps(bare), Stamps(with_copies)) for bare, with_copies in times]


def test_a_row_tells_median_and_quartiles_of_the_pairs() -> None:
    row = beside.row_of(MODES[1], pairs((100, 103), (100, 102), (200, 202)), [300.0, 310.0, 320.0], is_right=True)
    assert row.slowdown_percent == pytest.approx([1.5, 2.0, 2.5])
    assert (row.bare_ms, row.alone_gb_per_s, row.tail_ms, row.launch_ms) == (100, 310.0, 0.5, 0.1)
    assert "+2.00" in str(row)
    assert "+1.50 to +2.50" in str(row)


def test_wrong_bytes_are_seen() -> None:
    assert "WRONG" in str(beside.row_of(MODES[1], pairs((1, 1), (1, 1)), [1.0], is_right=False))


def test_the_bare_row_has_no_copies() -> None:
    row = beside.row_of(NONE, pairs((1, 1), (1, 1)), [], is_right=True)
    assert (row.alone_gb_per_s, row.tail_ms) == (None, None)
    assert len(str(row)) <= len(beside.HEAD)


def test_modes_have_names_of_their_own() -> None:
    assert len({mode.name for mode in MODES}) == len(MODES)


def test_what_the_time_doesnt_allow_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Slow:
        memories = cast("Any", type("Memories", (), {"total_bytes": 1}))

        def warm_up(self) -> float:
            return 1e6

    report: dict[str, Any] = {}
    beside.run_modes(cast("Any", Slow()), list(MODES), 2, 0.0, report)
    assert report["left_out"] == [mode.name for mode in MODES]
    assert "Left out" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        beside.main([])
