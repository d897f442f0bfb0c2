"""How a page is put together: its template over the common one, style and scripts, plotly, and the figures as JSON."""

from __future__ import annotations

import base64
import zlib
from importlib import resources
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKED_FROM = 500_000  # characters of JSON; from here on the page holds them deflated


def render(
    page: str, drawn: dict[str, Any], /, *, version: str, kind: str, scripts: Sequence[str] = (), **context: Any
) -> str:
    """Fill a page's template: one self-contained file that asks the network for nothing.

    Args:
        page: Folder of this package with `page.html`.
        drawn: What the scripts read as JSON.
        version: The version of skillfast that the results name.
        kind: What the page is, in a word.
        scripts: Files of the folder that do more than draw figures; the last starts the page.
        context: What the template reads.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_resource),
    )
    data = script_json(drawn)
    packed = len(data) >= PACKED_FROM
    own = [_resource(f"{page}/{name}") for name in scripts] or ["page.start();"]
    # our own files and encoded JSON: everything else in the page is escaped
    inline = {
        "style": Markup(_resource("page.css")),
        "scripts": [Markup(script) for script in (_resource("figures.js"), *own)],
        "plotly": Markup(_resource("plotly.min.js")),
        "data": Markup(base64.b64encode(zlib.compress(data.encode())).decode() if packed else data),
    }
    template = environment.get_template(f"{page}/page.html")
    return template.render(**context, **inline, version=version, kind=kind, packed=packed)


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; what is not finite is null."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _resource(name: str) -> str:
    return resources.files("skillfast.report").joinpath(*name.split("/")).read_text(encoding="utf-8")
