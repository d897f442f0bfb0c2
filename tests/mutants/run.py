"""Mutation testing: change one expression, run the tests of its module, see whether one of them fails.

mutmut's operators and a few of our own make the changes; one of every (line, operator) can be drawn. Not counted:
changes of annotations, docstrings, error messages, assertions for the type checker, warnings, progress bars, `__repr__`
and devices. A mutant is a fork of a process that has imported and collected everything once; the code of the changed
function is put in its place there (what runs at import is imported anew). Its tests are those that run the changed
line, cheap ones that name it or its module before others, until one fails or `BUDGET` is spent; left out are tests that
are marked slow, need the trained default model or start processes, where no mutant in memory is. Which lines a test
runs is recorded once, in minutes (`--record` records all tests and tries nothing; `--changed` records nothing and takes
the tests of the package). What is known of each mutant is kept in build/mutants/results.jsonl, what a test runs in
reach.jsonl.
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
import threading
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import fields
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING

import libcst as cst
import pytest
import tomllib
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
WORK = ROOT / "build" / "mutants"
RESULTS, REACH = WORK / "results.jsonl", WORK / "reach.jsonl"
PACKAGE = Path(importlib.util.find_spec("skillfast").submodule_search_locations[0])
SCOPE = ("statistics", "evaluation", "skills", "ablation", "tracing", "backends/reference.py")
FOLDERS = ("statistics", "tracing", "ops", "evaluation", "skills", "ablation")
MOST_CASES = 6  # of a test in another folder
BUDGET = 40.0  # seconds of CPU for the tests of a mutant
USUAL = 0.2  # seconds of CPU of a test that has not run yet
ENDLESS = 20.0  # seconds of CPU after which one test is taken not to end
STARTS_PROCESSES = re.compile(r"torchrun|subprocess")
COSTLY = {"default_run", "trained_digits"}  # fixtures that take longer than that
LARGEST = 0.05  # share that may survive
PROGRESS = os.fdopen(os.dup(1), "w")
SILENT = {"__repr__", "__str__", "describe", "warn", "track", "errstate"}
PRELOADED = ("torch", "timm", "transformers", "scipy.stats", "sklearn.metrics", "hypothesis", "pandas")


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
    """What a module says, but for where tensors are made or moved to, which only a second device would show.

    And but for `strict=`, which asserts what is so (two lengths are equal), and the type that `cast` tells readers.
    """
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg not in ("device", "strict")]
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called == "cast":
                node.args = node.args[1:]
            if called in ("to", "moved"):
                node.args = [a for a in node.args if ast.unparse(a).rpartition(".")[2] not in ("device", "None")]
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


def sources() -> list[str]:
    places = [ROOT / "skillfast" / part for part in SCOPE]
    files = [file for place in places for file in ([place] if place.suffix else sorted(place.rglob("*.py")))]
    return [str(file.relative_to(ROOT)) for file in files]


def import_all() -> None:
    for path in sources():
        importlib.import_module(path.removesuffix(".py").replace("/", "."))


def all_tests() -> list[Path]:
    """Files of tests that lie in the packages' folders or name one of them."""
    named = re.compile(rf"skillfast.({'|'.join(FOLDERS)})\b")
    files = sorted(file for file in (ROOT / "tests").rglob("test_*.py") if "triton" not in file.name)
    return [file for file in files if file.parent.name in FOLDERS or named.search(file.read_text())]


def tests_of(path: str) -> tuple[list[str], set[str]]:
    """Files of tests in a module's package or that import from it; and those that name it or are called as it is."""
    _, package, *_, name = Path(path).with_suffix("").parts
    dotted = ".".join(Path(path).with_suffix("").parts)
    named = re.compile(rf"\b{re.escape(dotted)}\b|\b{re.escape(dotted.rpartition('.')[0])} import .*\b{name}\b")
    own = re.compile("|".join(part.rstrip("s") for part in Path(path).with_suffix("").parts[2:]))
    files, near = [], set()
    for file in all_tests():
        text, place = file.read_text(), str(file.relative_to(ROOT))
        if file.parent.name == package or f"skillfast.{package}" in text:
            files.append(place)
            if named.search(text) or own.search(file.stem):
                near.add(place)
    return files, near


