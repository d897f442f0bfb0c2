from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import make_vit, one_line
from tiny_models import save_model

import skillfast
from skillfast import BenchConfig, NeuronRanking, SweepResult
from skillfast.data.splits import Splits, TensorImages
from skillfast.errors import DataError, ModelError
from skillfast.evaluation.probes import Reader
from skillfast.models.digests import weights_digest
from skillfast.progress import Forecast
from skillfast.results.records import to_json
from skillfast.runs import bench as protocol
from skillfast.runs import images, never_seen, subject
from skillfast.runs.checkpoints import FOLDER, Checkpoints
from skillfast.runs.cost import Clock
from skillfast.runs.kept import JSON, MODEL, WEIGHTS, Kept
from skillfast.runs.provenance import data_digests
from skillfast.runs.session import Session

pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined", "ignore:no neuron was chosen")


def opened(folder, said=None, clock=None, *, resume=True, **identity):
    say = (lambda _: None) if said is None else said.append
    kept = Checkpoints(folder, identity, resume=resume, say=say)
    return Session(None, None, clock or Clock(), True, say, kept)


def never():
    raise AssertionError("made again")


def test_a_finished_stage_is_not_run_again(tmp_path):
    value = {"a": [1, 2.5, None], "b": "ü"}
    assert opened(tmp_path).stage("choose", lambda: value, JSON) == value
    clock = Clock()
    again = opened(tmp_path, clock=clock)
    assert again.stage("choose", never, JSON) == value
    assert again.resumed == ["choose"]
    earlier = clock.seconds["choose"]
    assert earlier > 0
    assert again.stage("choose", lambda: 3, JSON, part="other") == 3  # another part is another result
    assert clock.seconds["choose"] > earlier
    assert again.cost()["seconds"]["total"] >= earlier


def test_a_stage_that_breaks_off_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path).stage("choose", interrupted, JSON)
    assert opened(tmp_path).stage("choose", lambda: 1, JSON) == 1


@pytest.mark.parametrize(("settings", "name"), [({"share": 0.1}, "share"), ({"share": 0.03, "new": 1}, "new")])
def test_other_settings_start_anew(tmp_path, settings, name):
    opened(tmp_path, share=0.03).stage("choose", lambda: 1, JSON)
    said = []
    assert opened(tmp_path, said, **settings).stage("choose", lambda: 2, JSON) == 2
    assert said == [f"the unfinished run in {tmp_path} had another {name}: starting anew"]


def test_other_data_start_anew(tmp_path):
    opened(tmp_path, data="x").stage("choose", lambda: 1, JSON)
    said = []
    assert opened(tmp_path, said, data="x").stage("choose", never, JSON) == 1
    assert opened(tmp_path, said, data="y").stage("choose", lambda: 2, JSON) == 2
    assert said == [f"the unfinished run in {tmp_path} had another data: starting anew"]


def test_no_resume_starts_anew(tmp_path):
    opened(tmp_path).stage("choose", lambda: 1, JSON)
    assert opened(tmp_path, resume=False).stage("choose", lambda: 2, JSON) == 2


@pytest.mark.parametrize("broken", ["{", '{"schema": "else"}', ""])
def test_a_broken_stage_is_made_anew(tmp_path, broken):
    opened(tmp_path).stage("choose", lambda: 1, JSON)
    (tmp_path / FOLDER / "choose" / "result" / "value.json").write_text(broken)
    said = []
    assert opened(tmp_path, said).stage("choose", lambda: 2, JSON) == 2
    assert len(said) == 1
    assert "stage choose is made anew" in said[0]
    assert opened(tmp_path).stage("choose", never, JSON) == 2


