"""Mutation testing: change one expression, run the tests that execute it, see whether one of them fails.

mutmut's operators and a few of our own make the changes; one of every (line, operator) can be drawn. Not counted:
changes of annotations, docstrings, error messages, assertions for the type checker, progress bars, `__repr__` and
`device=`. A mutant is a fork of a process that has imported and collected everything once; the code of the changed
function is put in its place there (what runs at import is imported anew). Tests that take longer than `COSTLY` are not
run; lines that only such tests execute are reported as not covered, and count as survivors (not where the search for
tests was cut short).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import fields
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import coverage
import libcst as cst
import pytest
import tomllib
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
WORK = ROOT / "build" / "mutants"
RESULTS = WORK / "results.json"
PACKAGE = Path(importlib.util.find_spec("skillfast").submodule_search_locations[0])
SCOPE = ("statistics", "evaluation", "skills", "ablation", "tracing", "backends/reference.py")
RUNS = [f"tests/runs/test_{name}.py" for name in ("evaluate", "bench", "selection", "real_run")]
TESTS = {part: [f"tests/{part}"] for part in SCOPE}
TESTS |= {"backends/reference.py": ["tests/ops"], "evaluation": ["tests/evaluation", *RUNS]}
COSTLY, RUN = 5.0, 20.0  # seconds of CPU of one test, and of all tests of a mutant
VARIANTS = 2  # cases of a parametrized test that are tried first; the others only on what survives these
LARGEST = 0.05  # share that may survive
PROGRESS = os.fdopen(os.dup(1), "w")
SILENT = {"__repr__", "__str__", "describe", "warn", "track"}
PRELOADED = ("torch", "timm", "scipy.stats", "sklearn.metrics", "sklearn.linear_model", "hypothesis", "jsonschema")


def in_parentheses(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.with_changes(lpar=[cst.LeftParen(), *node.lpar], rpar=[*node.rpar, cst.RightParen()])


def dropped_operand(node: cst.BinaryOperation | cst.BooleanOperation) -> Iterator[cst.CSTNode]:
    yield from (node.left, node.right)


def times_zero(node: cst.BinaryOperation) -> Iterator[cst.CSTNode]:
    yield in_parentheses(cst.BinaryOperation(cst.Integer("0"), cst.Multiply(), in_parentheses(node)))


def dropped_statement(node: cst.Expr | cst.AugAssign) -> Iterator[cst.CSTNode]:
    yield cst.Pass()


def never(node: cst.If) -> Iterator[cst.CSTNode]:
    yield node.with_changes(test=cst.BooleanOperation(in_parentheses(node.test), cst.And(), cst.Name("False")))


OPERATORS = [
    *mutation_operators,
    (cst.BinaryOperation | cst.BooleanOperation, dropped_operand),
    (cst.BinaryOperation, times_zero),
    (cst.Expr | cst.AugAssign, dropped_statement),
    (cst.If, never),
]


class Mutants(cst.CSTVisitor):
    """Every (line, operator, function, parent, node, changed node) of a module."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found, self.names, self.above, self.line = [], [], [], 1

    def on_visit(self, node: cst.CSTNode) -> bool:
        parent = self.above[-1] if self.above else None
        self.above.append(node)
        position = self.get_metadata(PositionProvider, node, None)
        self.line = position.start.line if position else self.line
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.names.append(node.name.value)
        name = getattr(node, "name", None) or (isinstance(node, cst.Call) and getattr(node.func, "attr", node.func))
        if (
            isinstance(node, cst.Annotation | cst.Raise | cst.Assert | cst.Decorator | cst.Import | cst.ImportFrom)
            or (isinstance(node, cst.If) and getattr(node.test, "value", "") == "TYPE_CHECKING")
            or (isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString))
            or getattr(name, "value", "") in SILENT
            or (isinstance(node, cst.Param) and node.name.value == "quiet")
        ):
            return False
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                function = ".".join(self.names)
                self.found += [(self.line, operator.__name__, function, parent, node, new) for new in operator(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self.above.pop()
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self.names.pop()


def code_with(module: cst.Module, parent: cst.CSTNode, node: cst.CSTNode, new: cst.CSTNode) -> str:
    """The module's code with a node changed; the tree is as before (a changed copy takes ten times as long)."""
    for name, value in ((field.name, getattr(parent, field.name)) for field in fields(parent)):
        parts = value if isinstance(value, list | tuple) else [value]
        if any(part is node for part in parts):
            changed = [new if part is node else part for part in parts]
            object.__setattr__(parent, name, type(value)(changed) if isinstance(value, list | tuple) else new)
            try:
                return module.code
            finally:
                object.__setattr__(parent, name, value)
    raise LookupError(f"node: expected one of its parent's, got {node}")


def shape(code: str) -> str:
    """What a module says, but for the devices of new tensors, which only a second device would show."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg != "device"]
    return ast.dump(tree)


def drawn(paths: list[str], changed: dict[str, set[int]] | None, seed: int) -> Iterator[dict]:
    """Mutants in a random order: one of every (file, line, operator).

    The place in the order hangs on the seed and the line's own text alone, so an edit leaves the rest of a sample as it
    is.
    """
    groups, sources = defaultdict(list), {}
    for path in paths:
        wrapper, visitor = MetadataWrapper(cst.parse_module((ROOT / path).read_text())), Mutants()
        wrapper.visit(visitor)
        sources[path] = wrapper.module, shape(wrapper.module.code), wrapper.module.code.splitlines()
        for line, operator, *choice in visitor.found:
            if changed is None or line in changed[path]:
                groups[path, line, operator].append(choice)

    def place(group: tuple[str, int, str]) -> str:
        path, line, operator = group
        text = f"{seed} {path} {groups[group][0][0]} {sources[path][2][line - 1].strip()} {operator}"
        return hashlib.sha256(text.encode()).hexdigest()

    for path, line, operator in sorted(groups, key=place):
        function, *change = random.Random(place((path, line, operator))).choice(groups[path, line, operator])
        module, before, _ = sources[path]
        code = code_with(module, *change)
        try:
            if shape(code) == before:
                continue
        except SyntaxError:
            continue
        diff = difflib.unified_diff(module.code.splitlines(), code.splitlines(), n=0, lineterm="")
        change = "\n".join(re.sub(r"^(.) +", r"\1 ", d) for d in list(diff)[2:] if d[0] in "-+")
        mutant = {"file": path, "line": line, "function": function, "operator": operator, "change": change}
        yield mutant | {"code": code}


def import_all() -> None:
    for part in SCOPE:
        for path in [PACKAGE / part] if part.endswith(".py") else (PACKAGE / part).rglob("*.py"):
            importlib.import_module(".".join(["skillfast", *path.relative_to(PACKAGE).with_suffix("").parts]))


class Mapper:
    """Which test executes which lines, and what it costs with the fixtures that it needs, in seconds of CPU.

    Args:
        kept: Test file -> where what is found of it goes; not of one that time cut short.
        stop: When to begin no other test.
    """

    def __init__(self, kept: dict[str, Path], stop: float) -> None:
        self.kept, self.stop, self.inner, self.done = kept, stop, 0.0, set()
        self.cov = coverage.Coverage(data_file=None, config_file=False, source=[str(PACKAGE)], messages=False)
        self.fixtures, self.cost, self.names, self.bad = Counter(), {}, {}, set()

    def around(self, tests: Callable[[], int]) -> None:
        self.cov.start()
        import_all()  # so that what runs at import belongs to no test
        tests()
        self.cov.stop()
        result = self.result()
        for file in self.done:
            cost = {test: cost for test, cost in result["cost"].items() if test.split("::")[0] == file}
            lines = {
                path: {n: [test for test in found if test in cost] for n, found in of.items()}
                for path, of in result["lines"].items()
            }
            self.kept[file].write_text(json.dumps({"cost": cost, "lines": lines}))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        variants = defaultdict(list)
        for item in items:
            variants[item.nodeid.split("[")[0]].append(item)
        rng = random.Random(0)
        chosen = {i for found in variants.values() for i in rng.sample(found, min(VARIANTS, len(found)))}
        items[:] = [item for item in items if item in chosen]
        self.done = self.kept.keys() - {item.nodeid.split("::")[0] for item in items}
        signal.signal(signal.SIGPROF, lambda *_: pytest.fail("too costly"))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        start = sum(os.times()[:4])
        self.cov.switch_context(f"fixture {fixturedef.argname}")
        result = yield
        self.cov.switch_context(self.item)
        spent = sum(os.times()[:4]) - start
        self.inner += spent
        self.fixtures[fixturedef.argname] += spent
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.item, self.inner, start = item.nodeid, 0.0, sum(os.times()[:4])
        self.cov.switch_context(item.nodeid)
        signal.setitimer(signal.ITIMER_PROF, 2 * COSTLY)
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.names[item.nodeid] = list(item.fixturenames)
        self.cost[item.nodeid] = sum(os.times()[:4]) - start - self.inner
        file = item.nodeid.split("::")[0]
        if nextitem is None or nextitem.nodeid.split("::")[0] != file:
            self.done.add(file)
        if time.time() > self.stop:
            item.session.shouldstop = "time is up"
        return result

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.bad.add(report.nodeid)

    def result(self) -> dict:
        cost = {t: c + sum(self.fixtures[f] for f in self.names[t]) for t, c in self.cost.items() if t not in self.bad}
        users = defaultdict(list)
        for test in cost:
            for name in [test, *(f"fixture {f}" for f in self.names[test])]:
                users[name].append(test)
        data, lines = self.cov.get_data(), {}
        for file in data.measured_files():
            path = str(Path("skillfast") / Path(file).relative_to(PACKAGE))
            by_line = data.contexts_by_lineno(file)
            lines[path] = {n: sorted({t for c in by_line[n] for t in users[c]}) for n in by_line}
        return {"cost": cost, "lines": lines}


class Runner:
    """Tries mutants in forks of a process that has collected all tests; without a place to fork, tries one here."""

    def __init__(
        self, mutants: list[dict], cost: dict[str, float], args: argparse.Namespace, here: Path | None
    ) -> None:
        self.mutants, self.cost, self.args, self.here = mutants, cost, args, here

    def around(self, tests: Callable[[], int]) -> None:
        if self.here:
            (self.here / "test.txt").write_text("at import")
        tests()
        found = [{key: m[key] for key in ("outcome", "test") if key in m} for m in self.mutants]
        (WORK / "found.json").write_text(json.dumps(found))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.here:
            self.run_tests(session, self.mutants[0], self.here)
        import_all()
        live = defaultdict(list)
        for function in gc.get_objects():
            if type(function) is FunctionType and function.__code__.co_filename.startswith(str(PACKAGE)):
                live[function.__code__].append(function)

        def start(mutant: dict, folder: Path) -> int:
            pid = os.fork()
            if not pid:
                put_in_place(mutant, live)
                self.run_tests(session, mutant, folder)
            return pid

        try_all([m for m in self.mutants if replaced(m, live) is not None], start, self.args)
        return True

    def run_tests(self, session: pytest.Session, mutant: dict, folder: Path) -> None:
        """The mutant's tests until one fails, each under a limit of CPU time; does not return."""
        status = 1
        try:
            redirect(folder)
            session.config._tmp_path_factory._given_basetemp = folder / "tmp"
            session.config._tmp_path_factory._basetemp = None
            items = {item.nodeid: item for item in session.items}
            chosen = [items[test] for test in mutant["tests"] if test in items]
            cost = {test.split("[")[0]: self.cost[test] for test in mutant["tests"]}
            more = [i for i in session.items if i.nodeid.split("[")[0] in cost and i.nodeid not in mutant["tests"]]
            sums = itertools.accumulate(cost[i.nodeid.split("[")[0]] for i in more)
            chosen += [item for item, total in zip(more, sums, strict=True) if total < RUN / 2]
            for item, following in itertools.zip_longest(chosen, chosen[1:]):
                (folder / "test.txt").write_text(item.nodeid)
                signal.setitimer(signal.ITIMER_PROF, 10 + 5 * cost[item.nodeid.split("[")[0]])
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    break
            status = int(session.testsfailed > 0 or not chosen)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            shutil.rmtree(folder / "tmp", ignore_errors=True)
            os._exit(status)


def redirect(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def own(code: CodeType) -> tuple:
    return code.co_code, repr([c for c in code.co_consts if not isinstance(c, CodeType)]), code.co_names


def differing(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """Functions that a module or class defines and that differ; None if what it runs itself does."""
    if old.co_flags & inspect.CO_OPTIMIZED:
        return [] if old == new else [(old, new)]
    inner = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (old, new)]
    if own(old) != own(new) or len(inner[0]) != len(inner[1]):
        return None
    found = [differing(*pair) for pair in zip(*inner, strict=True)]
    return None if None in found else [pair for pairs in found for pair in pairs]


def nested(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from nested(const)


def replaced(mutant: dict, live: dict[CodeType, list[FunctionType]]) -> list[tuple[FunctionType, CodeType]] | None:
    """Functions in memory with their changed code; None where that does not make the mutant."""
    path, pairs = str(target(mutant)), differing(*codes(mutant))
    if not pairs or any(old not in live or any(code in live for code in nested(old)) for old, _ in pairs):
        return None
    if any(old.co_freevars != new.co_freevars for old, new in pairs):
        return None
    return [(f, new) for old, new in pairs for f in live[old] if f.__code__.co_filename == path]


def put_in_place(mutant: dict, live: dict[CodeType, list[FunctionType]]) -> None:
    for function, code in replaced(mutant, live) or ():
        function.__code__ = code


def codes(mutant: dict) -> tuple[CodeType, CodeType]:
    return tuple(
        compile(code, target(mutant), "exec") for code in ((ROOT / mutant["file"]).read_text(), mutant["code"])
    )


def target(mutant: dict) -> Path:
    return PACKAGE / Path(mutant["file"]).relative_to("skillfast")


def fork(plugin: Mapper | Runner, tests: list[str], folder: Path, mutant: dict | None = None) -> int:
    """A fork of this process that imports everything, with a module's changed code if one is given; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        redirect(folder)
        original = SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: (
            compile(mutant["code"], self.path, "exec")
            if mutant and Path(self.path) == target(mutant)
            else original(self, name)
        )
        plugin.around(lambda: run_pytest(plugin, tests, folder))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        os._exit(1)


def run_pytest(plugin: object, tests: list[str], folder: Path) -> int:
    options = f"-q -p no:cacheprovider --capture=sys --timeout=300 --hypothesis-seed=0 --basetemp={folder / 'tmp'}"
    options += " --ignore-glob=*triton* -W ignore::pytest.PytestAssertRewriteWarning"
    return pytest.main([*tests, *options.split(), "-m", "not slow and not gpu"], [plugin])


def try_all(mutants: list[dict], start: Callable[[dict, Path], int], args: argparse.Namespace) -> None:
    """Sets the outcome of each mutant and the test that noticed it, a few at a time."""
    running, waiting = {}, list(mutants)
    folders = [WORK / str(n) for n in range(args.workers)]
    while waiting or running:
        while waiting and folders and time.time() < args.stop:
            mutant, folder = waiting.pop(0), folders.pop()
            running[start(mutant, folder)] = mutant, folder
        if not running:
            return
        pid, status = os.wait()
        mutant, folder = running.pop(pid)
        folders.append(folder)
        outcomes = {0: "survived", -signal.SIGPROF: "timeout"}
        mutant["outcome"] = outcomes.get(os.waitstatus_to_exitcode(status), "killed")
        mutant["test"] = (folder / "test.txt").read_text()
        line = f"{mutant['outcome']} {mutant['file']}:{mutant['line']} {mutant['operator']} {mutant['test']}"
        print(line + f"\n{mutant['change']}" * (mutant["outcome"] == "survived"), file=PROGRESS, flush=True)


def statements(source: str) -> dict[int, range]:
    """Lines of the statement, or of its header, that each line belongs to."""
    spans = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            span = range(node.lineno, max(node.lineno, body[0].lineno - 1 if body else node.end_lineno) + 1)
            spans.update(dict.fromkeys(span, span))
    return spans


def tests_for(mutant: dict, known: dict, spans: dict[int, range]) -> list[str]:
    """Tests that execute the mutant's statement, cheapest first; of one that runs at import, those of its file."""
    lines, cost = known["lines"].get(mutant["file"], {}), known["cost"]
    executed = [lines[str(line)] for line in spans[mutant["line"]] if str(line) in lines]
    tests = set().union(*executed)
    if executed and not tests:
        tests = set().union(*lines.values())
    chosen, total = [], 0.0
    for test in sorted(tests, key=lambda t: (cost[t], t)):
        total += cost[test]
        if cost[test] <= COSTLY and total <= RUN:
            chosen.append(test)
    return chosen


def coverage_map(tests: list[str], seconds: float) -> dict:
    """What `Mapper` finds in each test file; kept until a source, that file or what tests share changes."""
    files = sorted(
        {file for test in tests for file in [*(ROOT / test).rglob("test_*.py"), *ROOT.glob(test)] if file.is_file()}
    )
    sources = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py")])
    common, kept = hashlib.sha256(b"".join(p.read_bytes() for p in sources)), {}
    for file in files:
        digest = common.copy()
        digest.update(repr(file).encode() + file.read_bytes())
        kept[str(file.relative_to(ROOT))] = WORK / "map" / f"{digest.hexdigest()[:16]}.json"
    missing = {file: path for file, path in kept.items() if not path.exists()}
    if missing:
        os.waitpid(fork(Mapper(missing, time.time() + seconds), list(missing), WORK / "map"), 0)
    known = {
        "cost": {},
        "lines": defaultdict(lambda: defaultdict(list)),
        "cut": not all(p.exists() for p in kept.values()),
    }
    for found in [json.loads(path.read_text()) for path in kept.values() if path.exists()]:
        known["cost"] |= found["cost"]
        for path, lines in found["lines"].items():
            for line, names in lines.items():
                known["lines"][path][line] += names
    return known


def changed_lines(base: str) -> dict[str, set[int]]:
    """Lines of each file that differ from a commit."""
    found, path = defaultdict(set), ""
    command = ["git", "diff", "-U0", base, "--", "skillfast"]
    for line in subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines():
        if line.startswith("+++ "):
            path = line[6:]
        elif place := re.match(r"@@ -\S+ \+(\d+),?(\d*) @@", line):
            found[path] |= set(range(int(place[1]), int(place[1]) + int(place[2] or 1)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=300, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changed", metavar="COMMIT", help="only lines that differ from this commit")
    parser.add_argument("--only", default="", help="of those only what is in files whose path matches this")
    parser.add_argument("--tests", nargs="*", help="folders or files of tests to choose from")
    parser.add_argument("--again", action="store_true", help="only those that were not noticed the last time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--map-seconds", type=float, default=3600, help="when to stop looking for tests")
    parser.add_argument("--seconds", type=float, default=36000, help="when to stop trying mutants")
    parser.add_argument("--intact", action="store_true", help="change nothing: every one has to survive")
    args = parser.parse_args()
    changed = changed_lines(args.changed) if args.changed else None
    parts = {part: sorted((ROOT / "skillfast" / part).rglob("*.py")) or [ROOT / "skillfast" / part] for part in SCOPE}
    paths = {str(file.relative_to(ROOT)): part for part, files in parts.items() for file in files}
    paths = {path: part for path, part in paths.items() if changed is None or path in changed}
    mutants = list(itertools.islice(drawn(list(paths), changed, args.seed), args.n))
    mutants = [m for m in mutants if re.search(args.only, m["file"])]
    if args.again:
        last = {key(m): m["outcome"] for m in json.loads(RESULTS.read_text())}
        mutants = [m for m in mutants if last.get(key(m)) not in ("killed", "timeout")]
    if not mutants:
        print("no line to change")
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    for name in PRELOADED:
        importlib.import_module(name)
    stop = time.time() + args.seconds
    for part in parts:
        some = [m for m in mutants if paths[m["file"]] == part]
        if some:
            try_part(some, args.tests or TESTS[part], stop, args)
            if not args.intact:
                keep(some)
    return report(mutants)


def try_part(mutants: list[dict], tests: list[str], stop: float, args: argparse.Namespace) -> None:
    """Sets the outcomes of mutants that the same tests may notice."""
    known = coverage_map(tests, args.map_seconds)
    args.stop = stop
    spans = {path: statements((ROOT / path).read_text()) for path in {m["file"] for m in mutants}}
    for mutant in mutants:
        mutant["tests"] = tests_for(mutant, known, spans[mutant["file"]])
        mutant["outcome"] = "no time" if mutant["tests"] or known["cut"] else "not covered"
        if args.intact:
            mutant["code"] = (ROOT / mutant["file"]).read_text()
    covered = [m for m in mutants if m["tests"]]
    rest = [m for m in covered if differing(*codes(m)) is not None]

    def start(mutant: dict, folder: Path) -> int:
        return fork(Runner([mutant], known["cost"], args, folder), files_of([mutant]), folder, mutant)

    if rest:
        os.waitpid(fork(Runner(rest, known["cost"], args, None), files_of(rest), WORK), 0)
        for mutant, found in zip(rest, json.loads((WORK / "found.json").read_text()), strict=True):
            mutant.update(found)
    try_all([m for m in covered if m["outcome"] == "no time"], start, args)


def files_of(mutants: list[dict]) -> list[str]:
    return sorted({test.split("::")[0] for mutant in mutants for test in mutant["tests"]})


def key(mutant: dict) -> tuple[str, str, str]:
    """What tells a mutant, wherever it stands in its file."""
    return mutant["file"], mutant["function"], mutant["change"].strip()


def keep(mutants: list[dict]) -> None:
    """Adds the outcomes to those of earlier runs."""
    last = {key(m): m for m in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    last |= {key(m): {k: v for k, v in m.items() if k not in ("code", "tests")} for m in mutants}
    RESULTS.write_text(json.dumps(list(last.values()), indent=1))


def report(mutants: list[dict]) -> int:
    """Prints the table and what survived; 1 if that is too much."""
    listed = tomllib.loads((HERE / "survivors.toml").read_text()).get("survivor", [])
    verdicts = {key(entry): entry["verdict"] for entry in listed}
    for mutant in sorted(mutants, key=lambda m: (m["file"], m["line"])):
        mutant["verdict"] = verdicts.get(key(mutant), "not judged")
        if mutant["outcome"] in ("survived", "not covered"):
            place = f"{mutant['file']}:{mutant['line']} {mutant['function']}"
            print(
                f"\n{mutant['outcome']} {len(mutant['tests'])} tests, {mutant['verdict']}: {place}\n{mutant['change']}"
            )
    kinds = ("killed", "timeout", "survived", "not covered", "no time", "equivalent")
    table = defaultdict(Counter)
    for mutant in mutants:
        alive = mutant["outcome"] in ("survived", "not covered")
        kind = "equivalent" if alive and mutant["verdict"] == "equivalent" else mutant["outcome"]
        table[mutant["file"]][kind] += 1
        table["all"][kind] += 1
    print(f"\n{'':46}" + "".join(f"{kind:>12}" for kind in kinds))
    for file, counts in sorted(table.items()):
        print(f"{file:46}" + "".join(f"{counts[kind]:12}" for kind in kinds))
    counts = table["all"]
    alive = counts["survived"] + counts["not covered"]
    tried = alive + counts["killed"] + counts["timeout"]
    print(
        f"{alive} of {tried} mutants that are not equivalent survive, {alive / max(1, tried):.1%} (limit {LARGEST:.0%})"
    )
    return int(alive > LARGEST * tried)


if __name__ == "__main__":
    sys.exit(main())
