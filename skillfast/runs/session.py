"""The session that every command runs in: device, dtype, backend, memory, data, model, clock and checkpoints."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from skillfast import __version__, backends, files
from skillfast.errors import ArgumentError, SkillfastError
from skillfast.memory.budget import limited_memory
from skillfast.memory.usage import peak_memory
from skillfast.metrics import check_metric_names
from skillfast.models.coverage import coverage
from skillfast.models.digests import weights_digest
from skillfast.models.sites import module_device
from skillfast.progress import telling
from skillfast.results.records import to_json
from skillfast.runs.checkpoints import TRAIN, Checkpoints
from skillfast.runs.cost import Clock
from skillfast.runs.given import given_subject
from skillfast.runs.never_seen import check_never_seen
from skillfast.runs.provenance import data_digests, measured_weights
from skillfast.runs.replay import Earlier
from skillfast.runs.soft_prompt import used_prompt
from skillfast.statistics.scoring import undefined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from skillfast.models.coverage import Coverage
    from skillfast.results.provenance import DataDigests, Weights
    from skillfast.runs.config import BenchConfig
    from skillfast.runs.given import Given
    from skillfast.runs.kept import Kept
    from skillfast.runs.subject import Subject
    from skillfast.statistics.scores import NeuronScores

    Say = Callable[[str], None]

T = TypeVar("T")


@dataclass
class Session:
    """What the stages of a run share; it runs them, and knows which of them an interrupted run has finished.

    Attributes:
        subject: The model on its device and the data; `subject.config` are the settings, the dtype among them.
        coverage: What the model's sites cover; None where it could not be certified.
        clock: Seconds per stage.
        quiet: Show no progress bars.
        say: Called with each line worth reading.
        checkpoints: Keeps the stages' results; None keeps nothing.
        resumed: Stages that an interrupted run had finished.
    """

    subject: Subject
    coverage: Coverage | None
    clock: Clock
    quiet: bool
    say: Say
    checkpoints: Checkpoints | None = None
    resumed: list[str] = field(default_factory=list)
    _last: str = ""  # the last stage that will not be run again
    _earlier: float = 0.0  # seconds of an interrupted run
    _peaks: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> BenchConfig:
        """The settings, the dtype among them."""
        return self.subject.config

    @cached_property
    def data_digests(self) -> DataDigests:
        """Digests of each part of the data, all of which is read for them once."""
        with self.clock.stage("data"):
            return data_digests(self.subject.splits)

    @cached_property
    def weights(self) -> Weights:
        """Digest and origin of the weights, once they are trained."""
        return measured_weights(self.subject)

    def stage(self, name: str, make: Callable[[], T], kept: Kept[T] | None = None, *, part: str = "") -> T:
        """A stage's result: what an interrupted run left of it, or made now.

        Args:
            name: The stage, as in `cost.seconds`.
            make: Makes the result.
            kept: How it is kept for an interrupted run to go on from; None: it is made anew then.
            part: Which of several results of the stage this is.
        """
        what = f"{name}: {part}" if part else name
        if self.checkpoints is not None and kept is not None and (found := self.checkpoints.load(what, kept)):
            self.resumed.append(what)
            self._last = what
            self._earlier += found.seconds
            self.clock.add(name, found.seconds)
            for kind, peak in found.peaks.items():
                self._peaks[kind] = max(peak, self._peaks.get(kind, 0))
            return found.value
        before = self.clock.seconds.get(name, 0.0)
        with self.clock.stage(name), telling(lambda line: self.say(f"{what}: {line}")):
            value = make()
        if self.checkpoints is None or kept is None:
            return value
        if self.checkpoints.save(what, value, kept, self.clock.seconds[name] - before, peak_memory()):
            self._last = what
        return value

    def trace(self, part: str, *, statistics: Sequence[str] | None = None) -> NeuronScores:
        """Trace a part of the data; what has no score is said in a line instead of a warning of Python's.

        Args:
            part: `"select"`, `"validate"` or `"test"`.
            statistics: Others than those of the settings.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "some scores are not defined", RuntimeWarning)
            scores = self.subject.trace(part, statistics=statistics, quiet=self.quiet)
        if parts := undefined(scores):
            line = f"{part}: some scores are not defined: {'; '.join(parts)}"
            if "correct" in scores.reasons.get("constant_metric", ()):
                line += f"; the model errs on none of the {scores.n_observations:,} examples, or on all"
            self.say(line)
        return scores

    def finish(self) -> None:
        """Remove what was kept for resuming, once results are written; trained weights stay in the output folder."""
        if self.checkpoints is not None:
            self.checkpoints.end()

    def cost(self) -> dict[str, Any]:
        """Seconds per stage and in all, the stages that were resumed, and the peaks of memory, as in results.json.

        Seconds and peaks are those of every process that had a part in the run.
        """
        peaks = {
            kind: None if peak is None else max(peak, self._peaks.get(kind, 0)) for kind, peak in peak_memory().items()
        }
        seconds = {**self.clock.seconds, "total": self.clock.total() + self._earlier}
        return {"seconds": seconds, "resumed": self.resumed, **peaks}


