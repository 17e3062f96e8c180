"""README.md and README.zh-CN.md say the same: the same commands, words in code, figures and links; and they exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from twolane.cli import app
from twolane.launch.configuration import VARIABLES

ROOT = Path(__file__).parent.parent
ENGLISH = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
FENCE = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Lines of all code blocks, without their comments."""
    lines = "".join(FENCE.findall(text)).splitlines()
    return [line.partition(" # ")[0].rstrip() for line in lines]


def code_words(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))


def figures(text: str) -> list[str]:
    """Every number in a table, in order."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return re.findall(r"\d+(?:[.,]\d+)*", "\n".join(rows))


def test_both_show_the_same_commands() -> None:
    assert commands(ENGLISH) == commands(CHINESE)


def test_both_use_the_same_words_in_code_figures_and_links() -> None:
    assert code_words(ENGLISH) - {"", "."} == code_words(CHINESE)
    assert figures(ENGLISH) == figures(CHINESE)
    links = {target for text in (ENGLISH, CHINESE) for target in re.findall(r"\]\(([\w./-]+)\)", text)}
    assert all((ROOT / target).exists() for target in links)
    assert len(re.findall("^## ", ENGLISH, re.MULTILINE)) == len(re.findall("^## ", CHINESE, re.MULTILINE))


@pytest.mark.parametrize("text", [ENGLISH, (ROOT / "docs/TROUBLESHOOTING.md").read_text()], ids=["README", "trouble"])
def test_commands_and_variables_that_are_named_exist(text: str) -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"(?:^|`)twolane ([a-z]+)", text, re.MULTILINE))
    assert named <= known
    assert set(re.findall(r"\bTWOLANE_[A-Z_]+\b", text)) <= set(VARIABLES)
