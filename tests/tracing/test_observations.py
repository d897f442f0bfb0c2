"""What a forward's sites hand to the accumulators, against numpy: wherever rows come from and in whatever dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skillfast import Categorical, Continuous, Tracer
from skillfast.errors import ArgumentError
from skillfast.models.activations import RoutedActivations
from skillfast.models.sites import Site
from skillfast.statistics.routed import RoutedStatistics
from skillfast.statistics.tokens import TokenMask, TokenStatistics
from skillfast.tracing.observations import Expected, RoutedTokens, TokenRows

CPU = torch.device("cpu")
METRICS = {"label": Categorical(2), "loss": Continuous()}
EXPERTS, UNITS, TOKENS = 3, 4, 7


def routed(expected, statistics=("pearson", "spearman"), n_bootstrap=16):
    made = RoutedStatistics(
        EXPERTS, UNITS, METRICS, statistics, bins=8, n_bootstrap=n_bootstrap, seed=0, buffer_rows=8, device=CPU
    )
    site = Site("blocks.0.experts", "expert", 0, "experts", EXPERTS * UNITS, experts=EXPERTS)
    return RoutedTokens(site, expected, made)


def forward(x, gate, expert, rows):
    """Some examples of x [n, tokens, slots, U] as a model's experts see them: rows in an order of their own."""
    n, tokens, slots, units = x[rows].shape
    token = torch.arange(n * tokens).repeat_interleave(slots)
    order = expert[rows].flatten().argsort()
    return RoutedActivations(
        x[rows].reshape(-1, units)[order], expert[rows].flatten()[order], token[order], gate[rows].flatten()[order],
        EXPERTS, (n, tokens),
    )  # fmt: skip


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_experts_rows_are_those_of_numpy_however_forwards_cut_them(per_token, kept):
    """Some tokens are padding, some rows are of no expert, an example is left out; the bootstrap numbers examples."""
    if per_token and not kept:
        statistics, n_bootstrap = ("pearson",), None
    else:
        statistics, n_bootstrap = (("pearson", "spearman"), 16) if kept else (("pearson",), None)
    g = torch.Generator().manual_seed(0)
    n = 12
    x = torch.randn(n, TOKENS, 2, UNITS, generator=g) + 3
    gate = torch.rand(n, TOKENS, 2, generator=g) + 0.5
    expert = torch.stack([torch.randperm(EXPERTS + 1, generator=g)[:2] for _ in range(n * TOKENS)])
    expert = (expert + (expert == EXPERTS) * 2).view(n, TOKENS, 2)  # whatever is above the last expert is none
    mask = torch.rand(n, TOKENS, generator=g) > 0.3
    label = torch.randint(0, 2, (n,), generator=g)
    loss = torch.randn((n, TOKENS) if per_token else (n,), generator=g) + 5
    valid = torch.arange(n) != 5
    mask_of_all = mask & valid[:, None]
    found = []
    for cut in ([4, 8], [1, 2, 9], [12]):
        expected = Expected()
        rows = routed(expected, statistics, n_bootstrap)
        for part in torch.arange(n).split(cut):
            expected.mask = TokenMask(mask_of_all[part] if per_token else mask[part])
            expected.values = {"label": label[part], "loss": loss[part]} if per_token else {}
            rows.read_routed(rows.sites[0], forward(x, gate, expert, part))
            if per_token:
                rows.count({}, None, None)
            else:
                rows.count({"label": label[part], "loss": loss[part]}, valid[part], None)
            assert not rows.open
        found.append(rows.scores())
    y = torch.stack([label == 0, label == 1], 1).double()[:, None].expand(-1, TOKENS, -1)
    y = torch.cat([y, (loss if per_token else loss[:, None].expand(-1, TOKENS))[..., None].double()], -1)
    for e in range(EXPERTS):
        here = (expert == e) & mask_of_all[..., None]
        want = np.corrcoef((x * gate[..., None])[here].double().T, y[:, :, None].expand(-1, -1, 2, -1)[here].T)
        for scores in found:
            own = slice(e * UNITS, (e + 1) * UNITS)
            np.testing.assert_allclose(scores.pearson[own], want[:UNITS, UNITS:], atol=1e-5)
            assert set(scores.n_routed[own]) == {int(here.sum())}
            if n_bootstrap:
                np.testing.assert_allclose(scores.pearson_low, found[-1].pearson_low, atol=1e-5)


