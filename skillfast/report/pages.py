"""How a page is put together: a template, its style and script, plotly, and the figures as JSON."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

FIGURES = "skillfast.report", "figures.js"


def render(package: str, drawn: dict[str, Any], /, *, script: tuple[str, str] = FIGURES, **context: Any) -> str:
    """Fill a package's `page.html`: one self-contained page that asks the network for nothing.

    Args:
        package: Holds `page.html`.
        script: Package and name of the page's script; by default the one that draws figures and no more.
        drawn: What the script reads as JSON.
        context: What the template reads.
    """
    import jinja2
    from markupsafe import Markup

    # our own files and encoded JSON: everything else in the page is escaped
    inline = {
        "style": Markup(_resource("skillfast.report", "page.css")),
        "script": Markup(_resource(*script)),
        "plotly": Markup(_resource("skillfast.report", "plotly.min.js")),
        "data": Markup(script_json(drawn)),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_resource(package, "page.html")).render(**context, **inline)


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _resource(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
