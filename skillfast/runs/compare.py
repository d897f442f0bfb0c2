"""`skillfast.compare`: what became of each skill between two runs, and a gate's decision on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

from skillfast import __version__, files
from skillfast.errors import ArgumentError, DataError
from skillfast.evaluation import comparison
from skillfast.evaluation.comparison import ClassPair, Measured
from skillfast.evaluation.gate import Quantities, decide
from skillfast.evaluation.paired import LEVEL, PairedDifference, kl_divergence, mean_limits
from skillfast.results import bench, records
from skillfast.results import skills as skill_files
from skillfast.results.comparison import (
    FILE,
    ComparedRun,
    Comparison,
    Divergence,
    GateResult,
    OverallChange,
    Shift,
    SkillChange,
)
from skillfast.results.decisions import FILE as DECISIONS
from skillfast.results.decisions import Decisions
from skillfast.results.gates import gates_of, read_gates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from skillfast.results.bench import BenchResults
    from skillfast.results.comparison import Overlap, PairedChange
    from skillfast.results.gates import Gates

SAME = ("scale", "pool", "sites")  # settings without which a drop is not the same quantity


@dataclass(frozen=True)
class Run:
    """Files of a run that is compared."""

    directory: Path
    results: BenchResults
    skills: skill_files.Skills
    decisions: Decisions

    @staticmethod
    def read(directory: str | Path) -> Run:
        path = Path(directory)
        results = records.read(bench.BenchResults, path / bench.FILE, bench.REMEDY)
        skills = records.read(skill_files.Skills, path / skill_files.FILE, bench.REMEDY)
        decisions = Decisions.load(path)
        skill_files.check_of_run(skills, results, path / skill_files.FILE)
        ours, theirs = results.dataset.classes, decisions.classes
        if [*theirs] != ours:
            raise DataError(
                f"{path / DECISIONS}: expected decisions on the classes of results.json, in their order, got others; "
                "take both files from one run"
            )
        return Run(path, results, skills, decisions)

    @property
    def classes(self) -> list[str]:
        return self.results.dataset.classes

    def measured(self, rows: np.ndarray, shared: Sequence[str], other: np.ndarray | None) -> Measured:
        """Decisions on some examples and of the skills of shared classes; classes that are not shared are one more.

        Args:
            rows: int64 [n].
            shared: Class names, in the order of their new indices.
            other: int64 [K, n], this run's classes as this model decides without the other run's skills of the shared
                classes, on these examples; None where that was not measured.
        """
        at = {name: i for i, name in enumerate(shared)}
        index = np.array([at.get(name, len(shared)) for name in self.classes])
        own = [self.classes.index(name) for name in shared]
        found = self.decisions
        removed = index[found.removed[own][:, rows]]
        return Measured(index[found.intact[rows]], removed, None if other is None else index[other])

    def exchanged(self, base: Run, rows: np.ndarray, shared: Sequence[str]) -> tuple[np.ndarray | None, ...]:
        """What this run, which is NEW, decided without BASE's skills, and its skills took from BASE: int64 [K, n] each.

        Args:
            base: BASE.
            rows: int64 [n], examples of this run.
            shared: Class names.
        """
        found = self.decisions
        same = found.earlier_skills == skill_files.skills_digest(base.skills)
        if found.earlier is None or not same or not set(shared) <= {*found.earlier_classes}:
            return None, None
        theirs = [found.earlier_classes.index(name) for name in shared]
        without, ours = found.earlier[theirs][:, rows], [self.classes.index(name) for name in shared]
        if found.in_earlier is None or self.classes != base.classes:  # BASE's outputs are numbered by its own classes
            return without, None
        return without, found.in_earlier[ours][:, rows]

    def neurons(self, name: str) -> dict[str, set[int]]:
        skill = next(skill for skill in self.skills.skills if skill.name == name)
        return {site: set(index) for site, index in skill.neurons.items()}

    def described(self, accuracy: float | None) -> ComparedRun:
        results = self.results
        return ComparedRun(
            directory=str(self.directory),
            model=results.model.name,
            weights=results.model.weights,
            fingerprint=results.model.fingerprint,
            dataset=results.dataset.name,
            data=results.dataset.digests.test,
            accuracy=accuracy,
            n_test=results.dataset.n_test,
        )


def compare(
    base: str | Path | torch.nn.Module,
    new: str | Path | torch.nn.Module,
    *,
    gate: str | Path | Mapping[str, Any] | None = None,
    margin: float = comparison.MARGIN,
    output: str | Path | None = None,
    loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Comparison:
    """Say what became of each skill between two runs of `bench` on the same test examples, or between two models.

    NEW had best be run with `--like BASE`, so that it was measured without BASE's skills, too: then a skill that moved
    is told from one that was chosen otherwise. A model is measured first: BASE by `bench`, NEW by `bench` like BASE.

    Args:
        base: Folder of the earlier run, or a model: a checkpoint, `hf:` and a name or folder, timm's name of a
            pretrained one, or a module.
        new: Folder of the later run, or a model.
        gate: Thresholds: a `gates.toml`, or what one holds.
        margin: Largest change of accuracy that does not matter, in (0, 1); of a drop twice as much.
        output: Folder for `compare.json` and `compare.html`, and for the runs of models, `base` and `new`; None writes
            nothing.
        loader: Labelled examples for modules, as `bench` takes them.
        quiet: Show no progress bars while models are measured.
        say: Called with each line worth reading meanwhile.
        **settings: Flat settings as of `BenchConfig.of`, for a model as BASE: `model`, `dataset`, `data_dir`.

    Returns:
        The comparison; `.passed` says whether the gate passed. Runs of other classes or examples are compared as far as
        they go, with `.reasons`, and pass no gate.

    Raises:
        ArgumentError: A gate with unknown skills or keys, a margin out of its range, models without `output`.
        DataError: A folder without readable results, skills and decisions.
        SkillfastError: What stops the run of a model.
    """
    if not 0 < margin < 1:
        raise ArgumentError(f"margin: expected a number in (0, 1), got {margin:g}; leave it out for 0.05")
    gates = None
    if gate is not None:
        gates = gates_of(gate) if isinstance(gate, Mapping) else read_gates(Path(gate))
    folders = run_folders([base, new], output, settings, loader=loader, quiet=quiet, say=say)
    runs = [Run.read(folder) for folder in folders]
    found = compared(runs[0], runs[1], gates, margin)
    if output is not None:
        from skillfast.report import write_comparison

        records.write(found, files.output_folder(output) / FILE)
        write_comparison(output)
    return found


def run_folders(
    sides: Sequence[str | Path | torch.nn.Module],
    output: str | Path | None,
    settings: Mapping[str, Any],
    *,
    loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Folders of runs; see `skillfast.runs.measure.measured`, which folders alone do not need, nor torch."""
    runs = [Path(side) for side in sides if isinstance(side, str | Path)]
    if len(runs) == len(sides) and all(run.is_dir() for run in runs) and not settings and loader is None:
        return runs
    from skillfast.runs.measure import measured

    return measured(sides, output, settings, loader=loader, quiet=quiet, say=say)


