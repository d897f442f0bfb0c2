"""Every kind of file that the package reads: an example of it, and what its readers do with it."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mutations
import numpy as np
import report_sample as sample
import timm
import torch
from compared import planted
from PIL import Image
from safetensors.torch import save_file

import skillfast
from skillfast import data, files
from skillfast.data.text import read_text
from skillfast.data.transforms import make_transforms
from skillfast.errors import DataError, SkillfastError
from skillfast.models import soft_prompt
from skillfast.models.digits import digits_model
from skillfast.models.huggingface import check_ids, encode, load_config, load_language_model
from skillfast.models.loading import create_model, load_trained, save_trained
from skillfast.report import read_results, replay_text, summary_table, write_comparison, write_evaluation, write_report
from skillfast.report.exports import card
from skillfast.results.decisions import Decisions
from skillfast.results.gates import read_gates
from skillfast.runs.checkpoints import FOLDER, Checkpoints
from skillfast.runs.compare import compare
from skillfast.runs.config import BenchConfig, Grid
from skillfast.runs.earlier import model_settings
from skillfast.runs.embedding_sweep import EmbeddingChanges, compare_embeddings
from skillfast.runs.evaluate import evaluate
from skillfast.runs.kept import JSON
from skillfast.runs.replay import Earlier
from skillfast.runs.selection import candidates_of
from skillfast.runs.shares import OwnPredictions
from skillfast.runs.soft_prompt import named_prompt
from skillfast.statistics.routed import RoutedRows, RoutedStatistics
from skillfast.statistics.tokens import TokenStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    Draw = mutations.Draw

CLASSES = ("ant", "bee", "cat")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: Its name in the folder.
        make: Writes an example of it, and what else its readers need, into a folder.
        read: Reads it and does with the result what the package does; raises SkillfastError where it is refused.
        change: Draws another content of the file.
        heavy: Whether an example takes more than about 2 ms.
        slow: Whether it needs a library that takes seconds to import.
    """

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    change: Callable[[Draw, bytes], bytes]
    heavy: bool = False
    slow: bool = False

    def example(self, folder: Path) -> bytes:
        """Write an example into a folder and read it; returns its bytes."""
        self.make(folder)
        raw = (folder / self.file).read_bytes()
        self.read(folder)
        return raw

    def refuses(self, folder: Path, content: bytes) -> bool:
        """Whether a file of this content is refused and not read; raises AssertionError where that is said badly."""
        (folder / self.file).write_bytes(content)
        try:
            self.read(folder)
        except SkillfastError as error:
            text = str(error)
            assert len(text.splitlines()) == 1, text
            assert "expected " in text or "had another " in text, text  # another run's remains are no error
            assert len(text) < 1500, text
            return True
        return False


def _json_or_bytes(draw: Draw, raw: bytes) -> bytes:
    if draw.random() < 0.25:
        return mutations.changed_bytes(draw, raw)
    return mutations.changed_json(draw, json.loads(raw)).encode("utf-8", "surrogatepass")


def _vit() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(18, 3, 8, 8, generator=generator), torch.arange(18) % 3)]


def scores() -> skillfast.NeuronScores:
    return skillfast.trace(_vit(), _batches(), classes=CLASSES, n_bootstrap=8, bins=4)


def _read_scores(folder: Path) -> object:
    scores = skillfast.NeuronScores.load(folder)
    skills = skillfast.select(scores)
    scores.to_dataframe(metric=scores.columns[-1].partition(":")[0], top=2)
    scores.save(folder / "again")
    return skills


def _read_ranking(folder: Path) -> object:
    ranking = skillfast.NeuronRanking.load(folder)
    ranking.save(folder / "again")
    return skillfast.select(ranking)


def _sweep() -> skillfast.SweepResult:
    skills = [skillfast.Skill(name, {"blocks.0.mlp": torch.tensor([i])}) for i, name in enumerate(CLASSES)]
    conditions = [skillfast.Condition(skill) for skill in skills]
    kept = {"keep_predictions": True, "keep_margins": True, "keep_embeddings": True}
    return skillfast.sweep(_vit(), _batches(), conditions, classes=CLASSES, **kept)


