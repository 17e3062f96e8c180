"""The import rules: proxy, launcher and CLI know nothing of torch or vLLM, the connector nothing of all those."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import twolane

SOURCE = Path(twolane.__file__).parent
HEAVY = ("torch", "vllm", "transformers", "triton")
CONNECTOR_MAY_KNOW = ("twolane.connector", "twolane.protocol", "twolane.addresses", "twolane.curve", "twolane.errors")


def modules_of(*folders: str) -> list[str]:
    return [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for folder in folders
        for path in sorted((SOURCE / folder).rglob("*.py"))
    ]


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "twolane")
    return found


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_proxy_launcher_and_cli_load_neither_torch_nor_vllm() -> None:
    modules = ["twolane.cli", "twolane.config", "twolane.protocol", *modules_of("proxy", "launch", "power")]
    code = f"import sys, {', '.join(modules)}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", sorted((SOURCE / "connector").rglob("*.py")), ids=lambda path: path.name)
def test_the_connector_knows_protocol_curve_and_errors_only(path: Path) -> None:
    own = {module for module in imports_of(path) if within(module, ("twolane",))} - {"twolane"}
    assert {module for module in own if not within(module, CONNECTOR_MAY_KNOW)} == set()


def test_only_the_converter_names_torch_outside_the_connector() -> None:
    files = [path for path in sorted(SOURCE.rglob("*.py")) if "connector" not in path.parts]
    users = {path.name for path in files if any(within(module, HEAVY) for module in imports_of(path))}
    assert users == {"convert.py"}


def test_nothing_imports_the_cli() -> None:
    files = [
        path for path in sorted(SOURCE.rglob("*.py")) if path.name not in {"cli.py", "disagg_prefill_proxy_server.py"}
    ]
    assert [path.name for path in files if "twolane.cli" in imports_of(path)] == []