def compared(base: Run, new: Run, gates: Gates | None, margin: float) -> Comparison:
    """Two runs compared; see `compare`."""
    shared = [name for name in base.classes if name in new.classes]
    rows = paired([base.decisions, new.decisions])
    labels = np.array([shared.index(base.classes[label]) for label in base.decisions.labels[rows[0]]], dtype=np.int64)
    by_base, by_new = new.exchanged(base, rows[1], shared)
    sides = base.measured(rows[0], shared, by_new), new.measured(rows[1], shared, by_base)
    n_base, n_new = len(base.decisions.labels), len(new.decisions.labels)
    found = Comparison(
        skillfast=__version__,
        base=base.described(accuracy_of(sides[0].intact, labels)),
        new=new.described(accuracy_of(sides[1].intact, labels)),
        reasons=_reasons(base, new, len(labels)),
        only_base=[name for name in base.classes if name not in shared],
        only_new=[name for name in new.classes if name not in shared],
        n=len(labels),
        n_only_base=n_base - len(labels),
        n_only_new=n_new - len(labels),
        margin=margin,
        level=LEVEL,
        overall=None,
        skills={},
        interference=[],
    )
    quantities: dict[str | None, Quantities] = {}
    if len(labels):
        found, quantities = _filled(found, base, new, sides, labels, shared, rows)
    if gates is None:
        return found
    return structs.replace(found, gate=_decided(gates, found, base, quantities))


