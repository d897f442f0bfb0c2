"""Sweeps that start in the middle, against the plain loop of hooks, on every family of vision transformers."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import replace

import numpy as np
import planted
import pytest
import timm
import torch
from conftest import make_vit, one_line
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import skillfast
from skillfast import Condition, Skill, progress
from skillfast.ablation import forward_trace, prefix_reuse, sweep
from skillfast.ablation.batch_result import BatchRecorder, BatchResult, Observed
from skillfast.ablation.interventions import Interventions
from skillfast.ablation.shared_forwards import SharedForwards
from skillfast.ablation.sweep import BatchRunner, SweepResult
from skillfast.errors import ArgumentError, DataError
from skillfast.memory.living import LivingBytes
from skillfast.models.batches import Batch
from skillfast.models.sites import find_sites
from skillfast.vocabulary import KINDS

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 7}
# name -> (arguments, whether all conditions may start in the middle)
FAMILIES = {
    "vit_tiny_patch16_224": ({**SMALL, "depth": 3}, True),
    "vit_tiny_patch16_224, mean pool": ({**SMALL, "depth": 3, "global_pool": "avg", "class_token": False}, True),
    "deit_tiny_distilled_patch16_224": ({**SMALL, "depth": 2}, True),
    "deit3_small_patch16_224": ({**SMALL, "depth": 2}, True),
    "vit_base_patch16_siglip_224": ({**SMALL, "depth": 2, "embed_dim": 48, "num_heads": 4}, True),
    "beit_base_patch16_224": ({**SMALL, "depth": 2, "embed_dim": 48, "num_heads": 4}, True),
    "eva02_tiny_patch14_224": ({"img_size": 28, "patch_size": 7, "depth": 2, "num_classes": 7}, True),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 28, "patch_size": 7, "depth": 2, "num_classes": 7}, True),
    "vit_small_patch16_dinov3": ({**SMALL, "depth": 2}, True),
    "cait_xxs24_224": ({**SMALL, "depth": 2}, False),  # its last blocks take two streams
    "vit_relpos_small_patch16_224": ({**SMALL, "depth": 2}, True),
    "vit_small_patch16_18x2_224": ({**SMALL, "depth": 2}, False),  # two attentions side by side
    "convit_tiny": (SMALL | {"depth": 2}, True),
    "naflexvit_base_patch16_gap": ({"depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 7}, True),
}


def family(name):
    settings, in_the_middle = FAMILIES[name]
    torch.manual_seed(0)
    model = timm.create_model(name.partition(",")[0], **settings).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and "pos_embed" not in path:
                parameter.normal_(0, 2 / parameter[0].numel() ** 0.5)
            elif float(parameter.abs().max()) < 0.1 and "bias" not in path:  # layer scales begin as nearly nothing
                parameter.fill_(0.5)
    size = settings.get("img_size", 64)
    images = torch.randn(9, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model, (images, torch.arange(9) % 7), in_the_middle


def some_conditions(model, seed=0):
    """Conditions that begin everywhere: at each site alone, in several sites, with every intervention."""
    rng = np.random.default_rng(seed)
    sites = find_sites(model)

    def skill(chosen):
        neurons = {s.name: rng.choice(s.width, max(1, s.width // 8), replace=False) for s in chosen}
        return Skill("+".join(neurons), {name: torch.from_numpy(index) for name, index in neurons.items()})

    alone = [Condition(skill([site]), scale=scale) for site in sites for scale in (0.0, 3.0)]
    several = [Condition(skill(rng.permutation(np.array(sites, dtype=object))[:3])) for _ in range(4)]
    conditions = [
        *alone,
        *several,
        Condition(skill(sites)),
        Condition(skill(sites), components=("attn",), scale=0.5),
        Condition(skill(sites), mode="resample"),
        Condition(skill(sites[:1]), mode="resample", scale=0.25),
        Condition(Skill("nothing", {})),
    ]
    return [replace(condition, name=str(i)) for i, condition in enumerate(conditions)]


def donors_of(model, images, conditions):
    """Donors drawn from a batch, and whose activations each of its images gets."""
    bank = skillfast.donors(
        model, [(images, torch.zeros(len(images)).long())], [c.skill for c in conditions], n_donors=5
    )
    return bank, images[bank.indices[bank.rows_of(model, images)]]


def by_plain_hooks(model, images, condition, donors=None):
    """Logits with the neurons changed by hooks that use nothing of skillfast but who is whose donor."""
    handles, others = [], {}
    if condition.mode == "resample":
        for site in find_sites(model):
            keep = model.get_submodule(site.path).register_forward_pre_hook(
                lambda _, args, name=site.name: others.__setitem__(name, args[0])
            )
            handles.append(keep)
        with torch.no_grad():
            model(donors)
        for handle in handles:
            handle.remove()
    handles = []
    for site in find_sites(model):
        index = condition.neurons_at(site)
        if index is None:
            continue

        def hook(_, args, index=index, name=site.name):
            x = args[0].clone()
            other = others[name][..., index] if others else 0
            x[..., index] = other + condition.scale * (x[..., index] - other)
            return (x, *args[1:])

        handles.append(model.get_submodule(site.path).register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model(images)
    for handle in handles:
        handle.remove()
    return logits


def clear(logits, tolerance):
    """bool [n]: samples whose two best logits are farther apart than the dtype's rounding."""
    return (logits.float().topk(2).values.diff().abs()[:, 0] > tolerance * logits.abs().max()).numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_loop(name):
    model, batch, in_the_middle = family(name)
    conditions = some_conditions(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bank, other = donors_of(model, batch[0], conditions)
        result = skillfast.sweep(model, [batch], conditions, donors=bank, classes=7, keep_predictions=True)
    assert bool(told) != in_the_middle
    for warning in told:
        assert f"of {len(conditions)} conditions run the whole forward of this " in str(warning.message)
        assert f"{type(model).__name__}, which does not allow to start in the middle" in str(warning.message)
    np.testing.assert_array_equal(result.donors, bank.indices[bank.rows_of(model, batch[0])])
    for i, condition in enumerate(conditions):
        want = by_plain_hooks(model, batch[0], condition, other)
        sure = clear(want, 1e-4)
        assert sure.mean() > 0.8
        np.testing.assert_array_equal(result.predictions[i][sure], want.argmax(1).numpy()[sure])
    assert (result.predictions != result.top2[:, 0]).mean() > 0.02  # the conditions do something


class Past(torch.nn.Module):
    """Blocks that are dictionaries: the model calls what is in them, and never (or with a number first) the block."""

    num_classes = 5

    class Numbered(torch.nn.ModuleDict):
        def forward(self, place, x):
            return x + place + self["mlp"](x)

    def __init__(self, *blocks):
        super().__init__()
        torch.manual_seed(0)
        layer = {"mlp": lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))}
        self.layers = torch.nn.ModuleList(block({name: made() for name, made in layer.items()}) for block in blocks)
        self.head = torch.nn.Linear(8, 5)
        skillfast.models.sites.declare_sites(
            self, {**{f"blocks.{i}.mlp": f"layers.{i}.mlp.2" for i in range(len(blocks))}, "head": "head"}
        )

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            x = layer(place, x) if isinstance(layer, self.Numbered) else x + layer["mlp"](x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    "blocks",
    [[torch.nn.ModuleDict] * 2, [Past.Numbered] * 2, [Past.Numbered, torch.nn.ModuleDict]],
    ids=["never called", "a number comes first", "one of each"],
)
def test_blocks_that_give_no_hidden_state_to_start_from_run_whole(blocks):
    model, x = Past(*blocks).eval(), torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(1))
    removed = [{"blocks.0.mlp": [0, 3]}, {"blocks.1.mlp": [5]}, {"head": [2]}]
    conditions = [Condition(Skill(str(i), neurons), scale=2.0) for i, neurons in enumerate(removed)]
    with pytest.warns(RuntimeWarning, match=r"3 of 3 conditions run the whole forward of this Past, which does not "):
        result = skillfast.sweep(model, [(x, torch.arange(6) % 5)], conditions, keep_margins=True)
    own = torch.nn.functional.one_hot(torch.arange(6) % 5, 5).bool()
    for condition in conditions:
        logits = by_plain_hooks(model, x, condition, None)
        want = (logits[own] - logits.masked_fill(own, -torch.inf).amax(1)).numpy()
        np.testing.assert_allclose(result.margins_of([condition.name])[0], want, atol=1e-5)
    of_first = torch.zeros(6, dtype=torch.long)
    shared = SharedForwards(model, [conditions[:1], conditions[2:]], Batch(x, of_first))
    want = np.stack([by_plain_hooks(model, x, conditions[i]).argmax(1).numpy() for i in (0, 2)])
    np.testing.assert_array_equal(shared.predict(Batch(x, of_first), of_first), want)


