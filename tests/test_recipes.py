"""Every page in docs/ has one script; it is run as it stands, and its scores are compared with numpy and scipy."""

from __future__ import annotations

import re
import runpy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import stats

import skillfast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from skillfast import NeuronScores

    Recipe = Callable[[str], dict[str, Any]]

DOCS = Path(__file__).parents[1] / "docs"
TESTED = ("hf-trainer", "nnsight", "npy", "processes", "training-loop", "transformer-lens", "tune-a-skill")


def script_of(page: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{page.name}: expected one python block, got {len(blocks)}"
    return blocks[0]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """Run a recipe in an empty folder; gives the variables that it leaves."""
    threads = torch.get_num_threads()

    def run(name: str) -> dict[str, Any]:
        path = tmp_path / "recipe.py"
        path.write_text(script_of(DOCS / f"recipe-{name}.md"), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        torch.set_num_threads(1)  # models this small only wait for more
        return runpy.run_path(str(path), run_name="__main__")

    yield run
    torch.set_num_threads(threads)


def check_scores(scores: NeuronScores, x: np.ndarray, columns: Sequence[np.ndarray]) -> None:
    """Every score against scipy on stored activations x [n, D] and one array [n] per column."""
    x = x.astype(np.float64)
    y = np.stack(columns, 1).astype(np.float64)
    n, width = x.shape
    assert scores.n_observations == n
    assert scores.pearson.shape == (width, len(columns))
    classes = [set(np.unique(column)) == {0.0, 1.0} for column in y.T]
    for name, array in scores.arrays().items():
        defined = np.broadcast_to(classes if name.startswith("auroc") else True, array.shape)
        np.testing.assert_array_equal(np.isfinite(array), defined, err_msg=name)
    pearson = (stats.zscore(x).T @ stats.zscore(y)) / n
    np.testing.assert_allclose(scores.pearson, pearson, atol=2e-6)
    ranks = stats.rankdata(x, axis=0)
    spearman = (stats.zscore(ranks).T @ stats.zscore(stats.rankdata(y, axis=0))) / n
    assert (abs(scores.spearman - spearman) <= scores.spearman_bound + 1e-6).all()
    assert scores.spearman_bound.max() < 0.1
    for j in np.flatnonzero(classes):
        positives = y[:, j] == 1
        u = ranks[positives].sum(0) - positives.sum() * (positives.sum() + 1) / 2
        auroc = u / (positives.sum() * (~positives).sum())
        assert (abs(scores.auroc[:, j] - auroc) <= scores.auroc_bound[:, j] + 1e-6).all()


def one_hot(label: torch.Tensor | np.ndarray, classes: int) -> list[np.ndarray]:
    return [np.asarray(label) == c for c in range(classes)]


def inputs_of(module: torch.nn.Module, forward: Callable[[], Any]) -> tuple[torch.Tensor, Any]:
    """What the module reads in a forward, by a plain hook, and what the forward returns."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        output = forward()
    handle.remove()
    (x,) = seen
    return x, output


def test_every_page_is_tested_and_listed() -> None:
    pages = sorted(page.name for page in DOCS.glob("recipe-*.md"))
    assert pages == [f"recipe-{name}.md" for name in TESTED]
    index = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((recipe-.*?\.md)\)", index)) == pages


def test_training_loop(recipe: Recipe, tmp_path: Path) -> None:
    left = recipe("training-loop")
    model, scores = left["model"], left["scores"]
    images, label = left["validation"].dataset.tensors
    losses = partial(torch.nn.functional.cross_entropy, reduction="none")
    for block in range(2):
        x, logits = inputs_of(model.blocks[block].mlp.fc2, lambda: model(images))
        columns = [*one_hot(label, 3), losses(logits, label).numpy()]
        check_scores(scores[f"blocks.{block}.mlp"], x.mean(1).numpy(), columns)
    for epoch in range(2):
        saved = skillfast.NeuronScores.load(tmp_path / f"epoch-{epoch}")
        assert np.array_equal(saved.pearson, scores.pearson) == (epoch == 1)


def test_tuning_a_skill(recipe: Recipe) -> None:
    left = recipe("tune-a-skill")
    for name, changed in left["changed"].items():
        assert not (changed & ~left["masks"].get(name, torch.zeros_like(changed))).any(), name
    assert left["own"] * 0.9 < left["tuned"] <= left["own"] < left["everything"] / 4


@pytest.mark.filterwarnings("ignore")
def test_hf_trainer(recipe: Recipe) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    left = recipe("hf-trainer")
    model, examples, history = left["model"].eval(), left["examples"][48:], left["callback"].history
    assert len(history) == 2
    batch = {name: torch.as_tensor(np.stack([e[name] for e in examples])) for name in examples[0]}
    # One example at a time and without its padding: nothing of the mask is left to get wrong.
    rows, losses = [], []
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        tokens, label = batch["input_ids"][i : i + 1, :length], batch["labels"][i : i + 1]
        forward = partial(model, input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=label)
        x, output = inputs_of(model.bert.encoder.layer[1].output.dense, forward)
        rows.append(x[0].mean(0).numpy())
        losses.append(output.loss.item())
    check_scores(left["scores"], np.stack(rows), [*one_hot(batch["labels"], 3), np.array(losses)])
    assert not np.array_equal(history[0].pearson, history[1].pearson)


@pytest.mark.filterwarnings("ignore")
def test_transformer_lens(recipe: Recipe) -> None:
    pytest.importorskip("transformer_lens")
    if int(version("transformer_lens").partition(".")[0]) < 4:
        pytest.skip("the recipe needs transformer_lens 4")
    left = recipe("transformer-lens")
    model, tokens, scores = left["model"], left["tokens"], left["scores"]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    columns = [loss.numpy(), (tokens[:, :-1] == 7).flatten().numpy()]
    assert set(scores) == {"blocks.1.mlp.hook_post", "blocks.1.attn.hook_z"}
    for point, result in scores.items():
        check_scores(result, cache[point][:, :-1].reshape(40 * 11, -1).numpy(), columns)


@pytest.mark.filterwarnings("ignore")
def test_nnsight(recipe: Recipe) -> None:
    pytest.importorskip("nnsight")
    pytest.importorskip("transformers")
    left = recipe("nnsight")
    model = left["model"]._module
    x, output = inputs_of(model.transformer.h[1].mlp.c_proj, lambda: model(left["tokens"]))
    confidence = output.logits[:, -1].softmax(-1).amax(-1)
    check_scores(left["scores"], x.mean(1).numpy(), [left["repeats"].numpy(), confidence.numpy()])


def test_npy(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    left = recipe("npy")
    scores, frame = left["scores"], left["frame"]
    stored = {
        name: np.concatenate([np.load(tmp_path / f"{name}-{shard}.npy") for shard in range(3)])
        for name in ("activations", "label", "loss")
    }
    assert len(stored["label"]) == 24_000
    check_scores(scores, stored["activations"], [*one_hot(stored["label"], 4), stored["loss"]])
    assert not scores.reasons
    auroc = frame[frame["statistic"] == "auroc"]
    first = auroc.groupby("metric", sort=False)["unit"].first()
    assert first.to_dict() == {"label:cat": 0, "label:dog": 1, "label:eel": 2, "label:fox": 3}

    # A shard in another process, as the page says: started from a saved accumulator, and saved itself.
    left["total"].like().save(tmp_path / "start")
    part = skillfast.NeuronStatistics.load(tmp_path / "start")
    part.update(np.load(tmp_path / "activations-0.npy"), left["values"][0])
    part.save(tmp_path / "part")
    part = skillfast.NeuronStatistics.load(tmp_path / "part")
    expected = left["parts"][0].compute()
    np.testing.assert_array_equal(part.compute().spearman, expected.spearman)
    np.testing.assert_allclose(part.compute().pearson, expected.pearson, atol=1e-7)


def test_processes(recipe: Recipe) -> None:
    left = recipe("processes")
    model, images, label, scores = (left[name] for name in ("model", "images", "label", "scores"))
    assert scores.n_observations == 384
    x, logits = inputs_of(model.blocks[1].mlp.fc2, lambda: model(images))
    loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    check_scores(scores["blocks.1.mlp"], x.mean(1).numpy(), [*one_hot(label, 3), loss.numpy()])