def test_a_full_disk_costs_the_way_back_and_not_the_run(tmp_path):
    def full(value, folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    said = []
    session = opened(tmp_path, said)
    assert session.stage("choose", lambda: 1, Kept(full, never)) == 1
    assert said == ["warning: stage choose cannot be kept (No space left on device): an interrupted run will repeat it"]
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["run.json"]


def test_a_digest_is_of_every_value_in_the_order_of_the_names():
    model, wanted = make_vit(), hashlib.sha256()
    for name in sorted(state := model.state_dict()):
        wanted.update(f"{name} float32 [{', '.join(map(str, state[name].shape))}]\n".encode())
        wanted.update(np.ascontiguousarray(state[name].numpy()).tobytes())
    assert weights_digest(model) == wanted.hexdigest()
    with torch.no_grad():  # one value, and not the first
        model.blocks[1].mlp.fc2.weight.t()[7, 5] += 1e-3
    assert weights_digest(model) not in (wanted.hexdigest(), weights_digest(model.bfloat16()))
    with pytest.raises(ModelError, match=r"weights: expected values of \S+, got none, on the meta device; load them"):
        weights_digest(torch.nn.Linear(2, 2, device="meta"))


def test_every_example_and_label_of_a_part_is_in_its_digest():
    images, labels = torch.randn(40, 3, 4, 4), torch.arange(40) % 4
    changed = images.clone()
    changed[17, 2, 3, 3] += 1e-3

    def digests(images, labels, classes="abcd"):
        part = TensorImages(images, labels, classes)
        return data_digests(Splits("x", tuple(classes), part, TensorImages(images[:1], labels[:1], classes), part))

    found = digests(images, labels)
    assert found == digests(images.clone(), labels.clone())
    assert found.select == found.test != found.validate
    assert digests(changed, labels).test.examples != found.test.examples
    assert digests(changed, labels).test.labels == found.test.labels
    for other in (digests(images, labels.flip(0)), digests(images, labels, "abce")):
        assert other.test.labels != found.test.labels
        assert other.test.examples == found.test.examples


def test_results_come_back_as_they_were(tmp_path, vit, batches):
    ranking = skillfast.attribute(vit, batches)
    ranking.save(tmp_path)
    again = NeuronRanking.load(tmp_path)
    np.testing.assert_array_equal(again.values, ranking.values)
    assert (again.sites, again.columns, again.fingerprint) == (ranking.sites, ranking.columns, ranking.fingerprint)
    skills = skillfast.select(ranking)
    assert all(skillfast.select(again)[name].neurons.keys() == skill.neurons.keys() for name, skill in skills.items())
    swept = skillfast.sweep(vit, batches, [skillfast.Condition(s) for s in skills.values()], keep_embeddings=True)
    swept.save(tmp_path)
    back = SweepResult.load(tmp_path)
    assert back.classes == swept.classes
    assert back.predictions is None
    for name in ("per_class_accuracy", "per_class_margin", "top2", "embeddings"):
        np.testing.assert_array_equal(getattr(back, name), getattr(swept, name))


@pytest.fixture(scope="module")
def small(pictures):
    """Settings of a run of seconds that goes through every stage."""
    return {
        "dataset": "imagefolder",
        "data_dir": str(pictures),
        "model": "vit_tiny_patch16_224",
        "model_kwargs": {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3},
        "epochs": 2,
        "statistics": ("pearson",),
        "method": "attribution",
        "control_draws": 1,
        "never_seen": ("blue",),
    }


def without_cost(report):
    return {key: value for key, value in to_json(report.results).items() if key != "cost"}


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return skillfast.bench(BenchConfig.of(**small, output=str(folder)))


def test_a_finished_run_leaves_its_files_alone(undisturbed):
    names = {path.name for path in undisturbed.directory.iterdir()}
    assert names == {
        "results.json", "skills.json", "scores.safetensors", "decisions.safetensors", "removal_matrix.csv",
        "report.html", WEIGHTS
    }  # fmt: skip
    assert undisturbed.results.cost.resumed == []


def test_a_model_that_never_saw_a_class_stands_beside_its_removal(undisturbed, small, pictures):
    """It is the model that the same training makes of a folder without the class, but for its name."""
    config = BenchConfig.of(**small)
    (found,) = [
        values.never_seen
        for values in undisturbed.results.information.per_class.values()
        if values.never_seen is not None
    ]
    made = images.image_subject(config, torch.device("cpu"), quiet=True, say=print)
    other, trained = images.train_anew(config, made.splits.without(2), torch.device("cpu"))
    assert (found.n_train, trained["n_train"], undisturbed.results.model.trained.n_train) == (32, 32, 48)
    labels = made.splits.test.labels.numpy()
    predicted, probed = never_seen.read_model(other, made.loader("test"), made.splits.classes, Reader(labels, 3, None))
    right = [float((predicted == labels)[labels == label].mean()) for label in range(3)]
    assert found.retained == pytest.approx((right[0] + right[1]) / 2)
    assert found.recall == right[2]
    assert found.recall_refitted == pytest.approx((probed == labels)[labels == 2].mean())
    changes = np.array(undisturbed.results.removal_matrix[2]) + undisturbed.results.baseline.per_class
    assert found.retained_removed == pytest.approx(changes[:2].mean())
    assert undisturbed.results.cost.seconds.never_seen > 0
    seen = made.training.run()
    assert seen["n_train"] == 48
    assert weights_digest(made.model) == undisturbed.results.model.weights.sha256  # and this the model itself
    assert weights_digest(other) != weights_digest(made.model)


def test_the_trained_weights_can_be_loaded(undisturbed, small, tmp_path):
    """As a checkpoint, they need no training and do the same."""
    config = {name: value for name, value in small.items() if name not in ("epochs", "never_seen")}
    checkpoint = str(undisturbed.directory / WEIGHTS)
    again = skillfast.bench(BenchConfig.of(**config, checkpoint=checkpoint, output=str(tmp_path)))
    assert again.results.removal_matrix == undisturbed.results.removal_matrix
    assert again.results.model.trained.source == "checkpoint"
    like = BenchConfig.of(like=str(undisturbed.directory), checkpoint=checkpoint)
    assert like.ablate.never_seen == ()  # these weights were not trained by a recipe of ours
    assert not (tmp_path / WEIGHTS).exists()  # it has them


@pytest.mark.parametrize(
    ("module", "name", "finished"),
    [
        (images.training, "finetune", []),
        (subject.Subject, "trace", ["train"]),
        (protocol.selection, "attribute", ["train", "trace"]),
        (protocol.selection, "try_on", ["train", "trace", "select: attribution"]),
        (protocol, "_sweep", ["train", "trace", "select: attribution", "choose"]),
        (protocol, "compare_embeddings", ["train", "trace", "select: attribution", "choose", "sweep", "shares"]),
        (
            never_seen,
            "read_model",
            ["train", "trace", "select: attribution", "choose", "sweep", "shares", "embeddings"],
        ),
        (
            protocol,
            "trace_over_forward",
            [
                "train",
                "trace",
                "select: attribution",
                "choose",
                "sweep",
                "shares",
                "embeddings",
                "never_seen: blue",
                "identifiability",
                "trade_off",
                "replace",
                "trace_test",
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interrupted_run_goes_on_after_its_last_stage(
    undisturbed, small, tmp_path, monkeypatch, module, name, finished
):
    config = BenchConfig.of(**small, output=str(tmp_path))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            skillfast.bench(config, say=said.append)
    assert not (tmp_path / "results.json").exists()
    assert any(line.endswith("the same command goes on from there") for line in said) == bool(finished)
    said.clear()
    report = skillfast.bench(config, say=said.append)
    assert report.results.cost.resumed == finished
    assert any(line.startswith("an unfinished run goes on after") for line in said) == bool(finished)
    assert json.dumps(without_cost(report)) == json.dumps(without_cost(undisturbed))
    seconds = to_json(report.results.cost.seconds)
    assert seconds["total"] >= sum(value for stage, value in seconds.items() if stage != "total") * 0.99
    assert not (tmp_path / FOLDER).exists()
    torch.testing.assert_close(
        skillfast.load_skills(tmp_path)["red"].neurons, skillfast.load_skills(undisturbed.directory)["red"].neurons
    )


def test_another_share_trains_again(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "_sweep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            skillfast.bench(BenchConfig.of(**small, output=str(tmp_path)))
    said = []
    report = skillfast.bench(BenchConfig.of(**small, share=0.02, output=str(tmp_path)), say=said.append)
    assert report.results.cost.resumed == []
    assert any("had another share: starting anew" in line for line in said)


def test_what_a_stage_foretells_bears_its_name():
    said = []
    session = Session(None, None, Clock(), True, said.append)
    session.stage("select", lambda: Forecast("60 steps", 60), part="mask keep 5")
    Forecast("nobody is told", 1)
    assert said == ["select: mask keep 5: 60 steps"]


def test_a_language_model_that_was_trained_is_read_from_the_folder_that_it_is_left_in(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")
    from skillfast.models.huggingface import load_language_model
    from skillfast.runs.text import _folder_of

    folder = save_model(tmp_path / "saved")
    trained, other = (load_language_model(str(folder)) for _ in range(2))
    with torch.no_grad():
        trained.model.classifier.bias += 1
    (tmp_path / "stage").mkdir()
    _folder_of(trained).save({"finetune": "all", "epochs": 3}, tmp_path / "stage")
    (tmp_path / "run").mkdir()
    (tmp_path / "stage" / MODEL).rename(tmp_path / "run" / MODEL)  # all that a finished run leaves
    assert weights_digest(other.model) != weights_digest(trained.model)
    assert _folder_of(other).load(tmp_path / "run") == {"finetune": "all", "epochs": 3}
    assert weights_digest(other.model) == weights_digest(trained.model)
    (tmp_path / "run" / MODEL / "model.safetensors").write_bytes(b"x")
    assert "expected a whole folder, got" in one_line(DataError, _folder_of(other).load, tmp_path / "run")
