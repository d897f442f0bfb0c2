"""Text in: files, tokens, prompts, padded batches, and the inputs that nobody meant."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import one_line
from tiny_models import make_tokenizer, save_model

import skillfast
from skillfast import Categorical, Continuous
from skillfast.data.splits import loader
from skillfast.data.text import read_text
from skillfast.errors import ArgumentError, DataError, SkillfastError
from skillfast.metrics import parse_metrics
from skillfast.models.inputs import joined
from skillfast.models.text_inputs import Collate, Prompt, TextForward, TokenExamples, batches, split_text

ROWS = [
    ("good fun movie", "positive", 3.0), ("bad plot", "negative", 2.0), ("the film was great", "positive", 4.0),
    ("this is a long and boring story with a dull plot", "negative", 11.0), ("warm", "positive", 1.0),
    ("the worst film of the story", "negative", 6.0),
]  # fmt: skip


def write(path, rows=ROWS, header=("text", "label", "length")):
    separator = {".tsv": "\t", ".csv": ","}.get(path.suffix)
    if separator is None:
        lines = [json.dumps(dict(zip(header, row, strict=False))) for row in rows]
    else:
        lines = [separator.join(map(str, row)) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_files_of_each_kind_are_read_alike(tmp_path, suffix):
    table = read_text(write(tmp_path / f"x{suffix}"), columns=["length"])
    assert table.classes == ("negative", "positive")
    assert table.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert table.texts[2] == "the film was great"
    assert table.columns["length"].tolist() == [3, 2, 4, 11, 1, 6]
    assert table.places[1] == ("line 2" if suffix == ".jsonl" else "line 3")
    part = table.take([3, 0])
    assert (part.texts[1], part.labels.tolist(), part.columns["length"].tolist()) == (ROWS[0][0], [0, 1], [11, 3])


def test_quotes_are_text_in_tsv_and_quotes_in_csv(tmp_path):
    (tmp_path / "x.tsv").write_text('text\tlabel\n"good" he said\t1\n"bad\t0\n', encoding="utf-8")
    assert read_text(tmp_path / "x.tsv").texts == ('"good" he said', '"bad')
    (tmp_path / "x.csv").write_text('\ufefftext,label\n"good, ""very""\nfine",1\nbad,0\n', encoding="utf-8")
    table = read_text(tmp_path / "x.csv")
    assert table.texts == ('good, "very"\nfine', "bad")
    assert table.places == ("line 3", "line 4")


def test_numbers_as_classes_are_in_numerical_order_and_may_be_indices(tmp_path):
    rows = [("a", 10), ("b", 9), ("c", 2)]
    path = write(tmp_path / "x.tsv", rows)
    assert read_text(path).classes == ("2", "9", "10")
    path = write(tmp_path / "y.tsv", [("a", 1), ("b", 0), ("c", 1)])
    table = read_text(path, classes=["negative", "positive"])
    assert (table.classes, table.labels.tolist()) == (("negative", "positive"), [1, 0, 1])


def test_pairs_and_words_as_columns(tmp_path):
    path = write(tmp_path / "x.jsonl", [("a b", "a", 1, "x"), ("c", "b", 0, "y")], ("one", "two", "same", "genre"))
    table = read_text(path, text_column="one", pair_column="two", label_column="same", columns=["genre"])
    assert table.pairs == ("a", "b")
    assert table.columns["genre"].tolist() == ["x", "y"]


BAD_FILES = [
    ("x.tsv", "text\tlabel\ngood\t1\n \t0\n", "line 3: expected text in column 'text', got an empty one"),
    ("x.tsv", "sentence\tlabel\ngood\t1\n", "line 2: expected a column 'text', got sentence, label"),
    ("x.tsv", f"{'9' * 5000}\tlabel\ngood\t1\n", f"expected a column 'text', got {'9' * 157}...; check --text-column"),
    ("x.csv", '"a\nb",label\ngood,1\n', "line 3: expected a column 'text', got a b, label; check"),
    ("x.tsv", "text\tlabel\ngood\n", "line 2: expected a value in column 'label', got none"),
    ("x.tsv", "text\tlabel\ngood\t1\tmore\n", "line 2: expected 2 fields, got 3"),
    ("x.tsv", "text\tlabel\ngood\t1\nbad\tno\n", "line 3: expected labels of one type in column 'label', got 'no'"),
    ("x.tsv", "text\tlabel\ngood\t1\nfine\t1\n", "expected 2 to 1000 classes in column 'label', got 1"),
    ("x.tsv", "text\tlabel\n", "expected at least one example, got none"),
    ("x.tsv", "", "expected at least one example, got none"),
    ("x.csv", 'text,label\n"good,1\n', "expected fields, got unexpected end of data"),
    ("x.jsonl", '{"text": 3, "label": 0}\n', "line 1: expected text in column 'text', got int 3"),
    ("x.jsonl", '{"text": "a", "label": 0.5}\n', "line 1: expected a class in column 'label', got 0.5"),
    ("x.jsonl", '{"text": "b", "label": null}\n', "line 1: expected a value in column 'label'"),
    ("x.jsonl", '{"text": "good", "label"\n', "line 1: expected a JSON object, got Expecting"),
    ("x.jsonl", "[1, 2]\n", "line 1: expected a JSON object, got list"),
    ("x.parquet", "", "expected .tsv, .csv, .jsonl or hf:NAME, got '.parquet'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES)
def test_bad_files_are_told_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert words in one_line(SkillfastError, read_text, tmp_path / name)


def test_more_that_is_wrong_with_files(tmp_path):
    assert "got no such file" in one_line(DataError, read_text, tmp_path / "none.tsv")
    (tmp_path / "x.tsv").write_bytes("text\tlabel\nd\xe9j\xe0 vu\t1\n".encode("latin-1"))
    assert "expected UTF-8, got byte 0xe9" in one_line(DataError, read_text, tmp_path / "x.tsv")
    path = write(tmp_path / "y.tsv")
    text = one_line(DataError, read_text, path, classes=["negative", "neutral"])
    assert "line 2: expected one of negative, neutral in column 'label', got 'positive'" in text
    path = write(tmp_path / "z.tsv", [("a", 1, 3.0), ("b", 0, "many")])
    assert "line 3: expected numbers in column 'length'" in one_line(DataError, read_text, path, columns=["length"])
    path = tmp_path / "v.jsonl"  # a whole number that no float64 holds
    path.write_text(f'{{"text": "a", "label": 1, "n": 2}}\n{{"text": "b", "label": 0, "n": {10**400}}}\n')
    told = one_line(DataError, read_text, path, columns=["n"])
    assert told.endswith(f"line 2: expected numbers in column 'n' as elsewhere, got 1{'0' * 156}...; use one type")
    path = write(tmp_path / "w.tsv", [("a", 1), ("b", 7)])
    assert "got '7'" in one_line(DataError, read_text, path, classes=["no", "yes"])


def test_data_sets_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    part = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}, features=features)
    asked = []

    def load(name, config=None, split=None):
        asked.append((name, config, split))
        return part if split else datasets.DatasetDict({"train": part})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hf:glue:sst2@validation", "hf:rotten_tomatoes"):
        table = read_text(source)
        assert (table.classes, table.labels.tolist(), table.places[1]) == (("neg", "pos"), [1, 0], "row 1")
    assert asked == [("glue", "sst2", "validation"), ("rotten_tomatoes", None, None)]

    def fails(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    assert "got none: no network; check the name" in one_line(DataError, read_text, "hf:glue:sst2")


transformers = pytest.importorskip("transformers", reason="needs transformers")
from skillfast.models.huggingface import load_language_model  # noqa: E402
from skillfast.models.sites import find_sites  # noqa: E402
from skillfast.models.text_classifier import TextClassifier  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by class, made once."""
    made = {}

    def get(model_class, **settings):
        key = (model_class, *sorted(settings.items()))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("model"), model_class, **settings)
        return made[key]

    return get


