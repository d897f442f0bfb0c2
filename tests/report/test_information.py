"""The page and the terminal on what is gone and what is hidden."""

from __future__ import annotations

import pytest
from msgspec import structs
from report_sample import sample_results, sample_skills

from skillfast.report import exports, summary_table
from skillfast.report.bench import identifiability, information, words
from skillfast.report.bench.page import render
from skillfast.report.formatting import UNDEFINED, percent, points
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.skills import Skills


@pytest.fixture
def results():
    return records.made(BenchResults, sample_results(10))


def test_classes_are_called_gone_hidden_or_still_read(results):
    mean, *rows = information.rows(results)
    assert mean[:5] == ("mean", "", "85.0\N{NO-BREAK SPACE}%", "18.0\N{NO-BREAK SPACE}%", "79.0\N{NO-BREAK SPACE}%")
    assert [row[1] for row in rows] == ["gone", "hidden", "still read", *["hidden"] * 7]
    values = results.information.per_class["bird"]
    assert information.verdict(structs.replace(values, readout_lost=0.9, information_lost=0.7)) == "partly gone"
    assert information.verdict(structs.replace(values, readout_lost=0.1, information_lost=0.95)) == "gone"
    assert information.verdict(structs.replace(values, information_lost=None)) == UNDEFINED
    assert information.say(results)[-1] == "Of 10 classes: 1 gone, 8 hidden, 1 still read."


def test_who_signs_reads_what_is_lost_beside_what_a_removal_takes(results):
    for name, drop, lost, *_ in words.verdict_rows(results):
        assert drop.startswith(points(results.verdicts[name].target_drop))
        assert lost == percent(results.information.per_class[name].information_lost)
    card = exports.card(results)
    row = results.verdicts["bird"]
    assert f"| {points(row.others_lose_at_most)} |" in next(line for line in card.splitlines() if "| bird |" in line)
    unread = structs.replace(results, information=None)
    assert {row[2] for row in words.verdict_rows(unread)} == {UNDEFINED}


def test_sentences_say_what_comes_back(results):
    text = " ".join(information.say(results)).replace("\N{NO-BREAK SPACE}", " ")
    assert "has lost 85.0 % (83.0 % to 88.0 %)" in text
    assert "30 steps of tuning the classifier on 5 examples" in text
    assert "on those of other classes alone to 2.0 %" in text
    unread = structs.replace(results, information=structs.replace(results.information, relearned=None))
    assert "tuning" not in " ".join(information.say(unread))


def test_the_terminal_says_both(results):
    cells = [list(column.cells) for column in summary_table(results).columns]
    found = dict(zip(cells[0], cells[1], strict=True))
    assert str(found["information lost (refitted probe)"]).startswith("18.0")
    assert str(found["readout lost"]).startswith("85.0")


def test_a_removal_stands_beside_a_model_that_never_saw_the_class(results):
    (row,) = information.never_seen_rows(results)
    wanted = ("2.0 %", "12.0 %", "98.0 %", "83.0 %", "96.0 %", "97.0 %")
    assert row == ("bird", *(text.replace(" ", "\N{NO-BREAK SPACE}") for text in wanted))
    said = information.never_seen_say(results)
    assert said.startswith("A model of the same architecture was trained by the same recipe on 540 examples, none")
    cells = [list(column.cells) for column in summary_table(results).columns]
    found = dict(zip(cells[0], cells[1], strict=True))
    assert found["bird, information lost: removed; never seen"] == "; ".join(row[1:3])
    assert found["bird, accuracy on others: removed; never seen"] == "; ".join(row[5:])
    values = results.information.per_class
    other = structs.replace(values["bird"].never_seen, n_train=550)
    two = {**values, "cat": structs.replace(values["cat"], never_seen=other)}
    several = structs.replace(results, information=structs.replace(results.information, per_class=two))
    assert information.never_seen_say(several).startswith("For each of 2 classes a model of the same architecture")
    assert "on 540 to 550 examples" in information.never_seen_say(several)
    asked = structs.replace(results, config={**results.config, "never_seen": ["bird", "cat"]})
    assert "--never-seen bird,cat" in words.command(asked)
    none = {name: structs.replace(row, never_seen=None) for name, row in values.items()}
    alone = structs.replace(results, information=structs.replace(results.information, per_class=none))
    assert information.beside(alone) == information.beside(structs.replace(results, information=None)) == {}
    pages = [render(found, records.made(Skills, sample_skills(sample_results(10)))) for found in (results, alone)]
    assert [page.count("Beside a model that never saw the class") for page in pages] == [1, 0]


def test_flagged_classes_are_named_with_why(results):
    mean, *rows = identifiability.rows(results)
    assert mean[-1] == "2 of 10"
    assert [row[-1] for row in rows[:4]] == [
        "",
        "control above 10.0\N{NO-BREAK SPACE}%",
        "halves share less than 30.0\N{NO-BREAK SPACE}%",
        "",
    ]
    first, second, last = identifiability.say(results)
    assert "cost it 80.0 points more than other examples" in first
    assert "share 61.0" in second
    assert "two seeds share 55.0 % (chance: 2.0 %; 3 of 10 classes)" in second.replace("\N{NO-BREAK SPACE}", " ")
    assert [row[-2] for row in rows[2:4]] == ["55.0\N{NO-BREAK SPACE}%", "not learned again"]
    values = structs.replace(results.identifiability.per_class["bird"], overlap=0.5, seed_overlap=0.1)
    assert identifiability.why(values, results.identifiability) == "seeds share less than 30.0\N{NO-BREAK SPACE}%"
    assert last == "Flagged: automobile, bird."
    calm = {name: structs.replace(row, flagged=False) for name, row in results.identifiability.per_class.items()}
    quiet = structs.replace(results, identifiability=structs.replace(results.identifiability, per_class=calm))
    assert identifiability.say(quiet)[-1] == "No class is flagged."
    cells = [list(column.cells) for column in summary_table(results).columns]
    assert "2 flagged" in str(dict(zip(cells[0], cells[1], strict=True))["chosen for a class; arbitrary group"])