def _decided(gates: Gates, found: Comparison, base: Run, quantities: Mapping[str | None, Quantities]) -> GateResult:
    thresholds = gates.thresholds(list(dict.fromkeys([*base.classes, *found.only_new])))
    return decide(thresholds, quantities, comparable=found.comparable)


def _filled(
    found: Comparison,
    base: Run,
    new: Run,
    sides: tuple[Measured, Measured],
    labels: np.ndarray,
    shared: list[str],
    rows: Sequence[np.ndarray],
) -> tuple[Comparison, dict[str | None, Quantities]]:
    """The comparison with what the examples say, and what a gate may ask."""
    margin = found.margin
    pairs = [ClassPair(*sides, label, labels == label) for label in range(len(shared))]
    margins = {name: margin if name == "accuracy" else min(2 * margin, 1.0) for name in comparison.CHANGES}
    changes = {name: comparison.changes_of(pairs, name, margins[name]) for name in comparison.CHANGES}
    interference, merged = comparison.interferences(*sides, labels, shared)
    skills = {
        name: _skill(base, new, name, pairs[i], {key: rows[i] for key, rows in changes.items()}, merged, len(shared))
        for i, name in enumerate(shared)
    }
    kl = None
    if shared == base.classes == new.classes:
        kl = kl_divergence(base.decisions.log_probabilities[rows[0]], new.decisions.log_probabilities[rows[1]])
        if not np.isfinite(kl).all():  # what BASE gives a chance has none at all in NEW
            kl = None

    def asked(which: np.ndarray, harm: bench.Harm | None) -> Quantities:
        return Quantities(*sides, labels, which, harm, None if kl is None else kl[which])

    quantities: dict[str | None, Quantities] = {None: asked(np.arange(len(labels)), new.results.selectivity.harm)}
    for i, name in enumerate(shared):
        verdict = (new.results.verdicts or {}).get(name)
        quantities[name] = asked(np.flatnonzero(labels == i), None if verdict is None else verdict.harm)
    overall = _overall(base, new, sides, labels, kl, margin)
    return structs.replace(found, overall=overall, skills=skills, interference=interference), quantities


def _overall(
    base: Run,
    new: Run,
    sides: tuple[Measured, Measured],
    labels: np.ndarray,
    kl: np.ndarray | None,
    margin: float,
) -> OverallChange:
    right = [(side.intact == labels).astype(np.int64) for side in sides]
    rows = np.arange(len(labels))
    drops = [
        PairedDifference(r - (side.removed[labels, rows] == labels), labels=labels).change
        for r, side in zip(right, sides, strict=True)
    ]
    means = [PairedDifference(r, labels=labels).change for r in right]
    difference = PairedDifference(right[1] - right[0], labels=labels)
    equal = difference.equivalence_p(margin)
    divergence = None
    if kl is not None and len(kl) > 1:
        divergence = Divergence(float(kl.mean()), list(mean_limits(kl)))
    return OverallChange(
        accuracy=comparison.paired_change(difference, means[0], means[1], difference.p, equal),
        drop=Shift(*drops),
        harm=Shift(*(run.results.selectivity.harm.plug_in for run in (base, new))),
        kl=divergence,
    )


