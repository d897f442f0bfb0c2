"""Several tasks on one model: overlaps against sets and draws, effects against plain ablation and scikit-learn."""

from __future__ import annotations

import itertools
import json
import warnings

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import one_line
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from tiny_models import WORDS, save_model

from skillfast import BenchConfig, Skill
from skillfast.cli import main
from skillfast.errors import ArgumentError
from skillfast.evaluation.tasks import RIDGE, Outputs, TaskMeasures, _pearson, expected_shared, overlaps
from skillfast.metrics import Categorical, Continuous, parse_metrics
from skillfast.models.sites import find_sites
from skillfast.results import records
from skillfast.results.evaluation import EvaluationResults
from skillfast.results.records import to_json
from skillfast.runs.session import open_session
from skillfast.runs.tasks import check_tasks, compare_tasks, task_skills
from skillfast.skills.skill import random_skills

pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
TASKS = ("label", "column:length", "confidence", "column:genre")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Classifiers of texts whose class is told by a word, their length and a genre."""
    path = tmp_path_factory.mktemp("tasks")
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    for model_class in ("BertForSequenceClassification", "LlamaForSequenceClassification"):
        save_model(path / model_class, model_class, **names)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(150):
        text = " ".join([*rng.choice(WORDS, size=2 + i % 11), ("bad", "good")[i % 2], ("film", "story")[i % 3 == 0]])
        rows.append(f"{text}\t{('neg', 'pos')[i % 2]}\t{2 + i % 11}\t{('film', 'story')[i % 3 == 0]}")
    (path / "x.tsv").write_text("\n".join(["text\tlabel\tlength\tgenre", *rows]) + "\n", encoding="utf-8")
    return path


def subject_of(folder, model_class):
    config = BenchConfig.of(
        model=f"hf:{folder / model_class}", dataset="text", data_file=str(folder / "x.tsv"), batch_size=16,
        metrics=TASKS, statistics=("pearson", "auroc"),
    )  # fmt: skip
    with open_session(config) as session:
        return session.subject


def plain(subject, part, skill=None):
    """Logits and what enters the classifier, a text at a time, a skill's neurons set to 0 by hooks of our own."""
    model, embeddings = subject.model, []
    sites = {site.name: site for site in find_sites(model)}
    handles = []
    for name, index in ({} if skill is None else skill.neurons).items():

        def zero(_, args, index=index):
            x = args[0].clone()
            x[..., index] = 0
            return (x,)

        handles.append(
            model.get_submodule(sites["head" if name == "head" else name].path).register_forward_pre_hook(zero)
        )
    head = model.get_submodule(sites["head"].path)
    handles.append(
        head.register_forward_pre_hook(lambda _, args: embeddings.append(args[0][0].reshape(-1, args[0].shape[-1])[-1]))
    )
    dataset = getattr(subject.splits, part)
    with torch.no_grad():
        logits = [model(dataset.collate([dataset[i]])[0])[0] for i in range(len(dataset))]
    for handle in handles:
        handle.remove()
    return torch.stack(logits).double(), torch.stack(embeddings).double().numpy(), dataset


