"""What a forward from the middle runs, what it keeps for that, and when a route is taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from skillfast import Condition, Skill
from skillfast.ablation.interventions import Interventions
from skillfast.ablation.prefix_reuse import (
    PrefixCache,
    PrefixReuse,
    ResumePoint,
    Route,
    _other_routes,
    _repeat,
    replaced_forward,
)
from skillfast.ablation.sweep import BatchRunner
from skillfast.errors import ModelError
from skillfast.models.sites import find_sites

SITES = [*(f"blocks.{b}.{kind}" for b in range(3) for kind in ("attn", "mlp")), "head"]
TOKENS, WIDTH = 17, 24


@pytest.fixture
def ready(vit):
    """Two conditions at each site, and one that changes nothing."""
    conditions = [Condition(Skill(f"{name} {i}", {name: [i, 5]})) for name in SITES for i in range(2)]
    runner = BatchRunner(vit, Interventions(vit, [*conditions, Condition(Skill("none", {}))]), None)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        yield runner._prepared(images), images, runner


def test_a_forward_runs_what_follows_its_first_site_and_one_token_of_the_last_block(vit, ready):
    reuse, images, _ = ready
    cache, ran, stems = reuse.fill_cache(images), [], []
    for path, module in vit.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, y, path=path: ran.append((path, *y.shape[:-1])))
    vit.patch_embed.register_forward_pre_hook(lambda _, args: stems.append(len(args[0])))
    assert [point.site.name for point in reuse.routes] == SITES
    for i, (point, name) in enumerate(zip(reuse.routes, SITES, strict=True)):
        ran.clear()
        reuse.run(cache, point, [2 * i, 2 * i + 1])
        places = [(b, part) for b in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        done = {"attn": 2, "mlp": 4}.get(name[9:], 0) + 4 * (point.block if point.block is not None else 3)
        want = [(f"blocks.{b}.{p}", 8, TOKENS if b < 2 or p == "attn.qkv" else 1) for b, p in places[done:]]
        assert ran == [*want, ("head", 8)]
        assert stems == [1] * min(i + 1, 6)  # what the stem makes of it is not used
        assert reuse.work(point) == (0 if point.block is None else pytest.approx(1 - point.block / 3))
    assert reuse.conditions_from[None] == [2 * len(SITES)]
    ran.clear()
    reuse.routes[point] = Route(None)
    reuse.run(cache, point, [12, 13])
    assert len(ran) == 13
    assert {shape[1:] for shape in ran} == {(8, TOKENS), (8,)}
    assert stems[6:] == [8]
    assert reuse.work(point) == 1


def test_a_cache_holds_what_the_routes_need_and_no_more(ready):
    reuse, images, _ = ready
    cache = reuse.fill_cache(images)

    def tokens(name):
        return TOKENS if "2" not in name else 1

    assert {path: [x.shape for x in leaves] for path, (leaves, _) in cache.calls.items()} == {
        path: [(4, tokens(path), WIDTH)] for path in ("blocks.0", "blocks.1", "blocks.2")
    }
    assert {path: x.shape for path, x in cache.outputs.items()} == {n: (4, tokens(n), WIDTH) for n in SITES[:-1]}
    assert {name: x.shape for name, x in cache.neurons.items()} == {n: (4, tokens(n), 3) for n in SITES[:-1]}
    assert cache.nbytes == 4 * 4 * (2 * TOKENS + 1) * (WIDTH + 2 * WIDTH + 2 * 3)
    assert cache.calls["blocks.2"][0][0].untyped_storage().nbytes() == 4 * 4 * WIDTH  # no view of all tokens
    assert cache.outputs["blocks.2.mlp"].untyped_storage().nbytes() == 4 * 4 * WIDTH
    late = reuse.fill_cache(images, [reuse.routes[point] for point in reuse.routes if point.block == 1][:1])
    assert [list(late.calls), list(late.outputs), list(late.neurons)] == [["blocks.1"], *[["blocks.1.attn"]] * 2]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in reuse.model.modules())
    shared = torch.zeros(3, 2)
    both = PrefixCache(images, shared, None, {"a": ([shared, "flag"], None)}, {"b": (shared, 1)}, {"c": shared[:1]})
    assert both.nbytes == 24 + 8  # a tensor in two places counts once
    assert both.routed == 0


def test_ways_to_run_are_tried_from_the_shortest_to_the_plain_forward(ready):
    reuse, _, _ = ready
    points = list(reuse.routes)
    at, before, head = points[2], ResumePoint(1, None), points[-1]
    last = ResumePoint(2, None)
    ways = [(narrow, whole_stem) for whole_stem in (False, True) for narrow in (True, False)]
    assert list(reuse.candidate_routes(at)) == [*(Route(p, *way) for way in ways for p in (at, before)), Route(None)]
    assert list(reuse.candidate_routes(before)) == [*(Route(before, *way) for way in ways), Route(None)]
    assert list(reuse.candidate_routes(head)) == [Route(head), *(Route(last, *way) for way in ways), Route(None)]
    reuse.trace = dataclasses.replace(reuse.trace, head_is_last=False)
    assert list(reuse.candidate_routes(head)) == [*(Route(last, *way) for way in ways), Route(None)]
    reuse.trace = dataclasses.replace(reuse.trace, sequential=False)
    assert list(reuse.candidate_routes(at)) == [Route(None)]


def test_every_route_is_tried_unchanged_and_one_of_each_kind_against_a_plain_forward(ready, monkeypatch):
    reuse, images, runner = ready
    plain, unchanged, agrees = [], [], PrefixReuse.agrees

    def counted(self, cache, point, condition, want, tolerance, *, changed=True):
        unchanged.extend([point] * (not changed))
        return agrees(self, cache, point, condition, want, tolerance, changed=changed)

    monkeypatch.setattr(PrefixReuse, "agrees", counted)
    chosen = dict(reuse.routes)
    reuse.verify(images[:2], lambda i: plain.append(i) or runner._plain(images[:2], i), 1e-4)
    assert reuse.routes == chosen
    assert unchanged == list(chosen)
    assert plain == [0, 2, 12]  # attention, MLP and head
    plain.clear()
    reuse.verify(images[:2], lambda i: plain.append(i) or runner._plain(images[:2], i) + 1.0, 1e-4)
    assert set(reuse.routes.values()) == {Route(None)}  # nothing gives a plain forward's logits


def test_a_route_agrees_where_all_logits_do(ready, monkeypatch):
    reuse, images, _ = ready
    cache, point = reuse.fill_cache(images), next(iter(reuse.routes))
    want = torch.tensor([[4.0, -10.0], [0.0, 1.0]])
    given = []

    def run(*_, **__):
        if isinstance(given[0], Exception):
            raise given[0]
        return given[0][None], None, None

    monkeypatch.setattr(PrefixReuse, "run", run)

    def agree(logits):
        given[:] = [logits]
        return reuse.agrees(cache, point, 0, want, 0.01)

    off = torch.zeros(2, 2)
    off[1, 0] = 1
    assert agree(want)
    assert agree(want + 0.099 * off)
    for wrong in (want + 0.11 * off, want - 0.11 * off, want + torch.nan * off, want[:1], want[:, :1]):
        assert not agree(wrong)
    for error in (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError, ModelError):
        assert agree(error("of the model's own")) is False
    with pytest.raises(torch.OutOfMemoryError):
        agree(torch.OutOfMemoryError("CUDA out of memory"))


def test_other_experts_are_counted_per_condition_of_real_tokens(vit):
    site = find_sites(vit)[0]
    before = torch.tensor([[[0, 1], [0, 2], [1, 2]], [[0, 1], [0, 1], [0, 1]]])  # [batch, tokens, slots]
    routes = before.repeat(2, 1, 1)
    routes[2, 0] = routes[2, 2] = routes[3, 1] = torch.tensor([3, 4])
    routes[1, 1, 1] = 5
    cache = PrefixCache(torch.zeros(2), torch.zeros(2, 3), None, routes={site.name: before})
    assert _other_routes(cache, site, routes, 2).tolist() == [1, 3]
    assert _other_routes(cache, site, routes[:, :1], 2).tolist() == [0, 1]  # the first token alone
    assert _other_routes(cache, site, routes[:1], 2).tolist() == [0, 0]  # the one row before the blocks that run
    assert cache.routed == 6
    cache.real = torch.tensor([[True, True, False], [True, False, False]])
    assert _other_routes(cache, site, routes, 2).tolist() == [0, 1]
    assert cache.routed == 3
    assert _repeat("flag", 3) == "flag"
    assert _repeat(torch.arange(2), 2).tolist() == [0, 1, 0, 1]


def test_a_forward_that_is_replaced_comes_back():
    module, x = torch.nn.ReLU(), torch.tensor(-2.0)
    with replaced_forward(module, lambda x: x):
        with pytest.raises(ZeroDivisionError), replaced_forward(module, lambda _: 1 / 0):
            module(x)
        assert module(x) == -2
    assert module(x) == 0
    assert "forward" not in vars(module)


def test_where_an_output_cannot_be_corrected_the_block_runs_whole(vit, ready):
    """As if the MLPs did more than their projections: their conditions begin at the block's input."""
    reuse, images, runner = ready
    parents = {name: path for name, path in reuse.trace.parents.items() if name.endswith("attn")}
    made = PrefixReuse(vit, reuse.interventions, dataclasses.replace(reuse.trace, parents=parents))
    made.verify(images[:2], lambda i: runner._plain(images[:2], i), 1e-4)
    points = [ResumePoint(b, site) for b in range(3) for site in (made.trace.sites[2 * b], None)]
    assert list(made.routes) == [*points, ResumePoint(None, made.trace.head)]
    assert [route for point, route in made.routes.items() if point.block is not None] == [
        Route(point, narrow=True) for point in points
    ]
    cache, ran = made.fill_cache(images), []
    for path, module in vit.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, y, path=path: ran.append((path, *y.shape[:-1])))
    logits, _, _ = made.run(cache, points[-1], [10, 11])
    last = [
        (f"blocks.2.{p}", 8, t) for p, t in (("attn.qkv", TOKENS), ("attn.proj", 1), ("mlp.fc1", 1), ("mlp.fc2", 1))
    ]
    assert ran == [*last, ("head", 8)]
    want = torch.stack([runner._plain(images, i) for i in (10, 11)])
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert cache.calls["blocks.2"][0][0].shape == (4, TOKENS, WIDTH)


@pytest.mark.parametrize("name", SITES)
def test_conditions_of_a_single_site_take_its_route(vit, name):
    """Nothing was proven elsewhere: the trial corrects one token of the last block's output as the run does."""
    conditions = [Condition(Skill(str(i), {name: [i, 5]}), scale=3.0) for i in range(2)]
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        runner = BatchRunner(vit, Interventions(vit, conditions), None)
        reuse = runner._prepared(images)
        ((point, route),) = reuse.routes.items()
        assert route == Route(point, narrow=name != "head")
        logits, _, _ = reuse.run(reuse.fill_cache(images), point, [0, 1])
        want = torch.stack([runner._plain(images, i) for i in (0, 1)])
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
