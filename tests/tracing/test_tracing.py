from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit

import skillfast
from skillfast import Categorical, Continuous
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import find_sites


@contextmanager
def storing(model, sites):
    """Keeps every site's activations as they flow into the projection, and the logits, by plain hooks."""
    kept, logits = {site.name: [] for site in sites}, []
    handles = [
        model.get_submodule(site.path).register_forward_hook(
            lambda _, args, __, n=site.name: kept[n].append(args[0].detach())
        )
        for site in sites
    ]
    handles.append(model.register_forward_hook(lambda _, __, output: logits.append(output.detach())))
    yield kept, logits
    for handle in handles:
        handle.remove()


def pooled(kept, pool):
    """Every site's pooled activations [n, D], float64."""
    pools = {
        "mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "cls": lambda a: a[:, 0], "last": lambda a: a[:, -1],
    }  # fmt: skip
    rows = [torch.cat(parts) for parts in kept.values()]
    return torch.cat([(x if x.dim() == 2 else pools[pool](x)).double() for x in rows], 1).numpy()


def stored(model, batches, sites, pool):
    """The same of the model as it is, and its logits."""
    with storing(model, sites) as (kept, logits), torch.no_grad():
        for x, _ in batches:
            model(x)
    return pooled(kept, pool), torch.cat(logits)


@pytest.mark.parametrize("pool", ["mean", "cls", "max", "last"])
def test_a_trace_equals_stored_activations_and_numpy(vit, batches, pool):
    with storing(vit, find_sites(vit)) as (kept, outputs):
        scores = skillfast.trace(vit, batches, pool=pool)
    x, logits = pooled(kept, pool), torch.cat(outputs)
    untraced, _ = stored(vit, batches, scores.sites, pool)
    np.testing.assert_allclose(x, untraced, atol=1e-5, rtol=1e-5)  # tracing changes what is traced by rounding alone
    label = torch.cat([y for _, y in batches])
    loss = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    y = np.column_stack([
        torch.nn.functional.one_hot(label, 5), logits.argmax(1) == label, logits.softmax(1).amax(1), loss,
    ])  # fmt: skip
    want = np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :]
    assert scores.columns[-3:] == ("correct", "confidence", "loss")
    np.testing.assert_allclose(scores.pearson, want, atol=5e-6)  # a float32 forward: 2.2e-6 with torch 2.11
    np.testing.assert_allclose(scores.mean, x.mean(0), atol=1e-5)
    assert scores.fingerprint is not None
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_sites_can_be_chosen_by_kind_and_name(vit, batches):
    scores = skillfast.trace(vit, batches, sites=("head", "blocks.1.attn"))
    assert [site.name for site in scores.sites] == ["blocks.1.attn", "head"]
    whole = skillfast.trace(vit, batches)
    np.testing.assert_allclose(scores["head"].pearson, whole["head"].pearson, atol=1e-5)


def test_a_tracer_in_a_loop_of_ones_own(vit, batches):
    metrics = {"label": Categorical(5), "brightness": Continuous()}
    vit.train()  # a loop that trains
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with skillfast.Tracer(vit, metrics, sites=("mlp",)) as tracer:
        for x, y in batches:
            vit(x).sum().backward()
            valid = y != 4
            tracer.step(label=y, brightness=x.mean((1, 2, 3)), valid=valid)
        vit(images)
        tracer.discard()
    assert tracer.n_observations == int((labels != 4).sum())
    scores = tracer.compute()
    x, _ = stored(vit, [(images[labels != 4], None)], scores.sites, "mean")
    brightness = images[labels != 4].mean((1, 2, 3)).double().numpy()
    np.testing.assert_allclose(
        scores.pearson[:, scores.columns.index("brightness")],
        [np.corrcoef(column, brightness)[0, 1] for column in x.T],
        atol=5e-6,  # a float32 forward of other batches: 3.1e-6 with torch 2.11
    )
    assert scores.reasons == {"constant_metric": ("label:4",)}


pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")


@pytest.mark.parametrize("pool", ["mean", "none"])
@pytest.mark.parametrize("statistics", [("pearson",), ("auroc",), ("spearman", "mutual_info")])
def test_only_the_statistics_that_are_asked_for(vit, batches, pool, statistics):
    x, y = batches[0]
    with skillfast.Tracer(vit, {"label": Categorical(5)}, sites=("head",), pool=pool, statistics=statistics) as tracer:
        vit(x)
        tracer.step(label=y)
    found = {name for name in tracer.compute().arrays() if not name.endswith("_bound")} - {"mean", "std"}
    assert found == set(statistics)