def _read_sweep(folder: Path) -> object:
    found = skillfast.SweepResult.load(folder)
    for name in found.names:
        found[name]
    np.bincount(found.labels * len(found.classes) + found.top2[:, 0], minlength=len(found.classes) ** 2)
    found.save(folder / "again")
    return found


def _embeddings() -> EmbeddingChanges | None:
    skills = [skillfast.Skill(name, {"blocks.0.mlp": torch.tensor([i])}) for i, name in enumerate(CLASSES)]
    removals = [skillfast.Condition(skill) for skill in skills]
    return compare_embeddings(_vit(), _batches(), removals, [], classes=CLASSES)


def _read_embeddings(folder: Path) -> object:
    found = EmbeddingChanges.load(folder)
    found.of(found.names)
    found.metrics.knn_accuracy()
    found.save(folder / "again")
    return found


def _own_predictions() -> OwnPredictions:
    rows = np.arange(6)
    return OwnPredictions(
        np.zeros((3, 9), int), np.ones((4, 6), int), rows, np.ones((2, 6), int), np.zeros((2, 6), int), rows
    )


METRICS = {"label": skillfast.Categorical(CLASSES), "loss": skillfast.Continuous(), "correct": skillfast.Binary()}


def _statistics() -> skillfast.NeuronStatistics:
    acc = skillfast.NeuronStatistics(5, METRICS, bins=4, n_bootstrap=8)
    acc.update(*_counted(100))
    return acc


def _counted(n: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    values = {"label": torch.arange(n) % 3, "loss": torch.rand(n, generator=generator), "correct": torch.arange(n) % 2}
    return torch.randn(n, 5, generator=generator), values


def _read_statistics(folder: Path) -> object:
    acc = skillfast.NeuronStatistics.load(folder)
    found = acc.compute()
    acc.save(folder / "again")
    if len(acc.state.settings.metrics) == 3 and acc.state.settings.n_neurons == 5:
        shard = acc.like()
        try:
            shard.update(*_counted(3))
        except SkillfastError:
            return found  # of other metrics than ours
        acc.merge(shard)
        acc.compute()
    return found


def _routed(*statistics: str) -> RoutedStatistics:
    """Tokens at two experts; ranks keep an accumulator of each."""
    settings: dict[str, Any] = {"bins": 4, "n_bootstrap": 8 if len(statistics) > 1 else None, "seed": 0}
    acc = RoutedStatistics(2, 5, METRICS, statistics, buffer_rows=16, device=torch.device("cpu"), **settings)
    x, values = _counted(90)
    at = torch.arange(len(x))
    rows = RoutedRows(x, torch.ones(len(x)), at % 2, at, (len(x), 1))
    checked = acc.check(values, len(x))
    if acc.keeps_rows:
        acc.add(rows, checked, at)
    else:
        acc.center(rows)
        acc.add_sums(*acc.summed(rows), checked)
    return acc


def _read_routed(folder: Path, *statistics: str) -> object:
    acc = RoutedStatistics.load(folder)
    found = acc.scores()
    acc.save(folder / "again")
    acc.merge(_routed(*statistics))
    acc.scores()
    return found


def _tokens() -> TokenStatistics:
    """Sums over all tokens of some examples, and ranks of a sample that is still kept, with edges for later."""
    acc = TokenStatistics(
        5, METRICS, ("pearson", "auroc"), bins=4, n_bootstrap=8, seed=0, buffer_rows=16, device=torch.device("cpu")
    )
    for n in (9, 11):
        x, values = _counted(n)
        checked = acc.check(values, n)
        picked = acc.pick(n, 1, None)
        assert picked is not None
        acc.add_sums(torch.stack([x, x.square()]), torch.ones(n, dtype=torch.int64), checked, None)
        rows = acc.reserve(len(picked)).copy_(x[picked])
        acc.commit(rows, picked, checked[:, None], None)
        if n == 9:
            acc.calibrate_on_counted()
    return acc


def _read_tokens(folder: Path) -> object:
    acc = TokenStatistics.load(folder)
    found = acc.scores()
    acc.save(folder / "again")
    acc.like().merge(acc)
    acc.merge(_tokens().like())
    acc.scores()
    return found


def _traced() -> skillfast.Tracer:
    tracer = skillfast.Tracer(_vit(), METRICS, pool="none", statistics=("pearson", "auroc"), bins=4)
    with tracer, torch.no_grad():
        for x, y in _batches():
            tracer._model(x)
            tracer.step(label=y, loss=y.double(), correct=y == 1)
    return tracer


def _read_traced(folder: Path) -> object:
    tracer = skillfast.Tracer.load(folder, _vit())
    found = tracer.compute()
    tracer.save(folder / "again")
    tracer.like().merge(tracer)
    return found


def run_folder(folder: Path, seed: int = 0) -> Path:
    """A run's folder, small."""
    folder.mkdir(parents=True, exist_ok=True)
    results = sample.sample_results(3, blocks=2)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "skills.json").write_text(json.dumps(sample.sample_skills(results)))
    labels, base, _ = planted(np.random.default_rng(seed), classes=3, n=20)
    Decisions(
        classes=tuple(results["dataset"]["classes"]),
        labels=labels,
        digests=np.arange(len(labels), dtype=np.uint64),
        intact=base.intact,
        removed=base.removed,
        log_probabilities=np.full((len(labels), 3), np.log(1 / 3), np.float16),
    ).save(folder)
    return folder


