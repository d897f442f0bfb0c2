"""Language models of the `transformers` library: by name or from a folder, with their tokenizers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sizes import check_counts, no_more_than
from skillfast.models.sources import Source, is_gguf, source_of
from skillfast.models.weights import first_line, probe
from skillfast.vocabulary import EMBEDDED, HUGGINGFACE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from skillfast.vocabulary import Task

_AUTO = {"classification": "AutoModelForSequenceClassification", "causal": "AutoModelForCausalLM", "own": "AutoModel"}
_NO_LIMIT = 10**6  # tokenizers without one say 10^30


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer, ready for use.

    Attributes:
        model: In evaluation mode.
        tokenizer: The model's tokenizer, with a token to pad with.
        name: As it was asked for, without the prefix.
        task: `"classification"`: a head over the classes; `"causal"`: the next token; `"own"`: what its weights are
            for.
        context: Tokens that it can read, special ones included.
        head_replaced: Whether the classifier is new and untrained: the weights had none for so many classes.
    """

    model: torch.nn.Module
    tokenizer: Any
    name: str
    task: Task
    context: int
    head_replaced: bool


def is_huggingface(name: str | None) -> bool:
    """Whether a `--model` argument means a model of the transformers library."""
    return name is not None and name.startswith((HUGGINGFACE, EMBEDDED))


def load_config(name: str) -> Any:
    """Read a model's configuration; no weights.

    Args:
        name: As `load_language_model` takes it, or a file `config.json`.

    Raises:
        ModelError: No such model here or on the hub, or a configuration that transformers does not know.
    """
    transformers = _library()
    name = name.removeprefix(HUGGINGFACE)
    if Path(name).is_file() and not is_gguf(name):
        from huggingface_hub.errors import StrictDataclassError

        try:
            values = json.loads(Path(name).read_text(encoding="utf-8"))
            check_counts(name, values)
            with _silent(transformers):
                return transformers.AutoConfig.for_model(**values)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            StrictDataclassError,
        ) as error:
            raise ModelError(
                f"model '{name}': expected a config.json with a known model_type, got {first_line(error)}; "
                "check the file"
            ) from error
    source = _source(name)
    with _from_hub(name, source, "its configuration") as where:
        if source.is_local and source.gguf is None:
            check_counts(_prefixed(name), json.loads((Path(source.place) / "config.json").read_text(encoding="utf-8")))
        config = transformers.AutoConfig.from_pretrained(source.place, trust_remote_code=False, **where)
    if source.gguf and not config.architectures:  # older readers of such files name none
        decoders = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        config.architectures = [decoders[config.model_type]] if config.model_type in decoders else None
    return config


def load_language_model(
    name: str,
    task: Task = "own",
    *,
    classes: Sequence[str] | None = None,
    pad_token: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    seed: int = 0,
) -> LanguageModel:
    """Load a model, its weights and its tokenizer.

    Args:
        name: A name on the hub, a folder, or a GGUF file in either; with or without the prefix `hf:`. With the prefix
            `embedded:` what an installed package brings (`skillfast.models.embedded`).
        task: `"classification"` puts a head for the classes on it unless the weights have one; `"causal"` predicts
            tokens; `"own"` is whatever its configuration names as the architecture of its weights.
        classes: Names of the classes, for classification.
        pad_token: What to pad with, where the tokenizer has nothing.
        dtype: Data type of the weights; None for that of the file.
        device_map: As in `from_pretrained`: `"auto"` spreads the layers over the devices; needs accelerate.
        quantization_config: As in `from_pretrained`, for 4-bit and 8-bit layers. A GGUF file is unpacked; with
            transformers' `GgufConfig()` its weights stay packed where there is a kernel that multiplies by them.
        seed: Seed of a new head's weights; the global random state is left as it was.

    Raises:
        ModelError: No such model here or on the hub, weights or a tokenizer that cannot be read, no token to pad with.
    """
    transformers = _library()
    name = name.removeprefix(HUGGINGFACE)
    source = _source(name)
    config = load_config(name)
    tokenizer = load_tokenizer(name, pad_token=pad_token)
    if task == "classification":
        config.num_labels = len(_checked(classes))
    if source.is_local:
        packed = source.gguf is not None or getattr(config, "quantization_config", None) is not None
        with no_more_than(_prefixed(name), Path(source.gguf or source.place), packed=packed):
            skeleton(config, task)
    quantised = _unpacked(transformers, name, quantization_config) if source.gguf else quantization_config
    options: dict[str, Any] = {"config": config, "dtype": dtype or "auto", "device_map": device_map}
    if quantised is not None:
        options["quantization_config"] = quantised
    with (
        torch.random.fork_rng(devices=[]),
        _from_hub(name, source, "its weights") as where,
    ):
        torch.default_generator.manual_seed(seed)
        model, loading = _model_class(transformers, config, task).from_pretrained(
            source.place,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=task == "classification",
            **options,
            **where,
        )
    missing = sorted([*loading["missing_keys"], *(str(key[0]) for key in loading["mismatched_keys"])])
    if missing and not (task == "classification" and all(is_head(model, key) for key in missing)):
        raise ModelError(
            f"model '{name}': expected all weights of {type(model).__name__}, got {len(missing)} missing "
            f"({', '.join(missing[:3])}); it was made for {_made_for(config)}"
        )
    _check_tokens(name, model, tokenizer)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # classification heads of decoders look for the last token
    return LanguageModel(model.eval(), tokenizer, name, task, _context(name, model.config, tokenizer), bool(missing))