def test_a_hook_that_never_fires_is_named(vit, batches):
    vit.blocks[2].mlp.fc2.forward = lambda x: x[..., :24]  # the module still runs: its hook fires
    vit.blocks[1].mlp.forward = lambda x: x  # this one's fc2 is never called
    with pytest.warns(RuntimeWarning, match=r"hook_never_fired \(blocks.1.mlp\)"):
        scores = skillfast.trace(vit, batches)
    assert scores.reasons["hook_never_fired"] == ("blocks.1.mlp",)
    assert np.isnan(scores["blocks.1.mlp"].pearson).all()
    assert np.isfinite(scores["blocks.2.mlp"].pearson).all()


def test_steps_and_forwards_must_alternate(vit, batches):
    x, y = batches[0]
    with skillfast.Tracer(vit, {"label": Categorical(5)}) as tracer:
        with pytest.raises(ModelError, match=r"expected a forward of the traced model since the last step"):
            tracer.step(label=y)
        vit(x)
        with pytest.raises(ModelError, match="expected one forward per step, got a second"):
            vit(x)
        tracer.discard()
        vit(x)
        tracer.step(label=y)
    assert tracer.n_observations == len(y)


def test_hooks_are_removed_after_an_exception(vit, batches):
    def fails(model, batch):
        model(batch[0])
        raise KeyError("of the user's own")

    with pytest.raises(KeyError, match="of the user's own"):
        skillfast.trace(vit, batches, forward=fails)
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_a_forward_of_the_users_own(vit, batches):
    def forward(model, batch):
        logits = model(batch[0])
        return logits, {"top": logits.amax(1)}

    scores = skillfast.trace(vit, batches, {"top": Continuous()}, forward=forward)
    assert scores.columns == ("top",)
    assert np.isfinite(scores.pearson).all()


def test_compiled_models_are_unwrapped_or_refused(vit, batches):
    compiled = torch.compile(vit)  # lazily: nothing is compiled before the first call
    with pytest.raises(ModelError, match=r"wrapped by torch\.compile"):
        skillfast.Tracer(compiled, {"label": Categorical(5)})
    np.testing.assert_array_equal(skillfast.trace(compiled, batches).pearson, skillfast.trace(vit, batches).pearson)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sites": ("mlp", "blocks.9.mlp")}, ArgumentError, "site 'blocks.9.mlp': expected one of mlp, attn, head or"),
        ({"sites": ()}, ArgumentError, "got none"),
        ({"pool": "median"}, ArgumentError, "pool: expected one of mean, cls, max, last, none, got 'median'"),
        ({"statistics": ("kendall",)}, ArgumentError, "statistics: expected some of"),
        ({"metrics": "regression"}, ArgumentError, "metrics: expected 'classification' or"),
        (
            {"metrics": {"speed": Continuous()}},
            ArgumentError,
            "metric 'speed': expected one of label, correct, .*forward=",
        ),
        ({"classes": 3}, ArgumentError, r"'label': expected class indices in \[0, 3\)"),
    ],
)
def test_trace_refuses(vit, batches, arguments, error, words):
    with pytest.raises(error, match=words):
        skillfast.trace(vit, batches, **arguments)


def test_trace_refuses_a_model_in_training_mode(vit, batches):
    with pytest.raises(ModelError, match=r"^trace: expected .*; call model.eval\(\)$"):
        skillfast.trace(vit.train(), batches)


def test_a_model_without_known_sites_is_refused(batches):
    with pytest.raises(ModelError, match="Sequential: expected blocks named as in a known family"):
        skillfast.trace(torch.nn.Sequential(torch.nn.Linear(3, 3)).eval(), batches)


