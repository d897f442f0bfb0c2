"""Donors: who gets whose activations follows from the data set, not from its order, its batches or its padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_vit, one_line
from tiny_models import save_model

import skillfast
from skillfast import Condition, Skill
from skillfast.ablation.donors import example_digests
from skillfast.ablation.interventions import _rows_of_calls
from skillfast.data import load_digits, loader
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import find_sites

SKILL = Skill("mine", {"blocks.0.mlp": [0, 5, 95], "blocks.1.attn": [3, 4], "blocks.2.mlp": [7], "head": [1, 2]})


def drawn(model, data, skills=(SKILL,), **more):
    return skillfast.donors(model, data, skills, **{"n_donors": 8, **more})


def ordered(images, labels, order, size):
    return list(zip(images[order].split(size), labels[order].split(size), strict=True))


def test_a_sweep_depends_neither_on_order_nor_on_batches(trained_digits):
    """With partners of the same batch, skills cost nothing on small batches of one class."""
    splits = load_digits(0)
    attributions = skillfast.attribute(trained_digits, loader(splits.select, 256), classes=10)
    skills = list(skillfast.select(attributions, share=0.03, contrastive=True).values())
    conditions = [Condition(skill, mode="resample") for skill in skills]
    images, labels = (torch.cat(parts) for parts in zip(*loader(splits.test, 256), strict=True))
    few = torch.cat([(labels == c).nonzero()[:20, 0] for c in range(10)])  # sorted by class
    images, labels = images[few], labels[few]
    mixed = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    found = []
    for order, size in ((mixed, 100), (torch.arange(200), 100), (torch.arange(200), 20)):
        data = ordered(images, labels, order, size)
        bank = skillfast.donors(trained_digits, data, skills, n_donors=64)
        swept = skillfast.sweep(trained_digits, data, conditions, donors=bank, classes=10, keep_predictions=True)
        np.testing.assert_array_equal(swept.donor_labels, labels[order][swept.donors])
        assert np.mean(swept.donor_labels == swept.labels) < 0.2  # others, whatever stands beside
        assert (swept.baseline - np.diagonal(swept.per_class_accuracy)).mean() > 0.1
        back = order.argsort().numpy()
        found.append((swept.predictions[:, back], order[swept.donors].numpy()[back], order[bank.indices].numpy()))
    for predictions, given, members in found[1:]:
        np.testing.assert_array_equal(members, found[0][2])
        np.testing.assert_array_equal(given, found[0][1])
        assert np.mean(predictions != found[0][0]) < 2e-3  # equal but for what rounding decides


def test_no_one_is_its_own_donor(vit, batches):
    bank = drawn(vit, batches, n_donors=3)
    assert len(bank) == len(bank.labels) == 3
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    np.testing.assert_array_equal(bank.labels, labels[bank.indices])
    rows = bank.rows_of(vit, images)
    assert not (bank.indices[rows] == np.arange(len(images))).any()
    assert set(rows.tolist()) == {0, 1, 2}
    other = drawn(vit, batches, n_donors=3, seed=1)
    assert not np.array_equal(other.indices, bank.indices)
    per_token = drawn(vit, [(x, y[:, None].expand(-1, 17)) for x, y in batches], n_donors=3)
    np.testing.assert_array_equal(per_token.indices, bank.indices)
    np.testing.assert_array_equal(per_token.labels, [-1, -1, -1])


def test_donors_are_a_simple_random_sample():
    """Each of 40 examples is as often a donor as any other, over 300 seeds; and each donor is as often given."""
    model = make_vit(depth=1)
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = [(images, torch.zeros(40, dtype=torch.long))]
    times, given = np.zeros(40), np.zeros(10)
    for seed in range(300):
        bank = skillfast.donors(model, data, [], n_donors=10, seed=seed)
        times[bank.indices] += 1
        given += np.bincount(bank.rows_of(model, images), minlength=10)
    assert np.abs(times - 75).max() < 4.5 * np.sqrt(300 * 0.25 * 0.75)
    assert np.abs(given - 1200).max() < 4.5 * np.sqrt(12000 * 0.1 * 0.9)


def test_ablate_leaves_the_donors_activations(vit, batches):
    images = torch.cat([x for x, _ in batches])
    bank = drawn(vit, batches)
    kept = {}
    handles = [
        vit.get_submodule(path).register_forward_pre_hook(
            lambda _, args, p=path: kept.setdefault(p, []).append(args[0])
        )
        for path in ("blocks.1.attn.proj", "head")
    ]
    part = images[5:9]
    with torch.no_grad():
        vit(part)
        vit(images[bank.indices[bank.rows_of(vit, part)]])
        for handle in handles:
            handle.remove()
        only = Skill("one", {"blocks.1.attn": [3, 4], "head": [1]})
        for scale in (0.0, 0.25):
            with skillfast.ablate(vit, only, mode="resample", donors=bank, scale=scale):
                seen = []
                handle = vit.blocks[1].attn.proj.register_forward_pre_hook(
                    lambda _, args, seen=seen: seen.append(args[0])
                )
                vit(part)
                handle.remove()
            own, other = kept["blocks.1.attn.proj"]
            torch.testing.assert_close(seen[0][..., [3, 4]], (other + scale * (own - other))[..., [3, 4]])
            torch.testing.assert_close(seen[0][..., 5:], own[..., 5:])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in vit.modules())


def test_a_sweep_inside_an_ablation_keeps_its_donors(vit, batches):
    bank = drawn(vit, batches)
    inner = Condition(Skill("inner", {"blocks.2.attn": [1, 2], "blocks.2.mlp": [3]}))
    with skillfast.ablate(vit, SKILL, mode="resample", donors=bank):
        got = skillfast.sweep(vit, batches, [inner], keep_embeddings=True)
        with skillfast.ablate(vit, inner.skill), torch.no_grad():
            want = torch.cat([vit(x) for x, _ in batches])
    np.testing.assert_allclose(vit.head(torch.from_numpy(got.embeddings[0])).detach(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_padding_is_no_donor(tmp_path, name):
    """The same donors and logits whatever stands beside a text; a donor gives the mean over its own tokens."""
    pytest.importorskip("transformers", reason="needs transformers")
    from skillfast.models.huggingface import load_language_model
    from skillfast.models.text_classifier import TextClassifier
    from skillfast.models.text_inputs import Collate

    folder = save_model(tmp_path, name, num_hidden_layers=3, num_labels=3)
    loaded = load_language_model(str(folder), "classification", classes=["a", "b", "c"])
    model, collate, rng = TextClassifier(loaded, 3), Collate(loaded), np.random.default_rng(0)
    lengths = (9, 3, 4, 6, 5, 5, 2, 7, 8, 4)
    texts = [{"input_ids": rng.integers(4, 33, n).tolist(), "label": n % 3, "columns": {}} for n in lengths]

    def batched(size):
        made = [collate(texts[i : i + size]) for i in range(0, len(texts), size)]
        return [(TextClassifier.pack(batch), batch["labels"]) for batch in made]

    skill = Skill("s", {"blocks.0.attn": [1, 4], "blocks.1.mlp": [0, 3]})
    alone, together = (skillfast.donors(model, batched(size), [skill], n_donors=4) for size in (1, 10))
    np.testing.assert_array_equal(alone.indices, together.indices)
    for site, kept in alone.activations.items():
        assert kept.shape == (4, 1, 2)
        assert torch.equal(kept, together.activations[site])
    path = next(site.path for site in find_sites(model) if site.name == "blocks.0.attn")
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(batched(1)[int(alone.indices[2])][0])
    handle.remove()
    torch.testing.assert_close(alone.activations["blocks.0.attn"][2, 0], seen[0][0][:, [1, 4]].mean(0))
    logits = {}
    for size in (1, 10):
        with skillfast.ablate(model, skill, mode="resample", donors=alone), torch.no_grad():
            logits[size] = torch.cat([model(packed) for packed, _ in batched(size)])
    torch.testing.assert_close(logits[1], logits[10], rtol=1e-4, atol=1e-5)
    condition = Condition(skill, mode="resample")
    swept = skillfast.sweep(model, batched(4), [condition], donors=alone, classes=3, keep_predictions=True)
    np.testing.assert_array_equal(swept.predictions[0], logits[10].argmax(1))
    with skillfast.ablate(model, skill, mode="resample", donors=alone):  # whose padding an inner sweep knows, too
        same = Condition(Skill("same", {"blocks.1.attn": [2]}), scale=1.0)
        inner = skillfast.sweep(model, batched(4), [same], classes=3, keep_margins=True)
    torch.testing.assert_close(torch.from_numpy(inner.baseline_logits), logits[10], rtol=1e-4, atol=1e-5)
    labels = torch.cat([labels for _, labels in batched(4)])
    want = skillfast.metrics.margin(logits[10], labels).numpy()
    np.testing.assert_allclose(inner.margins[0], want, rtol=1e-4, atol=1e-5)


def test_what_has_no_donor_is_refused(vit, batches):
    condition = [Condition(SKILL, mode="resample")]
    assert one_line(ArgumentError, skillfast.sweep, vit, batches, condition) == (
        "mode 'resample': expected donors=skillfast.donors(model, loader, skills), got none; draw them first"
    )
    bank = drawn(vit, batches, [Skill("less", {"blocks.0.mlp": [0, 5]})])
    text = one_line(ArgumentError, skillfast.sweep, vit, batches, condition, donors=bank)
    assert "expected activations of all neurons of skill 'mine' in blocks.0.mlp, got some without" in text
    first = Condition(Skill("first", {"blocks.0.mlp": [0]}), mode="resample")
    text = one_line(ArgumentError, skillfast.sweep, make_vit(depth=2), batches, [first], donors=bank)
    assert "expected some of the model's architecture" in text
    text = one_line(ArgumentError, drawn, vit, [(batches[0][0][:1].repeat(3, 1, 1, 1), torch.zeros(3).long())])
    assert "expected at least 2 different examples, got 1" in text
    assert "expected at least 2, got 1" in one_line(ArgumentError, drawn, vit, batches, n_donors=1)
    text = one_line(ArgumentError, drawn, vit, batches, memory_budget=10_000)
    assert "for 8 donors, got 0 MiB; lower n_donors" in text
    text = one_line(ArgumentError, drawn, vit, batches, [Skill("s", {"blocks.0.mlp": [400]})])
    assert "expected neurons that the model has, got 400 in blocks.0.mlp" in text
    images, each = 8 * 3 * 16 * 16 * 4, (17 * (3 + 2 + 1) + 2) * 4  # bytes; 17 tokens, the head's pooled
    with pytest.raises(ArgumentError, match="for 8 donors"):
        drawn(vit, batches, memory_budget=images + 8 * each - 1)
    drawn(vit, batches, memory_budget=images + 8 * each)
    text = one_line(ArgumentError, drawn, vit, batches, [Skill("s", {"blocks.9.mlp": [3]})])
    assert "expected neurons that the model has, got 3 in blocks.9.mlp" in text
    assert "donors: expected a model in evaluation mode" in one_line(ModelError, drawn, make_vit().train(), batches)


def test_a_part_of_the_model_does_not_tell_who_is_whose_donor(vit, batches):
    bank = drawn(vit, batches)
    images = batches[0][0]
    with skillfast.ablate(vit, SKILL, mode="resample", donors=bank), torch.no_grad():
        text = one_line(ModelError, vit.forward_features, images)
        assert "expected a forward of the whole model" in text
        vit(images)
        assert "got 10 rows where none went in" in one_line(ModelError, vit.forward_features, images)


def test_images_of_another_size_have_no_donors(batches):
    model = make_vit(dynamic_img_size=True)
    bank = drawn(model, batches)
    larger = torch.randn(4, 3, 24, 24)
    with skillfast.ablate(model, SKILL, mode="resample", donors=bank), torch.no_grad():
        assert "of examples of another size" in one_line(ArgumentError, model, larger)
    text = one_line(ArgumentError, drawn, model, [*batches, (larger, torch.zeros(4).long())], n_donors=41)
    assert "expected examples of one number of tokens, got [17] and [37] at blocks.0.mlp" in text


def test_a_call_tells_examples_apart_by_its_arguments_but_labels():
    class Masked(torch.nn.Module):
        def forward(self, x, attention_mask=None, labels=None):
            seen.append(rows())
            return x

    class Bank:
        def rows_of(self, model, inputs):
            return inputs

    seen, model, x, mask = [], Masked(), torch.tensor([[4, 1], [5, 2]]), torch.tensor([[1, 1], [1, 0]])
    with _rows_of_calls(model, Bank()) as rows:
        model(x)
        model(x, attention_mask=mask, labels=x[:, 0])
        model(x=x)
        assert "got {x: str}; call the model with its inputs" in one_line(ArgumentError, model, x="text")
        assert rows() is None
    assert seen[0] is x
    assert seen[1] == {"x": x, "attention_mask": mask}
    assert seen[2] == {"x": x}
    assert not model._forward_pre_hooks


def test_an_example_is_the_same_with_a_mask_of_all_tokens_and_without(vit):
    ids = torch.arange(12).view(3, 4)
    bare, real = {"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert [*example_digests(vit, bare, 0)] == [*example_digests(vit, real, 0)]
    assert [*example_digests(vit, bare, 0)] != [*example_digests(vit, bare, 1)]


def test_donors_run_a_few_at_a_time_and_keep_what_a_plain_forward_gives(vit, batches):
    images, sizes, seen = torch.cat([x for x, _ in batches]), [], []
    handle = vit.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    bank = drawn(vit, batches, n_donors=36)
    handle.remove()
    assert sizes == [16, 16, 4]
    assert drawn(vit, batches, n_donors=100).digests.shape == (37,)
    assert (np.diff(bank.digests.astype(float)) > 0).all()
    for site in find_sites(vit):
        if site.name in SKILL.neurons:
            vit.get_submodule(site.path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        vit(images[bank.indices])
    for name, x in zip(bank.activations, seen, strict=True):
        assert bank.neurons[name].tolist() == SKILL.neurons[name].tolist()
        torch.testing.assert_close(bank.activations[name], x[..., SKILL.neurons[name]], rtol=1e-4, atol=1e-4)
    assert bank.places("head", torch.tensor([2, 1])).tolist() == [1, 0]
    assert bank.places("head", torch.tensor([1, 3])) is bank.places("blocks.0.attn", torch.tensor([0])) is None
    assert (bank.seed, bank.fingerprint) == (0, skillfast.models.sites.fingerprint(vit))
    negative = drawn(vit, batches, seed=-5)
    assert not np.array_equal(negative.indices, drawn(vit, batches, seed=5).indices)