@pytest.mark.parametrize("model_class", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_effects_are_those_of_a_plain_loop(folder, model_class):
    subject = subject_of(folder, model_class)
    scores = subject.trace("select")
    found = to_json(compare_tasks(subject, scores, TASKS, share=0.2, draws=2, seed=4))
    names = ["label", "length", "confidence", "genre"]
    skills = task_skills(scores, names, "pearson", 0.2)
    assert found["names"] == names
    assert len({len(skill) for skill in skills}) == 1
    _, rows, select = plain(subject, "select")
    scaler = StandardScaler().fit(rows)
    probe = RidgeCV(RIDGE).fit(scaler.transform(rows), select.table.columns["length"])
    intact = plain(subject, "test")

    def values(logits, embeddings, dataset):
        length = dataset.table.columns["length"]
        p, labels = logits.softmax(1).amax(1).numpy(), dataset.labels.numpy()
        right = logits.argmax(1).numpy() == labels
        return {
            "label: accuracy": right.mean(),
            "length: R² of a probe": probe.score(scaler.transform(embeddings), length),
            "length: r of a probe": np.corrcoef(probe.predict(scaler.transform(embeddings)), length)[0, 1],
            "confidence: mean": p.mean(),
            "confidence: r with intact": np.corrcoef(p, intact[0].softmax(1).amax(1).numpy())[0, 1],
            "confidence: AUROC of right": roc_auc_score(right, p),
        }

    def check(got, want):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name

    check(found["intact"], values(*intact))
    assert found["intact"]["confidence: r with intact"] == pytest.approx(1)
    assert set(found["intact"]) == {*values(*intact), "genre: accuracy of a probe"} == set(found["measured"])
    assert "not give out length" in found["measured"]["length: R² of a probe"]
    assert "give out length: Pearson's r with the truth" in found["measured"]["length: r of a probe"]
    rng = np.random.default_rng(4)
    changes = []
    for skill, removal in zip(skills, found["removals"], strict=True):
        want = values(*plain(subject, "test", skill))
        check(removal["values"], want)
        check(removal["change"], {name: value - values(*intact)[name] for name, value in want.items()})
        drawn = [values(*plain(subject, "test", s)) for s in random_skills(skill, scores.sites, 2, rng)]
        for name in want:
            mean = np.mean([d[name] for d in drawn])
            assert removal["random"]["values"][name]["mean"] == pytest.approx(mean, abs=2e-3, rel=1e-3), name
        changes.append(abs(removal["change"]["confidence: mean"]))
    assert max(changes) > 1e-2


def test_a_tasks_neurons_have_the_largest_statistic_of_any_of_its_classes(folder):
    subject = subject_of(folder, "BertForSequenceClassification")
    scores = subject.trace("select")
    for method in ("pearson", "auroc"):
        skill = task_skills(scores, ["genre"], method, 0.1, max_site_share=1.0)[0]
        columns = [i for i, c in enumerate(scores.columns) if c.startswith("genre:")]
        values = np.abs(scores.statistic(method)[:, columns] - (0.5 if method == "auroc" else 0)).max(1)
        slices = scores.site_slices()
        chosen = np.concatenate([values[slices[s]][i.numpy()] for s, i in skill.neurons.items()])
        best = np.sort(np.nan_to_num(values, nan=-1))[-int(0.1 * scores.n_neurons) :]
        np.testing.assert_allclose(np.sort(chosen), best)
    message = one_line(ArgumentError, task_skills, scores, ["confidence"], "auroc", 0.1)
    assert "task 'confidence': expected a metric with auroc" in message


def test_overlaps_are_those_of_sets_and_chance_is_that_of_draws(vit):
    sites = find_sites(vit)
    rng = np.random.default_rng(0)
    base = Skill("a", {"blocks.0.mlp": torch.arange(30), "blocks.1.attn": torch.arange(8), "head": torch.arange(3)})
    other = Skill("b", {"blocks.0.mlp": torch.arange(20, 60), "blocks.1.attn": torch.arange(6, 10)})
    third = Skill("c", {"blocks.2.mlp": torch.arange(20, 60), "blocks.1.attn": torch.tensor([7])})
    found = to_json(overlaps([base, other, third], sites))
    assert found["neurons"] == [41, 44, 41]
    assert found["shared"] == [[41, 12, 1], [12, 44, 1], [1, 1, 41]]
    assert found["jaccard"][0][1] == pytest.approx(12 / (41 + 44 - 12))
    assert len(found["in_several"]) == 12
    three = [entry for entry in found["in_several"] if len(entry["tasks"]) == 3]
    assert three == [{"site": "blocks.1.attn", "neuron": 7, "tasks": ["a", "b", "c"]}]
    widths = {site.name: site.width for site in sites}

    def of_any(skill: Skill, site: str) -> np.ndarray:
        return rng.choice(widths[site], len(skill.neurons[site]), replace=False)

    both = base.neurons.keys() & other.neurons.keys()
    drawn = [sum(len(np.intersect1d(of_any(base, s), of_any(other, s))) for s in both) for _ in range(3000)]
    want = expected_shared(base, other, sites)
    assert found["expected_shared"][0][1] == want
    assert np.mean(drawn) == pytest.approx(want, abs=4 * np.std(drawn) / np.sqrt(3000))
    assert found["expected_jaccard"][0][1] == pytest.approx(want / (85 - want))
    assert all(found["expected_shared"][i][i] is None for i in range(3))


def test_confidence_tells_nothing_apart_where_all_are_right_or_wrong():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    both, right, wrong = (
        Outputs(logits, torch.tensor(labels), np.zeros((3, 1), np.float32))
        for labels in ([1, 0, 1], [0, 0, 1], [1, 1, 0])
    )
    measures = TaskMeasures(parse_metrics(["confidence"], ["a", "b"]), both, {}, {}, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        areas = [measures.values(found)["confidence: AUROC of right"] for found in (both, right, wrong)]
    assert areas[0] == 0.5  # the wrong one is between the others
    assert np.isnan(areas[1:]).all()


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["label"], "tasks: expected two different ones or more, got label"),
        (["label", "label"], "got label, label"),
        (["label", "token_log_probability"], "expected metrics of a classifier, got token_log_probability"),
        (["label", "nothing"], "metric 'nothing': expected one of"),
    ],
)
def test_tasks_that_cannot_be_compared(tasks, words):
    assert words in one_line(ArgumentError, check_tasks, tasks)


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in arguments])


