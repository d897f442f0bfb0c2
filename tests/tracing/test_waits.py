"""No step waits for the device, on a fake one that counts what would make the host wait."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import make_vit
from fake_cuda import DEVICE, CudaTensor, FakeCuda, to_cuda
from packaging.version import Version
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from skillfast import (
    Categorical,
    Condition,
    Continuous,
    NeuronStatistics,
    Skill,
    Tracer,
    attribute,
    learn_masks,
    ops,
    sweep,
    transfer,
)
from skillfast.ablation.sweep import BatchRunner
from skillfast.data.splits import Splits, TensorImages
from skillfast.errors import ArgumentError
from skillfast.metrics import classification_values, token_classification_values
from skillfast.models import training
from skillfast.tracing.trace import ClassificationForward, trace

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: tests/ops/test_gpu.py")
METRICS = {"label": Categorical(5), "loss": Continuous()}
BLOCKS = ("mlp", "attn", "head")


@pytest.fixture
def fake(monkeypatch):
    """A device on which these small images are large ones: they have to be pinned."""
    monkeypatch.setattr(transfer, "AT_ONCE", 1 << 12)
    with FakeCuda() as mode:
        mode.pageable = 1 << 12
        yield mode


def unfused():
    """A model whose attention runs the same ops on every device."""
    model = make_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


@pytest.fixture
def vit():
    return unfused()


@pytest.fixture
def on_cuda(fake):
    return to_cuda(unfused())


def scores_of(model, batches, run, **settings):
    with torch.inference_mode():
        tracer = Tracer(model, METRICS, **settings)
        with tracer:
            for i, (images, labels) in enumerate(batches):
                run(tracer, model, images.to(DEVICE) if isinstance(model.pos_embed, CudaTensor) else images, labels, i)
        return tracer.compute()


def same(got, want):
    for name, array in want.arrays().items():
        np.testing.assert_allclose(got.arrays()[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("pool", ["mean", "cls", "max", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_waits_for_nothing(fake, on_cuda, vit, batches, pool, masked):
    """Values from the device and from the host, with padding and with rows that are left out."""
    tokens = vit.pos_embed.shape[1]
    masks = [torch.rand(len(y), tokens) > 0.3 for _, y in batches]
    waited = []

    def run(tracer, model, images, labels, i):
        if masked:
            tracer.expect(mask=masks[i])
        logits = model(images)
        before = fake.waits.copy()
        loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device, non_blocking=True), reduction="none")
        tracer.step(label=labels, loss=loss, valid=torch.arange(len(labels)) != 1 if i == 2 else None)
        waited.append(fake.waits - before)

    got = scores_of(on_cuda, batches, run, pool=pool, sites=("mlp", "attn"))
    assert fake.ops["act_mask_pool"] > 0
    assert waited == [{}] * len(batches)
    same(got, scores_of(vit, batches, run, pool=pool, sites=("mlp", "attn")))


@pytest.mark.parametrize("masked", [False, True])
def test_metrics_of_each_token_wait_for_nothing(fake, on_cuda, vit, batches, masked):
    tokens = vit.pos_embed.shape[1]
    masks = [torch.rand(len(y), tokens) > 0.3 for _, y in batches]
    values = [torch.randn(len(y), tokens) for _, y in batches]
    waited = []

    def run(tracer, model, images, labels, i):
        before = fake.waits.copy()
        loss = values[i].to(images.device, non_blocking=True)
        tracer.expect(masks[i] if masked else None, label=labels, loss=loss)
        model(images)
        tracer.step()
        waited.append(fake.waits - before)

    got = scores_of(on_cuda, batches, run, pool="none", sites=("mlp", "attn"), statistics=("pearson", "spearman"))
    assert fake.ops["act_pool_accumulate"] > 0
    assert waited == [{}] * len(batches)
    want = scores_of(vit, batches, run, pool="none", sites=("mlp", "attn"), statistics=("pearson", "spearman"))
    same(got, want)


@pytest.fixture
def marked(fake, monkeypatch):
    """Lets calls of a method note how often the host has waited before."""

    def mark(owner, name):
        marks, method = [], getattr(owner, name)

        def noted(*args, **kwargs):
            marks.append(sum(fake.waits.values()))
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
        return marks

    return mark


def test_a_trace_waits_for_nothing_between_its_first_batch_and_its_end(fake, on_cuda, vit, batches, marked):
    """With host batches, as a loader gives them; the edges are set, and the scores are read, once."""
    seen = marked(ClassificationForward, "__call__")
    got = trace(on_cuda, batches, classes=5)
    passes = seen[-len(batches) :]
    assert passes[0] == passes[-1], "a batch waited"
    same(got, trace(vit, batches, classes=5))


def test_tables_on_a_device_are_written_as_rarely_as_kept_rows_allow(fake, on_cuda, vit, batches, monkeypatch):
    """Pooled rows alone: those of tokens and experts come in numbers of their own."""
    monkeypatch.setattr("skillfast.tracing.tracer.BUFFER_ROWS", 10)
    settings = {"bins": 2, "sites": ("mlp",)}
    counted = []
    for more in ({}, {"buffer_rows": 5}, {"statistics": ("pearson",)}, {"pool": "none"}):
        tracer = Tracer(on_cuda, METRICS, **settings, **more)
        statistics = tracer._groups()[0].statistics
        counted.append(getattr(statistics, "_sampled", statistics).settings.buffer_rows)
    assert counted == [16 * 2, 5, 10, 10]
    assert Tracer(vit, METRICS, **settings)._groups()[0].statistics.settings.buffer_rows == 10


def conditions(count):
    skills = [
        Skill(str(i), {"blocks.0.mlp": [i, i + 3], "blocks.1.attn": [i], "blocks.2.attn": [3], "head": [1]})
        for i in range(count)
    ]
    return [
        Condition(skill, components)
        for skill in skills
        for components in (("mlp", "attn", "head"), ("attn",), ("head",))
    ]


def test_the_stacks_of_a_sweep_wait_for_nothing(fake, on_cuda, vit, batches, marked):
    """The host waits for a batch's outcome, and not for each condition's."""
    waits = []
    for count in (2, 9):
        marks = marked(BatchRunner, "run")
        sweep(on_cuda, batches, conditions(count), classes=5)
        waits.append(np.diff(marks)[1:])  # the first batch finds its routes
        assert (waits[-1] == waits[-1][0]).all()
    assert waits[0][0] == waits[1][0] <= 8
    got = sweep(on_cuda, batches, conditions(2), classes=5, keep_predictions=True, keep_margins=True)
    want = sweep(vit, batches, conditions(2), classes=5, keep_predictions=True, keep_margins=True)
    np.testing.assert_array_equal(got.predictions, want.predictions)
    np.testing.assert_allclose(got.margins, want.margins, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="older backward passes make CPU tensors of a fake device's"
)
def test_attribution_and_the_steps_of_masks_wait_for_nothing(fake, on_cuda, vit, batches):
    def waited(run):
        before = sum(fake.waits.values())
        result = run()
        return sum(fake.waits.values()) - before, result

    few, _ = waited(lambda: attribute(on_cuda, batches[:2], classes=5))
    all_of_them, attributions = waited(lambda: attribute(on_cuda, batches, classes=5))
    assert few == all_of_them
    np.testing.assert_allclose(attributions.values, attribute(vit, batches, classes=5).values, rtol=1e-4, atol=1e-6)
    short, _ = waited(lambda: learn_masks(on_cuda, batches, attributions, steps=2))
    long, masks = waited(lambda: learn_masks(on_cuda, batches, attributions, steps=4))
    assert short == long
    want = learn_masks(vit, batches, attributions, steps=4)
    np.testing.assert_allclose(masks.values, want.values, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="older backward passes make CPU tensors of a fake device's"
)
@pytest.mark.parametrize("mode", ["head", "all"])
def test_the_steps_of_training_wait_for_nothing(fake, vit, mode, batches, monkeypatch):
    """Only the end of an epoch reads the loss; what frozen layers give stays on the device."""
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    data = TensorImages(images, labels, "abcde")
    splits = Splits("tiny", tuple("abcde"), data, data, data)
    here, there = copy.deepcopy(vit), to_cuda(vit)
    monkeypatch.setattr(there, "to", lambda _: there)
    monkeypatch.setattr(training, "_seeded", lambda *_: nullcontext())  # of a device's generator
    monkeypatch.setattr(training, "accuracy", torch.no_grad()(training.accuracy.__wrapped__))
    waits = []
    for size in (20, 8):  # 2 and 5 steps
        before = sum(fake.waits.values())
        training.finetune(there, splits, mode, epochs=2, batch_size=size, device=DEVICE, quiet=True)
        waits.append(sum(fake.waits.values()) - before)
        training.finetune(here, splits, mode, epochs=2, batch_size=size, quiet=True)
    assert waits[0] == waits[1] == 3  # two losses and the accuracy
    for name, weight in there.state_dict().items():
        torch.testing.assert_close(weight.cpu(), here.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_replicates_and_labels_of_tokens_wait_for_nothing(fake, on_cuda, vit, batches, pool):
    """Bootstrap weights are hashed on the device, tokens without a label computed and left out there."""
    tokens = vit.pos_embed.shape[1]
    generator = torch.Generator().manual_seed(2)
    targets = [torch.randint(-2, 5, (len(y), tokens), generator=generator) for _, y in batches]
    waited = []

    def run(tracer, model, images, labels, i):
        before = fake.waits.copy()
        hidden = model.forward_features(images)
        values = token_classification_values(model.head(hidden), targets[i], each=True)
        few = {name: value.double().mean(1) for name, value in values.items()}
        tracer.step(label=labels, loss=few["loss"])
        waited.append(fake.waits - before)

    settings = {"pool": pool, "sites": ("mlp",), "n_bootstrap": 8, "buffer_rows": 10, "statistics": ("pearson",)}
    got = scores_of(on_cuda, batches, run, **settings)
    assert waited == [{}] * len(batches)
    same(got, scores_of(vit, batches, run, **settings))


@pytest.mark.parametrize("pool", ["mean", "cls", "max", "none"])
def test_no_size_in_a_step_depends_on_data(vit, batches, pool, monkeypatch):
    """Tensors without values on a CUDA device: whatever would look at one raises."""
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (1 << 36, 1 << 36))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with FakeTensorMode(), torch.no_grad():
        for module in vit.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(weight.shape, device="cuda"))
        with Tracer(vit, METRICS, pool=pool, statistics=("pearson",), buffer_rows=12) as tracer:
            for images, labels in batches:
                logits = vit(torch.empty(images.shape, device="cuda"))
                label = torch.empty(labels.shape, dtype=torch.int64, device="cuda")
                tracer.step(label=label, loss=torch.nn.functional.cross_entropy(logits, label, reduction="none"))
        with pytest.raises(DataDependentOutputException):
            tracer.compute()


def test_what_does_not_fit_a_metric_is_refused_at_the_end(fake):
    """On the device nothing is read when it comes; in the end it is told as on the host, by the metric's name."""
    x = torch.randn(6, 3).to(DEVICE)
    for label, loss, name in ((7, 0.0, "label"), (1, torch.nan, "loss"), (0.5, 0.0, "label")):
        statistics = NeuronStatistics(3, METRICS, device=DEVICE)
        given = {"label": torch.tensor([0, 1, 2, 3, 4, label]), "loss": torch.tensor([1.0, 2, 3, 4, 5, loss])}
        with pytest.raises(ArgumentError, match=f"metric '{name}': expected"):
            statistics.update(x, given)  # from the host: at once
        waits = fake.waits.copy()
        there = {key: value.to(DEVICE, non_blocking=True) for key, value in given.items()}
        statistics.update(x, there)
        assert fake.waits == waits
        for read in (statistics.compute, statistics.state_dict, lambda s=statistics: s.like().merge(s)):
            with pytest.raises(ArgumentError, match=f"metric '{name}': expected .* got others in a batch that came on"):
                read()


