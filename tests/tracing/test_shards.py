"""Tracers of parts of the data, saved and merged, are one pass over all of it; what does not fit is refused whole."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import make_vit, one_line

import skillfast
from skillfast import Categorical, Continuous, Tracer
from skillfast.errors import ArgumentError, DataError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")
METRICS = {"label": Categorical(3), "loss": Continuous()}
TOKENS = 6


@pytest.fixture(scope="module")
def moe():
    """Dense layers, routed experts, a router, attention and a classifier in one model."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, moe_intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=3, num_experts_per_tok=1,
        mlp_only_layers=[0], num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3MoeForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


def parts_of(sizes):
    """Data of each part: the later, the further is every loss, and the other the words."""
    g = torch.Generator().manual_seed(1)
    found = []
    for i, n in enumerate(sizes):
        ids = torch.randint(1 + 13 * i, 14 + 13 * i, (n, TOKENS), generator=g)
        mask = torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (n, 1), generator=g)
        loss = torch.randn(n, generator=g).double() + 40 * i
        found.append((ids * mask, mask.long(), torch.randint(0, 3, (n,), generator=g), loss))
    return found


def count(tracer, model, data, *, told=False, batch=5):
    with tracer, torch.no_grad():
        for ids, mask, label, loss in zip(*(part.split(batch) for part in data), strict=True):
            if len(ids):
                values = {"label": label, "loss": loss}
                tracer.expect(mask, **(values if told else {}))
                model(input_ids=ids, attention_mask=mask)
                tracer.step(**({} if told else values))
    return tracer


def same(scores, want, atol):
    assert scores.n_observations == want.n_observations
    assert scores.reasons == want.reasons
    assert scores.arrays().keys() == want.arrays().keys()
    for name, expected in want.arrays().items():
        if "bound" not in name and name != "mutual_info":  # of other bins, where rows are not all kept
            np.testing.assert_allclose(scores.arrays()[name], expected, atol=atol, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("pool", "told"), [("mean", False), ("none", False), ("none", True)])
def test_shards_of_every_kind_of_site_are_one_pass(moe, tmp_path, pool, told, stored):
    """Of other sizes, one of them empty; each begins with its own shift, since nobody made them from one."""
    statistics = ("pearson", "spearman", "auroc") if pool == "mean" else ("pearson",)
    arguments = {"pool": pool, "statistics": statistics, "bins": 16}
    data = parts_of((33, 9, 0))
    if told:  # to the classifier comes one token of each text
        arguments["sites"] = ["mlp", "attn", "expert", "router"]
    shards = [count(Tracer(moe, METRICS, **arguments), moe, part, told=told) for part in data]
    kinds = {"mlp", "attn", "expert", "router"} | (set() if told else {"head"})
    assert kinds == {site.kind for site in shards[0].sites}
    want = count(Tracer(moe, METRICS, **arguments), moe, [torch.cat(x) for x in zip(*data, strict=True)], told=told)
    if stored:
        for i, shard in enumerate(shards):
            assert shard.save(tmp_path / str(i)).name == "tracer.safetensors"
        shards = [Tracer.load(tmp_path / str(i), moe) for i in range(3)]
    total = shards[2]
    for shard in shards[:2]:
        total.merge(shard)
    same(total.compute(), want.compute(), 1e-5 if told else 2e-6)
    assert total.compute().routed is not None or pool == "none"
    again = Tracer.from_state_dict(total.state_dict(), moe)
    more = parts_of((7,))[0]
    for tracer in (again, want):  # goes on where it was
        count(tracer, moe, more, told=told)
    same(again.compute(), want.compute(), 1e-5 if told else 2e-6)


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_shards_of_one_start_share_edges_and_no_weight(moe, pool):
    """Bins that are full, and a bootstrap: what `like` is for. Each shard could have come from another process."""
    statistics = ("pearson", "spearman") if pool == "mean" else ("pearson",)
    start = Tracer(moe, METRICS, pool=pool, statistics=statistics, bins=4, n_bootstrap=8)
    data = parts_of((70, 90))
    everything = [torch.cat(x) for x in zip(*data, strict=True)]
    count(start, moe, [x[::4] for x in everything])
    start.calibrate()
    shards = [Tracer.from_state_dict(start.like().state_dict(), moe) for _ in data]
    for shard, part in zip(shards, data, strict=True):
        count(shard, moe, part)
        assert shard.n_observations == len(part[0]) if pool == "mean" else True
    total = start.like()
    for shard in shards:
        total.merge(shard)
    want = count(start.like(), moe, everything).compute()
    got = total.compute()
    for name in ("pearson", "spearman", "mean", "std")[: 4 if pool == "mean" else 1]:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5, rtol=1e-5, err_msg=name)
    width = np.nanmedian(got.pearson_high - got.pearson_low)
    assert width == pytest.approx(np.nanmedian(want.pearson_high - want.pearson_low), rel=0.5)
    told = one_line(ArgumentError, total.merge, shards[1])  # a second time
    assert "got two of one stream" in told


