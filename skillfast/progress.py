"""Progress bars for people: rich's, on a terminal, and not when asked to be quiet."""

from __future__ import annotations

import sys
from collections.abc import Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")


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
        total: Number of items; `len(iterable)` where it has one.
        quiet: Never draw a bar.

    Yields:
        The items of `iterable`, unchanged.
    """
    if quiet or not sys.stderr.isatty():
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        for item in iterable:
            bar.update(task, description=description if isinstance(description, str) else description())
            yield item
            bar.advance(task)