def affordable(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests that a mutant may meet, those of the packages first; of others a few cases of each test."""
    near, far = [], defaultdict(list)
    for item in items:
        if not COSTLY & set(item.fixturenames) and not STARTS_PROCESSES.search(inspect.getsource(item.function)):
            own = item.path.parent.name in FOLDERS
            (near if own else far[item.nodeid.partition("[")[0]]).append(item)
    near.sort(key=lambda item: FOLDERS.index(item.path.parent.name))
    return near + [item for cases in far.values() for item in cases[:: -(-len(cases) // MOST_CASES)]]


def digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:10]


def digests(path: str) -> list[list[str]]:
    """Names of a file, its functions and its lines that stay when lines move: for each line, from narrow to wide."""
    lines = (ROOT / path).read_text().splitlines()
    functions = [""] * (len(lines) + 1)

    def name(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            below = names
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                below = (*names, child.name)
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                functions[first : child.end_lineno + 1] = [".".join(below)] * (child.end_lineno + 1 - first)
            name(child, below)

    name(ast.parse("\n".join(lines)), ())
    return [
        [digest(path, function, text.strip()), digest(path, function), digest(path)]
        for function, text in zip(functions, ["", *lines], strict=True)
    ]


class Reach:
    """Which lines of the packages each test runs; what a shared fixture runs counts for every test that takes it."""

    def __init__(self) -> None:
        self.lines, self.of_fixtures = set(), defaultdict(set)
        self.digests = {str(target({"file": path})): digests(path) for path in sources()}

    def enter(self, frame: FrameType, _event: str, _arg: object) -> Callable | None:
        return self.step if frame.f_code.co_filename in self.digests else None

    def step(self, frame: FrameType, event: str, _arg: object) -> Callable:
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.step

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        before, self.lines = self.lines, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.of_fixtures[fixturedef.baseid, fixturedef.argname] |= self.lines
            self.lines = before | self.lines

    def record(self, item: pytest.Item, following: pytest.Item | None) -> dict:
        self.lines, before, failed = set(), cpu_seconds(), item.session.testsfailed
        sys.settrace(self.enter)
        threading.settrace(self.enter)
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        finally:
            sys.settrace(None)
            threading.settrace(None)
        for name, definitions in item._fixtureinfo.name2fixturedefs.items():
            self.lines |= self.of_fixtures[definitions[-1].baseid, name]
        reached = {name for file, line in self.lines for name in self.digests[file][line]}
        passed = item.session.testsfailed == failed
        cost = round(cpu_seconds() - before, 2)
        return {"test": named(item), "cost": cost, "passed": passed, "reached": sorted(reached)}


def named(item: pytest.Item) -> str:
    """A test's name, another one if the test is changed."""
    return f"{item.nodeid} {digest(inspect.getsource(item.function))}"


def recorded() -> dict[str, dict]:
    """What each test that was recorded costs, and what it runs."""
    records = map(json.loads, REACH.read_text().splitlines() if REACH.exists() else [])
    return {record["test"]: record | {"reached": set(record["reached"])} for record in records}


def in_turn(items: list[pytest.Item], mutant: dict, known: dict[str, dict]) -> list[pytest.Item]:
    """A mutant's tests: those that run its line, or its function where none is known to, or its file.

    Cheap ones come first; one that does not name the function or its class, that lies far from its module or of which
    another case comes before counts as more costly. A test that was not recorded is taken to run the line if it is of
    the package.
    """
    public = [name for name in mutant["function"].split(".") if len(name) > 3 and not name.startswith("_")]
    names = re.compile("|".join(rf"\b{name}\b" for name in public) or "$^")
    records = [known.get(named(item)) for item in items]
    of_line = digests(mutant["file"])[mutant["line"]]
    place = next((p for p in of_line if any(r and p in r["reached"] for r in records)), None)
    seen, found = Counter(), []
    for item, record in zip(items, records, strict=True):
        file, test = item.nodeid.partition("::")[0], item.nodeid.partition("[")[0]
        sound = record and record["passed"] and record["cost"] < ENDLESS / 2
        if (sound and place in record["reached"]) if record else file in mutant["tests"]:
            weight = max(record["cost"], 0.02) if record else USUAL
            weight *= 1 if names.search(inspect.getsource(item.function)) else 3
            weight *= 1 if file in mutant["near"] else 3
            weight *= 4 if seen[test] else 1
            seen[test] += 1
            found.append((weight, len(found), item))
    return [item for *_, item in sorted(found, key=lambda entry: entry[:2])]


def cpu_seconds() -> float:
    return sum(os.times()[:4])


class Runner:
    """Tries mutants in forks of a process that has collected all tests; with a folder, tries the only one here."""

    def __init__(self, mutants: list[dict], args: argparse.Namespace, here: Path | None = None) -> None:
        self.mutants, self.args, self.here, self.known = mutants, args, here, recorded()

    def record(self, session: pytest.Session) -> None:
        """Records, in a fork, the tests that were not recorded yet."""
        items = [item for item in affordable(session.items) if named(item) not in self.known]
        if not items:
            return
        print(f"recording what {len(items)} tests run", file=PROGRESS, flush=True)
        pid = os.fork()
        if not pid:
            try:
                reach = Reach()
                session.config.pluginmanager.register(reach)
                with REACH.open("a") as file:
                    for item, following in itertools.zip_longest(items, items[1:]):
                        file.write(json.dumps(reach.record(item, following)) + "\n")
                        file.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(pid, 0)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.here:
            self.run_tests(session, self.mutants[0], self.here)
        import_all()
        if not self.args.changed:
            self.record(session)
        self.known = recorded()
        live = defaultdict(list)
        for function in gc.get_objects():
            if type(function) is FunctionType and function.__code__.co_filename.startswith(str(PACKAGE)):
                live[function.__code__].append(function)
        gc.freeze()  # so that the forks share its memory

        def start(mutant: dict, folder: Path) -> int:
            pid = os.fork()
            if not pid:
                for function, code in replaced(mutant, live):
                    function.__code__ = function.__code__.replace() if self.args.intact else code
                self.run_tests(session, mutant, folder)
            return pid

        try_all([m for m in self.mutants if replaced(m, live) is not None], start, self.args)
        return True

    def run_tests(self, session: pytest.Session, mutant: dict, folder: Path) -> None:
        """The mutant's tests until one fails or the budget is spent; does not return."""
        status = 1
        try:
            redirect(folder)
            session.config._tmp_path_factory._given_basetemp = folder / "tmp"
            session.config._tmp_path_factory._basetemp = None
            chosen = in_turn(affordable(session.items), mutant, self.known)
            stop, ran = cpu_seconds() + self.args.budget, 0
            for item, following in itertools.zip_longest(chosen, chosen[1:]):
                (folder / "test.txt").write_text(item.nodeid)
                signal.setitimer(signal.ITIMER_PROF, ENDLESS)  # of a loop that does not end
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                ran += 1
                if session.testsfailed or cpu_seconds() > stop:
                    break
            status = int(session.testsfailed > 0)
            if not status:
                (folder / "test.txt").write_text(f"{ran} of {len(chosen)} tests")
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
    if pairs is None or any(old not in live or any(code in live for code in nested(old)) for old, _ in pairs):
        return None
    if any(old.co_freevars != new.co_freevars for old, new in pairs):
        return None
    return [(f, new) for old, new in pairs for f in live[old] if f.__code__.co_filename == path]


def codes(mutant: dict) -> tuple[CodeType, CodeType]:
    return tuple(
        compile(code, target(mutant), "exec") for code in ((ROOT / mutant["file"]).read_text(), mutant["code"])
    )


def target(mutant: dict) -> Path:
    return PACKAGE / Path(mutant["file"]).relative_to("skillfast")


def fork(runner: Runner, folder: Path, mutant: dict | None = None) -> int:
    """A fork of this process that imports everything, with a module's changed code if one is given; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        redirect(folder)
        (folder / "test.txt").write_text("at import")
        original = SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: (
            compile(mutant["code"], self.path, "exec")
            if mutant and Path(self.path) == target(mutant)
            else original(self, name)
        )
        options = f"-q -p no:cacheprovider --capture=sys --tb=line --timeout=300 --basetemp={folder / 'tmp'}"
        options += " --hypothesis-seed=0 -W ignore::pytest.PytestAssertRewriteWarning"
        files = files_for(runner, mutant)
        collected = pytest.main([*files, *options.split(), "-m", "not slow and not gpu"], [runner])
        os._exit(1 if mutant else int(collected))  # a mutant that comes here could not be imported
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        os._exit(1)


def files_for(runner: Runner, mutant: dict | None) -> list[str]:
    """Files of tests to collect: those that may run the lines of the mutant, all of them for all mutants."""
    if not mutant and not runner.args.changed:
        return [str(file) for file in all_tests()]
    files = {file for m in runner.mutants for file in m["tests"]}
    if mutant:
        place = digest(mutant["file"])
        files |= {test.partition("::")[0] for test, record in runner.known.items() if place in record["reached"]}
    return sorted(file for file in files if (ROOT / file).exists())


def try_all(mutants: list[dict], start: Callable[[dict, Path], int], args: argparse.Namespace) -> None:
    """Notes the outcome of each mutant and the test that noticed it, a few at a time."""
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
        outcome = outcomes.get(os.waitstatus_to_exitcode(status), "killed")
        test = (folder / "test.txt").read_text()
        known = {k: v for k, v in mutant.items() if k not in ("code", "tests", "near")}
        with args.results.open("a") as file:
            file.write(json.dumps(known | {"outcome": outcome, "test": test}) + "\n")
        line = f"{outcome} {mutant['file']}:{mutant['line']} {mutant['operator']} {test}"
        print(line + f"\n{mutant['change']}" * (outcome == "survived"), file=PROGRESS, flush=True)


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


def key(mutant: dict) -> tuple[str, str, str]:
    """What tells a mutant, wherever it stands in its file."""
    return mutant["file"], mutant["function"], mutant["change"].strip()


def outcomes(results: Path) -> dict[tuple[str, str, str], str]:
    """The last outcome of every mutant that was tried."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {key(m): m["outcome"] for m in map(json.loads, lines)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=300, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changed", metavar="COMMIT", help="only lines that differ from this commit")
    parser.add_argument("--only", default="", help="of those only what is in files whose path matches this")
    those = parser.add_mutually_exclusive_group()
    those.add_argument("--again", dest="those", action="store_const", const="again", help="try what survived so far")
    those.add_argument("--more", dest="those", action="store_const", const="more", help="try what was not tried so far")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of CPU for the tests of a mutant")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=36000, help="when to begin no other mutant")
    parser.add_argument("--record", action="store_true", help="record what tests run that are not recorded, and end")
    parser.add_argument("--intact", action="store_true", help="change nothing: every one has to survive")
    args = parser.parse_args()
    args.stop, args.results = time.time() + args.seconds, WORK / "intact.jsonl" if args.intact else RESULTS
    changed = changed_lines(args.changed) if args.changed else None
    paths = [path for path in sources() if changed is None or path in changed]
    mutants = list(itertools.islice(drawn(paths, changed, args.seed), args.n))
    known = outcomes(args.results)
    mutants = [mutant for mutant in mutants if re.search(args.only, mutant["file"])]
    if args.record:
        mutants = []
    elif not mutants:
        print("no line to change")
        return 0
    tried = {"again": ("killed", "timeout"), "more": ("killed", "timeout", "survived")}.get(args.those, ())
    todo = [mutant for mutant in mutants if known.get(key(mutant)) not in tried]
    if args.those != "again":  # what nothing can notice need not be tried
        judged = verdicts()
        todo = [mutant for mutant in todo if judged.get(key(mutant)) != "equivalent"]
    WORK.mkdir(parents=True, exist_ok=True)
    args.results.write_text("".join(f"{line}\n" for line in lines_without(args.results, todo)))
    for name in PRELOADED:
        importlib.import_module(name)
    for mutant in todo:
        mutant["tests"], mutant["near"] = tests_of(mutant["file"])
    if (todo or args.record) and os.waitpid(fork(Runner(todo, args), WORK), 0)[1]:
        raise SystemExit(f"mutants: expected tests that can be collected, got errors; see {WORK / 'output.txt'}")

    def start(mutant: dict, folder: Path) -> int:
        code = (ROOT / mutant["file"]).read_text() if args.intact else mutant["code"]
        return fork(Runner([mutant], args, folder), folder, mutant | {"code": code})

    try_all([m for m in todo if key(m) not in outcomes(args.results)], start, args)
    known = outcomes(args.results)
    for mutant in mutants:
        mutant["outcome"] = known.get(key(mutant), "no time")
    return report(mutants, limit_accepted=not args.changed)


