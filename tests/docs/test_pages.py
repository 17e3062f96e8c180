"""What stands in the docs can't rot: blocks have classes and could run, links resolve, both READMEs say the same."""

from __future__ import annotations

import ast
import configparser
import json
import re

import pytest
import typer.main
import yaml

from tests.docs.lines import check, check_kv_transfer_config
from tests.docs.pages import CLASSES, LANGUAGES, OPTIONS, ROOT, Block, Page, pages
from twolane.cli import app
from twolane.connector.settings import ConnectorSettings
from twolane.launch.configuration import VARIABLES, ConfigFile, resolve

PAGES = pages()
BLOCKS = [block for page in PAGES for block in page.blocks]
ENGLISH = next(page for page in PAGES if page.path.name == "README.md" and page.path.parent == ROOT)
CHINESE = PAGES[-1]
UNIT_KEYS = frozenset(
    (
        *("Description", "After", "Wants", "User", "Group", "WorkingDirectory", "Environment", "EnvironmentFile"),
        *("ExecStart", "ExecStop", "ExecReload", "Restart", "RestartSec", "Type", "TimeoutStartSec", "TimeoutStopSec"),
        *("KillMode", "LimitNOFILE", "LimitMEMLOCK", "WantedBy", "BindsTo", "Requires", "RemainAfterExit"),
    )
)


def by_name(thing: Page | Block) -> str:
    return thing.name if isinstance(thing, Block) else str(thing.path.relative_to(ROOT))


def test_every_page_is_in_the_index() -> None:
    listed = {page.path for page in PAGES}
    assert set((ROOT / "docs").glob("*.md")) <= listed


@pytest.mark.parametrize("block", BLOCKS, ids=by_name)
def test_every_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES, "a fence needs a language: ```sh for commands, ```text for what is no code"
    assert set(block.options) <= OPTIONS
    if block.language == "sh":
        assert block.run in CLASSES, "a shell block needs <!-- run: CLASS --> above it, see tests/docs/pages.py"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_no_block_is_hidden_from_the_tests(page: Page) -> None:
    """Such as those that indentation makes, in which no test looks."""
    assert not re.findall(r"(?<=\n\n)(?: {4}|\t)\S.*", page.prose)
    assert page.text.count("\n```") == 2 * len(page.blocks)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=by_name)
def test_every_command_could_run(block: Block) -> None:
    for line in block.lines:
        check(line)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language not in {"sh", "text"}], ids=by_name)
def test_every_other_block_parses(block: Block) -> None:
    text = block.text
    if block.language == "python":
        ast.parse(text)
    elif block.language == "toml":
        resolve({}, {}, ConfigFile("twolane.toml", text))
    elif block.language == "yaml":
        assert yaml.safe_load(text)
    elif block.language == "json":
        parsed = json.loads(text)
        if "kv_connector" in parsed:
            check_kv_transfer_config(parsed)
    elif block.language == "ini":
        check_unit(text)
    else:
        assert text.count("{") == text.count("}") > 0


def check_unit(text: str) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    assert {key for section in unit.sections() for key in unit[section]} <= UNIT_KEYS
    for key in ("ExecStart", "ExecStop"):
        if key in unit["Service"]:
            check(re.sub(r"^/\S*/bin/", "", unit["Service"][key]))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_and_their_anchors_resolve(page: Page) -> None:
    for link in page.links:
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), link
        if anchor:
            assert anchor in Page(path, path.read_text()).anchors, link


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_and_variables_that_are_named_exist(page: Page) -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:^|`)twolane ([a-z]+)", page.text, re.MULTILINE)) <= known
    named = set(re.findall(r"\bTWOLANE_[A-Z_]+\b", page.text))
    tests_own = ("TWOLANE_TEST_", "TWOLANE_GPU_")
    assert {name for name in named if not name.startswith(tests_own)} <= set(VARIABLES)


def test_every_key_of_the_connector_is_documented() -> None:
    (page,) = [page for page in PAGES if page.path.name == "CONNECTOR.md"]
    rows = set(re.findall(r"^\| `(\w+)` \|", page.prose, re.MULTILINE))
    assert set(ConnectorSettings.__struct_fields__) <= rows


def commands(page: Page) -> list[str]:
    return [line for block in page.blocks if block.language == "sh" for line in block.lines]


def code_words(page: Page) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", page.prose))


def figures(page: Page) -> list[str]:
    """Every number in a table, in order."""
    rows = [line for line in page.text.splitlines() if line.startswith("|")]
    return re.findall(r"\d+(?:[.,]\d+)*", "\n".join(rows))


def test_both_readmes_show_the_same_commands_with_the_same_classes() -> None:
    assert commands(ENGLISH) == commands(CHINESE)
    assert [block.run for block in ENGLISH.blocks] == [block.run for block in CHINESE.blocks]


def test_both_readmes_use_the_same_words_in_code_figures_and_links() -> None:
    assert code_words(ENGLISH) - {"", "."} == code_words(CHINESE)
    assert figures(ENGLISH) == figures(CHINESE)
    to_each_other = {"README.md", "README.zh-CN.md"}
    assert set(ENGLISH.links) - to_each_other == set(CHINESE.links) - to_each_other
    assert len(re.findall("^## ", ENGLISH.text, re.MULTILINE)) == len(re.findall("^## ", CHINESE.text, re.MULTILINE))
