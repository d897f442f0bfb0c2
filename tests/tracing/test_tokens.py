"""Tokens as observations: the numbers are those of numpy, and no tensor of all tokens outlives its layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_vit, one_line

import skillfast
from skillfast import Categorical, Continuous, Tracer, backends
from skillfast.errors import ArgumentError, ModelError
from skillfast.memory.living import LivingBytes
from skillfast.models.sites import find_sites

METRICS = {"label": Categorical(5), "loss": Continuous()}
BLOCKS = ("mlp", "attn")


def stored_tokens(model, images, sites):
    """Every site's activations as they flow in [batch, tokens, D] by forward hooks."""
    kept = {}
    handles = [
        model.get_submodule(site.path).register_forward_hook(
            lambda _, args, __, n=site.name: kept.__setitem__(n, args[0].detach())
        )
        for site in sites
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return torch.cat([kept[site.name] for site in sites], -1).double()


def data(batches):
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return images, labels, torch.randn(len(labels), generator=torch.Generator().manual_seed(3))


def pearson(x, values, mask=None):
    """Pearson's r of rows [n, tokens, D] with columns [n, tokens, M], by numpy."""
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    rows, columns = x[keep].numpy(), values[keep].numpy()
    return np.corrcoef(rows.T, columns.T)[: rows.shape[1], rows.shape[1] :]


def columns_of(labels, loss, tokens):
    one_hot = torch.nn.functional.one_hot(labels, 5).double()
    columns = torch.cat([one_hot, loss.double()[..., None]], -1)
    return columns if columns.dim() == 3 else columns[:, None].expand(-1, tokens, -1)


def test_every_token_counts(vit, batches):
    images, labels, loss = data(batches)
    tracer = Tracer(vit, METRICS, sites=BLOCKS, pool="none", statistics=("pearson",))
    start = 0
    with tracer, torch.no_grad():
        for x, y in batches:
            vit(x)
            tracer.step(label=y, loss=loss[start : start + len(y)])
            start += len(y)
    scores = tracer.compute()
    x = stored_tokens(vit, images, scores.sites)
    assert scores.n_observations == x.shape[0] * x.shape[1] == tracer.n_observations
    steady = x.flatten(0, 1).std(0).numpy() > 1e-2
    want = pearson(x, columns_of(labels, loss, x.shape[1]))
    np.testing.assert_allclose(scores.pearson[steady], want[steady], atol=5e-6)
    np.testing.assert_allclose(scores.mean, x.flatten(0, 1).mean(0), atol=1e-5)
    np.testing.assert_allclose(scores.std[steady], x.flatten(0, 1).std(0, correction=0)[steady], rtol=1e-4)


def test_groups_go_with_the_examples_that_have_tokens(vit, batches):
    images, labels, loss = data(batches)
    mask = torch.ones(37, 17, dtype=torch.bool)
    mask[[0, 5, 20]] = False
    found = []
    for rows, by in ((torch.arange(37), 2), (mask.any(1).nonzero()[:, 0], 2), (torch.arange(37), 3)):
        tracer = Tracer(vit, METRICS, sites=("attn",), pool="none", statistics=("pearson",), n_bootstrap=16)
        with tracer, torch.no_grad():
            tracer.expect(mask[rows])
            vit(images[rows])
            tracer.step(label=labels[rows], loss=loss[rows], groups=rows // by)
        found.append(tracer.compute())
    np.testing.assert_allclose(found[0].pearson_low, found[1].pearson_low, atol=1e-5)
    assert np.abs(found[0].pearson_low - found[2].pearson_low).mean() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_metrics_of_each_token(vit, batches, masked):
    images, labels, _ = data(batches)
    tokens = vit.pos_embed.shape[1]
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 5, (len(images), tokens), generator=generator)
    loss = torch.randn(len(images), tokens, generator=generator) + 7
    mask = torch.rand(len(images), tokens, generator=generator) > 0.3 if masked else None
    tracer = Tracer(vit, METRICS, sites=BLOCKS, pool="none", statistics=("pearson",))
    backends.calls.clear()
    with tracer, torch.no_grad():
        for part in torch.arange(len(images)).split(10):
            tracer.expect(None if mask is None else mask[part], label=labels[part], loss=loss[part])
            vit(images[part])
            tracer.step()
    assert backends.calls["act_pool_accumulate", "native"] == 4 * 6
    scores = tracer.compute()
    x = stored_tokens(vit, images, scores.sites)
    assert scores.n_observations == (x.shape[0] * x.shape[1] if mask is None else int(mask.sum()))
    steady = x.flatten(0, 1).std(0).numpy() > 1e-2
    want = pearson(x, columns_of(labels, loss, tokens), mask)
    np.testing.assert_allclose(scores.pearson[steady], want[steady], atol=5e-6)


def test_expected_metrics_of_examples_equal_those_told_later(vit, batches):
    images, labels, loss = data(batches)
    results = []
    for before in (True, False):
        tracer = Tracer(vit, METRICS, sites=BLOCKS, pool="none")
        with tracer, torch.no_grad():
            if before:
                tracer.expect(label=labels, loss=loss)
            vit(images)
            tracer.step(**({} if before else {"label": labels, "loss": loss}))
        results.append(tracer.compute())
    for name, array in results[0].arrays().items():
        if name.startswith(("pearson", "spearman", "auroc")):
            kept = results[1].std > 1e-2
            np.testing.assert_allclose(array[kept], getattr(results[1], name)[kept], atol=1e-5)


def test_a_forward_that_is_discarded_is_not_counted(vit, batches):
    images, labels, loss = data(batches)
    results = []
    for extra in (False, True):
        tracer = Tracer(vit, METRICS, sites=BLOCKS, pool="none", statistics=("pearson",))
        with tracer, torch.no_grad():
            tracer.expect(label=labels, loss=loss)
            vit(images)
            tracer.step()
            if extra:
                tracer.expect(label=labels.flip(0), loss=loss)
                vit(images * 2)
                tracer.discard()
        results.append(tracer.compute())
    np.testing.assert_array_equal(results[0].pearson, results[1].pearson)


def test_ranks_come_from_sampled_tokens():
    """A neuron's ranks over the tokens, from a 32nd of them, lie within the bounds."""
    model = make_vit(depth=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1500, 3, 16, 16, generator=generator)
    loss = images.mean((1, 2, 3)) * 10
    labels = (loss > 0).long()
    tracer = Tracer(model, METRICS, sites=BLOCKS, pool="none", bins=32)
    with tracer, torch.no_grad():
        for x, y, v in zip(images.split(100), labels.split(100), loss.split(100), strict=True):
            model(x)
            tracer.step(label=y, loss=v)
    with pytest.warns(RuntimeWarning, match="constant_metric"):
        scores = tracer.compute()
    from scipy import stats

    assert scores.n_observations == 1500 * 17
    assert abs(scores.n_ranked - 1500 * 17 / 32) < 4 * np.sqrt(1500 * 17 / 32)
    x = stored_tokens(model, images, scores.sites)
    ranks = stats.rankdata(x.flatten(0, 1).float().numpy(), axis=0)
    values = loss[:, None].expand(-1, x.shape[1]).flatten().numpy()
    rho = np.corrcoef(ranks.T, stats.rankdata(values))[:-1, -1]
    assert np.mean(np.abs(scores.spearman[:, -1] - rho) <= scores.spearman_bound[:, -1]) > 0.95


def test_many_examples_in_a_fixed_order_are_calibrated_on_random_ones():
    """Sorted by brightness: the first rows alone would make poor edges."""
    model = make_vit(depth=1, embed_dim=6, num_heads=1)
    images = torch.randn(2400, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    bright = torch.linspace(-2, 2, 2400)
    images += bright[:, None, None, None]
    batches = [(x, y) for x, y in zip(images.split(200), bright.split(200), strict=True)]
    scores = skillfast.trace(
        model, batches, {"bright": Continuous()}, sites=BLOCKS, pool="none", bins=64,
        forward=lambda model, batch: (model(batch[0]), {"bright": batch[1]}),
    )  # fmt: skip
    assert scores.n_observations == 2400 * 17
    assert abs(scores.n_ranked - 1275) < 150
    assert "stale_edges" not in scores.reasons


def test_masked_tokens_are_never_sampled():
    from skillfast.statistics.tokens import TokenStatistics

    mask = torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) > 0.6
    mask[:, 4] = True
    seen = torch.zeros(50 * 9, dtype=torch.bool)
    for seed in range(40):
        statistics = TokenStatistics(
            3, METRICS, ("spearman",), seed=seed, device=torch.device("cpu"), bins=4, buffer_rows=64, n_bootstrap=None
        )
        picked = statistics.pick(50, 9, mask)
        assert 20 < len(picked) <= 64  # 16 rows per bin
        seen[picked] = True
    assert not seen[~mask.flatten()].any()
    assert seen[mask.flatten()].float().mean() > 0.99


def test_confidence_over_examples(vit, batches):
    """Tokens of an example are one group: the interval is that of the examples, not of 17 times as many."""
    images, labels, loss = data(batches)
    widths = {}
    for pool in ("mean", "none"):
        tracer = Tracer(vit, METRICS, sites=("attn",), pool=pool, statistics=("pearson",), n_bootstrap=64)
        with tracer, torch.no_grad():
            for part in torch.arange(len(images)).split(10):
                vit(images[part])
                tracer.step(label=labels[part], loss=loss[part])
        scores = tracer.compute()
        widths[pool] = np.nanmedian(scores.pearson_high[:, -1] - scores.pearson_low[:, -1])
        assert (scores.pearson_low <= scores.pearson)[np.isfinite(scores.pearson_low)].all()
    naive = 4 / np.sqrt(17 * len(images))
    assert widths["none"] > naive / 2  # 1 / sqrt(number of tokens) would be far too sure
    assert widths["mean"] > widths["none"]


@pytest.mark.parametrize("expected", [False, True])
def test_no_tensor_of_all_tokens_outlives_its_layer(expected):
    model = make_vit(img_size=32, patch_size=2, depth=6, embed_dim=96, num_heads=4)  # 257 tokens
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    tokens = model.pos_embed.shape[1]
    every = 8 * tokens * sum(s.width for s in find_sites(model) if s.kind != "head") * 4
    peaks = []
    for traced in (False, True):
        tracer = Tracer(model, {"label": Categorical(5)}, sites=BLOCKS, pool="none", statistics=("pearson",))
        with torch.no_grad(), tracer:  # the first forward sets the centers
            model(images)
            tracer.step(label=labels)
        context = tracer if traced else torch.no_grad()
        with torch.no_grad(), context, LivingBytes() as memory:
            if traced and expected:
                tracer.expect(label=labels)
            model(images)
            peak = memory.peak
            if traced:
                tracer.step(**({} if expected else {"label": labels}))
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 0.1 * every
    assert 0.1 * every < peaks[0]


def test_trace_takes_a_second_forward_for_metrics_of_tokens(vit, batches):
    runs = []

    def forward(model, batch):
        runs.append(len(batch[0]))
        with torch.no_grad():
            logits = model(batch[0])
        tokens = model.pos_embed.shape[1]
        return logits, {"brightness": batch[0].mean((1, 2, 3))[:, None] + torch.arange(tokens)}

    scores = skillfast.trace(
        vit, batches, {"brightness": Continuous()}, sites=BLOCKS, pool="none", statistics=("pearson",), forward=forward
    )
    assert len(runs) == 2 * len(batches)
    images = torch.cat([x for x, _ in batches])
    x = stored_tokens(vit, images, scores.sites)
    values = images.double().mean((1, 2, 3))[:, None, None] + torch.arange(x.shape[1])[None, :, None]
    steady = x.flatten(0, 1).std(0).numpy() > 1e-2
    np.testing.assert_allclose(scores.pearson[steady], pearson(x, values)[steady], atol=2e-5)


@pytest.mark.parametrize("name", ["self", "valid", "groups", "mask"])
def test_a_metric_has_a_name_that_step_has_not(vit, name):
    told = one_line(ArgumentError, Tracer, vit, {name: Continuous(), "label": Continuous()})
    assert told == f"metrics: expected other names than step() has of its own, got {name}; rename them"


def test_metrics_of_tokens_far_from_0_lose_nothing(vit, batches):
    images, _, _ = data(batches)
    values = 1e9 + torch.randn(len(images), 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for offset in (0, 1e9):
        tracer = Tracer(vit, {"y": Continuous()}, sites=BLOCKS, pool="none", statistics=("pearson",))
        with tracer, torch.no_grad():
            tracer.expect(y=values - offset)
            vit(images)
            tracer.step()
        found.append(tracer.compute().pearson)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_what_cannot_be_counted_is_told(vit, batches):
    images, labels, loss = data(batches)
    tracer = Tracer(vit, METRICS, sites=BLOCKS, pool="none")
    per_token = torch.zeros(len(images), 17)
    with tracer, torch.no_grad():
        vit(images)
        text = one_line(ArgumentError, tracer.step, label=labels, loss=per_token)
        assert "tell values per token to tracer.expect() before the forward" in text
        tracer.discard()
        assert "expected all of the metrics" in one_line(ArgumentError, tracer.expect, loss=per_token)
        tracer.expect(label=labels, loss=per_token)
        vit(images)
        assert "expected no values after expect()" in one_line(ArgumentError, tracer.step, label=labels)
        tracer.discard()
        tracer.expect(label=labels, loss=per_token)
        vit(images)
        valid = torch.ones(len(images), dtype=torch.bool)
        assert "expected no values after expect()" in one_line(ArgumentError, tracer.step, valid=valid)
        tracer.discard()
        tracer.expect(label=labels, loss=loss[:3])
        assert "metric 'loss': expected values [37] or [37, 17]" in one_line(ArgumentError, vit, images)
        tracer.discard()
    sure = Tracer(vit, METRICS, sites=BLOCKS, pool="none", statistics=("pearson",), n_bootstrap=16)
    with sure, torch.no_grad():
        sure.expect(label=labels, loss=per_token)
        assert "leave out n_bootstrap" in one_line(ArgumentError, vit, images)


def test_sites_of_several_resolutions_are_refused():
    import timm

    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, num_classes=5).eval()
    tracer = Tracer(model, {"label": Categorical(5)}, sites=("mlp",), pool="none")
    with tracer, torch.no_grad():
        text = one_line(ModelError, model, torch.randn(1, 3, 56, 56))
    assert "trace sites of one resolution at a time" in text


def test_the_classifier_has_observations_of_its_own(vit, batches):
    scores = skillfast.trace(vit, batches, pool="none", statistics=("pearson",))
    pooled = skillfast.trace(vit, batches, statistics=("pearson",))
    np.testing.assert_allclose(scores["head"].pearson, pooled["head"].pearson, atol=1e-5)


def test_a_group_that_saw_no_forward_waits(vit):
    """The classifier alone runs: the tokens of the blocks have no observation in that step."""
    with skillfast.Tracer(vit, {"label": Categorical(5)}, sites=("mlp", "head"), pool="none") as tracer:
        vit.head(torch.randn(4, 24))
        tracer.step(label=torch.arange(4))
    assert [group.statistics.n_observations for group in tracer._groups()] == [0, 4]


@pytest.mark.filterwarnings("ignore:some scores are not defined")
@pytest.mark.parametrize("told", [True, False])  # before the forward, per token, or after it, per example
def test_a_site_that_saw_no_forward_has_no_scores(vit, told):
    x, loss = torch.randn(4, 17, 24), torch.randn(4, 17)
    with skillfast.Tracer(vit, {"loss": Continuous()}, sites=("mlp",), pool="none") as tracer, torch.no_grad():
        if told:
            tracer.expect(loss=loss)
        vit.blocks[0](x)
        tracer.step(**({} if told else {"loss": loss[:, 0]}))
    scores = tracer.compute()
    assert scores.reasons == {"hook_never_fired": tuple(site.name for site in scores.sites[1:])}
    for name in ("pearson", "mean", "std"):
        assert np.isfinite(getattr(scores["blocks.0.mlp"], name)).all()
        for site in scores.sites[1:]:
            assert np.isnan(getattr(scores[site.name], name)).all()


def test_examples_that_are_left_out_have_no_ranks(vit):
    """As if they had not been in the batch."""
    x, loss = torch.randn(6, 17, 24), torch.randn(6)
    valid = torch.tensor([False, True, True, False, True, True])
    found = []
    for rows, told in ((slice(None), {"valid": valid}), (valid, {})):
        with skillfast.Tracer(vit, {"loss": Continuous()}, sites=("mlp",), pool="none") as tracer, torch.no_grad():
            for block in vit.blocks:
                block(x[rows])
            tracer.step(loss=loss[rows], **told)
        found.append(tracer.compute())
    assert [scores.n_ranked for scores in found] == [4 * 17] * 2
    np.testing.assert_allclose(found[0].spearman, found[1].spearman, atol=1e-9)


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_what_an_open_forward_forbids_says_its_name(vit, batches, pool):
    with skillfast.Tracer(vit, {"label": Categorical(5)}, pool=pool) as tracer, torch.no_grad():
        vit(batches[0][0])
        closed = (tracer.calibrate, tracer.all_reduce, tracer.like, tracer.state_dict, tracer.replicated)
        for call in (*closed, tracer.compute, tracer.expect):
            text = one_line(ModelError, call)
            assert text.startswith(f"{call.__name__}: expected step() or discard() after the last forward")
        tracer.discard()


def test_a_site_without_tokens_takes_values_of_one_token(vit):
    x, loss = torch.randn(30, 24), torch.randn(30)
    with skillfast.Tracer(vit, {"loss": Continuous()}, sites=("head",), pool="none") as tracer, torch.no_grad():
        tracer.expect(loss=loss[:, None])
        vit.head(x)
        tracer.step()
    scores = tracer.compute()
    assert scores.n_observations == 30
    want = np.corrcoef(x.T, loss)[-1, :-1]
    np.testing.assert_allclose(scores.pearson[:, 0], want, atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_what_was_expected_of_a_forward_is_forgotten_with_it(vit, batches, pool):
    images, label = batches[0]
    hidden = torch.arange(17).expand(len(images), -1) < 5
    found = []
    for discarded in (True, False):
        with skillfast.Tracer(vit, {"label": Categorical(5)}, sites=("mlp",), pool=pool) as tracer, torch.no_grad():
            if discarded:
                tracer.expect(hidden, label=label.flip(0))
                vit(images)
                tracer.discard()
            vit(images)
            tracer.step(label=label)
            tracer.expect(hidden, label=label)
            vit(images)
            tracer.step()
            vit(images)
            with pytest.raises(ArgumentError, match=r"expected values for \['label'\], got \[\]"):
                tracer.step()
            tracer.discard()
        found.append(tracer.compute().pearson)
    np.testing.assert_allclose(*found, atol=1e-6)


def test_what_is_expected_takes_the_place_of_what_was(vit, batches):
    images, _ = batches[0]
    loss = torch.randn(len(images), generator=torch.Generator().manual_seed(1))
    hidden = torch.ones(len(images), 17, dtype=torch.bool)
    hidden[:, 5:] = False
    found = []
    for masks in ((hidden, None), (None,)):
        with skillfast.Tracer(vit, {"loss": Continuous()}, sites=("mlp",)) as tracer, torch.no_grad():
            for mask in masks:
                tracer.expect(mask)
            vit(images)
            tracer.step(loss=loss)
        found.append(tracer.compute().pearson)
    np.testing.assert_array_equal(*found)