def test_what_comes_from_the_device_is_there_when_it_is_read(fake):
    """An accumulator on the host, given what lies on the device: the copies block."""
    x, given = torch.randn(6, 3), {"label": torch.arange(6) % 5, "loss": torch.randn(6)}
    found = []
    for device in ("cpu", DEVICE):
        statistics = NeuronStatistics(3, METRICS, n_bootstrap=8)
        there = {name: value.to(device) for name, value in given.items()}
        statistics.update(x.to(device), there, groups=torch.arange(6).to(device))
        found.append(statistics.compute())
    same(found[1], found[0])
    values = classification_values(torch.randn(6, 5), given["label"].to(DEVICE))
    torch.testing.assert_close(values["label"], given["label"], rtol=0, atol=0)


def test_ops_refuse_operands_of_two_devices(fake):
    x, scale = torch.randn(4, 3, 8), torch.ones(2, 8)
    there = x.to(DEVICE)
    for arguments in ((there, scale), (x, scale.to(DEVICE)), (there, scale.to(DEVICE), None, torch.zeros(4).long())):
        with pytest.raises(ArgumentError, match=r"'s device: expected (cuda:0|cpu), got (cuda:0|cpu); move it"):
            ops.neuron_scale(*arguments)
    with pytest.raises(ArgumentError, match="act_mask_pool mask's device"):
        ops.act_mask_pool(there, mask=torch.ones(4, 3, dtype=torch.bool))
    y, shift, sums = torch.randn(12, 2), torch.zeros(8), [torch.zeros(8).double(), torch.zeros(8).double()]
    with pytest.raises(ArgumentError, match="comoments_update sum_xy's device"):
        ops.comoments_update(x.flatten(0, 1), y, shift, *sums, torch.zeros(2, 8).double().to(DEVICE))


def test_the_fake_device_tells_what_waits(fake):
    """The control of this file: each of these makes a host wait."""
    x = torch.arange(6.0).to(DEVICE, non_blocking=True)
    assert not fake.waits
    for read in (
        lambda: x.sum().item(), lambda: bool((x > 1).any()), lambda: x[x > 1], lambda: x.nonzero(), lambda: x.cpu(),
        lambda: torch.ones(2).to(DEVICE), lambda: x.tolist(), lambda: torch.equal(x, x), lambda: x.masked_select(x > 1),
    ):  # fmt: skip
        before = sum(fake.waits.values())
        read()
        assert sum(fake.waits.values()) > before
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(6)