def _read_results(folder: Path) -> object:
    write_report(folder)
    results = read_results(folder)
    summary_table(results)
    return card(results)


def _read_run(folder: Path) -> object:
    """As NEW beside an intact BASE, with a gate."""
    base = folder / "base"
    if not base.exists():
        run_folder(base)
    checks = ("min_accuracy", "max_weakening", "max_relative_weakening", "min_drop", "max_drop_loss", "max_harm")
    gate = {"skill": {"*": dict.fromkeys(checks, 0.05)}, "overall": {"max_harm": 0.1, "max_kl": 0.1}}
    return compare(base, folder, gate=gate, output=folder / "compared")


def _again(folder: Path) -> None:
    """A run with the settings of a real one."""
    results = json.loads((run_folder(folder) / "results.json").read_text())
    machine = {"device": "cpu", "dtype": "float32", "batch_size": 64}
    results["model"]["trained"]["finetune"] = "none"
    results["config"] = BenchConfig.of(model="vit_tiny_patch16_224", dataset="cifar10", **machine).to_json()
    (folder / "results.json").write_text(json.dumps(results))


def _read_again(option: str, folder: Path) -> object:
    """As the run of `bench --like` or `--replay`, but for the passes of the model."""
    given = {"checkpoint": str(folder / "results.json")} if option == "like" else {}
    config = BenchConfig.of(**{option: str(folder)}, **given)
    earlier = Earlier.read(folder)
    if option == "like":
        tried = None if earlier.results.selection is None else candidates_of(earlier.results)
        return tried, model_settings(folder, earlier.results)
    whole = _sample()
    earlier.check(config, whole.results.dataset.digests)
    earlier.check_weights(whole.results.model.weights)
    return replay_text(earlier.compared(whole.results, whole.skills))


@cache
def _sample() -> Earlier:
    with tempfile.TemporaryDirectory() as folder:
        _again(Path(folder))
        return Earlier.read(folder)


def _comparison(folder: Path) -> object:
    compare(
        run_folder(folder / "base"),
        run_folder(folder / "new", 1),
        gate={"skill": {"*": {"max_weakening": 0.05}}},
        output=folder,
    )