class Mixed(torch.nn.Module):
    """Rows of the batch are merged in threes on the way, so that no row is a sample's."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})})]
        )

    def forward(self, x):
        merged = self.blocks[0]["attn"]["proj"](x.reshape(3, -1, 8))
        return merged.reshape(*x.shape)[:, 0, :5]


def test_a_model_whose_rows_are_no_samples_is_refused():
    with pytest.raises(
        ModelError, match=r"blocks.0.attn: expected one row per sample \(2\), or one per window of each"
    ):
        skillfast.trace(Mixed().eval(), [(torch.randn(2, 3, 8), torch.tensor([0, 1]))], classes=5)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
)
def test_sites_of_timms_families(name):
    model = timm.create_model(name, depth=2, embed_dim=48, num_heads=4, num_classes=3)
    sites = find_sites(model)
    assert [site.name for site in sites] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head"]
    assert [site.heads for site in sites] == [4, None, 4, None, None]
    assert all(model.get_submodule(site.path).in_features == site.width for site in sites)


def test_correlate_activations_that_exist():
    g = np.random.default_rng(0)
    x, label = g.normal(size=(200, 7)).astype(np.float32), g.integers(0, 3, 200)
    scores = skillfast.correlate(x, {"label": label, "right": label == 1, "loss": label * 0.5 + x[:, 0]})
    assert scores.columns == ("label:0", "label:1", "label:2", "right", "loss")
    np.testing.assert_allclose(scores.pearson[:, 3], scores.pearson[:, 1], atol=1e-12)
    np.testing.assert_allclose(scores.pearson[0, 0], np.corrcoef(x[:, 0], label == 0)[0, 1], atol=1e-6)
    for n, exact in ((64, True), (65, False)):  # up to 16 rows for each bin
        few = skillfast.correlate(x[:n], {"label": label[:n]}, statistics=("spearman",), bins=4)
        assert (few.spearman_bound.max() < 1e-9) == exact


def test_scores_are_saved_and_loaded(vit, batches, tmp_path):
    scores = skillfast.trace(vit, batches)
    path = scores.save(tmp_path / "new")
    loaded = skillfast.NeuronScores.load(tmp_path / "new")
    np.testing.assert_array_equal(loaded.pearson, scores.pearson)
    assert (loaded.sites, loaded.columns, loaded.fingerprint) == (scores.sites, scores.columns, scores.fingerprint)
    with pytest.raises(skillfast.SkillfastError, match=r"expected one of blocks\.0\..*, got 'blocks\.9\.mlp'"):
        loaded["blocks.9.mlp"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(skillfast.SkillfastError, match="expected a safetensors file, got one that is broken"):
        skillfast.NeuronScores.load(tmp_path / "new")
    with pytest.raises(skillfast.SkillfastError, match=r"; write it with NeuronScores\.save or `skillfast trace`$"):
        skillfast.NeuronScores.load(tmp_path / "nowhere")


def test_the_data_frame_is_long(vit, batches):
    scores = skillfast.trace(vit, batches)
    frame = scores.to_dataframe(metric="label", top=4)
    assert list(frame.columns) == [
        "site",
        "layer",
        "kind",
        "head",
        "expert",
        "unit",
        "metric",
        "statistic",
        "value",
        "n",
    ]
    assert len(frame) == 5 * 4 * 6
    assert set(frame["statistic"]) == {
        "pearson", "spearman", "spearman_bound", "auroc", "auroc_bound", "mutual_info",
    }  # fmt: skip
    assert str(frame["layer"].dtype) == "Int64"
    attention = scores.to_dataframe(site="blocks.2.attn", metric="loss")
    attention = attention[attention["statistic"] == "pearson"]
    assert len(attention) == 24
    assert attention["head"].tolist() == sorted([0, 1, 2] * 8)
    np.testing.assert_array_equal(attention["value"], scores["blocks.2.attn"].pearson[:, scores.columns.index("loss")])
    with pytest.raises(ArgumentError, match="metric: expected one of"):
        scores.to_dataframe(metric="nothing")


def test_the_size_of_the_state_is_known_and_told_before(vit, batches, monkeypatch):
    from skillfast.memory import state

    metrics = {"label": Categorical(5), "loss": Continuous()}
    for statistics, n_bootstrap in ((("pearson",), None), (("pearson", "auroc"), None), (("pearson",), 16)):
        acc = skillfast.NeuronStatistics(50, metrics, statistics, bins=16, n_bootstrap=n_bootstrap, buffer_rows=8)
        acc.calibrate(torch.randn(64, 50), {"label": torch.arange(64) % 5, "loss": torch.randn(64)})
        known = state.state_bytes(50, metrics, statistics, 16, n_bootstrap)
        columns = 1 + 6 + 2 * 6 + 6 * 6 + (n_bootstrap or 0) * (1 + 2 * 6)  # float64 of columns and replicates alone
        assert abs(acc.state_bytes - known) <= 8 * columns
    monkeypatch.setattr(state, "free_bytes", lambda _: 10_000)
    with pytest.warns(RuntimeWarning, match=r"the state of 384 neurons takes .* trace Pearson's r alone, with fewer"):
        skillfast.Tracer(vit, metrics, sites=("attn", "mlp", "head"))


def test_a_double_model_is_traced(batches):
    model = make_vit().double()
    scores = skillfast.trace(model, [(x.double(), y) for x, y in batches])
    np.testing.assert_allclose(scores.pearson, skillfast.trace(make_vit(), batches).pearson, atol=1e-4)