def logits_of_routes(model, batch, conditions, bank):
    """Each condition's logits by its route, and the routes."""
    with torch.inference_mode():
        runner = BatchRunner(model, Interventions(model, conditions, donors=bank), None)
        ready = runner._prepared(batch[0])
        cache = ready.fill_cache(batch[0])
        logits = {
            i: ready.run(cache, point, [i])[0][0]
            for point, members in ready.conditions_from.items() if point is not None for i in members
        }  # fmt: skip
    return logits, ready.routes


@pytest.mark.parametrize(
    ("name", "narrow"), [("vit_tiny_patch16_224", True), ("vit_tiny_patch16_224, mean pool", False)]
)
def test_routes_start_at_the_site_and_give_the_loops_logits(name, narrow):
    model, batch, _ = family(name)
    conditions = some_conditions(model)
    bank, other = donors_of(model, batch[0], conditions)
    logits, routes = logits_of_routes(model, batch, conditions, bank)
    for point, route in routes.items():
        assert route.point == point
        assert not route.whole_stem
        assert route.narrow == (narrow and point.block is not None)
    for i, got in logits.items():
        want = by_plain_hooks(model, batch[0], conditions[i], other)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_sweep_says_what_it_will_run_and_how_long_that_takes(vit, batches, monkeypatch):
    """Work counts by the blocks that run: from block 1 of 3 two thirds of a forward, at the head nothing."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=10)
    conditions = [Condition(Skill(name, {name: [0]})) for name in ("blocks.0.mlp", "blocks.1.attn", "head")]
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 3.0 * next(clock))
    lines, done, ran = [], [], progress.Forecast.ran
    monkeypatch.setattr(progress.Forecast, "ran", lambda self, work: done.append(work) or ran(self, work))
    with progress.telling(lines.append):
        skillfast.sweep(vit, loader, [], classes=5)
        assert lines == []
        done.clear()
        skillfast.sweep(vit, loader, conditions, classes=5)
    work = 37 * (1 + 1 + 2 / 3)
    assert sum(done) == pytest.approx(work)
    assert lines[0] == f"3 conditions on 37 examples: 111 forwards, as long as {work:.0f} whole ones"
    assert lines[1:] == [f"about {3 / 10 * (work - 10):.0f} s to go"]  # the intact forward of 10 took 3 s
    lines.clear()
    with progress.telling(lines.append), progress.telling(None):
        skillfast.sweep(vit, loader, conditions, classes=5)
    with progress.telling(lines.append):
        skillfast.sweep(vit, list(loader), conditions, classes=5)
    assert lines == ["3 conditions, as long as 3 forwards of every example"]  # of a stream nobody knows the length
    lines.clear()
    again = [*conditions, *(Condition(Skill(f"again {i}", {"blocks.1.attn": [i]})) for i in (1, 2, 3))]
    with progress.telling(lines.append):
        skillfast.sweep(vit, list(loader), again, classes=5)
    assert lines == ["6 conditions, as long as 5 forwards of every example"]  # 1 + 1 + 4 * 2 / 3 is 4.67


def test_a_sweep_is_asked_by_name_and_answers_by_name(vit, batches, tmp_path):
    deer = Skill("deer", {"blocks.1.mlp": list(range(60))})
    frog = Skill("frog", {"blocks.2.attn": [1], "head": list(range(24))})
    conditions = [
        Condition(deer),
        Condition(deer, ("attn", "mlp"), scale=2.0),
        Condition(frog, scale=0.5, mode="resample"),
        Condition(frog, scale=-3.0, name="mine"),
    ]
    bank = skillfast.donors(vit, batches, [deer, frog])
    result = skillfast.sweep(vit, batches, conditions, donors=bank, keep_predictions=True, keep_embeddings=True)
    assert result.names == ("deer", "deer (attn+mlp, x 2.0)", "frog (x 0.5, resample)", "mine")
    for i, name in enumerate(result.names):
        found = result[name]
        assert found.name == name
        np.testing.assert_array_equal(found.accuracy, result.per_class_accuracy[i])
        np.testing.assert_array_equal(found.margin, result.per_class_margin[i])
        np.testing.assert_array_equal(found.predictions, result.predictions[i])
        np.testing.assert_array_equal(found.embeddings, result.embeddings[i])
    np.testing.assert_array_equal(result.predictions_of(["mine", "deer"]), result.predictions[[3, 0]])
    assert not np.array_equal(result.predictions[3], result.predictions[0])
    assert one_line(ArgumentError, result.__getitem__, "cat") == (
        "condition: expected one of 'deer', 'deer (attn+mlp, x 2.0)', 'frog (x 0.5, resample)', 'mine', got 'cat'; "
        "see .names"
    )
    more = skillfast.sweep(vit, batches, [Condition(deer, scale=s, name=f"x {s}") for s in range(6)])
    assert "expected one of 'x 0', 'x 1', 'x 2', 'x 3', 'x 4', ..., got 'cat'" in one_line(
        ArgumentError, more.__getitem__, "cat"
    )
    with pytest.raises(DataError, match=r"got none; write it with SweepResult\.save$"):
        SweepResult.load(tmp_path)
    first, last = (skillfast.sweep(vit, batches, [c], keep_predictions=True) for c in (conditions[0], conditions[3]))
    joined = first.joined(last)
    assert joined.names == ("deer", "mine")
    np.testing.assert_array_equal(joined.predictions_of(["mine", "deer"]), result.predictions[[3, 0]])
    np.testing.assert_array_equal(joined["mine"].margin, last["mine"].margin)
    bare = skillfast.sweep(vit, batches, conditions[:1])
    bare.save(tmp_path)
    bare = SweepResult.load(tmp_path)
    save_file({"accuracy": torch.ones(1)}, tmp_path / "sweep.safetensors")
    with pytest.raises(DataError, match=r"expected schema 'skillfast\.sweep/1', got None"):
        SweepResult.load(tmp_path)
    assert bare["deer"].predictions is bare["deer"].embeddings is bare.baseline_embeddings is None
    assert "pass keep_predictions=True" in one_line(ArgumentError, bare.predictions_of, ["deer"])
    assert "pass keep_margins=True" in one_line(ArgumentError, bare.margins_of, ["deer"])
    text = one_line(
        ArgumentError, skillfast.sweep, vit, batches, [Condition(frog), Condition(deer), Condition(deer, KINDS)]
    )
    assert text == "conditions: expected a different name for each, got 'deer' 2 times; pass Condition(skill, name=...)"


def test_conditions_in_one_stack_do_not_mix():
    model, batch, _ = family("vit_tiny_patch16_224")
    site = find_sites(model)[2]
    conditions = [Condition(Skill(str(i), {site.name: [i, i + 1, 20 + i]}), scale=-2.0) for i in range(12)]
    together = skillfast.sweep(model, [batch], conditions, classes=7, keep_embeddings=True)
    for i, condition in enumerate(conditions):
        alone = skillfast.sweep(model, [batch], [condition], classes=7, keep_embeddings=True)
        np.testing.assert_allclose(together.embeddings[i], alone.embeddings[0], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(together.per_class_margin[i], alone.per_class_margin[0], rtol=1e-3, atol=1e-2)
    assert np.abs(together.embeddings - together.baseline_embeddings).max() > 0.1


def test_margins_and_embeddings_are_those_of_the_model(vit, batches):
    skill = Skill("s", {"blocks.1.mlp": list(range(30)), "head": [3]})
    result = skillfast.sweep(vit, batches, [Condition(skill)], keep_margins=True, keep_embeddings=True)
    labels = torch.cat([y for _, y in batches])
    head = vit.get_submodule("head")
    for embeddings, margin, context in (
        (result.baseline_embeddings, result.baseline_margin, None),
        (result.embeddings[0], result.per_class_margin[0], skill),
    ):
        with torch.no_grad():
            if context is None:
                logits = torch.cat([vit(x) for x, _ in batches])
            else:
                with skillfast.ablate(vit, context):
                    logits = torch.cat([vit(x) for x, _ in batches])
            np.testing.assert_allclose(head(torch.from_numpy(embeddings)), logits, rtol=1e-3, atol=1e-2)
            if context is None:
                np.testing.assert_allclose(result.baseline_logits, logits, rtol=1e-3, atol=1e-2)
        true = logits.gather(1, labels[:, None])[:, 0]
        other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        want = [float((true - other)[labels == c].mean()) for c in range(5)]
        np.testing.assert_allclose(margin, want, rtol=1e-3, atol=1e-2)
        if context is skill:
            np.testing.assert_allclose(result.margins_of(["s"])[0], true - other, rtol=1e-3, atol=1e-2)
    assert result.embeddings.dtype == np.float32
    assert (result.embeddings[0][:, 3] == 0).all()
    bare = skillfast.sweep(vit, batches, [Condition(skill)])
    assert bare.embeddings is None
    assert bare.baseline_embeddings is None
    assert bare.margins is bare.baseline_logits is None
    assert bare.predictions is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(batches, dtype):
    model = make_vit(depth=2).to(dtype)
    data = [(x.to(dtype), y) for x, y in batches]
    conditions = some_conditions(model)
    images = torch.cat([x for x, _ in data])
    bank, other = donors_of(model, images, conditions)
    result = skillfast.sweep(model, data, conditions, donors=bank, keep_predictions=True)
    for i, condition in enumerate(conditions):
        want = by_plain_hooks(model, images, condition, other)
        sure = clear(want, 1e-6 if dtype == torch.float64 else 0.1)
        np.testing.assert_array_equal(result.predictions[i][sure], want.argmax(1).numpy()[sure])


def test_autocast(vit, batches):
    conditions = some_conditions(vit)[:8]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = skillfast.sweep(vit, batches, conditions, keep_predictions=True)
        for i, condition in enumerate(conditions):
            want = torch.cat([by_plain_hooks(vit, x, condition) for x, _ in batches])
            sure = clear(want, 0.1)
            np.testing.assert_array_equal(result.predictions[i][sure], want.float().argmax(1).numpy()[sure])


def test_nothing_is_left_behind_after_an_exception(vit, batches, monkeypatch):
    before = {path: (m.forward.__func__, len(m._forward_pre_hooks)) for path, m in vit.named_modules()}
    skill = Skill("s", {"blocks.1.mlp": [0], "blocks.2.attn": [1]})
    original, calls = prefix_reuse.PrefixReuse.run, []

    def failing(self, *arguments, **more):
        calls.append(0)
        if len(calls) > 2:
            monkeypatch.setitem(vars(vit.blocks[2].mlp), "forward", lambda *_: 1 / 0)
        return original(self, *arguments, **more)

    monkeypatch.setattr(prefix_reuse.PrefixReuse, "run", failing)
    with pytest.raises(ZeroDivisionError):
        skillfast.sweep(vit, batches, [Condition(skill, name=str(i)) for i in range(3)])
    monkeypatch.undo()
    assert before == {path: (m.forward.__func__, len(m._forward_pre_hooks)) for path, m in vit.named_modules()}
    assert all("forward" not in vars(m) and not m._forward_hooks for m in vit.modules())


def test_activations_that_are_not_finite_are_removed(vit, batches):
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.bias[5] = torch.inf
    skill = Skill("s", {"blocks.1.mlp": [5]})
    with pytest.warns(RuntimeWarning, match="which gives logits that are not finite") as told:
        result = skillfast.sweep(vit, batches, [Condition(skill)], keep_embeddings=True)
    assert [warning.filename for warning in told] == [__file__]
    assert not np.isfinite(result.baseline_embeddings).all()
    assert np.isfinite(result.embeddings).all()


def test_a_batch_of_one_sample(vit, batches):
    data = [(batches[0][0][:1], batches[0][1][:1])]
    skill = Skill("s", {"blocks.1.mlp": [5]})
    assert skillfast.sweep(vit, data, [Condition(skill)], keep_predictions=True).predictions.shape == (1, 1)


def test_memory_runs_out_and_the_stack_is_halved(vit, batches, monkeypatch):
    conditions = [Condition(Skill(str(i), {"blocks.0.attn": [i]})) for i in range(9)]
    want = skillfast.sweep(vit, batches, conditions, keep_predictions=True, keep_margins=True)
    original, sizes = prefix_reuse.PrefixReuse.run, []

    def limited(self, cache, point, some, **more):
        sizes.append(len(some) * len(cache.inputs))
        if sizes[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, cache, point, some, **more)

    monkeypatch.setattr(prefix_reuse.PrefixReuse, "run", limited)
    got = skillfast.sweep(vit, batches, conditions, keep_predictions=True, keep_margins=True)
    assert max(sizes) > 20
    assert sum(size > 20 for size in sizes) <= 3  # it is remembered
    np.testing.assert_array_equal(got.predictions, want.predictions)
    np.testing.assert_allclose(got.margins, want.margins, rtol=1e-3, atol=1e-3)
    assert (np.abs(want.margins - want.margins[:1]).max(1) > 0.005).sum() == 8  # each condition does something else
    monkeypatch.setattr(prefix_reuse.PrefixReuse, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        skillfast.sweep(vit, batches, conditions)


def test_what_a_sample_keeps_is_what_the_budget_counts(vit, batches, monkeypatch):
    conditions = [Condition(Skill("s", {"blocks.1.mlp": [0, 3]}))]
    runner, images = BatchRunner(vit, Interventions(vit, conditions, None), 12345), batches[0][0]
    asked = []
    monkeypatch.setattr(sweep, "rows_that_fit", lambda *given: asked.append(given) or (10, 10))
    with torch.inference_mode():
        kept = runner._prepared(images).fill_cache(images).nbytes
        runner._sizes(images)
    trace = runner.reuse.trace
    assert asked == [(12345, kept / 10, trace.running_bytes, 17, 10, torch.device("cpu"))]
    assert kept > 0


def test_stacks_have_as_many_rows_as_fit(vit, batches, monkeypatch):
    conditions = [Condition(Skill(str(i), {"blocks.0.attn": [i]})) for i in range(9)]
    want = skillfast.sweep(vit, batches[:1], conditions, keep_predictions=True)
    original, stacks = prefix_reuse.PrefixReuse.run, []

    def noted(self, cache, point, some, **more):
        stacks.append((len(cache.inputs), len(some)))
        return original(self, cache, point, some, **more)

    monkeypatch.setattr(prefix_reuse.PrefixReuse, "run", noted)
    monkeypatch.setattr(sweep, "rows_that_fit", lambda *_: (4, 14))  # 14 rows: 3 conditions of 4 samples, 7 of 2
    got = skillfast.sweep(vit, batches[:1], conditions, keep_predictions=True)
    trials = stacks.index((4, 3))
    assert stacks[:trials] == [(2, 1)] * trials  # each route is tried on two samples
    assert stacks[trials:] == [(4, 3)] * 6 + [(2, 7), (2, 2)]
    np.testing.assert_array_equal(got.predictions, want.predictions)


def test_a_budget_is_kept():
    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=5).eval()
    batch = (torch.randn(8, 3, 224, 224), torch.arange(8) % 5)
    rng = np.random.default_rng(0)
    conditions = [
        Condition(Skill(str(i), {f"blocks.{i % 4}.mlp": rng.choice(768, 20, replace=False)})) for i in range(12)
    ]
    peaks = {}
    for megabytes in (40, 120):
        with LivingBytes() as memory:
            skillfast.sweep(model, [batch], conditions, classes=5, memory_budget=megabytes << 20)
        peaks[megabytes] = memory.peak / 2**20
        assert peaks[megabytes] <= megabytes
    assert peaks[120] > peaks[40]
    text = one_line(ArgumentError, skillfast.sweep, model, [batch], conditions, classes=5, memory_budget=1 << 20)
    assert "for one sample of this model, got 1 MiB; raise --memory-budget" in text


def test_peak_bytes_counts_what_is_alive():
    with LivingBytes() as memory:
        a = torch.ones(1000)
        b = a.view(10, 100) + 1
        del a, b
        torch.ones(500)
    assert memory.peak == 8000


def test_models_without_a_classifier_have_no_embeddings(batches):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=0).eval()
    skill = Skill("s", {"blocks.0.mlp": [0]})
    text = one_line(
        ArgumentError, skillfast.sweep, model, batches, [Condition(skill)], classes=192, keep_embeddings=True
    )
    assert "leave out keep_embeddings" in text
    assert skillfast.sweep(model, batches, [Condition(skill)], classes=192).per_class_accuracy.shape == (1, 192)


def test_a_sweep_inside_an_ablation_keeps_it(vit, batches):
    outer = Skill("outer", {"blocks.0.mlp": list(range(40)), "blocks.2.attn": [0, 1]})
    inner = Condition(Skill("inner", {"blocks.2.attn": [1, 2], "blocks.2.mlp": [3]}))
    with skillfast.ablate(vit, outer):
        got = skillfast.sweep(vit, batches, [inner], keep_embeddings=True)
        with skillfast.ablate(vit, inner.skill), torch.no_grad():
            want = torch.cat([vit(x) for x, _ in batches])
    np.testing.assert_allclose(vit.head(torch.from_numpy(got.embeddings[0])).detach(), want, rtol=1e-3, atol=1e-2)


def test_tolerances_are_below_what_a_wrong_route_gives(vit, batches):
    """A route that leaves a condition out must not pass for right."""
    images = batches[0][0][:2]
    conditions = [Condition(Skill("s", {"blocks.1.mlp": list(range(10))}))]
    with torch.inference_mode():
        runner = BatchRunner(vit, Interventions(vit, conditions), None)
        ready = runner._prepared(images)
        point = next(iter(ready.routes))
        cache, tolerance = ready.fill_cache(images), prefix_reuse.TOLERANCE[torch.float32]
        assert ready.agrees(cache, point, 0, runner._plain(images, 0), tolerance)
        assert ready.agrees(cache, point, 0, vit(images), tolerance, changed=False)
        assert not ready.agrees(cache, point, 0, vit(images), tolerance)


def test_what_a_forward_trace_counts(vit, batches):
    trace = forward_trace.trace_forward(vit, batches[0][0][:2])
    blocks = ["blocks.0", "blocks.1", "blocks.2"]
    names = [f"{block}.{kind}" for block in blocks for kind in ("attn", "mlp")]
    assert list(trace.blocks) == blocks
    assert list(trace.sites) == list(find_sites(vit))
    assert dict(trace.block_of) == {**{name: int(name[7]) for name in names}, "head": None}
    assert dict(trace.parents) == {name: name for name in names}
    assert dict(trace.feeds) == {
        f"{b}.{kind}": f"{b}.{norm}"
        for b in blocks
        for kind, norm in zip(("attn", "mlp"), ("norm1", "norm2"), strict=True)
    }
    assert {block: many[0] for block, many in trace.batched.items()} == dict.fromkeys(blocks, True)
    assert trace.head.name == "head"
    assert trace.head_is_last
    assert trace.dtype == torch.float32
    assert [s.name for s in trace.sites_until(trace.sites[3])] == names[2:4]
    assert [s.name for s in trace.sites_until(trace.sites[2])] == names[2:3]
    assert forward_trace.trace_forward(planted.Copies(), torch.zeros(2, 8)).tokens == 1
    twice = forward_trace.trace_forward(vit, batches[0][0][:4])
    assert 0 < trace.running_bytes == pytest.approx(twice.running_bytes, rel=0.1)  # per sample
    two, one, number = torch.zeros(2, 3), torch.zeros(1, 3), torch.tensor(2)
    by_sample = [forward_trace._by_sample(leaf, 2) for leaf in (two, one, number, None, "flag", torch.zeros(3))]
    assert by_sample == [True, None, False, None, False, False]
    assert forward_trace._by_sample(one, 1) is True
    assert forward_trace._by_sample(torch.zeros(2), 2) is True
    assert forward_trace._by_sample(torch.zeros(1), 2) is None
    assert trace.tokens == 17  # 16 patches and the class token
    assert trace.sequential
    for leaves, more in (([True], False), ([None, False], False), ([True, True], True), ([False, False, None], True)):
        assert dataclasses.replace(trace, batched={"block": leaves}).takes_more("block") is more
    a, b = torch.zeros(2), torch.ones(2)
    for output in ((a, b), [a, b]):
        assert forward_trace.first_tensor(output) is a
        changed = forward_trace.with_first_tensor(output, b)
        assert type(changed) is type(output)
        assert changed[0] is b
    assert forward_trace.first_tensor(a) is a
    assert prefix_reuse._rows(a) == 2
    assert prefix_reuse._rows(torch.tensor(1.0)) == prefix_reuse._rows(None) == prefix_reuse._rows("a flag") == 0


def test_embeddings_that_wait_keep_no_tokens():
    """A classifier reads a view of the last block's output; what is kept of a condition is its row alone."""
    batch = Batch(torch.zeros(4, 1), torch.arange(4) % 3)
    observed = Observed(batch.labels, torch.arange(4), None)
    recorder = BatchRecorder(observed, torch.randn(4, 3), torch.zeros(4, 8), 2, keep_logits=False)
    tokens = torch.randn(2, 4, 50, 8)
    recorder.set([0, 1], torch.randn(2, 4, 3), tokens[:, :, 0])
    kept = recorder.told[0][3]
    assert kept.untyped_storage().nbytes() == kept.nbytes
    np.testing.assert_array_equal(recorder.result().embeddings[1:], tokens[:, :, 0])


