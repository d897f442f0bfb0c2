"""Progress bars for people: on a terminal, after two seconds, and not when asked to be quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress

T = TypeVar("T")

_DELAY = 2.0  # seconds of work before a bar is worth the screen
_shown = False  # one bar at a time: an inner loop does not draw over an outer one


def track(
    iterable: Iterable[T],
    description: str | Callable[[], str],
    total: int | None = None,
    quiet: bool = False,
) -> Iterator[T]:
    """Iterate, with a progress bar on stderr once the loop has taken about two seconds.

    The bar is drawn only where stderr is a terminal. It is removed, and the terminal restored, when the loop ends in
    any way, an exception in its body included.

    Args:
        iterable: what to iterate over.
        description: the text before the bar, or a function that is called for it after every item.
        total: number of items; `len(iterable)` where it has one.
        quiet: never draw a bar.

    Yields:
        The items of `iterable`, unchanged.
    """
    if quiet or not sys.stderr.isatty():
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    yield from _drawn(iterable, description, total)


def _drawn(iterable: Iterable[T], description: str | Callable[[], str], total: int | None) -> Iterator[T]:
    global _shown
    bar: Progress | None = None
    start = time.monotonic()
    try:
        for done, item in enumerate(iterable):
            if bar is None and not _shown and time.monotonic() - start >= _DELAY:
                bar = _make_bar()
                bar.add_task("", total=total)
                bar.start()
                _shown = True
            if bar is not None:
                text = description if isinstance(description, str) else description()
                bar.update(bar.task_ids[0], completed=done, description=text)
            yield item
    finally:
        if bar is not None:
            bar.stop()
            _shown = False


def _make_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