def test_the_command(folder, tmp_path):
    options = [
        "evaluate", "--model", f"hf:{folder / 'BertForSequenceClassification'}", "--dataset", "text", "--data-file",
        folder / "x.tsv", "--pool", "cls", "--statistics", "pearson", "--shares", "0.2", "--layers", "all", "--scales",
        "0", "--control-draws", 1, "--batch-size", 32, "--quiet", "--output", tmp_path,
    ]  # fmt: skip
    result = run(*options, "--tasks", "label,column:length,confidence")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, records.schema(EvaluationResults))
    assert found["tasks"]["names"] == ["label", "length", "confidence"]
    for i, j in itertools.combinations(range(3), 2):
        assert found["tasks"]["shared"][i][j] == found["tasks"]["shared"][j][i] <= found["tasks"]["neurons"][i]
    assert {o["skill"] for o in found["outcomes"]} == {"neg", "pos"}  # of --metrics alone
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert 'id="tasks-shared"' in page
    assert "without length" in page
    for change, words in [
        (["--tasks", "label"], "expected two different ones"),
        (["--tasks", "label,loss", "--method", "mask"], "which ranks neurons for classes alone"),
        (["--tasks", "label,loss", "--metrics", "token_log_probability"], "tasks: expected a classifier's --metrics"),
    ]:
        result = run(*options, *change)
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert len(result.output.strip().splitlines()) == 1


def test_every_measure_of_a_task_says_what_it_is():
    rng = np.random.default_rng(0)
    rows, held = rng.normal(size=(2, 60, 4)).astype(np.float32)
    columns = [
        {"length": x @ [1.0, 2, 0, 0] + 0.1 * rng.normal(size=60), "genre": np.where(x[:, 3] > 0, "film", "story")}
        for x in (rows, held)
    ]
    logits, labels = torch.from_numpy(rng.normal(size=(60, 2))), torch.from_numpy(rng.integers(0, 2, 60))
    kinds = {"length": Continuous(), "genre": Categorical(["film", "story"])}
    names = ["label", "correct", "loss", "confidence", "column:length", "column:genre"]
    tasks = parse_metrics(names, ["a", "b"], kinds)
    intact = Outputs(logits, labels, held)
    measures = TaskMeasures(tasks, intact, columns[1], columns[0], rows)
    found = measures.values(Outputs(logits + 1 * (labels == 0)[:, None] * torch.tensor([1.0, 0]), labels, held))
    assert found["length: R\N{SUPERSCRIPT TWO} of a probe"] > 0.99
    assert found["genre: accuracy of a probe"] > 0.8
    assert found["loss: mean"] < measures.values(intact)["loss: mean"]
    assert measures.values(intact)["loss: r with intact"] == pytest.approx(1)
    probe = (
        "the model does not give out {}: {} of a linear probe of it, from the embeddings that enter the classifier, "
        "fitted on those of the intact model on other examples"
    )
    right = "share of held-out examples that are predicted right"
    assert measures.words == {
        "label: accuracy": right,
        "correct: accuracy": right,
        "loss: mean": "mean loss on held-out examples",
        "loss: r with intact": "Pearson's r of each example's loss with the intact model's",
        "confidence: mean": "mean confidence on held-out examples",
        "confidence: r with intact": "Pearson's r of each example's confidence with the intact model's",
        "confidence: AUROC of right": "AUROC: how well confidence tells right predictions from wrong ones",
        "length: R\N{SUPERSCRIPT TWO} of a probe": probe.format("length", "R\N{SUPERSCRIPT TWO}"),
        "length: r of a probe": probe.format(
            "length", "Pearson's r with the truth, which a mere shift of the embeddings leaves,"
        ),
        "genre: accuracy of a probe": probe.format("genre", "accuracy"),
    }


def test_what_only_rounding_moves_has_no_correlation():
    x = np.linspace(1, 2, 9)
    assert _pearson(x, x**2) == pytest.approx(np.corrcoef(x, x**2)[0, 1])
    assert _pearson(x, 1e6 + 0.1 * x) == pytest.approx(1)
    for constant in (np.zeros(9), np.full(9, 0.1), 1e6 + 1e-5 * x, -1e6 - 1e-5 * x):
        assert np.isnan(_pearson(x, constant))
        assert np.isnan(_pearson(constant, x))
