"""Pages in a headless Chromium: one for all tests of a worker, and axe-core, which looks for what shuts people out."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL = "pip install 'skillfast[browser]'"


class Browser:
    """Chromium on a thread of its own, where Playwright's event loop is in nobody's way."""

    def __init__(self) -> None:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on PATH")
        api = pytest.importorskip("playwright.sync_api", reason=f"no Playwright; {INSTALL}")
        self._thread = ThreadPoolExecutor(1)
        self._playwright, self._browser = self._thread.submit(self._start, api, path).result()

    def _start(self, api: Any, path: str) -> tuple[Any, Any]:
        running = api.sync_playwright().start()
        return running, running.chromium.launch(executable_path=path, args=["--no-sandbox"])

    def close(self) -> None:
        """End it."""
        self._thread.submit(self._browser.close).result()
        self._thread.submit(self._playwright.stop).result()
        self._thread.shutdown()

    def visit(
        self, path: Path, use: Callable[[Any], Any], *, fragment: str = "", width: int = 1280, dark: bool = False
    ) -> Any:
        """Open a page, do something with it, and see that nothing went wrong.

        Args:
            path: The file.
            use: Gets Playwright's page when it is ready; runs on the browser's thread.
            fragment: Of the address, with its `#`.
            width: Of the window, in pixels.
            dark: Whether dark colours are preferred.

        Returns:
            What `use` returns.
        """
        return self._thread.submit(self._visit, path, use, fragment, width, dark).result()

    def _visit(self, path: Path, use: Callable[[Any], Any], fragment: str, width: int, dark: bool) -> Any:
        context = self._browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", is_mobile=width < 600
        )
        try:
            page = context.new_page()
            page.set_default_timeout(60_000)
            wrong, asked = [], set()
            page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: asked.add(request.url.partition(":")[0]))
            page.goto(f"{path.as_uri()}{fragment}")
            page.wait_for_selector("html[data-ready=true]", state="attached")
            found = use(page)
            assert wrong == []
            assert asked <= {"file", "data", "blob"}  # nothing of the network
            assert page.locator("#hostile").count() == 0
            return found
        finally:
            context.close()


def draw_all(page: Any) -> int:
    """Draw what is far from the window, too, as for print; how many figures there are."""
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_selector(".plot:not(:has(.main-svg))", state="detached")
    return int(page.locator(".plot").count())


NAMED = {"image", "table", "region", "button", "slider", "combobox", "searchbox", "checkbox"}
MARKS = {"SvgRoot", "graphics-symbol"}


def unheard(page: Any) -> list[str]:
    """What is amiss in the tree that Chromium gives a screen reader.

    Figures, tables, controls and regions without a name; figures that do not say what they found, or whose marks are
    told one by one; sections and figures that are not in it; rows without a heading.
    """
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    amiss = [role for role, name in told if role in MARKS or (role in NAMED and not name.strip())]
    shown = page.eval_on_selector_all(
        ".plot", "all => all.map((plot) => [plot.dataset.shows, plot.getAttribute('aria-label')])"
    )
    amiss += [name for _, name in shown if ("image", name) not in told]
    amiss += [
        name for shows, name in shown if not name.startswith(f"{shows}. ") or name.endswith(("undefined.", "null."))
    ]
    titles = [text.strip() for text in page.locator("main > section > h2").all_text_contents()]
    amiss += sorted(set(titles) - {name for role, name in told if role == "region"})
    amiss += ["a row without a heading"] * page.locator("tbody tr:not(:has(> th[scope=row]))").count()
    return amiss


def barriers(page: Any, *rules: str) -> list[str]:
    """What axe-core finds, of all of its rules or some: rule, element, reason."""
    if page.evaluate("typeof axe") == "undefined":
        try:
            script = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
        except ModuleNotFoundError:
            pytest.skip(f"no axe-core; {INSTALL}")
        page.evaluate(script)
    options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
    found = page.evaluate("(options) => axe.run(document, options)", options)
    assert found["passes"]
    return [
        f"{broken['id']}: {node['target']}: {node['failureSummary']}"
        for broken in found["violations"]
        for node in broken["nodes"]
    ]
