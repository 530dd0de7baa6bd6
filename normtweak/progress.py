"""How a long run says where it is. The library is silent by default; the command line shows bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# Call it after each step, with a line worth keeping or with nothing.
Advance = Callable[..., None]


class Progress(Protocol):
    """Shows tasks of known length."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Open a task of `total` steps; call what it gives once a step: `advance()` or `advance("block 3: ...")`."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See Progress."""
        yield lambda note="": None