def test_labels_are_class_indices_and_those_of_tokens_may_be_none(vit, batches):
    def swept(labels):
        return skillfast.sweep(vit, [(batches[0][0][: len(labels)], labels)], [], classes=5)

    assert swept(torch.tensor([0, 4])).labels.tolist() == [0, 4]
    for wrong in (torch.tensor([0, 5]), torch.tensor([-1, 4])):
        text = one_line(ArgumentError, swept, wrong)
        assert f"labels: expected class indices in [0, 5), got {int(wrong[0])} to {int(wrong[1])}" in text
    read = [sweep._read((torch.zeros(2, 3), torch.tensor([[-1, 4, 0], [2, -100, -1]])), 5, None).labels.min()]
    assert read == [-100]
    with pytest.raises(ArgumentError, match=r"got -1 to 5; check classes="):
        sweep._read((torch.zeros(1, 3), torch.tensor([[-1, 5, 0]])), 5, None)
    assert "expected at least one batch" in one_line(ArgumentError, skillfast.sweep, vit, [], [], classes=5)
    text = one_line(ArgumentError, skillfast.sweep, vit, batches, [Skill("s", {})], classes=5)
    assert "conditions: expected Condition(skill), got Skill" in text


def test_results_of_two_sweeps_are_joined_and_renamed():
    rng = np.random.default_rng(0)

    def result(names, **more):
        k = len(names)
        return SweepResult(
            classes=("a", "b"), names=names, labels=np.array([0, 1, 1]), baseline=np.ones(2),
            per_class_accuracy=rng.random((k, 2)), baseline_margin=np.ones(2), per_class_margin=rng.random((k, 2)),
            top2=np.zeros((3, 2), int), predictions=rng.integers(0, 2, (k, 3)), baseline_logits=rng.random((3, 2)),
            margins=rng.random((k, 3)), baseline_embeddings=rng.random((3, 4)), embeddings=rng.random((k, 3, 4)),
            **{"rerouted": rng.random(k), **more},
        )  # fmt: skip

    one, other = result(("x", "y")), result(("z",))
    joined = one.joined(other)
    assert joined.names == ("x", "y", "z")
    for kept in ("per_class_accuracy", "per_class_margin", "predictions", "rerouted"):
        np.testing.assert_array_equal(getattr(joined, kept), [*getattr(one, kept), *getattr(other, kept)])
    left_out = ("baseline_logits", "margins", "baseline_embeddings", "embeddings")
    assert all(getattr(joined, kept) is None for kept in left_out)
    assert one.joined(result(("z",), rerouted=None)).rerouted is None
    renamed = one.renamed({"y": "new"})
    assert renamed.names == ("new",)
    for kept in ("per_class_accuracy", "per_class_margin", "predictions", "margins", "rerouted"):
        np.testing.assert_array_equal(getattr(renamed, kept), getattr(one, kept)[1:])
    assert renamed.baseline_embeddings is renamed.embeddings is None
    np.testing.assert_array_equal(one.embeddings_of(["y", "x"]), one.embeddings[[1, 0]])
    bare = dataclasses.replace(one, predictions=None, margins=None, rerouted=None, embeddings=None).renamed({"x": "x"})
    assert bare.predictions is bare.margins is bare.rerouted is None
    assert "pass keep_embeddings=True" in one_line(ArgumentError, bare.embeddings_of, ["x"])
    text = one_line(ArgumentError, one.joined, dataclasses.replace(other, labels=np.array([0, 1])))
    assert "sweeps: expected the same examples in both, got 3 and 2 of other classes" in text


