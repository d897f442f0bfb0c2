"""What people see of a long computation: rich's bars on a terminal, and a line that says how long it will take."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
ENOUGH = 1.0  # seconds after which the rest is foretold
_say: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)


@contextmanager
def telling(say: Callable[[str], None] | None) -> Iterator[None]:
    """Give the lines of every `Forecast` inside the context to `say`; None keeps them silent."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def tell(line: str) -> None:
    """Give a line to `say`, inside `telling`; nowhere else."""
    if (say := _say.get()) is not None:
        say(line)


class Forecast:
    """Says what will be computed and, once a second of it has run, how long the rest will take.

    Args:
        what: What will be computed, in words; said at once inside `telling`, nowhere else.
        total: The work in all, in any unit; None where it is not known.
    """

    def __init__(self, what: str, total: float | None) -> None:
        self._tell = _say.get()
        self._total = total
        self._done = 0.0
        self._start = time.perf_counter()
        if self._tell is not None:
            self._tell(what)

    def ran(self, work: float) -> None:
        """Count work that has been done, in the unit of `total`."""
        self._done += work
        if self._tell is None or self._total is None or not self._done:
            return
        passed = time.perf_counter() - self._start
        if passed >= ENOUGH:
            left = passed / self._done * max(0.0, self._total - self._done)
            if left >= ENOUGH:
                self._tell(f"about {left:.0f} s to go")
            self._tell = None


def length_of(iterable: Iterable[object]) -> int | None:
    """How many items there are; None where that is not known."""
    try:
        return len(iterable)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return None


def track(
    iterable: Iterable[T],
    description: str | Callable[[], str],
    total: int | None = None,
    quiet: bool = False,
) -> Iterator[T]:
    """Iterate, with a progress bar on stderr where that is a terminal.

    The bar is removed, and the terminal restored, when the loop ends in any way, an exception in its body included.

    Args:
        iterable: What to iterate over.
        description: The text before the bar, or a function that is called for it before every item.
        total: Number of items; `length_of(iterable)` by default.
        quiet: Never draw a bar.

    Yields:
        The items of `iterable`, unchanged.
    """
    if quiet or not sys.stderr.isatty():
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = length_of(iterable) if total is None else total
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        for item in iterable:
            bar.update(task, description=description if isinstance(description, str) else description())
            yield item
            bar.advance(task)