HEADS = [
    "BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForSequenceClassification",
    "GPT2ForSequenceClassification", "LlamaForSequenceClassification", "GPTNeoXForSequenceClassification",
    "T5ForSequenceClassification",
]  # fmt: skip
LAST_TOKEN = ("GPT2ForSequenceClassification", "LlamaForSequenceClassification", "GPTNeoXForSequenceClassification")
DECODERS = ["GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"]
PROMPT = Prompt("{text} this is", ("bad", "good"))


def alone(examples, classifier):
    """Each example's logits from a forward of its own."""
    with torch.no_grad():
        return torch.cat([classifier.logits(batch) for batch in batches(examples, 1)])


@pytest.mark.parametrize(
    ("model_class", "side"),
    # heads of encoders read the first position, and T5 attends to whatever its decoder gets: they are padded right
    [(name, side) for name in HEADS for side in ("left", "right") if side == "right" or name in LAST_TOKEN],
)
def test_padding_changes_no_logit_of_a_classifier(tmp_path, folders, model_class, side):
    loaded = load_language_model(str(folders(model_class)), "classification", classes=["negative", "positive"])
    examples = TokenExamples(read_text(write(tmp_path / "x.tsv")), loaded)
    classifier = TextClassifier(loaded, 2)
    want = alone(examples, classifier)
    with torch.no_grad():
        batch = next(iter(batches(examples, 6, side=side)))
        got = classifier.logits(batch)
        packed = classifier.pack(batch)
        torch.testing.assert_close(classifier(packed), got)
        longer = torch.zeros(1, packed.shape[1], packed.shape[2] + 4, dtype=torch.long)
        torch.testing.assert_close(classifier(joined([packed, longer])[:6]), got, rtol=1e-4, atol=1e-5)
    column = batch["attention_mask"][:, 0 if side == "left" else -1]
    assert column.min() == 0  # there is padding, and there
    assert column.max() == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want.std() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_class", DECODERS)
