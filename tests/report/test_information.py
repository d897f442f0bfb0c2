"""The page and the terminal on what is gone and what is hidden."""

from __future__ import annotations

import pytest
from msgspec import structs
from report_sample import sample_results

from skillfast.report import exports, summary_table
from skillfast.report.bench import identifiability, information, words
from skillfast.report.formatting import UNDEFINED, percent, points
from skillfast.results import records
from skillfast.results.bench import BenchResults


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
