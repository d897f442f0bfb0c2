"""Imports point down only, and importing the package costs nothing."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys

import pytest
from conftest import ROOT

# A layer imports what is below it; what shares a layer imports only itself.
LAYERS = [
    {"cli", "testing"},
    {"runs"},
    {"report", "evaluation"},
    {"ablation", "skills"},
    {"tracing"},
    {"memory"},
    {"statistics"},
    {"models", "results"},
    {"ops", "data", "options"},
    {"metrics", "backends", "files", "markdown", "progress", "settings"},
    {"errors", "vocabulary", "transfer", "_core", "kernels"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path):
    """What a module imports at run time, functions included, as dotted names below skillfast: `models.sites.Site`."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "skillfast":
            yield from (f"{node.module}.{alias.name}".removeprefix("skillfast.") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("skillfast.") for a in node.names if a.name.startswith("skillfast."))


FILES = [
    p for p in sorted((ROOT / "skillfast").rglob("*.py")) if p.name != "__init__.py" or p.parent.name != "skillfast"
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT / "skillfast").parts[0].removesuffix(".py")
    for name in {imported.split(".")[0] for imported in imports(path)} - {"__version__"}:
        assert name in RANK, f"{name} is in no layer"
        assert name == own or RANK[name] > RANK[own], f"{own} imports {name}, which is not below it"


def test_no_modules_import_each_other():
    modules = {".".join(p.relative_to(ROOT / "skillfast").with_suffix("").parts): p for p in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {
        name: {found if found in modules else found.rpartition(".")[0] for found in imports(path)} - {name}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_module_is_in_a_layer():
    found = {p.stem if p.suffix else p.name for p in (ROOT / "skillfast").iterdir() if p.suffix in ("", ".py")}
    assert found - {"__init__", "__pycache__"} <= RANK.keys()


def test_csrc_sees_no_torch_and_one_file_sees_python():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "torch/" not in text
        assert "ATen" not in text
        assert ("pybind11" in text) == (path.name == "bindings.cpp")


def test_importing_the_package_costs_nothing():
    code = (
        "import sys, skillfast\n"
        "heavy = {'torch', 'numpy', 'timm', 'click', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert callable(skillfast.trace) and callable(skillfast.sweep)\n"
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()\n"
        "data = [(torch.randn(9, 3), torch.arange(9) % 2)]\n"
        "skillfast.trace(model, data, sites={'blocks.0.mlp': '2'}, classes=2, statistics=('pearson',))\n"
        "assert 'timm' not in sys.modules, 'seconds, for those whose model is not of it'\n"
        "from skillfast.models.adam import Adam\n"
        "Adam([torch.ones(2)]).step([torch.ones(2)], 0.1)\n"
        "assert 'torch._dynamo' not in sys.modules, 'a compiler, for one step'\n"
        "import skillfast.tracing.trace, skillfast.ablation\n"
        "assert callable(skillfast.trace) and callable(skillfast.select)\n"
        "missing = [name for name in skillfast.__all__ if not hasattr(skillfast, name)]\n"
        "assert not missing, missing\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
