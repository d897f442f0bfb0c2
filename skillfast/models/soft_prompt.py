"""Soft prompts: embeddings of virtual tokens before every text, as peft's prompt tuning keeps them."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast import files
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.models.batches import predicts_next
from skillfast.models.causal import is_causal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft names them
_TENSOR = "prompt_embeddings"
_SCHEMA = "skillfast.soft_prompt/1"
_REMEDY = "tune one with --soft-prompt NUMBER, or save one by peft's prompt tuning"
_TYPE = "PROMPT_TUNING"


@dataclass(frozen=True)
class SoftPrompt:
    """Embeddings of virtual tokens that stand before every text.

    Attributes:
        embeddings: float32 [tokens, width], on the CPU.
        tuned: How they were tuned (see `tune_prompt`); empty for a prompt of which its folder does not say.
    """

    embeddings: Tensor
    tuned: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of virtual tokens."""
        return len(self.embeddings)

    @property
    def sha256(self) -> str:
        """SHA-256 of a line with dtype and shape (`float32 [16, 640]`) and a line feed, then of the bytes."""
        digest = hashlib.sha256(f"float32 {list(self.embeddings.shape)}\n".encode())
        digest.update(self.embeddings.contiguous().numpy().data)
        return digest.hexdigest()

    def check(self, model: torch.nn.Module, name: str) -> None:
        """Raises ArgumentError where the embeddings are not as wide as a model's of this name."""
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        if self.embeddings.shape[1] != width:
            raise ArgumentError(
                f"soft prompt: expected embeddings of {width} numbers for {name}, got {self.embeddings.shape[1]}; tune "
                "one on this model"
            )

    def save(self, folder: str | Path, model: torch.nn.Module | None = None) -> Path:
        """Write a folder that `peft.PeftModel.from_pretrained(model, folder)` opens.

        Args:
            folder: Made if it is missing.
            model: The model that the prompt is for, whose name and sizes peft keeps beside it.

        Raises:
            ModelError: No peft library.
        """
        require_peft()
        path = files.output_folder(folder)
        made = peft_config(len(self), self.embeddings.shape[1], model)
        made.inference_mode = True
        made.save_pretrained(str(path))
        header = {"schema": _SCHEMA, "tuned": dict(self.tuned)}
        files.write_arrays(path / WEIGHTS, {_TENSOR: self.embeddings.numpy()}, header)
        return path

    @staticmethod
    def load(folder: str | Path) -> SoftPrompt:
        """Open a folder with a prompt that peft's prompt tuning or `save` left; peft itself is not needed.

        Raises:
            DataError: A folder without one, with another kind of adapter, or with files that are broken.
        """
        path = Path(folder)
        if not (path / CONFIG).is_file():
            got = f"a folder without {CONFIG}" if path.is_dir() else "no such folder"
            raise DataError(f"soft prompt '{path}': expected a folder that peft saved, got {got}; {_REMEDY}")
        config = files.read_any_json(path / CONFIG, _REMEDY)
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        if kind != _TYPE:
            raise DataError(
                f"{path / CONFIG}: expected an adapter of type {_TYPE}, got {files.short(str(kind))}; {_REMEDY}"
            )
        embeddings, tuned = _read_weights(path / WEIGHTS)
        told, copies = config.get("num_virtual_tokens"), config.get("num_transformer_submodules")
        if told != len(embeddings) or copies not in (None, 1):
            raise DataError(
                f"{path / CONFIG}: expected {len(embeddings)} virtual tokens for one decoder, as in {WEIGHTS}, got "
                f"{files.short(str(told))} for {files.short(str(copies))}; {_REMEDY}"
            )
        return SoftPrompt(embeddings, tuned)


def _read_weights(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """The embeddings and, of a file that was written here, how they were tuned."""
    with files.safetensors_file(path, _REMEDY, "pt") as file:
        names = sorted(file.keys())
        part = file.get_slice(_TENSOR) if names == [_TENSOR] else None
        shape = [] if part is None else list(part.get_shape())
        if part is None or part.get_dtype() not in ("F32", "F16", "BF16") or len(shape) != 2 or not all(shape):
            got = ", ".join(names[:3]) if part is None else f"{part.get_dtype()} {shape}"
            raise DataError(
                f"{path}: expected {_TENSOR} [tokens, width] of floating point, got {got or 'no tensor'}; {_REMEDY}"
            )
        tensor: Tensor = file.get_tensor(_TENSOR)
        own = "skillfast" in (file.metadata() or {})
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{path}: expected finite numbers in {_TENSOR}, got NaN or infinity; {_REMEDY}")
    if not own:
        return tensor.float(), {}
    with files.open_tensors(path, _SCHEMA, _REMEDY, "pt") as written:
        tuned = written.header.get("tuned")
        if not isinstance(tuned, dict):
            got = files.short(repr(tuned), 80)
            raise DataError(f"{path}: expected how it was tuned in its header, got {got}; {_REMEDY}")
        return written.get(_TENSOR).float(), tuned


def require_peft() -> None:
    """Raises ModelError where the peft library is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "soft prompt: expected the peft library to tune and save one, got none; pip install 'skillfast[llm]'"
        )


def peft_config(tokens: int, width: int, model: torch.nn.Module | None) -> Any:
    """What peft keeps of a prompt beside its embeddings."""
    from peft import PromptTuningConfig, TaskType

    config = getattr(model, "config", None)
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(config, "_name_or_path", None),
        num_virtual_tokens=tokens,
        token_dim=width,
        num_transformer_submodules=1,
        num_attention_heads=getattr(config, "num_attention_heads", None),
        num_layers=getattr(config, "num_hidden_layers", None),
    )


def check_prompted(model: torch.nn.Module, name: str) -> None:
    """Raises ModelError for a model that no soft prompt can stand before: only causal language models take one."""
    takes = predicts_next(model) and "inputs_embeds" in inspect.signature(model.forward).parameters
    if not takes or not is_causal(model):
        why = "which reads later tokens" if takes else "which takes none"
        raise ModelError(
            f"soft prompt: expected a causal language model, got {name} of type {type(model).__name__}, {why}; use a "
            "decoder"
        )
