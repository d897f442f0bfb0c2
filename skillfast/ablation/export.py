"""`export`: a checkpoint with an ablation folded into its weights, which runs without skillfast."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skillfast import __version__
from skillfast.ablation.folding import folded
from skillfast.ablation.interventions import Condition
from skillfast.errors import ArgumentError, ModelError
from skillfast.files import check_output, umask
from skillfast.markdown import code, escaped, table
from skillfast.models.coverage import warn_incomplete
from skillfast.models.digests import weights_digest
from skillfast.models.huggingface import save_language_model
from skillfast.models.shrink import is_configured
from skillfast.models.sites import find_sites, unwrap_compiled
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.weights import first_line, silent
from skillfast.vocabulary import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores
    from skillfast.vocabulary import Mode

WEIGHTS, CARD = "model.safetensors", "README.md"
_ON_HUB = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def export(
    model: nn.Module,
    skill: Skill | Sequence[Skill],
    folder: str | Path,
    *,
    scale: float | Mapping[str, float] = 0.0,
    mode: Mode = "zero",
    reference: NeuronScores | None = None,
    components: Sequence[str] = KINDS,
    processor: object = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint that does by itself what the model does inside `ablate`, and nothing of skillfast runs it.

    The factor goes into the columns of the output projections that the skill's neurons are multiplied by, which is
    exact but for the rounding of a product; constants of `mode="mean"` go into their biases. All other weights are
    bitwise those of the model. The folder's README.md says what was changed.

    A model of the transformers library becomes a folder for `from_pretrained`, sharded as it saves it; its head gets
    weights of its own where they were the embeddings'. A timm model becomes a folder for
    `timm.create_model("local-dir:FOLDER", pretrained=True)` (timm 1.0.20 reads no safetensors there: load them
    into it). Of any other model the state dict is written.

    Args:
        model: The model, which stays as it is.
        skill: The neurons; of several skills each changes its own, and a neuron that two have is scaled twice, as by
            contexts of `ablate` one inside the other.
        folder: A new or empty folder; it is whole when it appears under this name.
        scale: Factor on the activations: 0 removes, 2 amplifies; or one for each skill by its name, as of `knobs`.
        mode: `"zero"` or `"mean"`, as of `ablate`.
        reference: Scores of this model, for `mode="mean"`.
        components: Kinds of sites in which the neurons are changed.
        processor: Tokenizer or processor of a model of the transformers library, which is saved beside it.
        model_kwargs: Arguments that a timm model was made with, which older versions of timm do not remember.

    Returns:
        The folder.

    Raises:
        ArgumentError: A folder that holds something; neurons that the model lacks; a mode that no weights have; means
            without a bias that takes them.
        ModelError: Projections that are quantised, adapted, sharded, offloaded or tied to other modules; a timm model
            that its arguments do not make again.
    """
    model = unwrap_compiled(model)
    skills = list(skill) if isinstance(skill, Sequence) else [skill]
    if not skills:
        raise ArgumentError("skill: expected at least one, got none; name one")
    target = Path(folder)
    check_output(target)
    if target.is_dir() and any(target.iterdir()):
        raise ArgumentError(f"output folder {str(target)!r}: expected a new one, got files in it; name another")
    warn_incomplete(model)
    saved, prefix = (model.language_model, "language_model.") if isinstance(model, TextClassifier) else (model, "")
    _refuse_wrapped(saved)
    tied = _tied_head(saved)
    factors = scale if isinstance(scale, Mapping) else dict.fromkeys((each.name for each in skills), scale)
    if set(factors) != {each.name for each in skills}:
        raise ArgumentError(
            f"scale: expected a factor for each of {', '.join(each.name for each in skills)}, got "
            f"{', '.join(factors)}; give them by the skills' names"
        )
    conditions = [Condition(each, tuple(components), factors[each.name], mode) for each in skills]
    changed = folded(model, conditions, reference, untied=[prefix + tied] if tied else [])
    changed = {name.removeprefix(prefix): values for name, values in changed.items()}
    original = saved.state_dict()
    card = _card(saved, model, conditions, changed, weights_digest(saved))
    with _appearing(target) as made:
        state = {**original, **changed}
        if is_configured(saved):
            with _untied(saved, tied is not None and tied in changed):
                save_language_model(saved, made, tokenizer=processor, state=state)
        else:
            if _is_of_timm(saved):
                _save_timm_config(saved, made, dict(model_kwargs or {}))
            _save_state(state, made / WEIGHTS)
        (made / CARD).write_text(card, encoding="utf-8")
    return target


