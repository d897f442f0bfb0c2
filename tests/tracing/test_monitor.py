"""`Monitor`: what it reads against NumPy, its files, its alarms, threads, and that it leaves no trace in the model."""

from __future__ import annotations

import json
import re
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import planted
import pytest
import torch
from conftest import make_vit, one_line
from torch import nn

from skillfast import Monitor, Skill
from skillfast.errors import ArgumentError, ModelError
from skillfast.models import watching
from skillfast.models.activations import RoutedActivations
from skillfast.models.sites import find_sites
from skillfast.statistics.sequential import DriftTest
from skillfast.tracing import capture
from skillfast.tracing import monitor as monitor_module
from skillfast.tracing.capture import reading_routed

if TYPE_CHECKING:
    from pathlib import Path


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "monitor.jsonl").read_text().splitlines()]


def inputs_of(model: nn.Module, x: Any, paths: list[str]) -> dict[str, torch.Tensor]:
    """What projections read, by plain hooks."""
    seen: dict[str, torch.Tensor] = {}

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
        seen[path] = args[0].detach().clone()

    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: keep(m, args, path))
        for path in paths
    ]
    with torch.no_grad():
        model(**x) if isinstance(x, dict) else model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_activations_are_means_of_the_skills_neurons(tmp_path: Path) -> None:
    model = make_vit()
    skills = [
        Skill("deer", {"blocks.0.mlp": [5, 90], "blocks.1.attn": [3]}),
        Skill("cat", {"blocks.0.mlp": [5], "head": [1, 2, 20, 21, 22]}),
    ]
    x = torch.randn(12, 3, 16, 16)
    seen = inputs_of(model, x, ["blocks.0.mlp.fc2", "blocks.1.attn.proj", "head"])
    mlp, attn = (seen[name].abs().mean(1) for name in ("blocks.0.mlp.fc2", "blocks.1.attn.proj"))
    expected = {
        "deer": (mlp[:, 5] + mlp[:, 90] + attn[:, 3]) / 3,
        "cat": (mlp[:, 5] + seen["head"][:, [1, 2, 20, 21, 22]].abs().sum(1)) / 6,
    }
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    reference = {name: np.linspace(0, 1, 50) for name in expected}
    with torch.no_grad(), Monitor(model, skills, every=3, output=tmp_path, share=1.0, reference=reference) as monitor:
        for part in x.split(4):
            model(part)
        model(x[:2])
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == before
    first, last = lines(tmp_path)  # the second interval is cut short by the end
    assert (first["step"], first["examples"], last["step"], last["examples"]) == (3, 12, 4, 2)
    for name, values in expected.items():
        key, values = f"skill/{name}/", values.double().numpy()
        assert first[key + "activation"] == pytest.approx(values.mean(), rel=1e-5)
        assert last[key + "activation"] == pytest.approx(values[:2].mean(), rel=1e-5)
        for q in (5, 50, 95):
            assert first[f"{key}q{q:02d}"] == pytest.approx(np.quantile(values, q / 100), rel=1e-5)
        assert first[key + "alarm"] == first[key + "not_finite"] == 0
        test = DriftTest(reference[name], monitor.names.index(name))
        for part, line in ((values, first), (values[:2], last)):
            test.update(part)
            assert line[key + "drift"] == pytest.approx(test.evidence / np.log(10), rel=1e-6)
    r = np.corrcoef([values.double().numpy() for values in expected.values()])[0, 1]
    assert first["skill/deer/correlation/cat"] == pytest.approx(r, rel=1e-4)
    names = {"step", "time", "examples"}
    of_skill = ("activation", "q05", "q50", "q95", "not_finite", "drift", "alarm")
    assert (
        first.keys() - {"skill/deer/correlation/cat"}
        == last.keys()
        == names | {f"skill/{name}/{key}" for name in expected for key in of_skill}
    )
    found = monitor.prometheus()
    assert found == (tmp_path / "monitor.prom").read_text()
    comments = [line for line in found.splitlines() if line.startswith("#")]
    rows = dict(line.rsplit(" ", 1) for line in found.splitlines() if not line.startswith("#"))
    assert rows == {"skillfast_forwards_total": "4"} | {
        f"skillfast_skill_{row}": repr(last[f"skill/{skill}/{key}"])
        for skill in expected
        for key, row in (
            ("activation", f'activation{{skill="{skill}"}}'),
            *((f"q{q:02d}", f'activation_quantile{{skill="{skill}",quantile="{q / 100:g}"}}') for q in (5, 50, 95)),
            ("drift", f'drift{{skill="{skill}"}}'),
            ("alarm", f'alarm{{skill="{skill}"}}'),
        )
    }
    kinds = [re.fullmatch(r"# TYPE skillfast_(\w+) (gauge|counter)", line) for line in comments[1::2]]
    assert [kind[1] for kind in kinds if kind] == [
        "forwards_total", "skill_activation", "skill_activation_quantile", "skill_drift", "skill_alarm",
        "skill_routed_share", "skill_correlation",
    ]  # fmt: skip
    for kind, told in zip(kinds, comments[::2], strict=True):
        assert kind
        assert re.fullmatch(rf"# HELP skillfast_{kind[1]} [A-Z1][\w |,']+\.", told)


