"""What the proxy answers itself, by path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from twolane.proxy.request_reader import Request
from twolane.proxy.responder import Responder

# Gets what follows the page's path: empty, unless the page stands for all paths below its own. Raises NotFoundError for
# what isn't there. May take its time: it is cancelled when the client leaves.
Answer = Callable[[Request, Responder, str], Awaitable[None]]


@dataclass(frozen=True)
class Page:
    path: str  # one that ends in / stands for all below it, but for / itself
    answer: Answer
    is_public: bool = False  # needs no key: it tells nothing of what is served


class Pages:
    """Owns the table."""

    def __init__(self, pages: Iterable[Page]) -> None:
        self._pages = {page.path: page for page in pages}
        trees = [page for path, page in self._pages.items() if path != "/" and path.endswith("/")]
        # The longest first: what lies below a guarded path must not be taken for a part of a public one above it.
        self._trees = sorted(trees, key=lambda page: -len(page.path))

    @property
    def paths(self) -> list[str]:
        return [f"{path}..." if self._pages[path] in self._trees else path for path in self._pages]

    def find(self, path: str) -> tuple[Page, str] | None:
        """The page, and what follows its path; None if there is none."""
        page = self._pages.get(path)
        if page is not None:
            return page, ""
        for tree in self._trees:
            if path.startswith(tree.path):
                return tree, path[len(tree.path) :]
        return None