def save_language_model(
    model: torch.nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that `from_pretrained` opens, without bars and log lines.

    Args:
        model: A model of the transformers library.
        folder: Where to.
        tokenizer: The tokenizer or processor, if the model has one.
        state: Weights to write instead of the model's, under the same names.
    """
    with _silent(_library()):
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def load_tokenizer(name: str, *, pad_token: str | None = None) -> Any:
    """Load a model's tokenizer.

    Args:
        name: As `load_language_model` takes it.
        pad_token: What to pad with, where the tokenizer has nothing; a token of its vocabulary.

    Raises:
        ModelError: No tokenizer there, or one without a token to pad with.
    """
    transformers = _library()
    name = name.removeprefix(HUGGINGFACE)
    source = _source(name)
    with _from_hub(name, source, "its tokenizer") as where, _panics():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.place, trust_remote_code=False, **where)
        with contextlib.suppress(Exception):  # of a word that it does not know; a damaged one panics
            tokenizer("a")
            tokenizer("a", "a")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where there is none
        raise ModelError(
            f"model '{name}': expected a tokenizer beside it, got none; save it there with "
            f"tokenizer.save_pretrained('{name}')"
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(
                f"model '{name}': expected a pad token of its tokenizer's vocabulary, got {pad_token!r}; "
                f"for example {tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)!r}"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        remedy = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        raise ModelError(
            f"model '{name}': expected a tokenizer with a pad token, got none; pass --pad-token '{remedy}' (padding is "
            "masked, so any token serves)"
        )
    return tokenizer


def encode(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """Tokenise texts.

    Args:
        tokenizer: As `load_tokenizer` returns it.
        texts: A text or several.
        options: As a tokenizer takes them, such as `truncation` or `add_special_tokens`.

    Returns:
        What the tokenizer returns: a mapping with `input_ids`.

    Raises:
        ModelError: A tokenizer that cannot read them.
    """
    try:
        return tokenizer(texts if isinstance(texts, str) else list(texts), **options)
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise ModelError(
            f"tokenizer: expected one that reads the texts, got {first_line(error)}; check the model's tokenizer.json"
        ) from error


def check_ids(language_model: LanguageModel, texts: Sequence[Sequence[int]]) -> None:
    """Raise ModelError for a text without a token, or with one that the model has no embedding of.

    Args:
        language_model: The model, with its tokenizer.
        texts: The tokens of each text.
    """
    embeddings: Any = language_model.model.get_input_embeddings()  # type: ignore[operator]
    rows = embeddings.num_embeddings
    for ids in texts:
        if not len(ids) or not 0 <= min(ids) <= max(ids) < rows:
            got = f"{max(ids)}" if len(ids) else "a text without any"
            raise ModelError(
                f"tokenizer: expected tokens from 0 to {rows - 1}, which the model has embeddings of, got {got}; check "
                "the model's tokenizer.json"
            )


def skeleton(config: Any, task: Task = "own") -> torch.nn.Module:
    """A model without weights, on torch's `meta` device: its modules and their sizes, and no memory.

    Args:
        config: From `load_config`.
        task: As in `load_language_model`.

    Raises:
        ModelError: A configuration from which transformers cannot make a model.
    """
    transformers = _library()
    try:
        with torch.device("meta"), _silent(transformers):
            chosen = _model_class(transformers, config, task)
            made = chosen.from_config(config) if hasattr(chosen, "from_config") else chosen(config)
    except ModelError:
        raise
    except Exception as error:  # of whatever the model's constructor checks
        raise ModelError(
            f"model of type {config.model_type}: expected a configuration of a {task} model, got {first_line(error)}; "
            "check the configuration"
        ) from error
    return made.eval()


def is_head(model: Any, key: str) -> bool:
    """Whether a tensor of a state dict sits on top of the base model; a pooler does (BERT's).

    Args:
        model: A model of the transformers library.
        key: The tensor's name.
    """
    return not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key


def quantization(bits: int | None, dtype: torch.dtype) -> Any:
    """What `load_language_model` takes for linear layers of so many bits, by bitsandbytes; None for none.

    Args:
        bits: 4 or 8, or None.
        dtype: In which 4-bit layers compute.

    Raises:
        ModelError: No bitsandbytes library.
    """
    if bits is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"bits: expected the bitsandbytes library for layers of {bits} bits, got none; pip install bitsandbytes"
        )
    config = _library().BitsAndBytesConfig
    return config(load_in_8bit=True) if bits == 8 else config(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "model: expected the transformers library for a model with the prefix hf:, got none; "
            "pip install 'skillfast[llm]'"
        ) from error
    return transformers


def _model_class(transformers: Any, config: Any, task: Task) -> Any:
    named = next(iter(config.architectures or ()), None)
    if task == "own" and named is not None and hasattr(transformers, named):
        return getattr(transformers, named)
    return getattr(transformers, _AUTO[task])


def _checked(classes: Sequence[str] | None) -> Sequence[str]:
    if classes is None or len(classes) < 2:
        raise ArgumentError(
            f"classes: expected at least two for a classification head, got {len(classes or ())}; give the data's"
        )
    return classes


def _made_for(config: Any) -> str:
    return ", ".join(map(str, config.architectures or ())) or "something that its configuration does not name"


def _context(name: str, config: Any, tokenizer: Any) -> int:
    limits = {what: getattr(config, what, None) for what in ("max_position_embeddings", "n_positions")}
    limits["model_max_length"] = tokenizer.model_max_length
    known = {what: limit for what, limit in limits.items() if limit is not None}
    for what, limit in known.items():
        if not isinstance(limit, int | float) or not limit >= 1:
            raise ModelError(
                f"model '{_prefixed(name)}': expected a number of tokens as {what}, got {str(limit)[:80]!r}; check the "
                "folder"
            )
    return min([int(limit) for limit in known.values() if limit < _NO_LIMIT], default=_NO_LIMIT)


def _check_tokens(name: str, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) >= rows:
        raise ModelError(
            f"model '{name}': expected a tokenizer for its {rows} embeddings, got one of {len(tokenizer)} tokens; "
            "use the tokenizer that it was trained with"
        )


def _source(name: str) -> Source:
    return source_of(name, _unpack)


def _unpack(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a folder, its weights in float32."""
    loaded = load_language_model(str(file), "causal", dtype=torch.float32)
    save_language_model(loaded.model, folder, tokenizer=loaded.tokenizer)


def _unpacked(transformers: Any, name: str, given: Any) -> Any:
    """What unpacks a GGUF file, unless it shall stay packed; older versions of transformers do nothing else."""
    packs = getattr(transformers, "GgufConfig", None)
    if given is None:
        return None if packs is None else packs(dequantize=True)
    if packs is None or not isinstance(given, packs):
        raise ModelError(
            f"model '{HUGGINGFACE}{name}': expected no other quantisation of a GGUF file's weights, got "
            f"{type(given).__name__}; leave out --bits"
        )
    return given


@contextlib.contextmanager
def _from_hub(name: str, source: Source, what: str) -> Iterator[dict[str, Any]]:
    """Arguments that say where to look; a failure in one line, and soon where there is no network."""
    from huggingface_hub import constants

    transformers = _library()
    local = source.is_local
    offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1"
    unreachable = None if local or offline else probe(constants.ENDPOINT)
    try:
        with _silent(transformers):
            yield {"local_files_only": local or offline or unreachable is not None, **source.arguments}
    except ModelError:
        raise
    except Exception as error:  # of the hub's client, of safetensors, of whatever reads the files
        reason, remedy = first_line(error), "check the name, or pass a folder"
        if local:
            remedy = "check the file" if source.gguf else "check the folder"
        if unreachable is not None or offline:
            reason = "it is not in the local cache, and " + (
                f"{constants.ENDPOINT} cannot be reached ({unreachable})" if unreachable else "HF_HUB_OFFLINE is set"
            )
            remedy = "pass --model hf:FOLDER with the files of the model"
        raise ModelError(f"model '{_prefixed(name)}': expected {what}, got none: {reason}; {remedy}") from error


@contextlib.contextmanager
def _panics() -> Iterator[None]:
    """Raise a panic of a tokenizer's Rust code as an error, without the lines that it writes to stderr itself."""
    sys.stderr.flush()
    stderr, panicked = os.dup(2), False
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            if panicked:
                raise ValueError(first_line(error)) from error
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            if not panicked and (said := held.read()):
                os.write(2, said)


def _is_panic(error: BaseException) -> bool:
    return type(error).__module__ == "pyo3_runtime"  # no Exception, and of no module that can be imported


def _prefixed(name: str) -> str:
    return name if name.startswith(EMBEDDED) else f"{HUGGINGFACE}{name}"


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Keep the library's log lines and bars from the user; what matters of them is in our errors."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