def _evaluation(folder: Path) -> None:
    """From a run, made once."""
    config = BenchConfig.of(control_draws=1)
    grid = Grid(shares=(0.1,), layers=("all",), scales=(0.0, 2.0), draws=1, replicates=20)
    batches = [
        {
            "x": x.repeat(6, 1, 1, 1) + 0.1 * torch.randn(108, 3, 8, 8),
            "labels": y.repeat(6),
            "cue": torch.cat([y.roll(1), y.repeat(5)]),
        }
        for x, y in _batches()
    ]
    tasks, shortcut = ("label", "confidence"), "column:cue"
    evaluate(config, grid, model=_vit(), loader=batches, tasks=tasks, shortcut=shortcut).save(folder)


def _unfinished(folder: Path) -> None:
    opened = Checkpoints(folder, {"seed": 0, "model": "x", "data": ["a", 1.5]})
    opened.save("choose", {"a": [1, 2.5, None], "b": "ü"}, JSON, 1.5, {"rss": 12, "device": None})


def _read_unfinished(folder: Path) -> object:
    """What is left is taken, or the reason why not is said; a copy, since what is not taken is removed."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / FOLDER, copy / FOLDER)
    said: list[str] = []
    opened = Checkpoints(copy, {"seed": 0, "model": "x", "data": ["a", 1.5]}, say=said.append)
    found = opened.load("choose", JSON)
    if found is None:
        assert len(said) == 1, said
        raise DataError(said[0])
    return float(found.seconds) + sum(found.peaks.values()), found.value


def _trained(folder: Path) -> None:
    save_trained(
        digits_model(0).model, {"finetune": "all", "epochs": 3, "validation_accuracy": 0.9}, folder / "m.safetensors"
    )


def _read_trained(folder: Path) -> object:
    model = _digits()
    with torch.no_grad():
        model.head.weight.zero_()
    try:
        return load_trained(model, folder / "m.safetensors")
    except SkillfastError:
        assert not model.head.weight.any(), "weights of a file that is refused"
        raise


@cache
def _digits() -> torch.nn.Module:
    return digits_model(1).model


VIT: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}


def _read_checkpoint(name: str, folder: Path) -> object:
    loaded = create_model("vit_tiny_patch16_224", 3, checkpoint=folder / name, model_kwargs=VIT)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in loaded.model.parameters())
    return loaded


def _weights() -> dict[str, torch.Tensor]:
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT).state_dict()


def _configuration(folder: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=32, **sizes).save_pretrained(folder)


def _exported(folder: Path) -> None:
    """A language model's folder, as `export` writes it; of one layer, since each file drawn makes the model anew."""
    from tiny_models import SIZES, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    skill = skillfast.Skill("ant", {"blocks.0.mlp": torch.tensor([1])})
    skillfast.export(model, skill, folder, processor=make_tokenizer())


def _read_exported(folder: Path) -> object:
    loaded = load_language_model(f"hf:{folder}", "causal")
    batch = encode(loaded.tokenizer, ["a good film"], return_tensors="pt", return_token_type_ids=False)
    check_ids(loaded, batch["input_ids"].tolist())
    with torch.no_grad():
        return loaded.model(**batch).logits


def _read_configuration(folder: Path) -> object:
    return load_config(f"hf:{folder / 'config.json'}")


JSONL = "\n".join(json.dumps({"text": f"word {i}", "label": "ab"[i % 2], "n": i / 2}) for i in range(6))
CSV = "text,label,n\n" + "\n".join(f'"word, {i}",{"ab"[i % 2]},{i / 2}' for i in range(6))
TSV = CSV.replace('"', "").replace(", ", " ").replace(",", "\t")


def _read_table(name: str, folder: Path) -> object:
    return read_text(folder / name, text_column="text", label_column="label", columns=["n"])