def test_padding_changes_no_logit_of_a_label_word(tmp_path, folders, model_class, side):
    loaded = load_language_model(str(folders(model_class)), "causal")
    examples = TokenExamples(read_text(write(tmp_path / "x.tsv")), loaded, PROMPT)
    words = PROMPT.ids(loaded.tokenizer, examples.classes)
    classifier = TextClassifier(loaded, 2, words)
    want = alone(examples, classifier)
    with torch.no_grad():
        got = classifier.logits(next(iter(batches(examples, 6, side=side))))
        ids = loaded.tokenizer("good fun movie this is", return_tensors="pt")["input_ids"]
        plain = loaded.model(ids).logits[0, -1, loaded.tokenizer.convert_tokens_to_ids(["bad", "good"])]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0], plain, rtol=1e-4, atol=1e-5)


def test_a_batch_is_what_the_tokenizer_makes(tmp_path, folders):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    folder = save_model(
        tmp_path / "model", "BertForSequenceClassification", make_tokenizer(model_input_names=names), type_vocab_size=2
    )
    loaded = load_language_model(str(folder), "classification", classes=["a", "b"])
    path = write(tmp_path / "x.jsonl", [("good fun", "movie", "a"), ("bad", "the plot is long", "b")], ("t", "p", "l"))
    table = read_text(path, text_column="t", pair_column="p", label_column="l")
    batch = next(iter(batches(TokenExamples(table, loaded), 2)))
    want = loaded.tokenizer(list(table.texts), list(table.pairs), padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].tolist() == want[name].tolist(), name
    assert batch["labels"].tolist() == [0, 1]
    assert batch["token_type_ids"].max() == 1
    examples = TokenExamples(table, loaded)
    left = Collate(loaded, "left")([examples[0], examples[1]])
    n = int(want["attention_mask"][0].sum())
    assert left["input_ids"][0, -n:].tolist() == want["input_ids"][0, :n].tolist()
    assert left["attention_mask"].sum(1).tolist() == want["attention_mask"].sum(1).tolist()
    packed, labels = next(iter(loader(examples, 2)))
    assert (
        packed.tolist()
        == torch.stack([batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")], 1).tolist()
    )
    assert labels.tolist() == [0, 1]
    assert TextClassifier.token_mask(packed).tolist() == want["attention_mask"].bool().tolist()
    wide = torch.nn.functional.pad(packed, (2, 3))
    torch.testing.assert_close(TextClassifier.trim(wide), TextClassifier.trim(packed))
    assert TextClassifier.trim(wide).shape[-1] == int(max(TextClassifier.token_mask(packed).sum(1)))


def test_trace_over_text_equals_plain_hooks(tmp_path, folders):
    loaded = load_language_model(str(folders("BertForSequenceClassification")), "classification", classes=["no", "yes"])
    path = write(
        tmp_path / "x.tsv",
        [(" ".join(row[0].split()[:1] * (1 + i % 5)), row[1], row[2]) for i, row in enumerate(ROWS * 5)],
    )
    examples = TokenExamples(read_text(path, columns=["length"]), loaded)
    forward = TextForward(parse_metrics(["label", "margin", "column:length"], examples.classes, examples.metrics))
    assert forward.kinds["length"] == Continuous()
    classifier = TextClassifier(loaded, 2)
    scores = skillfast.trace(
        classifier, batches(examples, 4), forward.kinds, forward=forward, pool="cls", statistics=("pearson",)
    )
    kept, margins = [], []
    projection = loaded.model.bert.encoder.layer[1].output.dense
    handle = projection.register_forward_pre_hook(lambda _, x: kept.append(x[0][:, 0]))
    with torch.no_grad():
        for batch in batches(examples, 1):
            logits = classifier.logits(batch)[0]
            margins.append(float(logits[batch["labels"][0]] - logits[1 - batch["labels"][0]]))
    handle.remove()
    x = torch.cat(kept).double().numpy()
    y = np.column_stack([examples.labels == 0, examples.labels == 1, margins, examples.table.columns["length"]])
    assert scores.columns == ("label:negative", "label:positive", "margin", "length")
    want = np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :]
    np.testing.assert_allclose(scores["blocks.1.mlp"].pearson, want, atol=1e-4)


@pytest.mark.parametrize("model_class", [*HEADS, *DECODERS])
def test_a_text_classifier_has_the_sites_of_its_model(folders, model_class):
    causal = model_class in DECODERS
    loaded = load_language_model(
        str(folders(model_class)), "causal" if causal else "classification", classes=["a", "b"]
    )
    classifier = TextClassifier(loaded, 2, torch.tensor([5, 6]) if causal else None)
    own, of_wrapper = find_sites(loaded.model), find_sites(classifier)
    assert [(s.name, s.width, s.heads, f"language_model.{s.path}") for s in own] == [
        (s.name, s.width, s.heads, s.path) for s in of_wrapper
    ]
    assert classifier.num_features == own[-1].width
    assert len(classifier.blocks) == 2
    assert classifier.state_dict().keys() == {f"language_model.{name}" for name in loaded.model.state_dict()}


@pytest.mark.parametrize("model_class", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_text_goes_through_the_default_trace_and_sweep(tmp_path, folders, model_class):
    causal = model_class in DECODERS
    rows = [(" ".join([*ROWS[i % 6][0].split(), *["fun"] * (i % 4)]), ROWS[i % 6][1]) for i in range(30)]
    table = read_text(write(tmp_path / "x.tsv", rows))
    loaded = load_language_model(
        str(folders(model_class)), "causal" if causal else "classification", classes=["a", "b"]
    )
    prompt = PROMPT if causal else None
    examples = TokenExamples(table, loaded, prompt)
    classifier = TextClassifier(loaded, 2, PROMPT.ids(loaded.tokenizer, table.classes) if causal else None).eval()
    pool = "last" if causal else "cls"
    scores = skillfast.trace(classifier, loader(examples, 7), pool=pool, statistics=("pearson",))
    assert scores.columns == ("label:negative", "label:positive", "correct", "confidence", "loss")
    single = skillfast.trace(classifier, loader(examples, 1), pool=pool, statistics=("pearson",))  # no padding at all
    np.testing.assert_allclose(scores.pearson, single.pearson, atol=1e-4)
    skill = skillfast.select(scores, metric="label", share=0.1)["positive"]
    result = skillfast.sweep(classifier, loader(examples, 7), [skillfast.Condition(skill)], keep_predictions=True)
    with torch.no_grad(), skillfast.ablate(classifier, skill):
        want = torch.cat([classifier(x) for x, _ in loader(examples, 1)]).argmax(1)
    assert result.predictions[0].tolist() == want.tolist()


def test_columns_of_words_are_classes(tmp_path, folders):
    loaded = load_language_model(str(folders("BertForSequenceClassification")), "classification", classes=["a", "b"])
    rows = [("good", "a", "y"), ("bad", "b", "x"), ("fun", "b", "y")]
    examples = TokenExamples(read_text(write(tmp_path / "x.tsv", rows), columns=["length"]), loaded)
    assert examples.metrics == {"length": Categorical(["x", "y"])}
    assert next(iter(batches(examples, 3)))["columns"]["length"].tolist() == [1, 0, 1]


def test_texts_and_prompts_longer_than_the_context(tmp_path, folders):
    rows = [("good", "a"), (" ".join(["long"] * 40), "b")]
    table = read_text(write(tmp_path / "x.tsv", rows))
    loaded = load_language_model(str(folders("BertForSequenceClassification")), "classification", classes=["a", "b"])
    text = one_line(DataError, TokenExamples, table, loaded)
    assert "line 3: expected a text of at most 32 tokens, the model's context, got 42" in text
    assert TokenExamples(table, loaded, truncate=True).lengths.tolist() == [3, 32]
    causal = load_language_model(str(folders("GPT2LMHeadModel")), "causal")
    text = one_line(DataError, TokenExamples, table, causal, PROMPT, truncate=True)
    assert "line 3: expected a prompt of at most 32 tokens" in text


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("it is", ("bad", "good")), "expected {text} in the template, got no field"),
        (Prompt("{text} {pair}", ("bad", "good")), "expected {text} in the template, got {pair}, {text}"),
        (Prompt("{text", ("bad", "good")), "expected a template with {text}, got '{text'"),
        (Prompt("{text} is", ("bad",)), "expected one for each of negative, positive, got 1"),
        (Prompt("{text} is", ("bad", "bad")), "expected different tokens"),
        (Prompt("{text} is", ("bad", "not good")), "'not good': expected a single token of this tokenizer, got 2"),
        (
            Prompt("{text} is", ("bad", "wonderful")),
            "'wonderful': expected a single token of this tokenizer, got an unk",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused(tmp_path, folders, prompt, words):
    loaded = load_language_model(str(folders("GPT2LMHeadModel")), "causal")
    table = read_text(write(tmp_path / "x.tsv"))

    def use():
        TokenExamples(table, loaded, prompt)
        prompt.ids(loaded.tokenizer, table.classes)

    assert words in one_line(ArgumentError, use)


def test_splits_share_no_line_and_depend_on_the_seed_alone(tmp_path, folders):
    loaded = load_language_model(str(folders("BertForSequenceClassification")), "classification", classes=["a", "b"])
    table = read_text(write(tmp_path / "x.tsv", [(f"good {'fun ' * (i % 7)}", "ab"[i % 2]) for i in range(90)]))
    first, again, other = (split_text(table, loaded, seed=seed) for seed in (0, 0, 1))
    places = [part.table.places for part in (first.select, first.validate, first.test)]
    assert all((np.diff(part.lengths) >= 0).all() for part in (first.select, first.validate, first.test))
    assert sorted(len(part) for part in places) == [12, 30, 48]
    assert len(set().union(*places)) == 90
    assert first.test.table.places == again.test.table.places != other.test.table.places
    few = split_text(table, loaded, test=table.take(range(20)), train_per_class=10, test_per_class=3)
    assert [len(part) for part in (few.select, few.validate, few.test)] == [16, 4, 6]
    assert few.test.table.places[0] in table.places[:20]
    text = one_line(DataError, split_text, table, loaded, test=table.take(range(20)), test_per_class=11)
    assert "expected at least 11 examples of class 'a', got 10; lower --test-per-class" in text


@pytest.mark.parametrize("drop_last", [False, True])
def test_shuffled_batches_hold_each_text_once_and_little_padding(tmp_path, folders, drop_last):
    loaded = load_language_model(str(folders("BertForSequenceClassification")), "classification", classes=["a", "b"])
    rows = [(" ".join(["fun"] * (1 + i * 7 % 25)), "ab"[i % 2]) for i in range(203)]
    examples = TokenExamples(read_text(write(tmp_path / "x.tsv", rows)), loaded)
    passes = loader(examples, 10, shuffle=True, seed=3, drop_last=drop_last)
    first, second = list(passes), list(passes)
    assert len(first) == len(passes) == 20 + (not drop_last)
    found = sorted(int(n) for x, _ in first for n in TextClassifier.token_mask(x).sum(1))
    assert drop_last or found == sorted(examples.lengths.tolist())
    assert len(found) == (200 if drop_last else 203)
    assert [x.shape for x, _ in first] != [x.shape for x, _ in second]
    again = next(iter(loader(examples, 10, shuffle=True, seed=3, drop_last=drop_last)))
    assert torch.equal(again[0], first[0][0])
    padding = [1 - float(TextClassifier.token_mask(x).float().mean()) for x, _ in first]
    plain = [1 - float(TextClassifier.token_mask(x).float().mean()) for x, _ in loader(examples, 10)]
    assert np.mean(padding) < 0.3 * np.mean(plain)


def test_a_tokenizer_without_a_pad_token(tmp_path):
    folder = save_model(tmp_path, "GPT2LMHeadModel", make_tokenizer(pad=False, special=False))
    from skillfast.errors import ModelError

    text = one_line(ModelError, load_language_model, str(folder), "causal")
    assert "expected a tokenizer with a pad token, got none; pass --pad-token '[SEP]'" in text
    assert load_language_model(str(folder), "causal", pad_token="[SEP]").tokenizer.pad_token_id == 3
    assert "got '<pad>'" in one_line(ModelError, load_language_model, str(folder), "causal", pad_token="<pad>")
