"""Models that several processes hold together: each sees its own neurons, and all get the results of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers", minversion="5.24", reason="needs transformers 5.24, whose weights are DTensors")

SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
import numpy as np, timm, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
import skillfast
from skillfast import Condition, Continuous, Skill
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import find_sites, fingerprint

torch.set_num_threads(1)
STYLES = {"fc1": ColwiseParallel, "fc2": RowwiseParallel}
ids = torch.randint(0, 64, (22, 9), generator=torch.Generator().manual_seed(1))
mask = torch.arange(9) < torch.randint(4, 10, (22, 1), generator=torch.Generator().manual_seed(2))
values = torch.randn(22, generator=torch.Generator().manual_seed(3))
data = [{"input_ids": part, "labels": part} for part in ids.split(8)]


def traced(model, rows=slice(None), shared=False, **settings):
    tracer = skillfast.Tracer(model, {"y": Continuous()}, **settings)
    with tracer, torch.no_grad():
        for part, real, y in zip(ids[rows].split(8), mask[rows].split(8), values[rows].split(8)):
            tracer.expect(real)
            model(input_ids=part, use_cache=False)
            tracer.step(y=y)
    if shared:
        tracer.all_reduce()
    return tracer.compute()


def same(got, want, exact=()):
    assert got.sites == want.sites and got.fingerprint == want.fingerprint and got.reasons == want.reasons
    for name, array in want.arrays().items():
        np.testing.assert_allclose(got.arrays()[name], array, atol=2e-6, rtol=2e-5, err_msg=name)
    if want.routed is not None:
        np.testing.assert_allclose(got.routed.mean, want.routed.mean, atol=1e-6)


def one_line(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as raised:
        assert "\\n" not in str(raised), raised
        return str(raised)
    raise AssertionError("nothing was raised")


for folder in sys.argv[1:]:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    rank = dist.get_rank()
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    assert weight.to_local().shape[1] == weight.shape[1] // 2, "nothing is spread"
    every_token = {"pool": "none", "statistics": ["pearson"]}
    for settings in ({}, every_token, {"sites": ["head"]}, {"sites": ["blocks.1.attn"]}):
        want = traced(plain, **settings)
        same(traced(model, **settings), want)
    every = traced(plain, statistics=["pearson"])

    generator = torch.Generator().manual_seed(0)
    drawn = {s.name: torch.randperm(s.width, generator=generator)[: s.width // 3] for s in find_sites(plain)}
    skill, one_side = Skill("all", drawn), Skill("one side", {"blocks.1.attn": [0, 2]})
    for settings in ({}, {"scale": 2.0}, {"mode": "mean", "reference": every}):
        found = []
        for each in (plain, model):
            with skillfast.ablate(each, skill, **settings), torch.no_grad():
                found.append(each(input_ids=ids).logits)
        np.testing.assert_allclose(found[1], found[0], atol=2e-6)
    ranking, want = (skillfast.attribute(each, data, classes=64) for each in (model, plain))
    np.testing.assert_allclose(ranking.values, want.values, atol=1e-6)
    conditions = [Condition(skill), Condition(one_side), Condition(skill, scale=2.0)]
    sweeps = [
        skillfast.sweep(each, data, conditions, classes=64, keep_predictions=True, keep_margins=True)
        for each in (model, plain)
    ]
    np.testing.assert_allclose(sweeps[0].margins, sweeps[1].margins, atol=2e-6)
    assert (sweeps[0].predictions == sweeps[1].predictions).all()

    refused = "expected a model that one process holds, got parts of one (DTensor); load it whole"
    assert one_line(ModelError, skillfast.prepare, model) == f"prepare: {refused}"
    assert one_line(ModelError, skillfast.donors, model, data, [skill]) == f"donors: {refused}"
    assert one_line(ModelError, skillfast.learn_masks, model, data, ranking) == f"learn_masks: {refused}"
    assert one_line(ModelError, skillfast.knobs(model, {"s": skill}).__enter__) == f"knobs: {refused}"
    tracer = skillfast.Tracer(model, {"y": Continuous()})
    assert "got a part of them (DTensor)" in one_line(ModelError, tracer.state_dict)
    assert "all_reduce: expected the group of processes" in one_line(ArgumentError, tracer.all_reduce)
    with tracer, torch.no_grad():
        for step in range(2):
            model(input_ids=ids[:1])
            tracer.discard() if step == rank == 1 else tracer.step(y=[1.0])
    assert "expected the same batches in the 2 processes" in one_line(ArgumentError, tracer.compute)

    # weights that are whole in each forward, and other data in each process
    named, kept = fingerprint(plain), every
    for block in plain.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(plain, mesh=init_device_mesh("cpu", (2,)))
    assert fingerprint(plain) == named
    got = traced(plain, slice(rank, None, 2), shared=True, statistics=["pearson"])
    np.testing.assert_allclose(got.pearson, kept.pearson, atol=1e-5)
    with skillfast.ablate(plain, skill), torch.no_grad():
        logits = plain(input_ids=ids).logits
    with skillfast.ablate(model, skill), torch.no_grad():
        np.testing.assert_allclose(logits, model(input_ids=ids).logits, atol=2e-6)

# a vision transformer whose MLPs torch has spread; their inputs are DTensors
images, classes = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
torch.manual_seed(0)
plain, model = (timm.create_model("vit_tiny_patch16_224", **sizes).eval() for _ in range(2))
model.load_state_dict(plain.state_dict())
plan = {f"blocks.{i}.mlp.{name}": style() for i in range(2) for name, style in STYLES.items()}
parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
assert model.blocks[0].mlp.fc2.weight.to_local().shape[1] == 48
loader = [(images[:12], classes[:12]), (images[12:], classes[12:])]
want, got = (skillfast.trace(each, loader, classes=3, statistics=["pearson"]) for each in (plain, model))
same(got, want)
skill = Skill("both", {"blocks.0.mlp": [1, 50, 95], "blocks.1.mlp": [0, 60], "blocks.1.attn": [4]})
found = []
for each in (plain, model):
    with skillfast.ablate(each, skill), torch.no_grad():
        found.append(each(images))
np.testing.assert_allclose(found[1], found[0], atol=2e-6)
ranking, want = (skillfast.attribute(each, loader, classes=3) for each in (model, plain))
np.testing.assert_allclose(ranking.values, want.values, atol=1e-6)
swept = [skillfast.sweep(each, loader, [Condition(skill)], classes=3, keep_margins=True) for each in (model, plain)]
np.testing.assert_allclose(swept[0].margins, swept[1].margins, atol=2e-6)
dist.destroy_process_group()
"""


def test_two_processes_that_hold_a_model_together_give_the_results_of_one(tmp_path):
    """A dense decoder and one with experts under `tp_plan="auto"`, and the same under FSDP2 with half of the data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 64, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(intermediate_size=48, **sizes)).save_pretrained(tmp_path / "dense")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **sizes)).save_pretrained(tmp_path / "experts")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, (tmp_path / "script.py", tmp_path / "dense", tmp_path / "experts"))]
    running = [
        subprocess.Popen(
            command, env=os.environ | told | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    try:
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.1)  # one that failed would be waited for
    finally:
        for process in running:
            process.kill()
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-2000:] for text in errors)