def test_what_does_not_belong_together_is_refused_in_one_line_and_changes_nothing(batches, tmp_path):
    vit = make_vit(depth=2)
    metrics = {"label": Categorical(5), "loss": Continuous()}

    def traced(model=vit, metrics=metrics, **settings):
        tracer = Tracer(model, metrics, **{"sites": ("mlp",), "bins": 4, "statistics": ("pearson",), **settings})
        with tracer, torch.no_grad():
            for x, y in batches[:1]:
                model(x)
                tracer.step(label=y, loss=y.double())
        return tracer

    one = traced()
    before = one.compute()
    trained, smaller = copy.deepcopy(vit), make_vit(depth=1)
    with torch.no_grad():
        trained.blocks[0].mlp.fc1.weight.add_(1e-3)
    reshaped = {"label": Categorical(["a", "b", "c", "d", "e"]), "loss": Continuous()}
    remedy = "; trace every part with one model, sites and settings"
    for other, words in (
        (traced(smaller), "a model of architecture"),
        (traced(trained), "weights of digest"),
        (traced(sites=("mlp", "attn")), "sites ['blocks.0.mlp', 'blocks.1.mlp'], got ['blocks.0.attn', 'blocks.0.mlp'"),
        (traced(sites=("blocks.1.mlp",)), "sites ['blocks.0.mlp', 'blocks.1.mlp'], got ['blocks.1.mlp']"),
        (
            traced(metrics=reshaped),
            "metrics ('label', Categorical(classes=('0', '1', '2', '3', '4'))), got ('label', C",
        ),
        (traced(pool="max"), "pool mean, got max"),
        (traced(statistics=("auroc",)), "statistics pearson, got auroc"),
        (traced(bins=8), "bins 4, got 8"),
        (traced(seed=1), "seed 0, got 1"),
        (traced(n_bootstrap=8), "n_bootstrap None, got 8"),
    ):
        told = one_line(ArgumentError, one.merge, other)
        assert told.startswith(f"merge: expected {words}"), told
        assert told.endswith(remedy)
    assert "its data would count twice" in one_line(ArgumentError, one.merge, one)
    waiting = Tracer(vit, metrics, sites=("mlp",), statistics=("pearson",), bins=4)
    with waiting, torch.no_grad():
        vit(batches[0][0])
        for act in (lambda: one.merge(waiting), lambda: waiting.merge(one), waiting.state_dict, waiting.like):
            assert "expected step() or discard() after the last forward" in one_line(ModelError, act)
    same(one.compute(), before, 0)

    one.save(tmp_path)
    told = one_line(DataError, Tracer.load, tmp_path, trained)
    assert told.startswith(f"{tmp_path}/tracer.safetensors, load: expected weights of digest ")
    assert told.endswith("; give the model that was traced")
    assert "load: expected a model of architecture" in one_line(DataError, Tracer.load, tmp_path, smaller)
    assert "write it with Tracer.save" in one_line(DataError, Tracer.load, tmp_path / "nowhere", vit)
    state, wider = one.state_dict(), traced(sites=("mlp", "attn")).state_dict()["groups"]["0"]["state"]
    for change, words in (
        ({"groups": {"0": {**state["groups"]["0"], "state": wider}}}, "expected a state of the tracer's settings"),
        ({"groups": {"0": {**state["groups"]["0"], "sites": ["blocks.0.mlp"] * 2}}}, "expected each of 1 sites once"),
        ({"groups": {"1": state["groups"]["0"]}}, "expected groups 0, 1, ... at groups, got 1"),
        ({"seen": ["elsewhere"]}, "expected each of 2 sites once"),
        ({"bins": 16}, "expected a state of the tracer's settings"),
    ):
        told = one_line(ArgumentError, Tracer.from_state_dict, {**state, **change}, vit)
        assert words in told, told


def test_a_merge_that_is_refused_by_a_later_accumulator_changes_none(moe):
    """Two accumulators: the second one's bins differ, so the first one must not have been merged."""
    data = parts_of((90, 80))
    settings = {"pool": "none", "statistics": ("spearman",), "bins": 2, "buffer_rows": 8}
    shards = [count(Tracer(moe, METRICS, **settings), moe, part) for part in data]
    own = [shard.n_observations for shard in shards]
    assert len({id(group) for group in shards[0]._rows.values()}) > 2
    told = one_line(ArgumentError, shards[0].merge, shards[1])
    assert "expected the same bin edges" in told
    first = next(iter(shards[0]._rows.values()))
    assert first.statistics.n_observations == own[0]


def test_a_prepared_models_tracer_and_a_plain_ones_merge(batches):
    vit = make_vit()
    metrics = {"label": Categorical(5)}
    tracers = [Tracer(vit, metrics, sites=("mlp",))]
    prepared = skillfast.prepare(copy.deepcopy(vit))
    tracers.append(Tracer(prepared, metrics, sites=("mlp",)))
    for tracer, model in zip(tracers, (vit, prepared), strict=True):
        with tracer, torch.no_grad():
            for x, y in batches:
                model(x)
                tracer.step(label=y)
    n = tracers[0].n_observations
    tracers[0].merge(Tracer.from_state_dict(tracers[1].state_dict(), prepared))
    assert tracers[0].n_observations == 2 * n