def _pictures(suffix: str, folder: Path) -> None:
    for part in ("train", "test"):
        for name in CLASSES[:2]:
            (folder / part / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.{suffix}")


def _read_pictures(folder: Path) -> object:
    transforms = make_transforms({"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
                                  "interpolation": "bilinear"})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, about what it reads all the same
        splits = data.load_imagefolder(folder, transforms, quiet=True)
        return [splits.test[i] for i in range(len(splits.test))]


def _read_pt(folder: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about old pickles
        return _read_checkpoint("w.pt", folder)


def _prompt(folder: Path) -> None:
    """A folder as `SoftPrompt.save` leaves it, made without peft."""
    _prompt_of_peft(folder)
    tuned = {"steps": 60, "learning_rate": 0.1, "n_train": 960, "dtype": "float32", "loss": 0.25}
    header = {"schema": "skillfast.soft_prompt/1", "tuned": tuned}
    files.write_arrays(folder / soft_prompt.WEIGHTS, {"prompt_embeddings": np.ones((3, 8), np.float32)}, header)


def _prompt_of_peft(folder: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "num_transformer_submodules": 1, "token_dim": 8}
    (folder / soft_prompt.CONFIG).write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.ones(3, 8)}, folder / soft_prompt.WEIGHTS)


def _read_prompt(folder: Path) -> None:
    prompt = soft_prompt.SoftPrompt.load(folder)
    named_prompt(prompt, str(folder))


