"""Words that settings take and defaults of several signatures, for a command line that imports no torch, too."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["mlp", "attn", "ssm", "expert", "router", "head"]
Layout = Literal["tokens", "channels_first", "tokens_first"]
Pool = Literal["mean", "cls", "max", "last", "none"]
Mode = Literal["zero", "mean", "resample", "constant", "reroute"]
Activation = Literal["identity", "gelu", "gelu_tanh", "relu", "silu"]
Finetune = Literal["none", "head", "last-block", "all"]
NO_TRAINING: Finetune = "none"  # of weights that are to be measured as they are
Task = Literal["own", "classification", "causal"]

HUGGINGFACE, EMBEDDED = "hf:", "embedded:"  # before a language model's name: a hub or a folder, an installed package

BINS = 128  # per neuron, for all statistics but Pearson's r
BUFFER_ROWS = 512  # observations collected before one update of an accumulator

KINDS: tuple[Kind, ...] = get_args(Kind)
POOLS: tuple[Pool, ...] = get_args(Pool)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
MODES: tuple[Mode, ...] = get_args(Mode)
FOLDED: tuple[Mode, ...] = ("zero", "mean")  # the same for every example, so that weights can do it
STATISTICS = ("pearson", "spearman", "auroc", "mutual_info")
LEARNED = ("mask", "erase")
METHODS = (*STATISTICS, "attribution", *LEARNED)
DATASETS = ("digits", "cifar10", "imagefolder", "text")
GIVEN = "given"  # what model and data are called that a caller gave
FINETUNE: tuple[Finetune, ...] = get_args(Finetune)
TASKS: tuple[Task, ...] = get_args(Task)
DTYPES = ("float32", "bfloat16", "float16")
BITS = (4, 8)
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # as in transformers
BACKENDS = ("auto", "native", "triton", "reference")
METRICS = ("label", "correct", "confidence", "loss")

SHARE, MAX_SITE_SHARE = 0.03, 0.25  # of all neurons, and of one site's, that a skill takes at most
PERPLEXITY: Literal["perplexity"] = "perplexity"
BLEU: Literal["bleu"] = "bleu"
