"""`Monitor`: watches skills while a model serves or trains, and says when one goes quiet."""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import files
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.activations import by_sample
from skillfast.models.inputs import mask_of
from skillfast.models.sites import check_neurons, find_sites, fingerprint, refuse_compiled, unwrap_compiled
from skillfast.models.watching import watched
from skillfast.statistics.sequential import DriftTest
from skillfast.tracing.capture import reading_routed
from skillfast.tracing.sinks import sink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike

    from skillfast.models.activations import Activations, RoutedActivations
    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill

LINES, SCRAPED = "monitor.jsonl", "monitor.prom"
QUANTILES = (0.05, 0.5, 0.95)
TESTED = 64  # examples of an interval that are tested, drawn at random: memory grows by 8 bytes for each and skill
_PAIRED = 16  # skills up to which an interval has the correlation of each two: their number grows as the square
_CORRELATED = 3  # examples that a correlation needs: of two it is 1 or -1
_INPUTS = ("attention_mask", "input_ids", "inputs_embeds", "pixel_values")


class Monitor:
    """Watches how active skills are in every forward of a model inside the context, and tests for drift.

    A skill's activation in an example is the mean of |activation| over its neurons and the example's real tokens; of
    experts over all tokens, 0 where one was not routed there. The first `reference` examples are what later ones are
    compared with, by a test that holds at every look (`skillfast.statistics.sequential.DriftTest`): whatever the number
    of intervals, a model and inputs that do not change give an alarm with a probability of at most `alpha`, for all
    skills together. It takes examples to come in random order; another mix of inputs is a drift, too.

    Each interval is a line of `output`/monitor.jsonl with flat keys: `step` (forwards so far), `time` (seconds since
    1970), `examples`, and of each skill `skill/deer/activation`, `/q05`, `/q50`, `/q95`, `/drift` (evidence of a change
    as a logarithm to base 10: 2 is a hundredfold), `/alarm` (0 or 1), `/not_finite` (examples without a number) and
    `/routed_share` (of tokens at the experts that it has neurons in), and of each two of at most 16 skills
    `skill/deer/correlation/cat`, Pearson's r of their activations over the interval's examples. Prometheus finds them
    in `output`/monitor.prom.
    Threads may call the model at the same time. An ablation is seen if its context was entered before the monitor's.

    Args:
        model: The model; it may be in training mode.
        skills: Name -> `Skill`, or several skills.
        every: Forwards of an interval.
        output: Folder of the files.
        reference: Examples at the beginning that are the reference, or an earlier monitor's `reference`.
        share: Share of the forwards that are read, drawn at random; the others cost the calls of empty hooks.
        alpha: Probability of an alarm for any skill at any time although nothing has changed.
        sinks: Where else the keys go, with their step: some of `"tensorboard"`, `"wandb"` (an active run), `"mlflow"`.
        on_alarm: Called with a skill's name and the line, once for each skill, in the thread that ends the interval.
        seed: Seed of which forwards are read.

    Raises:
        ArgumentError: Neurons that the model lacks, no skill, settings out of range, a folder that cannot be written.
        ModelError: A model wrapped by `torch.compile`, whose hooks would not run; a sink whose library is missing.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        skills: Mapping[str, Skill] | Sequence[Skill],
        *,
        every: int = 100,
        output: str | Path = "skillfast-monitor",
        reference: int | Mapping[str, ArrayLike] = 256,
        share: float = 1 / 16,
        alpha: float = 0.01,
        sinks: Sequence[str] = (),
        on_alarm: Callable[[str, Mapping[str, float]], None] | None = None,
        seed: int = 0,
    ) -> None:
        refuse_compiled(model)
        self._model = model = unwrap_compiled(model)
        named = {skill.name: skill for skill in skills} if not hasattr(skills, "keys") else dict(skills)
        for what, value, most in (("share", share, 1.0), ("alpha", alpha, 1.0), ("every", every, float("inf"))):
            if not 0 < value <= most:
                raise ArgumentError(f"{what}: expected a number above 0 and at most {most}, got {value}; check it")
        if not named or len(named) < len(skills):
            raise ArgumentError(f"skills: expected one or more with names of their own, got {len(skills)}; name them")
        sites = {site.name: site for site in find_sites(model)}
        for skill in named.values():
            check_neurons(skill, sites, fingerprint(model))
        self.names = tuple(named)
        self._reads = [_Read(site, list(named.values())) for site in sites.values() if _has(named, site)]
        self._size = np.array([len(skill) for skill in named.values()])
        self._every, self._share, self._seed = every, share, seed
        self._limit = np.log(len(named) / alpha)
        self._given = reference
        self._wanted = reference if isinstance(reference, int) else 0
        self._calibrated: list[np.ndarray] = []  # [n, skills] each, of the examples that will be the reference
        self._tests: list[DriftTest] | None = None
        if not isinstance(reference, int):
            self._begin_tests([np.asarray(reference[name], dtype=np.float64) for name in self._checked(reference)])
        elif reference < 1:
            raise ArgumentError(f"reference: expected at least one example, got {reference}; give 100 or more")
        self._rng = np.random.default_rng(seed)
        self._lock, self._telling = threading.RLock(), threading.Lock()
        self._here = threading.local()  # the forward that runs in this thread
        self._forwards = 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # of this interval
        self._alarms: dict[str, int] = {}
        self._on_alarm = on_alarm
        self._last: dict[str, float] = {}
        self._output = files.output_folder(output)
        self._sinks = [sink(name, self._output) for name in sinks]
        self._stack = ExitStack()

    def _checked(self, reference: Mapping[str, ArrayLike]) -> tuple[str, ...]:
        missing = [name for name in self.names if name not in reference]
        if missing:
            raise ArgumentError(
                f"reference: expected values of each skill, got none of {', '.join(missing)}; take an earlier monitor's"
            )
        return self.names

    def _begin_tests(self, values: Sequence[np.ndarray]) -> None:
        kept = [each[np.isfinite(each)] for each in values]
        self.reference = dict(zip(self.names, kept, strict=True))
        self._tests = [DriftTest(each, self._seed + k) for k, each in enumerate(kept)]

    @property
    def alarms(self) -> dict[str, int]:
        """Skill -> step of its alarm, for each that has drifted."""
        with self._lock:
            return dict(self._alarms)

    def __enter__(self) -> Monitor:
        with ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            for read in self._reads:
                if read.site.experts is not None:
                    stack.enter_context(
                        reading_routed(self._model, read.site, partial(self._see_routed, read), self._reads_now)
                    )
                else:
                    stack.enter_context(
                        watched(self._model, read.site, partial(self._see, read), wanted=self._reads_now)
                    )
            stack.callback(self._model.register_forward_hook(self._end, always_call=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        with self._lock:
            line, rang = self._close_interval()
        self._tell(line, rang)
        for each in self._sinks:
            each.close()

    def _begin(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._lock:
            chosen = self._rng.random() < self._share
        inputs = [*(kwargs[name] for name in _INPUTS if name in kwargs), *args]
        first = next((x for x in inputs if isinstance(x, torch.Tensor) and x.dim()), None)
        self._here.forward = _Forward(len(first), mask_of(kwargs)) if chosen and first is not None else None

    def _reads_now(self) -> bool:
        """Whether this thread's forward is read: most are not, and leave the hooks of their sites at once."""
        return getattr(self._here, "forward", None) is not None

    def _see(self, read: _Read, found: Activations) -> None:
        forward: _Forward = self._here.forward
        forward.add(read.dense(found.values.detach(), forward))

    def _see_routed(self, read: _Read, found: RoutedActivations) -> None:
        forward: _Forward = self._here.forward
        forward.add(*read.routed(found, forward))

    def _end(self, _: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG002
        forward, self._here.forward = getattr(self._here, "forward", None), None
        with self._lock:
            self._forwards += 1
            if forward is not None and forward.total is not None and output is not None:  # else it failed half way
                self._pending.append((forward.total, forward.routed))
            if self._forwards % self._every:
                return
            line, rang = self._close_interval()
        self._tell(line, rang)

    def _close_interval(self) -> tuple[dict[str, float], list[str]]:
        """Count the interval's examples and test some: its line, empty without examples, and the skills that ring."""
        pending, self._pending = self._pending, []
        if not pending:
            return {}, []
        values = torch.cat([total for total, _ in pending]).double().cpu().numpy() / self._size
        shares = [share for _, share in pending if share is not None]
        line: dict[str, float] = {"step": self._forwards, "time": time.time(), "examples": len(values)}
        rows = self._after_reference(values)
        if len(rows) > TESTED:
            rows = rows[np.sort(self._rng.choice(len(rows), TESTED, replace=False))]
        rang = []
        for k, name in enumerate(self.names):
            key, known = f"skill/{name}/", values[np.isfinite(values[:, k]), k]
            if len(known):
                line[key + "activation"] = float(known.mean())
                for q in QUANTILES:
                    line[f"{key}q{round(100 * q):02d}"] = float(np.quantile(known, q))
            line[key + "not_finite"] = len(values) - len(known)
            if self._tests is not None:
                test = self._tests[k]
                highest = test.update(rows[np.isfinite(rows[:, k]), k]) if len(rows) else test.evidence
                line[key + "drift"] = float(test.evidence / np.log(10))
                if highest >= self._limit and name not in self._alarms:
                    self._alarms[name] = self._forwards
                    rang.append(name)
            line[key + "alarm"] = int(name in self._alarms)
        line |= self._correlations(values)
        if shares:
            for name, share in zip(self.names, torch.cat(shares).double().mean(0).tolist(), strict=True):
                if share == share:  # those without experts have none
                    line[f"skill/{name}/routed_share"] = share
        self._last = line
        return line, rang

    def _correlations(self, values: np.ndarray) -> dict[str, float]:
        """Pearson's r of each two skills over an interval's examples [n, skills]; those without one are left out."""
        known = values[np.isfinite(values).all(1)]
        if not 1 < len(self.names) <= _PAIRED or len(known) < _CORRELATED:
            return {}
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.corrcoef(known, rowvar=False)
        constant = np.ptp(known, 0) == 0  # whose variance need not be 0 in floating point
        r[constant] = r[:, constant] = np.nan
        return {
            f"skill/{name}/correlation/{other}": float(r[i, j])
            for (i, name), (j, other) in combinations(enumerate(self.names), 2)
            if np.isfinite(r[i, j])
        }

    def _after_reference(self, values: np.ndarray) -> np.ndarray:
        """Examples [n, skills] that are not in the reference."""
        if self._tests is not None:
            return values
        self._calibrated.append(values)
        every = np.concatenate(self._calibrated)
        if len(every) < self._wanted:
            return values[:0]
        self._begin_tests(list(every[: self._wanted].T))
        self._calibrated = []
        return every[self._wanted :]

    def _tell(self, line: dict[str, float], rang: Sequence[str]) -> None:
        """Write an interval, while other threads go on."""
        if not line:
            return
        with self._telling:
            with (self._output / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            with files.replacing(self._output / SCRAPED) as temporary:
                temporary.write_text(self.prometheus(), encoding="utf-8")
            flat = {key: value for key, value in line.items() if key.startswith("skill/")}
            for each in self._sinks:
                each.log(flat, int(line["step"]))
        if self._on_alarm is not None:
            for name in rang:
                self._on_alarm(name, dict(line))

    def prometheus(self) -> str:
        """The last interval in Prometheus' text format, to be scraped; each skill is a label."""
        with self._lock:
            last = dict(self._last)
        lines = [
            "# HELP skillfast_forwards_total Forwards of the model up to the last interval.",
            "# TYPE skillfast_forwards_total counter",
            f"skillfast_forwards_total {int(last.get('step', 0))}",
        ]
        for name, (kind, told) in _METRICS.items():
            rows = [
                f'skillfast_skill_{name}{{skill="{_escaped(skill)}"{more}}} {last[key]!r}'
                for skill in self.names
                for suffix, more in kind
                if (key := f"skill/{skill}/{suffix}") in last
            ]
            lines += [f"# HELP skillfast_skill_{name} {told}", f"# TYPE skillfast_skill_{name} gauge", *rows]
        lines += [
            "# HELP skillfast_skill_correlation Correlation of two skills' activations over the interval's examples.",
            "# TYPE skillfast_skill_correlation gauge",
            *(
                f'skillfast_skill_correlation{{skill="{_escaped(one)}",other="{_escaped(other)}"}} {last[key]!r}'
                for one, other in combinations(self.names, 2)
                if (key := f"skill/{one}/correlation/{other}") in last
            ),
        ]
        return "\n".join(lines) + "\n"


_METRICS: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "activation": ((("activation", ""),), "Mean absolute activation of the skill's neurons."),
    "activation_quantile": (
        tuple((f"q{round(100 * q):02d}", f',quantile="{q:g}"') for q in QUANTILES),
        "Quantiles of the same over examples.",
    ),
    "drift": ((("drift", ""),), "Evidence of a change since the reference, log10."),
    "alarm": ((("alarm", ""),), "1 where the skill has drifted."),
    "routed_share": ((("routed_share", ""),), "Share of the tokens at the skill's experts."),
}


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _has(skills: Mapping[str, Skill], site: Site) -> bool:
    return any(site.name in skill.neurons for skill in skills.values())


class _Forward:
    """What was read in the forward of a thread.

    Args:
        samples: Examples that went in.
        mask: bool [batch, tokens], False for padding; None without.

    Attributes:
        total: [batch, skills], sums over the skills' neurons so far; None before the first site.
        routed: [batch, skills], shares of tokens at their experts; NaN for a skill without; None without experts.
    """

    def __init__(self, samples: int, mask: torch.Tensor | None) -> None:
        self.samples, self.mask = samples, mask
        self.total: torch.Tensor | None = None
        self.routed: torch.Tensor | None = None

    def add(self, sums: torch.Tensor, routed: torch.Tensor | None = None) -> None:
        """Add what a site has."""
        if self.total is None:
            self.total = sums
        elif len(self.total) != len(sums):
            raise ModelError(
                f"monitor: expected {len(self.total)} examples at every site, got {len(sums)}; leave out "
                "skills at sites that see others"
            )
        else:
            self.total = self.total + sums.to(self.total.device)
        if routed is not None:
            before = self.routed
            known = routed if before is None else torch.where(before.isnan(), routed, before)  # its first experts
            self.routed = known


class _Read:
    """What is read at a site: each neuron that any skill has, once.

    Args:
        site: The site.
        skills: The skills, in the order of the columns.
    """

    def __init__(self, site: Site, skills: Sequence[Skill]) -> None:
        self.site = site
        none = torch.empty(0, dtype=torch.int64)
        parts = [skill.neurons.get(site.name, none) for skill in skills]
        self._neurons = torch.cat(parts).unique()
        self._members = torch.stack([torch.isin(self._neurons, part) for part in parts], 1).float()  # [S, skills]
        self._kept: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._experts = None
        if site.experts is not None:
            of_expert = self._neurons // (site.width // site.experts)
            counts = torch.zeros(site.experts, len(skills)).index_add_(0, of_expert, self._members)
            self._experts = (counts > 0).float()  # [experts, skills]

    def _there(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._kept:
            with torch.inference_mode(False):
                self._kept[device] = (self._neurons.to(device), self._members.to(device))
        return self._kept[device]

    def dense(self, x: torch.Tensor, forward: _Forward) -> torch.Tensor:
        """Sums [batch, skills] over neurons of the mean |activation| over real tokens."""
        neurons, members = self._there(x.device)
        size = x.index_select(-1, neurons).abs_()
        tokens = by_sample(size, forward.samples, self.site.name)
        tokens = tokens.reshape(len(tokens), -1, len(neurons))
        mask = forward.mask
        if mask is not None and mask.shape == tokens.shape[:2]:
            real = mask.to(tokens.device).float()
            mean = torch.bmm(real[:, None], tokens.float())[:, 0] / real.sum(1, keepdim=True).clamp(min=1)
        else:
            mean = tokens.mean(1, dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return mean @ members

    def routed(self, found: RoutedActivations, forward: _Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums [batch, skills] at a site of experts, and the share of tokens at the experts of each skill."""
        neurons, members = self._there(found.values.device)
        mask = forward.mask
        if mask is not None and mask.shape != found.shape:
            mask = None
        mask = None if mask is None else mask.to(found.values.device).bool()
        rows = replace(found, values=found.values.abs(), gate=torch.ones_like(found.gate)).pooled("mean", mask)
        sums = rows.float().index_select(-1, neurons) @ members
        assert self._experts is not None
        experts = self._experts.to(sums.device)
        one = torch.ones_like(found.gate, dtype=torch.float32)
        share = replace(found, values=one[:, None], gate=one).pooled("mean", mask)  # [batch, experts]
        of_skill = share.float() @ experts / experts.sum(0)  # NaN where a skill has no experts
        return sums, of_skill