def lines_without(results: Path, mutants: list[dict]) -> list[str]:
    """What is known of other mutants than these."""
    these = {key(mutant) for mutant in mutants}
    lines = results.read_text().splitlines() if results.exists() else []
    return [line for line in lines if key(json.loads(line)) not in these]


def verdicts() -> dict[tuple[str, str, str], str]:
    listed = tomllib.loads((HERE / "survivors.toml").read_text()).get("survivor", [])
    return {key(entry): entry["verdict"] for entry in listed}


def report(mutants: list[dict], limit_accepted: bool) -> int:
    """Prints the table and what survived; 1 if that is too much.

    Of a sample accepted ones count; of changed lines those alone that nobody has judged.
    """
    judged, table = verdicts(), defaultdict(Counter)
    for mutant in sorted(mutants, key=lambda m: (m["file"], m["line"])):
        kind = mutant["outcome"]
        if judged.get(key(mutant)) == "equivalent" and kind == "no time":
            kind = "survived"
        if kind == "survived":
            verdict = judged.get(key(mutant), "not judged")
            print(f"\n{verdict}: {mutant['file']}:{mutant['line']} {mutant['function']}\n{mutant['change']}")
            kind = verdict if verdict in ("equivalent", "accepted") else kind
        table[mutant["file"]][kind] += 1
        table["all"][kind] += 1
    kinds = ("killed", "timeout", "survived", "accepted", "equivalent", "no time")
    print(f"\n{'':46}" + "".join(f"{kind:>12}" for kind in kinds))
    for file, counts in sorted(table.items()):
        print(f"{file:46}" + "".join(f"{counts[kind]:12}" for kind in kinds))
    counts = table["all"]
    tried = counts["survived"] + counts["accepted"] + counts["killed"] + counts["timeout"]
    alive = counts["survived"] + counts["accepted"] * limit_accepted
    print(
        f"{alive} of {tried} mutants survive, {alive / max(1, tried):.1%} (limit {LARGEST:.0%}); equivalent ones aside"
    )
    return int(alive > LARGEST * tried)


if __name__ == "__main__":
    sys.exit(main())
