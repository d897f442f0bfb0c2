"""What the page and the terminal say of accuracy over all examples and of correlations."""

from __future__ import annotations

import html
import io
import re

import report_sample as sample
from rich.console import Console

from skillfast import report
from skillfast.report.bench import evidence, figures, tradeoff
from skillfast.report.formatting import MINUS, UNDEFINED, data_name, model_name, percent, points
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.skills import Skills


def typed(results):
    return records.made(BenchResults, results)


def rendered(results):
    return report.render(typed(results), records.made(Skills, sample.sample_skills(results)))


def words(page):
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).replace(MINUS, "-").split())


def test_the_page_says_what_a_removal_costs_over_all_examples():
    results = sample.sample_results(2)
    results["model"]["trained"] |= {"from": "pretrained", "learning_rate": 2e-4, "n_train": 4800, "epochs": 3}
    results["model"]["soft_prompt"] = {
        "tokens": 16,
        "sha256": "ab" * 32,
        "origin": "tuned",
        "validation_accuracy": 0.875,
    }
    results["overall"]["removals"][1] |= {"change": -0.375, "accuracy": 0.485, "random_changes": [0.01, -0.02]}
    results["overall"]["removals"][0]["random_changes"] = [0.0]
    text = words(rendered(results))
    assert "came pretrained; all its weights were trained on 4,800 examples for 3 epochs at a learning rate of" in text
    assert (
        "a soft prompt of 16 virtual tokens, which was tuned on them while the model stayed as it was, to 87.5" in text
    )
    assert "Without the skill automobile, which is 119 neurons or 1.00\xa0% of all, it is right on 48.5\xa0%" in (
        " ".join(evidence.overall_say(typed(results)))
    )
    assert "a change of -37.5 points, the largest of the 2 removals" in text
    assert "between -2.00 and +1.00 in 3 draws" in text
    assert "a mean |r| (Pearson) of 0.78 with label, 0.35 with confidence." in text
    assert "Those of the last block alone have 0.58 with label, 0.15 with confidence." in text
    assert "Neurons that follow nothing have 0.04 on as many examples." in text
    assert "the last block 0.58 (0.83)" in text
    assert "loss is the same for all examples that skills are chosen from, so nothing follows it." in text
    assert "confidence is the same" not in text
    assert "0.78 (0.83)" in text
    assert "label:airplane head 0 -0.83 +0.78" in text
    assert "not defined (not defined)" not in text


def test_the_last_block_is_drawn_beside_all():
    """Bars by block and kind of the first metric that is followed; lines of all places, the last block and chance."""
    results = sample.sample_results(2)
    results["correlations"]["metrics"]["label"]["select"] = results["correlations"]["metrics"]["label"]["test"] = None
    results["correlations"]["metrics"]["confidence"]["sites"]["blocks.1.mlp"]["test"] = 0.25
    results["correlations"]["metrics"]["confidence"]["sites"]["head"]["test"] = 0.354
    made = typed(results)
    assert evidence.drawn_metric(made) == "confidence"
    figure = figures.correlation_by_block(made, "confidence")
    data = {trace["name"]: trace for trace in figure["data"]}
    assert list(data) == ["attention", "MLP", "classifier head", "all places", "the last block", "by chance"]
    assert data["MLP"]["x"] == ["0", "1", "2", "3"]
    assert data["MLP"]["y"] == [0.35, 0.25, 0.35, 0.35]
    assert data["classifier head"]["x"] == ["head"]
    levels = [data[name]["y"] for name in ("all places", "the last block", "by chance")]
    assert levels == [[0.35] * 5, [0.15] * 5, [0.04] * 5]
    heard = "all places 0.35, the last block 0.15, by chance 0.04, most at head, 0.35"
    assert figure["layout"]["meta"]["told"] == heard
    assert "correlation-blocks" in rendered(results)
    for values in results["correlations"]["metrics"].values():
        values["test"] = None
    assert 'id="correlation-blocks"' not in rendered(results)