def test_experts_are_calibrated_and_refuse_what_was_told_before():
    """What came before a calibration leaves no trace; a forward whose metrics are known takes no others."""
    g = torch.Generator().manual_seed(2)
    x, gate = torch.randn(8, TOKENS, 2, UNITS, generator=g), torch.ones(8, TOKENS, 2)
    expert = torch.stack([torch.randperm(EXPERTS, generator=g)[:2] for _ in range(8 * TOKENS)]).view(8, TOKENS, 2)
    values = {"label": torch.arange(8) % 2, "loss": torch.randn(8, generator=g)}
    found = []
    for before in (False, True):
        expected = Expected()
        rows = routed(expected, ("pearson",), None)
        rows.count(values, None, None)  # no forward waits
        if before:
            rows.read_routed(rows.sites[0], forward(7 * x, gate, expert, slice(None)))
            rows.count(values, None, None)
            rows.calibrate()
        rows.read_routed(rows.sites[0], forward(x, gate, expert, slice(None)))
        rows.count(values, None, None)
        found.append(rows.scores())
    for name in ("n_routed", "mean", "std", "pearson"):
        np.testing.assert_allclose(getattr(found[1], name), getattr(found[0], name), rtol=1e-5, atol=1e-6)
    assert found[0].n_routed.sum() == 8 * TOKENS * 2 * UNITS
    expected.values = values
    for told, valid in ((values, None), ({}, torch.ones(8, dtype=torch.bool))):
        rows.read_routed(rows.sites[0], forward(x, gate, expert, slice(None)))
        with pytest.raises(ArgumentError, match="step: expected"):
            rows.count(told, valid, None)
        rows.discard()
    assert not rows.open


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_tokens_are_counted_as_they_flow_on(dtype, per_token):
    """An activation's values as its dtype holds them: what the next layer sees, and what numpy makes of that."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(6, TOKENS, UNITS, generator=g, dtype=torch.float64) * 3 + 1).to(dtype)
    loss = torch.randn((6, TOKENS) if per_token else (6,), generator=g)
    label = torch.arange(6) % 2
    site, expected = Site("blocks.0.mlp", "mlp", 0, "fc2", UNITS), Expected()
    statistics = TokenStatistics(
        UNITS, METRICS, ("pearson",), bins=8, n_bootstrap=None, seed=0, buffer_rows=8, device=CPU
    )
    rows = TokenRows([site], expected, statistics)
    flowing = []
    for part in (slice(0, 2), slice(2, 6)):
        values = {"label": label[part], "loss": loss[part]}
        expected.values = values if per_token else {}
        flowing.append(rows.read(site, x[part], "gelu", True))
        rows.count({} if per_token else values, None, None)
    flowing = torch.cat(flowing)
    assert flowing.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(flowing, torch.nn.functional.gelu(x), rtol=rounding, atol=1e-5)
    scores = rows.scores()
    z = flowing.double().flatten(0, 1).numpy()
    np.testing.assert_allclose(scores.mean, z.mean(0), rtol=2e-6)
    np.testing.assert_allclose(scores.std, z.std(0), rtol=2e-6)
    wide = loss.double() if per_token else loss.double()[:, None].expand(-1, TOKENS)
    want = np.corrcoef(z.T, wide.flatten().numpy())[:UNITS, -1]
    np.testing.assert_allclose(scores.pearson[:, -1], want, atol=2e-6)
    assert scores.n_observations == 6 * TOKENS


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_values_of_left_out_examples_are_given_too(vit, batches, pool):
    """Else the rows of a longer array would be taken for those of other examples."""
    x, y = batches[0]
    valid = torch.arange(len(x)) != 1
    with Tracer(vit, {"label": Categorical(5)}, pool=pool, sites=("mlp",)) as tracer, torch.no_grad():
        for given in (torch.cat([y, y]), y[valid]):
            vit(x)
            with pytest.raises(ArgumentError, match=rf"'label': expected {len(x)} values, got shape \[{len(given)}\]"):
                tracer.step(label=given, valid=valid)
            tracer.discard()
        for wrong in (valid[1:], valid.long()):
            vit(x)
            with pytest.raises(ArgumentError, match=f"valid: expected {len(x)} booleans, got shape"):
                tracer.step(label=y, valid=wrong)
            tracer.discard()
        vit(x)
        tracer.step(label=y, valid=valid)
    assert tracer.n_observations == (len(x) - 1) * (1 if pool == "mean" else 17)