@pytest.mark.parametrize("model_class", ["BertForSequenceClassification", "Qwen3MoeForCausalLM"])
@pytest.mark.filterwarnings("ignore:sites cover")
def test_padding_and_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_class: str) -> None:
    transformers = pytest.importorskip("transformers")
    from tiny_models import SIZES

    made = getattr(transformers, model_class)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8} if "Moe" in model_class else {}
    torch.manual_seed(0)
    model = made(made.config_class(**SIZES, **more)).eval()
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    x = {"input_ids": torch.randint(4, 30, (3, 9)), "attention_mask": mask}
    settings: dict[str, Any] = {"every": 1, "output": tmp_path, "share": 1.0, "reference": 100}
    if not more:
        path = "bert.encoder.layer.1.output.dense"
        rows = inputs_of(model, x, [path])[path].abs()[..., [4, 9]].mean(-1)
        with torch.no_grad(), Monitor(model, [Skill("deer", {"blocks.1.mlp": [4, 9]})], **settings):
            model(**x)
        expected = ((rows * mask).sum(1) / mask.sum(1)).mean()
        assert lines(tmp_path)[0]["skill/deer/activation"] == pytest.approx(float(expected), rel=1e-5)
        assert "skill/deer/drift" not in lines(tmp_path)[0]  # no reference yet
        return
    site = next(site for site in find_sites(model) if site.kind == "expert")
    with monkeypatch.context() as patch, torch.no_grad():  # of a forward that is not read nothing is made
        patch.setattr(watching, "Activations", None)
        patch.setattr(RoutedActivations, "joined", None)
        patch.setattr(capture, "replace", None)
        with Monitor(model, [Skill("deer", {site.name: [0], "head": [0]})], **{**settings, "share": 1e-9}):
            model(**x)
    seen: list[Any] = []
    handle = model.get_submodule(site.path).register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(**x)
    handle.remove()
    hidden, index, _ = seen[0]
    experts, expert, unit = model.get_submodule(site.path), 2, 3
    gate, up = (hidden.flatten(0, -2) @ experts.gate_up_proj[expert].detach().T).chunk(2, -1)
    routed = (index == expert).any(-1)
    values = (torch.nn.functional.silu(gate) * up)[:, unit].abs() * routed
    skills = [Skill("deer", {site.name: [expert * 8 + unit]}), Skill("cat", {"head": [0]})]
    with torch.no_grad(), Monitor(model, skills, **settings):
        model(**x)
    real = mask.bool()
    of_example = torch.stack([values.view(3, 9)[i][real[i]].mean() for i in range(3)])
    shares = torch.stack([routed.view(3, 9)[i][real[i]].float().mean() for i in range(3)])
    line = lines(tmp_path)[0]
    assert line["skill/deer/activation"] == pytest.approx(float(of_example.mean()), rel=1e-4)
    assert line["skill/deer/routed_share"] == pytest.approx(float(shares.mean()), rel=1e-5)
    assert "skill/cat/routed_share" not in line
    shown = (tmp_path / "monitor.prom").read_text().splitlines()
    assert f'skillfast_skill_routed_share{{skill="deer"}} {line["skill/deer/routed_share"]!r}' in shown
    seen.clear()
    handle = model.get_submodule(site.path).register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad(), Monitor(model, skills, **settings):
        model(input_ids=x["input_ids"])  # without padding
    handle.remove()
    whole: list[Any] = []
    read = monitor_module._Read(site, skills)

    def both(found: RoutedActivations) -> None:
        masks = None, torch.zeros(3, 5, dtype=torch.bool)  # of other tokens than the site's
        whole.extend(read.routed(found, monitor_module._Forward(3, mask)) for mask in masks)

    with torch.no_grad(), reading_routed(model, site, both):
        model(**x)
    for one, other in zip(*whole, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    routed = (seen[0][1] == expert).any(-1).float()
    assert lines(tmp_path)[1]["skill/deer/routed_share"] == pytest.approx(float(routed.mean()), rel=1e-5)


def test_an_alarm_when_a_skill_goes_quiet(tmp_path: Path) -> None:
    """The deer skill is turned down while the model serves; it is named, the other one is not."""
    model = planted.model()
    skills = {"deer": Skill("2", planted.PLANTED[2]), "cat": Skill("1", planted.PLANTED[1])}
    images, _ = planted.images(600)
    generator = torch.Generator().manual_seed(0)
    rang: list[tuple[str, int]] = []

    def serve(forwards: int) -> None:
        for _ in range(forwards):
            model(images[torch.randint(len(images), (8,), generator=generator)])

    def turn_down(label: int, back: bool = False) -> None:
        """Other weights for the rows that make a skill's neurons."""
        factor = 1 / 0.3 if back else 0.3
        for site, neurons in planted.PLANTED[label].items():
            block = model.blocks[int(site.split(".")[1])]
            made, rows = (block.mlp.fc1, neurons) if "mlp" in site else (block.attn.qkv, [128 + i for i in neurons])
            made.weight[rows] *= factor
            made.bias[rows] *= factor

    def on_alarm(name: str, line: Any) -> None:
        rang.append((name, line["step"]))
        assert line[f"skill/{name}/drift"] > 0

    settings: dict[str, Any] = {"every": 20, "output": tmp_path, "share": 0.5, "reference": 200, "on_alarm": on_alarm}
    with torch.inference_mode(), Monitor(model, skills, **settings) as monitor:
        serve(200)
        assert not monitor.alarms
        turn_down(2)
        serve(60)
    assert monitor.alarms.keys() == {"deer"}
    assert 200 < monitor.alarms["deer"] <= 240
    assert rang == [("deer", monitor.alarms["deer"])]
    last = lines(tmp_path)[-1]
    assert (last["skill/deer/alarm"], last["skill/cat/alarm"]) == (1, 0)
    assert last["skill/deer/drift"] > np.log10(2 / 0.01) > last["skill/cat/drift"]
    before = lines(tmp_path)[8]
    assert last["skill/deer/activation"] < 0.5 * before["skill/deer/activation"]
    # A later process goes on from the reference of this one.
    with torch.inference_mode(), Monitor(model, skills, **{**settings, "reference": monitor.reference}) as later:
        turn_down(2, back=True)
        serve(20)
        assert not later.alarms
        turn_down(1)
        serve(60)
    assert later.alarms.keys() == {"cat"}


class Small(nn.Module):
    """A model of a microsecond or two, for many streams."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.skillfast_sites = {"blocks.0.mlp": "last"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def test_two_hundred_streams_without_a_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    skills = [Skill("deer", {"blocks.0.mlp": [0, 1]}), Skill("cat", {"blocks.0.mlp": [2, 3, 4]})]
    alarms = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        settings: dict[str, Any] = {"reference": 64, "alpha": 0.1, "share": 1.0, "seed": seed}
        with torch.no_grad(), Monitor(model, skills, every=6, output=tmp_path, **settings) as monitor:
            for _ in range(24):
                model(torch.randn(10, 4, generator=generator))
        alarms += bool(monitor.alarms)
    assert alarms <= 200 * 0.1 + 2 * np.sqrt(200 * 0.1 * 0.9), alarms


def test_few_forwards_are_read_and_many_examples_are_drawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small().eval()
    read: list[int] = []
    dense = monitor_module._Read.dense
    monkeypatch.setattr(monitor_module._Read, "dense", lambda *args: read.append(1) or dense(*args))
    settings: dict[str, Any] = {"every": 500, "output": tmp_path, "reference": 50, "share": 0.1}
    with torch.no_grad(), Monitor(model, [Skill("deer", {"blocks.0.mlp": [0]})], **settings) as monitor:
        for _ in range(500):
            model(torch.randn(8, 4))
    assert 25 <= len(read) <= 75
    (line,) = lines(tmp_path)
    assert line["examples"] == 8 * len(read)
    assert len(monitor.reference["deer"]) == 50
    assert monitor._tests is not None
    assert monitor._tests[0]._tested == 64


def test_threads_share_a_monitor(tmp_path: Path) -> None:
    model = Small().eval()
    settings: dict[str, Any] = {"every": 50, "output": tmp_path, "reference": 20, "share": 1.0}
    inputs = {n: torch.full((n, 4), float(n)) for n in (1, 2, 3)}
    model.requires_grad_(False)
    expected = {n: float(model.first(x).relu()[0, :2].abs().mean()) for n, x in inputs.items()}
    failed: list[BaseException] = []

    def serve(n: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(100):
                    model(inputs[n])
        except BaseException as error:
            failed.append(error)

    with Monitor(model, [Skill("deer", {"blocks.0.mlp": [0, 1]})], **settings):
        threads = [threading.Thread(target=serve, args=(n,)) for n in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    found = sorted(lines(tmp_path), key=lambda line: line["step"])  # who is told first is open
    assert [line["step"] for line in found] == list(range(50, 301, 50))
    assert sum(line["examples"] for line in found) == 100 * (1 + 2 + 3)
    mean = sum(line["examples"] * line["skill/deer/activation"] for line in found) / 600
    assert mean == pytest.approx(sum(n * expected[n] for n in inputs) / 6, rel=1e-5)


def test_examples_are_those_of_the_first_input_that_has_any(tmp_path: Path) -> None:
    class Scaled(Small):
        def forward(self, scale: Any, x: torch.Tensor | None = None, *, pixel_values: Any = None) -> torch.Tensor:
            x = pixel_values if x is None else x
            return scale if x is None else super().forward(scale * x)

    model, settings = Scaled().eval(), {"every": 1, "output": tmp_path, "share": 1.0, "reference": 99}
    with torch.no_grad(), Monitor(model, [Skill("deer", {"blocks.0.mlp": [0]})], **settings):
        model(torch.tensor(2.0), torch.randn(3, 4))
        model(2.0, torch.randn(5, 4))
        model(torch.ones(1, 4), pixel_values=torch.randn(7, 4))
        model.first(torch.randn(9, 4))  # no forward of the model
        model(torch.ones(2, 4))  # one that no site sees
    assert [(line["step"], line["examples"]) for line in lines(tmp_path)] == [(1, 3), (2, 5), (3, 7)]


def test_sites_that_see_other_examples_are_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
            self.skillfast_sites = {"blocks.0.mlp": "first", "blocks.1.mlp": "second"}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[:1])

    model, skill = Two().eval(), Skill("deer", {"blocks.0.mlp": [0], "blocks.1.mlp": [0]})
    with torch.no_grad(), Monitor(model, [skill], output=tmp_path, share=1.0):
        text = one_line(ModelError, model, torch.randn(3, 4))
        model(torch.randn(1, 4))
    assert text.startswith("blocks.1.mlp: expected one row per sample (3)")
    assert [(line["step"], line["examples"]) for line in lines(tmp_path)] == [(2, 1)]  # of what failed nothing counts


def test_sums_of_sites_and_the_first_share_of_tokens() -> None:
    """Sites of experts may see other examples than went in."""
    forward, nan = monitor_module._Forward(2, None), torch.nan
    forward.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert forward.routed is None
    forward.add(torch.ones(2, 2), torch.tensor([[nan, 0.5], [nan, 0.25]]))
    forward.add(torch.ones(2, 2), torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    assert forward.total is not None
    assert forward.total.tolist() == [[3, 4], [5, 6]]
    torch.testing.assert_close(forward.routed, torch.tensor([[0.1, 0.5], [0.3, 0.25]]))
    text = one_line(ModelError, forward.add, torch.ones(1, 2))
    assert text == "monitor: expected 2 examples at every site, got 1; leave out skills at sites that see others"


def test_numbers_that_are_none_are_counted(tmp_path: Path) -> None:
    model = Small().eval()
    settings: dict[str, Any] = {"every": 2, "output": tmp_path, "reference": 4, "share": 1.0}
    with torch.no_grad(), Monitor(model, [Skill("deer", {"blocks.0.mlp": [0]})], **settings):
        model(torch.randn(5, 4))
        model(torch.full((3, 4), torch.nan))
    (line,) = lines(tmp_path)
    assert line["skill/deer/not_finite"] == 3
    assert np.isfinite(line["skill/deer/activation"])
    assert np.isfinite(line["skill/deer/drift"])


def test_correlations_of_each_two_skills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a constant skill, of two examples, of examples without a number, nor of too many skills."""
    model = Small().eval()
    with torch.no_grad():
        model.first.weight[2:], model.first.bias[2:] = 0, 0.1
    skills = [Skill(name, {"blocks.0.mlp": [k]}) for k, name in enumerate(("deer", "cat", "constant"))]
    settings: dict[str, Any] = {"every": 1, "output": tmp_path, "share": 1.0, "reference": 99}
    x = torch.randn(9, 4)
    seen = model.first(x).relu()[:, :2].double().detach().numpy()
    with torch.no_grad(), Monitor(model, skills, **settings) as monitor:
        model(torch.cat([x, torch.full((2, 4), torch.nan)]))
        shown, r = monitor.prometheus().splitlines()[-1].rsplit(" ", 1)
        assert shown == 'skillfast_skill_correlation{skill="deer",other="cat"}'
        assert float(r) == pytest.approx(np.corrcoef(seen.T)[0, 1], abs=1e-5)
        model(x[:2])
        model(x[:3])
        monkeypatch.setattr(monitor_module, "_PAIRED", 3)
        model(x)
        monkeypatch.setattr(monitor_module, "_PAIRED", 2)
        model(x)
    found = [{key for key in line if "correlation" in key} for line in lines(tmp_path)]
    assert found == [{"skill/deer/correlation/cat"} if k in (0, 2, 3) else set() for k in range(5)]


def test_sinks_get_flat_keys_and_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[Any]] = {"tensorboard": [], "wandb": [], "mlflow": []}

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            told["tensorboard"].append((key, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            told["tensorboard"].append("closed")

    def log(name: str) -> Any:
        return lambda values, step: told[name].extend((key, value, step) for key, value in values.items())

    run = types.SimpleNamespace(log=log("wandb"))
    for name, library in (
        ("torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer)),
        ("wandb", types.SimpleNamespace(run=run)),
        ("mlflow", types.SimpleNamespace(log_metrics=log("mlflow"))),
    ):
        monkeypatch.setitem(sys.modules, name, library)
    model, skill = Small().eval(), Skill("deer", {"blocks.0.mlp": [0]})
    settings: dict[str, Any] = {"output": tmp_path, "reference": 4, "share": 1.0}
    with torch.no_grad(), Monitor(model, [skill], every=1, sinks=list(told), **settings):
        model(torch.randn(8, 4))
    (line,) = lines(tmp_path)
    expected = {(key, value, 1) for key, value in line.items() if key.startswith("skill/deer/")}
    assert len(expected) == 7
    assert told["tensorboard"].pop() == "closed"
    assert [set(found) for found in told.values()] == [expected] * 3
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    assert "pip install mlflow" in one_line(ModelError, Monitor, model, [skill], sinks=["mlflow"], output=tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None))
    assert "call wandb.init() first" in one_line(ModelError, Monitor, model, [skill], sinks=["wandb"], output=tmp_path)
    assert "got 'excel'" in one_line(ArgumentError, Monitor, model, [skill], sinks=["excel"], output=tmp_path)


def test_names_of_users_are_escaped(tmp_path: Path) -> None:
    model, skill = Small().eval(), Skill('a"b\\c\nd', {"blocks.0.mlp": [0]})
    with torch.no_grad(), Monitor(model, [skill], every=1, output=tmp_path, share=1.0) as monitor:
        model(torch.randn(255, 4))
        assert not hasattr(monitor, "reference")  # of 256, unless told otherwise
        model(torch.randn(2, 4))
    assert [len(values) for values in monitor.reference.values()] == [256]
    assert 'skillfast_skill_alarm{skill="a\\"b\\\\c\\nd"} 0\n' in monitor.prometheus()
    assert 'skill/a"b\\c\nd/activation' in lines(tmp_path)[0]


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    model, skill = Small().eval(), Skill("deer", {"blocks.0.mlp": [0]})
    for skills, more, words in (
        ([], {}, "skills: expected one or more"),
        ([skill, skill], {}, "names of their own, got 2"),
        ([Skill("deer", {"blocks.0.mlp": [6]})], {}, "expected indices below 6"),
        ([skill], {"share": 0}, "share: expected a number above 0"),
        ([skill], {"alpha": 1.5}, "alpha: expected a number above 0"),
        ([skill], {"reference": 0}, "reference: expected at least one example"),
        ([skill], {"reference": {"cat": [1.0]}}, "got none of deer"),
    ):
        assert words in one_line(ArgumentError, Monitor, model, skills, output=tmp_path, **more)
    assert not model._forward_hooks
