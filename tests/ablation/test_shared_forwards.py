"""Rows of removals that share the first blocks: the same predictions as plain forwards, with less work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_vit

import skillfast
from skillfast import Condition, Skill, progress
from skillfast.ablation.assigned import predict_assigned
from skillfast.ablation.prefix_reuse import PrefixReuse
from skillfast.ablation.shared_forwards import INTACT, SharedForwards
from skillfast.memory.budget import limited_memory
from skillfast.models.batches import read_batch
from skillfast.models.sites import find_sites
from skillfast.runs.removals import block_conditions, component_conditions

DEPTH = 4


@pytest.fixture(scope="module")
def deep():
    model = make_vit(depth=DEPTH)
    with torch.no_grad():  # so that every class is predicted of some image
        model.head.bias -= model(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))).mean(0)
    return model


def skills_of(model, n=3, width=10):
    rng = np.random.default_rng(0)
    return [
        Skill(str(i), {site.name: rng.choice(site.width, width, replace=False) for site in find_sites(model)})
        for i in range(n)
    ]


def rows_of(model, scale=0.0):
    skills, sites = skills_of(model), find_sites(model)
    return [*component_conditions(skills, sites, scale), *block_conditions(skills, sites, scale)]


def alone(model, batches, rows, assigned):
    """Each row by itself, which shares nothing."""
    return np.concatenate([predict_assigned(model, batches, [row], assigned) for row in rows])


def planned(model, rows, batch):
    with torch.inference_mode():
        return SharedForwards(model, rows, read_batch(batch))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_rows_give_what_plain_forwards_do(deep, batches, scale):
    rows, assigned = rows_of(deep, scale), np.random.default_rng(1).integers(-1, 3, 37)
    want = alone(deep, batches, rows, assigned)
    assert len(np.unique(want, axis=0)) > len(rows) / 2
    plain = predict_assigned(deep, batches, [rows[0], []], assigned)  # a row that changes nothing
    np.testing.assert_array_equal(plain, [want[0], alone(deep, batches, rows[:1], np.full(37, -1))[0]])
    ran = []
    handles = [
        block.mlp.fc1.register_forward_pre_hook(lambda _, args: ran.append(len(args[0]))) for block in deep.blocks
    ]
    said = []
    with progress.telling(said.append):
        found = predict_assigned(deep, batches, rows, assigned, what="parts")
    for handle in handles:
        handle.remove()
    np.testing.assert_array_equal(found, want)
    with limited_memory(20_000):  # some examples at a time
        np.testing.assert_array_equal(predict_assigned(deep, batches, rows, assigned), want)
    # an intact forward, three whole subsets of kinds, one of which is all blocks, too; from either end of the blocks
    # 3, 2 and 1 quarters; what is left differs at the head
    assert planned(deep, rows, batches[0]).work == 1 + 3 + 2 * (3 + 2 + 1) / DEPTH
    assert said[0] == f"{len(rows)} parts on 37 examples: {37 * len(rows):,} forwards, as long as 259 whole ones"
    proofs = sum(ran) / DEPTH - 7 * 37  # two examples each
    assert 0 < proofs < 2 * 20


def test_states_come_from_the_row_that_agrees_longest(deep, batches):
    a, b = (Skill(name, {"blocks.0.mlp": [1, 2], "blocks.2.mlp": [i], "head": [i]}) for i, name in enumerate("ab"))
    rows = [[Condition(skill, components=kinds)] for skill in (a, b) for kinds in (("mlp", "head"), ("mlp",))]
    shared = planned(deep, rows, batches[0])
    assert shared.whole == [0]
    assert shared.begun == {1: (0, DEPTH), 2: (0, 2), 3: (0, 2)}
    assert shared.work == 1 + 2 * (1 - 2 / DEPTH)
    late = [[Condition(Skill(str(i), {"blocks.3.mlp": [i]}))] for i in range(3)]
    assert planned(deep, late, batches[0]).begun == dict.fromkeys(range(3), (INTACT, 3))
    once = planned(deep, late[:1], batches[0])  # an intact forward would cost more than it saves
    assert (once.whole, once.begun) == ([0], {})


def test_a_model_that_does_not_start_in_the_middle_runs_whole(deep, batches, monkeypatch):
    rows, assigned = rows_of(deep), np.arange(37) % 3
    want = alone(deep, batches, rows, assigned)
    monkeypatch.setattr(PrefixReuse, "agrees", lambda *_, **__: False)
    shared = planned(deep, rows, batches[0])
    assert (len(shared.whole), shared.begun, shared.work) == (len(rows), {}, len(rows))
    np.testing.assert_array_equal(predict_assigned(deep, batches, rows, assigned), want)


def test_a_start_that_gives_other_logits_is_not_taken(deep, batches, monkeypatch):
    rows = rows_of(deep)
    resumed = SharedForwards._resumed
    monkeypatch.setattr(SharedForwards, "_resumed", lambda self, *args: resumed(self, *args) + 0.1)
    assert planned(deep, rows, batches[0]).begun == {}


def test_texts_with_padding_share_too():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    lengths = torch.tensor([9, 4, 7, 9, 2, 5])
    mask = (torch.arange(9) < lengths[:, None]).long()
    texts = {"input_ids": torch.randint(1, 30, (6, 9)), "attention_mask": mask, "labels": torch.arange(6) % 3}
    rows, assigned = rows_of(model), np.arange(6) % 3
    shared = planned(model, rows, texts)
    assert {stage for _, stage in shared.begun.values()} == {1, 2, 3}
    np.testing.assert_array_equal(
        predict_assigned(model, [texts], rows, assigned), alone(model, [texts], rows, assigned)
    )


def test_a_single_row_and_a_prepared_model_are_not_planned(deep, batches):
    rows, ran = rows_of(deep)[-3:], []
    handle = deep.register_forward_pre_hook(lambda *_: ran.append(0))
    one = planned(deep, rows[:1], batches[0])
    handle.remove()
    assert ran == []
    assert (one.whole, one.begun, one.work) == ([0], {}, 1)
    assigned = np.arange(37) % 3
    want = alone(deep, batches, rows, assigned)
    model = make_vit(depth=DEPTH)
    model.load_state_dict(deep.state_dict())
    ready = skillfast.prepare(model)
    assert planned(ready, rows, batches[0]).begun == {}
    np.testing.assert_array_equal(predict_assigned(ready, batches, rows, assigned), want)


def test_rows_go_on_only_from_rows_that_do_the_same_before(deep, batches):
    """Two rows share a forward up to the block where a scale, a mean or a neuron is another one's."""
    bank = {"blocks.0.mlp": torch.tensor([1.0, 2.0]), "blocks.2.mlp": torch.tensor([3.0])}
    skill = Skill("s", {"blocks.0.mlp": [1, 2], "blocks.2.mlp": [4]})

    def begun(*conditions):
        return planned(deep, [[condition] for condition in conditions], batches[0]).begun

    def constant(late=3.0):
        return Condition(skill, mode="constant", constants={**bank, "blocks.2.mlp": torch.tensor([late])})

    assert begun(constant(), constant(), Condition(skill)) == {1: (0, DEPTH)}
    assert begun(constant(), constant(4.0)) == {1: (0, 2)}
    assert begun(Condition(skill), Condition(skill, scale=0.5)) == {}
    assert begun(Condition(skill), Condition(Skill("t", {"blocks.0.mlp": [1, 2], "blocks.2.mlp": [5]}))) == {1: (0, 2)}
    other_order = planned(deep, [[Condition(skill), constant()], [constant(), Condition(skill)]], batches[0])
    assert other_order.begun == {}