@contextmanager
def open_session(
    config: BenchConfig,
    *,
    given: Given | None = None,
    quiet: bool = True,
    say: Say = lambda _: None,
    resumable: bool = False,
) -> Iterator[Session]:
    """Load data and model, train what must be trained, and hold the context in which the stages run.

    Nothing is written before data and model are there and fit each other.

    Args:
        config: The settings.
        given: Model and data of the caller's own.
        quiet: Show no progress bars.
        say: Called with each line worth reading.
        resumable: Keep stages' results in the output folder, which is made, for an interrupted run to go on from.

    Raises:
        NotComparableError: A run to be repeated of other data or weights.
        SkillfastError: Data or a model that cannot be had, a device that is not there, an output folder that cannot be
            written.
    """
    check_metric_names(config.trace.metrics)
    device = choose_device(config.run.device) if given is None else module_device(given.model)
    config = config.replaced(dtype=choose_dtype(config.run.dtype, device))
    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(backends.use_backend(config.run.backend))
        stack.enter_context(limited_memory(config.run.memory_bytes))
        with clock.stage("data"), telling(say):
            subject = (
                load_subject(config, device, quiet=quiet, say=say) if given is None else given_subject(given, config)
            )
            check_never_seen(subject)
            covered = _certify(subject.model, say)
        session = Session(subject, covered, clock, quiet, say)
        earlier = None if config.run.replay is None else Earlier.read(config.run.replay)
        if earlier is not None:
            earlier.check(config, session.data_digests)
        if resumable:
            session.checkpoints = _checkpoints(session)
        try:
            _train(session, earlier)
            if earlier is not None:
                earlier.check_weights(session.weights, used_prompt(session.config, session.subject.model))
            stack.enter_context(session.subject.precision())
            yield session
        except BaseException:
            if session._last:
                say(f"stopped after stage {session._last}: the same command goes on from there")
            raise


def _certify(model: torch.nn.Module, say: Say) -> Coverage | None:
    """What the sites cover; a line where that is not everything, or cannot be told."""
    try:
        found = coverage(model)
    except SkillfastError as error:
        say(f"warning: not certified that the sites hold all that the blocks do: {error}")
        return None
    if not found.complete:
        say(f"warning: {found}")
    return found


def load_subject(config: BenchConfig, device: torch.device, *, quiet: bool, say: Say) -> Subject:
    """Load data and model, as the settings say; raises SkillfastError where they cannot be had."""
    if config.data.dataset != "text":
        from skillfast.runs.images import image_subject

        return image_subject(config, device, quiet=quiet, say=say)
    from skillfast.runs.text import causal_subject, predicts_tokens, text_subject, with_default_model

    config = with_default_model(config)
    if predicts_tokens(config):
        return causal_subject(config, device)
    return text_subject(config, device, quiet=quiet)


def _train(session: Session, earlier: Earlier | None) -> None:
    """Give the subject its weights: trained, or those that an earlier run trained and left."""
    subject, how = session.subject, session.subject.training
    if how.kept is not None and earlier is not None and earlier.has_weights:
        how = replace(how, run=partial(how.kept.load, earlier.directory), line="")
    if how.line:
        session.say(how.line)
    trained = session.stage(TRAIN, how.run, how.kept)
    subject.model.eval()
    session.subject = replace(subject, trained={"from": subject.source, **trained})


def _checkpoints(session: Session) -> Checkpoints:
    """What an interrupted run of the same settings, versions, data and weights left."""
    config = session.config
    identity = {
        **config.to_json(),
        "skillfast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "data": to_json(session.data_digests),
        "weights": weights_digest(session.subject.model),
        "prompt": None if (prompt := used_prompt(config, session.subject.model)) is None else prompt.sha256,
    }
    return Checkpoints(files.output_folder(config.run.output), identity, resume=config.run.resume, say=session.say)


def choose_device(name: str | None) -> torch.device:
    """The device by name, or CUDA where there is one; raises ArgumentError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device {name!r}: expected one that is there, got {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    return device


def choose_dtype(name: str | None, device: torch.device) -> str:
    """The dtype by name, or bfloat16 on a CUDA device that computes in it and float32 elsewhere."""
    if name is not None:
        return name
    halves = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if halves else "float32"
