"""The documentation, taken apart: pages, fenced blocks with what their markers say, shell lines, headings, links.

A fence has a language. A shell block (`sh`) says in a comment above it how it is tested:

    <!-- run: cpu; expect: Paris -->

| class | what the tests do |
|---|---|
| cpu | run each line, in the order of reading, in one folder with one deployment on the CPU engine |
| make-up | check it; a deployment starts and ends so, and the tests' own does with the launcher's commands |
| needs-gpu, needs-root, needs-docker, needs-network, slow | check it: programs, flags, settings, JSON, plans |

More for `cpu`: `expect` words of the output, several with `|` between them; `exit` code; `short: A => B` is done to the
line first; `background: URL` leaves the lines running and waits until the URL answers; `while: streams` has answers
streamed meanwhile, all of which must end well. Any block: `file: NAME` puts it into the folder first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "README.md"
CLASSES = frozenset(("cpu", "make-up", "needs-gpu", "needs-root", "needs-docker", "needs-network", "slow"))
OPTIONS = frozenset(("run", "expect", "exit", "short", "background", "while", "file"))
LANGUAGES = frozenset(("sh", "text", "python", "json", "toml", "yaml", "ini", "nginx", "caddy"))
_FENCE = re.compile(
    r"^(?P<marker><!-- (?P<options>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def run(self) -> str:
        return self.options.get("run", "")

    @property
    def lines(self) -> list[str]:
        """Shell lines, whole, without comments."""
        joined = self.text.replace("\\\n", "")
        bare = [re.sub(r"(^|\s)#\s.*", "", line).strip() for line in joined.splitlines()]
        return [line for line in bare if line]


@dataclass(frozen=True)
class Page:
    path: Path
    text: str

    @property
    def prose(self) -> str:
        return _FENCE.sub("", self.text)

    @property
    def blocks(self) -> list[Block]:
        return [
            Block(
                self.path,
                self.text.count("\n", 0, match.start("language")) + 1,
                match["language"],
                match["text"],
                _options(match["options"] or ""),
            )
            for match in _FENCE.finditer(self.text)
        ]

    @property
    def links(self) -> list[str]:
        return [match["target"] for match in _LINK.finditer(self.prose)]

    @property
    def anchors(self) -> set[str]:
        """As GitHub makes them of headings."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _options(text: str) -> dict[str, str]:
    if not text.startswith(("run:", "file:")):
        return {}
    parts = [part.partition(":") for part in text.split("; ")]
    return {name.strip(): value.strip() for name, _, value in parts}


def page(path: Path) -> Page:
    return Page(path, path.read_text())


def pages() -> list[Page]:
    """All, in the order in which the index wants them read; the Chinese README last."""
    index = page(INDEX)
    listed = [INDEX.parent / target for target in index.links if target.endswith(".md")]
    order = [ROOT / "README.md", INDEX, *dict.fromkeys(path.resolve() for path in listed), ROOT / "README.zh-CN.md"]
    return [page(path) for path in dict.fromkeys(order)]