def test_a_run_without_these_keys_has_a_page_without_them():
    results = sample.sample_results(2, optional=False)
    text = words(rendered(results))
    assert "Accuracy over all examples" not in text
    assert "How closely single neurons" not in text


def test_the_terminal_says_them_too():
    console = Console(file=io.StringIO(), width=160)
    console.print(report.summary_table(typed(sample.sample_results(2))))
    shown = " ".join(console.file.getvalue().replace(MINUS, "-").split())
    assert "all examples, largest change │ -30.5" in shown
    results = typed(sample.sample_results(2))
    retained = results.baseline.accuracy + sum(results.removal_matrix[i][1 - i] for i in (0, 1)) / 2
    forgotten = results.baseline.accuracy + sum(results.removal_matrix[i][i] for i in (0, 1)) / 2
    assert f"accuracy retained (other classes) │ {percent(retained)} │" in shown.replace(" %", "\N{NO-BREAK SPACE}%")
    assert f"accuracy forgotten (removed class) │ {percent(forgotten)} │" in shown.replace(" %", "\N{NO-BREAK SPACE}%")
    assert "top-10 |r| with label │ 0.78" in shown
    assert "pairs that compete; smallest to be seen │ 1; +0.60 (+3.00 points)" in shown
    assert "pairs that are linked; smallest to be seen │ 0; -0.90 (-7.00 points)" in shown


def test_the_headline_says_what_other_values_leave_of_the_drop():
    results = sample.sample_results(2)
    drops = {"zero": 0.8, "mean": 0.75, "resample": 0.7, "constant": 0.0625}
    ends = {name: [drop - 0.05, drop + 0.025] for name, drop in drops.items()}
    results["replacements"]["average"] = {**drops, "ci95": ends, "marked": True}
    text = words(rendered(results))
    assert "At their means the class loses 75.0 points, at another example's activations 70.0, and at the" in text
    assert "the constants that cost the model least 6.25: so much of it" in text
    console = Console(file=io.StringIO(), width=160)
    console.print(report.summary_table(typed(results)))
    shown = " ".join(console.file.getvalue().split())
    assert "target drop at their means │ 75.0 (70.0 to 77.5)" in shown
    assert "target drop at another example's │ 70.0 (65.0 to 72.5)" in shown
    assert "target drop at fitted constants │ 6.25 (1.25 to 8.75)" in shown
    results["replacements"]["average"]["marked"] = False
    assert "At their means" not in words(rendered(results))


def names(results):
    return model_name(typed(results)), data_name(typed(results))


def test_a_folders_name_is_short():
    results = sample.sample_results(2)
    assert names(results) == ("vit_digits_128x4", "digits")
    results["model"]["name"] = "hf:/home/somebody/models/encoder/model"
    results["config"] |= {"data_file": "/data/train.tsv", "test_file": "/data/dev.tsv"}
    assert names(results) == ("encoder/model", "dev.tsv")
    results["model"]["name"] = "hf:prajjwal1/bert-tiny"
    results["config"]["test_file"] = None
    assert names(results) == ("prajjwal1/bert-tiny", "train.tsv")


def test_candidates_that_were_not_measured_further_say_so():
    """What took too little stands in the table with its drop alone, and has no point; one beyond its limit no test."""
    results = sample.sample_results()
    found = results["selection"]["candidates"]
    found[1]["test"] = None
    made = records.made(BenchResults, results)
    weak, harmful, *rest = tradeoff.rows(made)
    assert weak[2:] == [points(found[0]["drop"]), *[UNDEFINED] * 7]
    assert harmful[5:8] == [UNDEFINED] * 3
    assert harmful[2] != UNDEFINED
    assert all(row[5] != UNDEFINED for row in rest)
    assert "1 that took less than half as much as the best were not measured on other classes." in tradeoff.say(made)[0]
    lines = {(line["name"], line["line"]["dash"]): line for line in tradeoff.trade_off(made)["data"]}
    assert len(lines["Pearson correlation", "dot"]["x"]) == 3
    assert len(lines["Pearson correlation", "solid"]["x"]) == 2
    assert len(lines["Pearson correlation", "solid"]["error_x"]["array"]) == 2
