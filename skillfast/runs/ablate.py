"""`skillfast ablate`: what skills that were found elsewhere do when they are removed or amplified."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.ablation.donors import donors
from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import SweepResult, sweep
from skillfast.runs.session import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from skillfast.runs.config import BenchConfig
    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores
    from skillfast.vocabulary import Mode


def ablated(
    config: BenchConfig,
    skills: Sequence[Skill],
    components: Sequence[str],
    *,
    mode: Mode = "zero",
    reference: NeuronScores | None = None,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> SweepResult:
    """Accuracy on the test part without and with each skill's intervention.

    Args:
        config: Model, data, and the factor on the skills' activations.
        skills: What to change, one condition each, named as the skill.
        components: Kinds of sites in which neurons are changed.
        mode: What is left, as in `Condition`; donors are drawn from the part to select on.
        reference: Scores of this model, for `mode="mean"`.
        quiet: Show no progress bars.
        say: Called with each line worth reading.

    Raises:
        SkillfastError: Anything that stops the run, in one line.
    """
    conditions = [Condition(skill, tuple(components), config.ablate.scale, mode, name=skill.name) for skill in skills]
    with open_session(config, quiet=quiet, say=say) as session:
        subject, bank = session.subject, None
        if mode == "resample":
            seed = config.run.seed
            bank = session.stage(
                "donors", lambda: donors(subject.model, subject.loader("select"), skills, seed=seed, quiet=quiet)
            )
            say(f"{len(bank)} donors drawn from {len(subject.splits.select)} examples to select on")
        return session.stage(
            "sweep",
            lambda: sweep(
                subject.model,
                subject.loader("test"),
                conditions,
                reference=reference,
                donors=bank,
                classes=subject.splits.classes,
                quiet=quiet,
            ),
        )