def test_a_batch_is_recorded_token_by_token():
    """Predictions, margins and embeddings of the tokens that have a label, against NumPy."""
    rng = np.random.default_rng(0)
    labels, logits = np.array([[2, -1, 0], [-100, 1, 1]]), rng.normal(size=(3, 2, 3, 4)).astype(np.float32)
    embeddings = rng.normal(size=(3, 2, 3, 5)).astype(np.float32)
    whole, rows = (torch.from_numpy(x) for x in (logits, embeddings))
    model = torch.nn.Identity()
    batch = Batch(torch.zeros(2, 3), torch.from_numpy(labels))
    kept = labels >= 0
    recorders = []
    for keep in (True, False):
        observed = Observed.of(batch, whole[0], model)
        recorder = BatchRecorder(
            observed, whole[0], rows[0] if keep else None, 3, keep_logits=keep, donors=torch.tensor([7, 9]), routed=12
        )
        recorder.set([2], whole[2:], rows[2:], torch.tensor([4]))
        recorder.set([0], whole[1:2], rows[1:2] if keep else None)
        recorders.append(recorder.result())
    found, bare = recorders
    of = [logits[i][kept] for i in (0, 1, 0, 2)]  # nothing was told of the second condition
    true = labels[kept]
    np.testing.assert_array_equal(found.labels, true)
    np.testing.assert_array_equal(found.predictions, [x.argmax(1) for x in of])
    np.testing.assert_array_equal(found.second, np.argsort(of[0], 1)[:, -2])
    own = [x[np.arange(4), true] for x in of]
    rest = [np.where(np.eye(4)[true] > 0, -np.inf, x).max(1) for x in of]
    np.testing.assert_allclose(found.margins, np.subtract(own, rest), rtol=1e-5)
    np.testing.assert_array_equal(found.logits, of[0])
    np.testing.assert_array_equal(found.embeddings, [embeddings[i][kept] for i in (0, 1, 0, 2)])
    np.testing.assert_array_equal(found.donors, [7, 7, 9, 9])
    np.testing.assert_array_equal(found.routes, [12, 0, 0, 4])
    assert bare.logits is bare.embeddings is None
    both = BatchResult.joined([found, found])
    assert both.predictions.shape == both.margins.shape == (4, 8)
    assert both.embeddings.shape == (4, 8, 5)
    assert both.logits.shape == (8, 4)
    np.testing.assert_array_equal(both.donors, [7, 7, 9, 9] * 2)
    np.testing.assert_array_equal(both.routes, [24, 0, 0, 8])
    assert BatchResult.joined([bare, bare]).embeddings is None


