"""Where weights come from: checkpoint files, and the hub that timm downloads from."""

from __future__ import annotations

import logging
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skillfast.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_PROBE_SECONDS = 5.0
_READ_SECONDS = 15.0


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a state dictionary; timm unwraps the usual containers and prefixes.

    Raises:
        ModelError: the file is missing, damaged, or holds something else or more than weights.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ModelError(f"checkpoint '{path}': expected a file, got {got}; check --checkpoint")
    if path.suffix not in _SUFFIXES:
        raise ModelError(
            f"checkpoint '{path}': expected a file ending in {', '.join(_SUFFIXES)}, got '{path.suffix}'; "
            "convert it to safetensors"
        )
    import timm  # seconds, which those who read no file need not wait for

    try:
        with silent():
            state = timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # readers of damaged files raise nearly anything
        raise ModelError(
            f"checkpoint '{path}': expected readable weights, got {_what_went_wrong(error)}; "
            "pass a safetensors file, or one made by torch.save(model.state_dict(), ...)"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(
            f"checkpoint '{path}': expected named tensors, got {', '.join(map(str, list(state)[:3])) or 'nothing'}; "
            "pass a safetensors file, or one made by torch.save(model.state_dict(), ...)"
        )
    return state


def fit_checkpoint(model: nn.Module, name: str, state: dict[str, Tensor], what: str) -> bool:
    """Load weights into a model.

    Args:
        model: gets the weights, in its own dtype.
        name: name of the model, for messages.
        state: the weights.
        what: the name of their file, for messages.

    Returns:
        Whether everything fits but the classifier, which is then left as it was.

    Raises:
        ModelError: more does not fit; names the first few tensors and counts the rest.
    """
    own = model.state_dict()
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    prefixes = tuple(f"{n}." for n, module in model.named_modules() if any(module is head for head in heads))
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not all(key.startswith(prefixes) for key in (*missing, *reshaped)) or unexpected:
        changed = [f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}" for key in reshaped]
        problems = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (changed, "of another shape"))
            if keys
        ]
        raise ModelError(
            f"{what}: expected the {len(own)} tensors of {name}, got {', '.join(problems)}; "
            "check --model and --model-kwarg"
        )
    trainable = {key for key, _ in model.named_parameters()}  # a buffer may hold infinity, as masks do
    wrong = [key for key in state if key in trainable and not bool(torch.isfinite(state[key].float()).all())]
    if wrong:
        raise ModelError(f"{what}: expected finite weights, got NaN or infinity in {wrong[0]}; pass another checkpoint")
    replaced = bool(missing or reshaped)
    fitting = {key: value for key, value in state.items() if not (replaced and key.startswith(prefixes))}
    model.load_state_dict(fitting, strict=not replaced)  # copies into float32, whatever the file has
    return replaced


@contextmanager
def hub(name: str, cfg: dict[str, Any], quiet: bool) -> Iterator[None]:
    """Keep a download short when there is no network, silent, and its failure to one line."""
    if not (cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("file")):
        raise ModelError(
            f"model '{name}': expected pretrained weights, got a model for which timm knows none; "
            "pass --checkpoint FILE or --no-pretrained"
        )
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    unreachable = probe(constants.ENDPOINT) if cfg.get("hf_hub_id") else None
    if unreachable is not None and not _is_cached(cfg):  # known before a model of any size is built
        raise _no_weights(name, f"{constants.ENDPOINT} cannot be reached ({unreachable})")
    offline, timeout, bars_off = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout(), are_progress_bars_disabled()
    try:
        if unreachable is not None:
            constants.HF_HUB_OFFLINE = True  # the local cache or nothing: no minute of retries
        socket.setdefaulttimeout(_READ_SECONDS)
        if quiet:
            disable_progress_bars()
        with silent():
            yield
    except ModelError:
        raise
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise _no_weights(name, first_line(error)) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        socket.setdefaulttimeout(timeout)
        if not bars_off:
            enable_progress_bars()


def _no_weights(name: str, reason: str) -> ModelError:
    return ModelError(
        f"model '{name}': expected its pretrained weights in the local cache or on the hub, got none: {reason}; "
        "pass --checkpoint FILE or --no-pretrained"
    )


def _is_cached(cfg: dict[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = (cfg.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(cfg["hf_hub_id"], file), str) for file in files if file)


def probe(endpoint: str) -> str | None:
    """Try to reach the hub for a few seconds: why not, or None."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_PROBE_SECONDS)
    except Exception as error:  # of whichever HTTP library the hub's client uses
        return first_line(error)
    return None


@contextmanager
def silent() -> Iterator[None]:
    """Keep the libraries' log lines from the user; what matters of them is in our errors."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """Shorten another library's message to one line."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    line = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    return f"{line[:160]}..." if len(line) > 160 else line or type(error).__name__


def _what_went_wrong(error: Exception) -> str:
    if "nsupported global" in str(error):  # a class that torch would have to import to make it
        return "a pickle of more than weights"
    if "weights_only" in str(error):
        return "a damaged file (not a pickle of weights)"
    if isinstance(error, AttributeError | TypeError):
        return "something else than a state dictionary"
    return f"a damaged file ({type(error).__name__}: {first_line(error)})"