KINDS = {
    "results.json": Kind("results.json", run_folder, _read_results, _json_or_bytes, heavy=True),
    "results.json of NEW": Kind("results.json", run_folder, _read_run, _json_or_bytes, heavy=True),
    "results.json of --like": Kind(
        "results.json", _again, partial(_read_again, "like"), _json_or_bytes, heavy=True
    ),
    "results.json of --replay": Kind(
        "results.json", _again, partial(_read_again, "replay"), _json_or_bytes, heavy=True
    ),
    "skills.json": Kind("skills.json", run_folder, lambda folder: skillfast.load_skills(folder), _json_or_bytes),
    "skills.json of NEW": Kind("skills.json", run_folder, _read_run, _json_or_bytes, heavy=True),
    "decisions": Kind("decisions.safetensors", run_folder, _read_run, mutations.changed_tensors, heavy=True),
    "evaluation.json": Kind("evaluation.json", _evaluation, write_evaluation, _json_or_bytes, heavy=True),
    "compare.json": Kind("compare.json", _comparison, write_comparison, _json_or_bytes, heavy=True),
    "scores": Kind(
        "scores.safetensors", lambda folder: scores().save(folder), _read_scores, mutations.changed_tensors, heavy=True
    ),
    "ranking": Kind(
        "ranking.safetensors",
        lambda folder: skillfast.attribute(_vit(), _batches(), classes=CLASSES).save(folder),
        _read_ranking,
        mutations.changed_tensors,
    ),
    "sweep": Kind(
        "sweep.safetensors", lambda folder: _sweep().save(folder), _read_sweep, mutations.changed_tensors
    ),
    "embeddings": Kind(
        "embeddings.safetensors", lambda folder: _embeddings().save(folder), _read_embeddings, mutations.changed_tensors
    ),
    "own predictions": Kind(
        "own_predictions.safetensors",
        lambda folder: _own_predictions().save(folder),
        OwnPredictions.load,
        mutations.changed_tensors,
    ),
    "statistics": Kind(
        "statistics.safetensors", lambda folder: _statistics().save(folder), _read_statistics, mutations.changed_tensors
    ),
    "routed sums": Kind(
        "routed.safetensors",
        lambda folder: _routed("pearson").save(folder),
        lambda folder: _read_routed(folder, "pearson"),
        mutations.changed_tensors,
    ),
    "routed ranks": Kind(
        "routed.safetensors",
        lambda folder: _routed("pearson", "spearman").save(folder),
        lambda folder: _read_routed(folder, "pearson", "spearman"),
        mutations.changed_tensors,
        heavy=True,
    ),
    "tokens": Kind(
        "tokens.safetensors", lambda folder: _tokens().save(folder), _read_tokens, mutations.changed_tensors
    ),
    "tracer": Kind(
        "tracer.safetensors", lambda folder: _traced().save(folder), _read_traced, mutations.changed_tensors, heavy=True
    ),
    "soft prompt": Kind(soft_prompt.WEIGHTS, _prompt, _read_prompt, mutations.changed_tensors),
    "soft prompt of peft": Kind(soft_prompt.WEIGHTS, _prompt_of_peft, _read_prompt, mutations.changed_tensors),
    "adapter": Kind(soft_prompt.CONFIG, _prompt, _read_prompt, _json_or_bytes),
    "unfinished run": Kind(f"{FOLDER}/run.json", _unfinished, _read_unfinished, _json_or_bytes, heavy=True),
    "unfinished cost": Kind(f"{FOLDER}/choose/cost.json", _unfinished, _read_unfinished, _json_or_bytes, heavy=True),
    "unfinished value": Kind(
        f"{FOLDER}/choose/result/value.json", _unfinished, _read_unfinished, _json_or_bytes, heavy=True
    ),
    "trained weights": Kind("m.safetensors", _trained, _read_trained, mutations.changed_tensors, heavy=True),
    "checkpoint": Kind(
        "w.safetensors",
        lambda folder: save_file(_weights(), folder / "w.safetensors"),
        partial(_read_checkpoint, "w.safetensors"),
        mutations.changed_tensors,
        heavy=True,
    ),
    "pickled checkpoint": Kind(
        "w.pt", lambda folder: torch.save(_weights(), folder / "w.pt"), _read_pt, mutations.changed_bytes, heavy=True
    ),
    "gates.toml": Kind(
        "gates.toml",
        lambda folder: (folder / "gates.toml").write_text(mutations.as_toml(GATES)),
        lambda folder: read_gates(folder / "gates.toml").thresholds(CLASSES),
        lambda draw, _: mutations.changed_toml(draw, GATES),
    ),
    "config.json": Kind("config.json", _configuration, _read_configuration, _json_or_bytes, slow=True),
    "exported weights": Kind(
        "model.safetensors", _exported, _read_exported, mutations.changed_tensors, heavy=True, slow=True
    ),
    "exported tokenizer.json": Kind(
        "tokenizer.json", _exported, _read_exported, _json_or_bytes, heavy=True, slow=True
    ),
    "exported tokenizer_config.json": Kind(
        "tokenizer_config.json", _exported, _read_exported, _json_or_bytes, heavy=True, slow=True
    ),
    "exported generation_config.json": Kind(
        "generation_config.json", _exported, _read_exported, _json_or_bytes, heavy=True, slow=True
    ),
    "exported config.json": Kind("config.json", _exported, _read_exported, _json_or_bytes, heavy=True, slow=True),
    "texts.jsonl": Kind(
        "texts.jsonl",
        lambda folder: (folder / "texts.jsonl").write_text(JSONL),
        partial(_read_table, "texts.jsonl"),
        lambda draw, _: mutations.changed_lines(draw, JSONL),
    ),
    "texts.csv": Kind(
        "texts.csv",
        lambda folder: (folder / "texts.csv").write_text(CSV),
        partial(_read_table, "texts.csv"),
        lambda draw, _: mutations.changed_lines(draw, CSV),
    ),
    "texts.tsv": Kind(
        "texts.tsv",
        lambda folder: (folder / "texts.tsv").write_text(TSV),
        partial(_read_table, "texts.tsv"),
        lambda draw, _: mutations.changed_lines(draw, TSV),
    ),
    "picture.png": Kind("test/ant/0.png", partial(_pictures, "png"), _read_pictures, mutations.changed_bytes),
    "picture.jpg": Kind("test/ant/0.jpg", partial(_pictures, "jpg"), _read_pictures, mutations.changed_bytes),
}  # fmt: skip

GATES: dict[str, Any] = {
    "skill": {"*": {"max_weakening": 0.05, "min_accuracy": 0.5}, "ant": {"min_drop": 0.2}},
    "overall": {"max_harm": 0.1, "max_kl": 0.5},
}
