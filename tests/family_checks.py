"""What must hold for a model of every family: certificate, traced values, a removal and a sweep against plain loops."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

import skillfast
from skillfast import Condition, Continuous, Skill
from skillfast.models.sites import find_sites

MOST_CLASSES = 5
JOINED = "grid_thw"  # sizes of images whose patches are in one sequence


class Classifier(nn.Module):
    """A model of the transformers library as one of classes: the last token's first logits or features.

    Args:
        inner: The model.
        inputs: Keyword arguments that it takes; of all but the main one every example gets the first row.
    """

    def __init__(self, inner: Any, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.inputs = inner, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes]."""
        main, *_ = self.inputs
        if JOINED in self.inputs:  # patches of all images in one sequence
            found = answer(self.inner(x.flatten(0, 1), self.inputs[JOINED][:1].expand(len(x), -1)))
            return found.view(len(x), -1, found.shape[-1])[:, -1, :MOST_CLASSES]
        more = {name: _first(value, len(x)) for name, value in self.inputs.items() if name != main}
        found = answer(self.inner(**{main: x, **more}))
        return found.flatten(1, -2)[:, -1, :MOST_CLASSES] if found.dim() > 2 else found[:, :MOST_CLASSES]


def _first(value: Any, n: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:1].expand(n, *value.shape[1:])
    return tuple(_first(part, n) for part in value) if isinstance(value, tuple) else value


def answer(output: Any) -> torch.Tensor:
    """What a model says: its logits, or its last hidden state or whatever tensor comes first."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), torch.Tensor):
            return found
    tensors = (x for value in output.values() for x in (value if isinstance(value, tuple) else (value,)))
    return next(x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point())


def run(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The model's answer."""
    return answer(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def of_channel(module: nn.Module) -> int:
    """The dimension of a projection's input that counts its neurons."""
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def check(model: nn.Module, inputs: Any, batch: int) -> None:
    """Raises where a family does not hold what skillfast promises.

    Args:
        model: A small model with random weights, in evaluation mode.
        inputs: What it is called with: a tensor, or keyword arguments.
        batch: Number of examples.
    """
    found = skillfast.coverage(model, inputs)
    assert found.complete, str(found)
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(3)
    neurons = {site.name: torch.randperm(site.width, generator=generator)[:3].sort().values for site in sites}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # constant neurons; forwards that cannot start in the middle
        _traced(model, inputs, batch, sites)
        _removed(model, inputs, sites, neurons)
        main = next(iter(inputs)) if isinstance(inputs, dict) else ""
        whole = Classifier(model, inputs) if main else model
        x = inputs[main] if main else inputs
        _swept(whole.eval(), x.unflatten(0, (batch, -1)) if main and JOINED in inputs else x)


def _traced(model: nn.Module, inputs: Any, batch: int, sites: Any) -> None:
    y = torch.randn(batch, generator=torch.Generator().manual_seed(2)).double()
    with skillfast.Tracer(model, {"y": Continuous()}, statistics=("pearson",)) as tracer, torch.no_grad():
        run(model, inputs)
        tracer.step(y=y)
    scores = tracer.compute()
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for site in sites:
            module = model.get_submodule(site.path)
            handle = module.register_forward_pre_hook(lambda _, x, name=site.name: seen.update({name: x[0].clone()}))
            stack.callback(handle.remove)
        run(model, inputs)
    for site in sites:
        x = seen[site.name].double().numpy()
        if of_channel(model.get_submodule(site.path)) == 1:
            x = np.moveaxis(x, 1, -1)
        rows = x.reshape(batch, -1, site.width).mean(1)  # windows of an example lie one after the other
        scale = np.abs(rows).max() + 1e-30
        np.testing.assert_allclose(scores[site.name].mean / scale, rows.mean(0) / scale, atol=1e-5, err_msg=site.name)
        got, spread = scores[site.name].pearson[:, 0], rows.std(0)
        sure = (spread > 1e-2 * scale) & np.isfinite(got)
        centred = rows - rows.mean(0)
        with np.errstate(invalid="ignore"):
            want = centred.T @ (y - y.mean()).numpy() / batch / (spread * y.numpy().std())
        assert sure.any() or (spread <= 1e-2 * scale).all(), site.name
        np.testing.assert_allclose(got[sure], want[sure], atol=2e-3, err_msg=site.name)


def _zeroed(model: nn.Module, neurons: dict[str, torch.Tensor], paths: dict[str, str]) -> ExitStack:
    """Plain hooks that set neurons to 0."""
    stack = ExitStack()
    for name, index in neurons.items():
        module = model.get_submodule(paths[name])

        def zero(module: nn.Module, args: tuple[Any, ...], index: torch.Tensor = index) -> tuple[Any, ...]:
            return (args[0].index_fill(of_channel(module), index, 0.0), *args[1:])

        stack.callback(module.register_forward_pre_hook(zero).remove)
    return stack


def _removed(model: nn.Module, inputs: Any, sites: Any, neurons: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        intact = run(model, inputs)
        with skillfast.ablate(model, Skill("any", neurons)):
            got = run(model, inputs)
        with _zeroed(model, neurons, {site.name: site.path for site in sites}):
            want = run(model, inputs)
    largest = float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * largest)
    assert not torch.allclose(got, intact, atol=1e-6 * largest)


def _swept(model: nn.Module, x: torch.Tensor) -> None:
    sites = [site for site in find_sites(model) if site.kind != "head"]
    paths = {site.name: site.path for site in sites}
    chosen = dict.fromkeys((sites[0].name, sites[-1].name))
    removed = {name: {name: torch.arange(3)} for name in chosen}
    with torch.no_grad():
        classes = model(x).shape[1]
    labels = torch.arange(len(x)) % classes
    result = skillfast.sweep(
        model, [(x, labels)], [Condition(Skill(name, some)) for name, some in removed.items()], classes=classes,
        keep_margins=True,
    )  # fmt: skip
    own = torch.nn.functional.one_hot(labels, classes).bool()
    for name, some in removed.items():
        with torch.no_grad(), _zeroed(model, some, paths):
            logits = model(x)
        want = (logits[own] - logits.masked_fill(own, -torch.inf).amax(1)).numpy()
        atol = 2e-4 * float(logits.abs().max())
        np.testing.assert_allclose(result.margins_of([name])[0], want, atol=atol, err_msg=name)