def _refuse_wrapped(model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        got, remedy = "a quantised one", "load it without quantisation"
    elif getattr(model, "_hf_peft_config_loaded", False):
        got, remedy = "one with adapters", "merge them into the weights first"
    else:
        return
    raise ModelError(f"export: expected a model in plain floating point, got {got}; {remedy}")


def _tied_head(model: nn.Module) -> str | None:
    """Name of the weight of a language-model head that is the embeddings', too; None without one."""
    if not is_configured(model):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    if weight is None or weight is not getattr(model.get_input_embeddings(), "weight", None):  # type: ignore[operator]
        return None
    return next(f"{path}.weight" for path, module in model.named_modules() if module is head)


@contextmanager
def _untied(model: nn.Module, apart: bool) -> Iterator[None]:
    """The configuration says inside that the head has weights of its own."""
    configs: list[Any] = [model.config, model.config.get_text_config()] if apart else []  # type: ignore[union-attr,operator]
    before = [getattr(config, "tie_word_embeddings", None) for config in configs]
    try:
        for config in configs:
            config.tie_word_embeddings = False
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.tie_word_embeddings = value


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place when it is whole."""
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
    try:
        yield made
        made.chmod(0o777 & ~umask())
        if target.is_dir():
            target.rmdir()
        made.replace(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """A state dict as safetensors; tensors that share memory are written each, so that every name is there."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = (tensor.clone() if place in seen else tensor).contiguous().cpu()
        seen.add(place)
    save_file(apart, path, metadata={"format": "pt"})


def _is_of_timm(model: nn.Module) -> bool:
    return bool((getattr(model, "pretrained_cfg", None) or {}).get("architecture"))


def _save_timm_config(model: nn.Module, folder: Path, model_kwargs: dict[str, Any]) -> None:
    """Write a config.json of timm's, which makes this model again; raises ModelError where it makes another."""
    import timm

    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    try:
        with silent(), torch.random.fork_rng(devices=[]):
            timm.models.save_for_hf(model, str(folder), model_args=model_kwargs, safe_serialization=True)
            again = timm.create_model(f"local-dir:{folder}")  # older versions of timm make none on the meta device
        found = {name: tensor.shape for name, tensor in again.state_dict().items()}
        got = "a model with other weights" if found != wanted else ""
    except Exception as error:  # of whichever constructor
        got = first_line(error)
    if got:
        raise ModelError(
            f"export: expected model_kwargs that make this {type(model).__name__} again, got {model_kwargs or 'none'} "
            f"({got}); pass what timm.create_model was called with"
        )


def _card(
    saved: nn.Module, model: nn.Module, conditions: Sequence[Condition], changed: Mapping[str, Tensor], digest: str
) -> str:
    """The folder's README.md: what was changed, and how to open it."""
    known = str(getattr(getattr(saved, "config", None), "_name_or_path", ""))
    name = Path(known).name if Path(known).exists() else known
    name = name or (getattr(saved, "pretrained_cfg", None) or {}).get("architecture", "") or type(saved).__name__
    front: dict[str, Any] = {"tags": ["skillfast"]}
    if is_configured(saved):
        front["library_name"] = "transformers"
        opened = f'transformers.{type(saved).__name__}.from_pretrained("FOLDER")'
    elif _is_of_timm(saved):
        front["library_name"] = "timm"
        opened = 'timm.create_model("local-dir:FOLDER", pretrained=True)'
    else:
        opened = f'model.load_state_dict(safetensors.torch.load_file("FOLDER/{WEIGHTS}"))'
    if is_configured(saved) and _ON_HUB.fullmatch(known) and not Path(known).exists():
        front["base_model"] = name
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    scale, one = conditions[0].scale, len({condition.scale for condition in conditions}) == 1
    what = ("removed" if scale == 0 else f"scaled by {scale:g}") if one else "scaled"
    each = ", ".join(f"{code(condition.skill.name)} {condition.scale:g}" for condition in conditions)
    factors = f"Factor on each neuron below: {scale:g}" if one else f"Factors on the neurons below: {each}"
    towards = "0" if conditions[0].mode == "zero" else "its mean, which the bias holds"
    lines += [f"# {escaped(name)} with {_plural(len(conditions), 'skill')} {what}", ""]
    lines += f"""A copy of {code(name)} ({type(saved).__name__}) whose weights were changed by skillfast {__version__}.
It runs without skillfast:

    {opened}

- {factors}, towards {towards}.
- Weights that differ: {", ".join(map(code, changed))}. All others are those of the source.
- SHA-256 of the source's weights: {code(digest)}, over its state dict in the order of the names: for each tensor a
  line with name, dtype and shape, then its bytes.

A neuron is an input of the projection named beside it: a column of that weight. That it was removed does not show that
the information is gone; a refitted probe may still read it.""".split("\n")
    sites = find_sites(model)
    for condition in conditions:
        skill = condition.skill
        chosen = [(site, neurons) for site in sites if (neurons := condition.neurons_at(site)) is not None]
        count = sum(len(neurons) for _, neurons in chosen)
        lines += ["", f"## Skill {code(skill.name)}: {_plural(count, 'neuron')}", ""]
        if skill.method is not None:
            lines += [f"Chosen by {code(skill.method)} for {code(str(skill.metric))}.", ""]
        rows = ([site.name, code(site.path), " ".join(map(str, neurons.tolist()))] for site, neurons in chosen)
        lines.append(table(("site", "projection", "neurons"), rows))
    return "\n".join(lines) + "\n"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