def test_as_many_examples_run_at_once_as_their_states_fit(deep, batches):
    """Of each example the hidden states of the stages are held, 17 tokens of 24 floats each."""
    rows, assigned = rows_of(deep)[-4:], np.arange(37) % 3
    shared = planned(deep, rows, batches[0])
    stages = {stage for _, stage in shared.begun.values()} - {DEPTH}
    assert shared._kept_bytes == len(stages) * 17 * 24 * 4
    sizes = []
    handle = deep.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    want = predict_assigned(deep, batches, rows, assigned)
    sizes.clear()
    with limited_memory(int(4.5 * shared._kept_bytes)), torch.inference_mode():
        found = shared.predict(read_batch(batches[0]), torch.from_numpy(assigned[:10]))
    assert max(sizes) == 4
    resumed = sum(stage < DEPTH for _, stage in shared.begun.values())
    assert sizes.count(1) == 3 * resumed  # the stem of a start in the middle runs on one row
    np.testing.assert_array_equal(found, want[:, :10])
    sizes.clear()
    with limited_memory(1), torch.inference_mode():
        shared.predict(read_batch(batches[0]), torch.from_numpy(assigned[:10]))
    assert max(sizes) == 1
    single = [(batches[0][0][:1], batches[0][1][:1])]  # is proven twice over
    assert planned(deep, rows, single[0]).begun == shared.begun
    np.testing.assert_array_equal(predict_assigned(deep, single, rows, assigned[:1]), want[:, :1])
    handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in deep.modules())


def test_rows_do_not_meet_at_a_classifier_that_is_not_the_last(deep, batches):
    """What follows the classifier would be left out; the blocks before are shared all the same."""

    class Signed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.vit, self.head = deep.blocks, [deep], deep.head
            self.signs = torch.tensor([1.0, -1, 1, -1, 1])

        def forward(self, x):
            return self.vit[0](x) * self.signs

    model = Signed().eval()
    skills = [Skill(str(i), {"blocks.0.mlp": range(9), "blocks.3.mlp": [i], "head": [i, 7]}) for i in range(3)]
    kinds = (("mlp", "head"), ("mlp",))
    rows = [[Condition(skill, components=some, scale=-2.0)] for skill in skills for some in kinds]
    shared = planned(model, rows, batches[0])
    assert {stage for _, stage in shared.begun.values()} == {3}
    assert len(shared.whole) == 1
    assigned = np.zeros(37, dtype=int)
    want = alone(model, batches, rows, assigned)
    np.testing.assert_array_equal(predict_assigned(model, batches, rows, assigned), want)
    assert len(np.unique(want, axis=0)) > 2