def _skill(
    base: Run,
    new: Run,
    name: str,
    pair: ClassPair,
    changes: Mapping[str, PairedChange | None],
    merged: set[frozenset[str]],
    classes: int,
) -> SkillChange:
    partners = sorted(other for both in merged if name in both for other in both - {name})
    overlap: Overlap | None = None
    sets: tuple[dict[str, list[int]] | None, ...] = (None, None, None)
    if base.results.model.fingerprint == new.results.model.fingerprint:
        ours, theirs = base.neurons(name), new.neurons(name)
        widths = {site.name: site.width for site in base.results.model.sites}
        overlap = comparison.overlap_of(ours, theirs, widths)
        both = {site: index & theirs.get(site, set()) for site, index in ours.items()}
        sets = (
            _sorted(both),
            _sorted({site: index - theirs.get(site, set()) for site, index in ours.items()}),
            _sorted({site: index - ours.get(site, set()) for site, index in theirs.items()}),
        )
    kinds, blocks = _kinds(base, new, name), _blocks(base, new, name)
    found = comparison.verdicts(pair, changes, overlap, bool(partners))
    alone, of_all = comparison.visible(pair, classes)
    harms = [run.results.verdicts[name].harm.plug_in for run in (base, new) if run.results.verdicts]
    return SkillChange(
        verdicts=found,
        n=pair.n,
        visible_alone=alone,
        visible_of_all=of_all,
        **changes,
        base_set=comparison.carried(pair, "new", "base"),
        new_set=comparison.carried(pair, "base", "new"),
        harm=Shift(*harms) if len(harms) == 2 else None,
        overlap=overlap,
        kinds=kinds,
        blocks=blocks,
        moved=comparison.moved_between(kinds, blocks) if "moved" in found else [],
        merged_with=partners,
        kept=sets[0],
        left=sets[1],
        taken=sets[2],
    )


def _sorted(neurons: Mapping[str, set[int]]) -> dict[str, list[int]]:
    return {site: sorted(index) for site, index in neurons.items() if index}


def _kinds(base: Run, new: Run, name: str) -> dict[str, Shift] | None:
    """Share of each kind in the class's drop, in either model."""
    found = []
    for run in (base, new):
        contribution = run.results.layer_contribution
        shares = None if contribution is None else contribution.per_class.get(name)
        if shares is None:
            return None
        found.append({kind: share for kind, share in structs.asdict(shares).items() if share is not None})
    return _shifts(*found)


def _blocks(base: Run, new: Run, name: str) -> dict[str, Shift] | None:
    """Share of each block in the class's drop, in either model."""
    found = []
    for run in (base, new):
        contribution = run.results.layer_contribution
        if contribution is None or not contribution.per_block:
            return None
        shares = {"head" if b.block is None else str(b.block): b.per_class.get(name) for b in contribution.per_block}
        found.append({block: share for block, share in shares.items() if share is not None})
    return _shifts(*found)


def _shifts(base: Mapping[str, float], new: Mapping[str, float]) -> dict[str, Shift] | None:
    names = [*base, *(name for name in new if name not in base)]
    return {name: Shift(base.get(name, 0.0), new.get(name, 0.0)) for name in names} if base and new else None


def paired(runs: Sequence[Decisions]) -> list[np.ndarray]:
    """Rows of the examples that all have, of the same class: int64 [n] for each run, in the first one's order."""

    def keys(of: Decisions) -> list[tuple[int, str, int]]:
        seen: dict[tuple[int, str], int] = {}
        made = []
        for digest, label in zip(of.digests.tolist(), of.labels.tolist(), strict=True):
            key = digest, of.classes[label]
            seen[key] = seen.get(key, 0) + 1  # the same image twice is two examples
            made.append((*key, seen[key]))
        return made

    places = [{key: row for row, key in enumerate(keys(run))} for run in runs]
    rows = [[there[key] for there in places] for key in places[0] if all(key in there for there in places)]
    return list(np.array(rows, dtype=np.int64).reshape(-1, len(runs)).T)


def _reasons(base: Run, new: Run, n: int) -> list[str]:
    """Why two runs are not of the same classes, examples and settings."""
    reasons = []
    for one, other, name in ((base, new, "NEW"), (new, base, "BASE")):
        if missing := [label for label in one.classes if label not in other.classes]:
            reasons.append(f"{name} lacks the classes {', '.join(missing)}")
    for run, name in ((base, "BASE"), (new, "NEW")):
        if more := len(run.decisions.labels) - n:
            reasons.append(f"{more:,} of {len(run.decisions.labels):,} test examples are {name}'s alone")
    for key in SAME:
        before, after = (run.results.config.get(key) for run in (base, new))
        if before != after:
            reasons.append(f"the setting {key} differs: {before} and {after}")
    return reasons


def accuracy_of(intact: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean over the classes."""
    return PairedDifference((intact == labels).astype(np.int64), labels=labels).change if len(labels) else None


__all__ = ["Comparison", "compare"]