def test_outputs_are_corrected_where_a_parent_returns_its_projections():
    """And where that is a plain linear layer, whose output is what its weights make of its input."""

    class Inner(torch.nn.Module):
        def __init__(self, factor, kind):
            super().__init__()
            self.proj, self.factor = kind(4, 4), factor

        def forward(self, x):
            y = self.proj(x)
            return y if self.factor == 1 else y * self.factor

    class Own(torch.nn.Linear):
        pass

    for factor, kind, parents in (
        (1, torch.nn.Linear, {"blocks.0.mlp": "0.inner"}),
        (2, torch.nn.Linear, {}),
        (1, Own, {}),
    ):
        block = torch.nn.Sequential()
        block.add_module("norm", torch.nn.LayerNorm(4))
        block.add_module("inner", Inner(factor, kind))
        model = torch.nn.Sequential(block, torch.nn.Linear(4, 3)).eval()
        model.skillfast_sites = {"blocks.0.mlp": "0.inner.proj", "head": "1"}
        trace = forward_trace.trace_forward(model, torch.randn(2, 4))
        assert dict(trace.parents) == parents
        assert dict(trace.feeds) == ({"0.inner": "0.norm"} if parents else {})


class Handing(torch.nn.Module):
    """Three blocks that hand something to the next one beside the hidden state."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

        def forward(self, x, handed):
            inner = self.up(x).relu() if handed is None else self.up(x + handed).relu()
            return x + self.down(inner), inner[..., :4]

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = torch.nn.ModuleList(self.Block() for _ in range(3)), torch.nn.Linear(4, 3)
        self.num_classes = 3
        self.skillfast_sites = {f"blocks.{i}.mlp": f"blocks.{i}.down" for i in range(3)} | {"head": "out"}

    def forward(self, x):
        handed = None
        for block in self.blocks:
            x, handed = block(x, handed)
        return self.out(x)


def test_blocks_that_are_left_out_return_as_many_parts_as_they_do():
    """Three samples: of two a block's input alone would be taken apart into as many parts as its output has."""
    torch.manual_seed(0)
    model, x = Handing().eval(), torch.randn(3, 4)
    conditions = [Condition(Skill(f"{i}", {f"blocks.{i}.mlp": [0, 2]}), name=f"{i}") for i in range(3)]
    with torch.no_grad():
        interventions = Interventions(model, conditions)
        runner = BatchRunner(model, interventions, None)
        ready = runner._prepared(x)
        assert [route.point.block for route in ready.routes.values()] == [0, 1, 2]
        assert dict(forward_trace.trace_forward(model, x[:2]).parts) == {f"blocks.{i}": 2 for i in range(3)}
    found = sweep.sweep(model, [(x, torch.arange(3))], conditions, keep_margins=True)
    for condition in conditions:
        with torch.no_grad(), skillfast.ablate(model, condition.skill):
            logits = model(x)
        margins = skillfast.metrics.margin(logits, torch.arange(3)).numpy()
        np.testing.assert_allclose(found.margins_of([condition.name])[0], margins, rtol=1e-4, atol=1e-5)
