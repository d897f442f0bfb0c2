"""What differs between a run and its replay, on records alone."""

from __future__ import annotations

import copy

import pytest
import report_sample as sample

from skillfast.report import replay_text
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.replay import Difference, Replay, replayed
from skillfast.results.skills import Skills

RESULTS = sample.sample_results(3)
RESULTS["selectivity"]["other_abs_change"] = 0.5
SKILLS = sample.sample_skills(RESULTS)
SAID = "numbers are equal within 1e-06 + 0.0001 of their size"


def compared(change=None, skills=SKILLS):
    again = copy.deepcopy(RESULTS)
    if change is not None:
        change(again)
    one, other = (records.from_json(BenchResults, values, "", "") for values in (RESULTS, again))
    return replayed(
        "runs/a",
        (one, records.from_json(Skills, SKILLS, "", "")),
        (other, records.from_json(Skills, skills, "", "")),
    )


def named(found):
    return [(each.field.removeprefix("results.json: "), each.earlier, each.again) for each in found.differences]


@pytest.mark.parametrize(("step", "differs"), [(5.0e-5, False), (-5.0e-5, False), (5.4e-5, True), (-5.4e-5, True)])
def test_numbers_are_equal_within_the_tolerance(step, differs):
    """0.5 may be 1e-6 + 1e-4 * 0.5 off."""

    def change(again):
        again["selectivity"]["other_abs_change"] = 0.5 + step

    found = compared(change)
    assert named(found) == ([("selectivity.other_abs_change", 0.5, 0.5 + step)] if differs else [])
    assert found.exit_code == (3 if differs else 0)
    if differs:
        assert found.differences[0].size == pytest.approx(5.4e-5)


def leaves(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(leaves, inner)) if inner else 1


def test_every_value_and_every_skill_is_counted():
    values = records.to_json(records.from_json(BenchResults, RESULTS, "", ""))
    counted = sum(leaves(value) for name, value in values.items() if name not in ("environment", "config", "cost"))
    assert compared().n == counted + 3

    def change(again):
        again["model"]["weights"]["revision"] = "abc"  # one more

    assert compared(change).n == counted + 3 + 1


def test_small_numbers_are_equal_within_a_millionth():
    def change(again, step):
        again["cost"]["samples_per_s"] = 1.0  # not compared
        again["verdicts"]["bird"]["harm"]["cross_fitted"] += step

    assert compared(lambda again: change(again, 9e-7)).differences == ()
    (found,) = compared(lambda again: change(again, 3e-6)).differences
    assert found.field == "results.json: verdicts.bird.harm.cross_fitted"


def test_what_is_no_number_is_equal_or_not():
    def change(again):
        again["selection"]["chosen"][1] = 0
        again["identifiability"]["per_class"]["bird"]["flagged"] = False
        again["verdicts"]["bird"]["verdict"] = "undecided"
        again["interference"]["competition"] = []
        del again["overall"]
        again["standard_metrics"]["cosine"] = None

    found = named(compared(change))
    lost = [each for each in found if each[0].startswith("overall")]
    pairs = [each for each in found if each[0].startswith("interference.competition")]
    assert len(lost) > 10
    assert all(each[2] == "absent" for each in lost)
    assert pairs[-1] == ("interference.competition", "absent", [])
    assert all(each[2] == "absent" for each in pairs[:-1])
    rest = [each for each in found if each not in lost and each not in pairs]
    assert {name for name, _, _ in rest} == {
        "selection.chosen[1]", "identifiability.per_class.bird.flagged", "verdicts.bird.verdict",
        "standard_metrics.cosine",
    }  # fmt: skip
    assert ("identifiability.per_class.bird.flagged", True, False) in rest
    assert Difference("x", True, False).size is Difference("x", 1.0, None).size is None


def test_skills_are_compared_neuron_by_neuron():
    skills = copy.deepcopy(SKILLS)
    head = skills["skills"][0]["neurons"]["head"]
    count = sum(map(len, skills["skills"][0]["neurons"].values()))
    unused = next(i for i in range(128) if i not in head)
    skills["skills"][0]["neurons"]["head"] = sorted([*head[1:], unused])
    found = compared(skills=skills)
    assert [(each.field, each.earlier, each.again) for each in found.differences] == [
        ("skills.json: airplane", f"{count} neurons", f"{count - 1} of these and 1 others")
    ]
    del skills["skills"][0]
    assert compared(skills=skills).differences[0].again == "0 of these and 0 others"


def test_cost_settings_and_versions_are_no_difference():
    def change(again):
        again["cost"]["forward_s"] = 99.0
        again["config"]["device"] = "cuda"
        again["environment"]["torch"] = "3"
        again["environment"]["libraries"] = {}

    found = compared(change)
    assert found.exit_code == 0
    assert [(each.field, each.earlier, each.again) for each in found.environment] == [
        ("torch", "2.15.0", "3"), ("libraries.timm", "1.0.31", "absent"), ("libraries", "absent", {}),
    ]  # fmt: skip
    first, second = replay_text(found).splitlines()
    assert first == f"replay of runs/a: all {found.n:,} values are equal; {SAID}"
    assert second == "  ran on: torch: 2.15.0, now 3; libraries.timm: 1.0.31, now absent; libraries: absent, now {}"


def test_the_largest_differences_are_shown_first():
    def change(again):
        again["removal_matrix"][0][0] += 0.25
        again["removal_matrix"][1][1] += 0.5
        again["verdicts"]["bird"]["verdict"] = "undecided"
        for i, row in enumerate(again["interference"]["overlap"]):
            for j in range(len(row)):
                row[j] = abs(row[j] - 0.001 * (1 + i + j))
        for removal in again["overall"]["removals"]:
            removal["random_changes"] = [value + 0.002 for value in removal["random_changes"]]

    found = compared(change)
    lines = replay_text(found).splitlines()
    assert lines[0] == f"replay of runs/a: {len(found.differences)} of {found.n:,} values differ; {SAID}"
    assert lines[1].startswith("  results.json: verdicts.bird.verdict: ")
    assert lines[2].startswith("  results.json: removal_matrix[1][1]: ")
    assert lines[2].endswith(" (0.5 apart)")
    assert lines[3].endswith(" (0.25 apart)")
    assert len(found.differences) == 27
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  and 7 more"


def test_as_many_differences_as_are_shown_leave_none():
    def change(again):
        for i in range(3):
            again["removal_matrix"][i] = [value / 2 + 0.1 for value in again["removal_matrix"][i]]
        for part, rows in (("removal_matrix", again["oracle"]), ("overlap", again["interference"])):
            rows[part] = [[abs(value / 2 - 0.1) for value in row] for row in rows[part]]

    found = compared(change)
    some = Replay(found.directory, found.n, found.differences[:20], ())
    assert len(replay_text(some).splitlines()) == 1 + 20
    assert len(replay_text(found).splitlines()) == 1 + 20 + 1
