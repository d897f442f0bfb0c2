"""What a replay gave again and what not, in lines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from skillfast.results.replay import ABSOLUTE, RELATIVE

if TYPE_CHECKING:
    from skillfast.results.replay import Difference, Replay

MOST = 20  # differences that are shown


def text(found: Replay) -> str:
    """See `skillfast.report.replay_text`."""
    differing = sorted(found.differences, key=lambda each: -math.inf if each.size is None else -each.size)
    many = f"{len(differing)} of {found.n:,} values differ" if differing else f"all {found.n:,} values are equal"
    lines = [f"replay of {found.directory}: {many}; numbers are equal within {ABSOLUTE:g} + {RELATIVE:g} of their size"]
    lines += [f"  {_said(each)}" for each in differing[:MOST]]
    if len(differing) > MOST:
        lines.append(f"  and {len(differing) - MOST:,} more")
    if found.environment:
        lines.append(f"  ran on: {'; '.join(map(_said, found.environment))}")
    return "\n".join(lines)


def _said(each: Difference) -> str:
    apart = "" if each.size is None else f" ({each.size:.3g} apart)"
    return f"{each.field}: {each.earlier}, now {each.again}{apart}"
