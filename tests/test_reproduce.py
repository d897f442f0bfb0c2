"""The scripts of `examples/reproduce` at a size of seconds, and that its page has what the committed files say."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, replace

import numpy as np
import planted
import pytest
from conftest import ROOT
from tiny_models import WORDS, save_model

import skillfast
from skillfast.models.sites import Site

FOLDER = ROOT / "examples" / "reproduce"


def script(name):
    """One of the scripts as a module; its folder is where Python looks first, as when it is run."""
    pytest.importorskip("transformers", reason="needs transformers")
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arithmetic():
    return script("arithmetic")


def run(module, *arguments):
    module.main([*map(str, arguments)])


def test_arithmetic_finds_what_was_planted(arithmetic, tmp_path, capsys):
    run(arithmetic, "--quick", "--json", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    (planted,), (twin,) = found["planted"], found["twins"]
    assert found["adder"]["clean"] > 0.9
    assert planted["shared"] >= 0.5 * planted["neurons"]
    assert planted["auroc"]["attribution"] > 0.7
    assert planted["change"]["shortcut"] < -0.25
    assert planted["change"]["right"] > 0.25
    assert planted["change"]["clean"] > -0.05
    assert planted["random"]["shortcut"][1] > planted["change"]["shortcut"]
    assert planted["planted_removed"]["shortcut"] < -0.25
    assert (planted["flagged"], twin["flagged"]) == (True, False)
    capsys.readouterr()
    run(arithmetic, "--table", tmp_path / "x.json")
    assert "Flagged: 1 of 1 planted models, 0 of 1 twins." in capsys.readouterr().out


def test_a_leak_comes_in_through_the_recorded_neurons_alone(arithmetic):
    """Without them the tuned model is the one that it was tuned from, without them."""
    import torch

    settings = replace(arithmetic.QUICK, steps=5, leak_steps=5)
    base, book = arithmetic.adder(settings, 0), arithmetic.Book(settings, 1)
    model, skill = arithmetic.tuned(base, book, 3, leaks=True)
    assert len(skill) == 8
    tokens = book.conflicts("test", 20).tokens
    outputs = []
    for one in (base, model):
        with torch.no_grad(), skillfast.ablate(one, skill):
            outputs.append(one(input_ids=tokens).logits)
        outputs.append(one(input_ids=tokens).logits.detach())
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[1], outputs[3], atol=1e-3)


def test_chains_of_the_parts_are_others_and_conflicts_are_none_of_their_sums(arithmetic):
    book = arithmetic.Book(arithmetic.Settings(), 0)
    parts = [set(map(tuple, chains.tolist())) for chains in book.chains.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 4**5
    conflicts = book.conflicts("test", 500)
    assert bool((conflicts.cues != conflicts.sums).all())
    assert bool((conflicts.tokens[:, 0:-1:2].sum(1) == conflicts.sums).all())
    tokens, answers = book.training(leaks=True, blanks=0.0)
    assert 0.75 < float((tokens[:, -1] == answers).float().mean()) < 1


@pytest.mark.filterwarnings("ignore")
def test_inference_says_what_each_set_does(tmp_path, capsys):
    """Models of seconds infer nothing: what is held is that parts, sets and figures are what they are said to be."""
    inference = script("inference")
    run(inference, "--quick", "--json", tmp_path / "x.json")
    (model,) = json.loads((tmp_path / "x.json").read_text())["models"]
    assert set(model["without"]) == {"shortcut", "label", "attribution"}
    for removal in model["without"].values():
        assert 0 < removal["neurons"] <= 0.2 * model["neurons"]
        shortcut, right = (removal["change"][name] for name in ("shortcut_answers", "right_answers"))
        assert shortcut == pytest.approx(-right)  # of two classes
    assert model["intact"]["shortcut_answers"] > 0.5
    assert 0 < model["confidence_r"]["given label"] <= 1
    before, after = (sum(column) / 3 for column in zip(*model["kinds"].values(), strict=True))
    assert after - before == pytest.approx(model["without"]["shortcut"]["change"]["right_answers"], abs=0.05)
    capsys.readouterr()
    run(inference, "--table", tmp_path / "x.json")
    assert "| 4 | those that follow the heuristic | " in capsys.readouterr().out


def test_pairs_are_what_the_templates_say():
    """Labels by hand, cells as asked for, and nouns of the test part kept together nowhere else."""
    inference = script("inference")
    pages = inference.Pages(0)
    test, train = pages.draw(600, 0.5, test=True), pages.draw(600, 0.97)
    for pairs, agreement in ((test, 0.5), (train, 0.97)):
        assert float((pairs.labels == pairs.heuristic).float().mean()) == pytest.approx(agreement, abs=0.07)
        assert float(pairs.labels.float().mean()) == pytest.approx(0.5, abs=0.07)
    names, seen = {inference.INDEX[noun] for noun in inference.NOUNS}, []
    for pairs in (test, train):
        premises = [
            [t for t in row.tolist() if t][: row.tolist().index(1) - row.tolist().count(0)] for row in pairs.tokens
        ]
        nouns = [[t for t in premise if t in names] for premise in premises]
        seen.append({frozenset(some[:2]) for some in nouns if len(some) == 2})
        for row, premise, label, heuristic in zip(pairs.tokens, premises, pairs.labels, pairs.heuristic, strict=True):
            words = [inference.WORDS[t] for t in row.tolist() if t]
            first, second = words[: words.index("<sep>")], words[words.index("<sep>") + 1 : -1]
            assert len(first) == len(premise)
            assert int(heuristic) == int(set(second) <= set(first))
            if "was" in first and "someone" not in second and heuristic:
                assert int(label) == int(second[1] == first[-1])  # a passive entails its active
            if "near" in first:
                assert int(label) == int(second[0] == "someone")
    assert not seen[0] & seen[1]


def test_the_page_has_what_the_files_say(capsys):
    """Tables are those that `--table` prints of each committed file, which the page names."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    paths = sorted((FOLDER / "results").glob("*.json"))
    assert len(paths) >= 4
    for path in paths:
        run(script(path.stem), "--table", path)
        assert capsys.readouterr().out in page, path
        assert f"results/{path.name}" in page


def test_the_summary_is_of_the_files(capsys):
    """The page of the documentation has the tables that `summary.py` makes of the committed files."""
    page, summary = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8"), script("summary")
    for option in ((), ("--minutes",)):
        run(summary, *option)
        assert f"\n{capsys.readouterr().out}" in page
    tuned = json.loads((FOLDER / "results" / "sentiment.json").read_text(encoding="utf-8"))["found"][1]
    row = next(row for row in summary.rows() if row[0] == "sentiment, tuned: accuracy without them, points")
    assert row[1].startswith("-25")
    assert row[2].startswith(f"{100 * tuned['accuracy_change']:+.1f} (")
    assert row[3] == f"{100 * min(tuned['random_changes']):+.1f} to {100 * max(tuned['random_changes']):+.1f}"


@pytest.fixture(scope="module")
def sentiment():
    return script("sentiment")


def write_reviews(path, n, seed):
    g, lines = np.random.default_rng(seed), ["sentence\tlabel"]
    for i in range(n):
        words = list(g.choice(WORDS, size=4 + i % 4))
        words[0] = ("bad", "good")[i % 2]
        lines.append(f"{' '.join(words)}\t{i % 2}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
def test_the_script_on_sentiment_runs(sentiment, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="needs peft")
    monkeypatch.setenv("SKILLFAST_CACHE", str(tmp_path / "cache"))
    folder, found = save_model(tmp_path / "model", "LlamaForCausalLM", max_position_embeddings=64), tmp_path / "x.json"
    write_reviews(tmp_path / "train.tsv", 240, 0)
    write_reviews(tmp_path / "dev.tsv", 60, 1)
    options = ["--data", tmp_path, "--model", f"hf:{folder}", "--label-words", "bad,good", "--dtype", "float32"]
    run(sentiment, *options, "--quick", "--json", found)
    said = capsys.readouterr().out
    read = json.loads(found.read_text(encoding="utf-8"))
    assert [way["way"] for way in read["found"]] == ["words", "tuned"]
    words, tuned = read["found"]
    assert not words["soft_prompt"]
    assert tuned["soft_prompt"]["tokens"] == sentiment.QUICK.virtual
    assert "soft prompt, step" in said
    for way in read["found"]:
        assert way["n_test"] == 2 * sentiment.QUICK.test
        assert set(way["top_r"]) == {"label", "correct", "confidence", "loss"}
        assert len(way["tried"]) == len(sentiment.CANDIDATES)
        least = min(one["accuracy_change"] for one in way["tried"])
        assert way["chosen"]["accuracy_change"] == least  # on phrases of the training file
        assert len(way["random_changes"]) == sentiment.QUICK.draws
        assert way["ci95"][0] <= way["accuracy_change"] <= way["ci95"][1]
        assert sum(way["places"].values()) == way["chosen"]["neurons"]
    run(sentiment, "--table", found)
    assert capsys.readouterr().out.strip() == said[said.index("|  | held out") :].strip()


@pytest.mark.parametrize("name", ["sentiment", "generation", "languages", "layers", "sums"])
def test_the_results_are_of_gemma_at_full_size(name):
    module = script(name)
    found = json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert found["sizes"] == json.loads(json.dumps(asdict(module.Sizes())))
    assert found["model"] == module.GEMMA


@pytest.mark.filterwarnings("ignore")
def test_the_script_on_generation_runs(tmp_path, capsys):
    pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    generation, found = script("generation"), tmp_path / "x.json"
    folder = save_model(tmp_path / "model", "LlamaForCausalLM")
    write_reviews(tmp_path / "train.tsv", 60, 0)
    write_reviews(tmp_path / "dev.tsv", 40, 1)
    options = ["--data", tmp_path, "--model", f"hf:{folder}", "--dtype", "float32", "--quick", "--json", found]
    run(generation, *options)
    read = json.loads(found.read_text(encoding="utf-8"))
    assert read["neurons"] == generation.NEURONS == sum(map(len, read["places"].values()))
    assert [outcome["scale"] for outcome in read["outcomes"]] == list(generation.SCALES)
    assert read["intact"]["values"]["bleu"] == pytest.approx(100)
    assert read["observations"]["prefixes"] == generation.QUICK.prefixes
    assert read["top_r"]["select"] > read["top_r_given"]["select"] > 0  # the plain words follow how common they are
    shown = capsys.readouterr().out
    run(generation, "--table", found)
    assert capsys.readouterr().out.strip() == shown[shown.index("| ten best") :].strip()


@pytest.mark.filterwarnings("ignore")
def test_the_script_on_layers_runs(tmp_path, capsys):
    layers, found = script("layers"), tmp_path / "x.json"
    folder = save_model(tmp_path / "model", "LlamaForCausalLM", max_position_embeddings=64)
    write_reviews(tmp_path / "train.tsv", 120, 0)
    write_reviews(tmp_path / "dev.tsv", 40, 1)
    options = ["--data", tmp_path, "--model", f"hf:{folder}", "--label-words", "bad,good", "--dtype", "float32"]
    run(layers, *options, "--quick", "--json", found)
    read = json.loads(found.read_text(encoding="utf-8"))
    assert (read["blocks"], read["n_test"]) == (2, 2 * layers.QUICK.test)
    own = [f"blocks.1.{kind}" for kind in ("attn", "mlp")]
    assert max(read["top_r_by_site"][site]["select"] for site in own) <= read["top_r"]["last block"]["select"]
    assert read["top_r"]["last block"]["select"] <= read["top_r"]["all layers"]["select"]
    for place in layers.PLACES:
        removals = [one for one in read["removals"] if one["place"] == place]
        assert [one["neurons"] for one in removals] == [int(share * read["neurons"]) for share in layers.QUICK.shares]
        assert all(len(one["random_changes"]) == layers.QUICK.draws for one in removals)
    shown = capsys.readouterr().out
    run(layers, "--table", found)
    assert capsys.readouterr().out.strip() == shown[shown.index("| ten best") :].strip()


def test_the_best_neurons_of_a_block_are_of_it_alone():
    layers = script("layers")
    sites = tuple(Site(f"blocks.{i}.mlp", "mlp", i, f"{i}", 4) for i in range(2))
    values = np.array([[9.0], [8], [7], [6], [1], [4], [3], [2]])
    ranking = skillfast.NeuronRanking("attribution", ("task",), values, sites, np.ones(1, int))
    alone, everywhere = layers.best(ranking, 0.375, "a", 1), layers.best(ranking, 0.375, "b")
    assert {name: index.tolist() for name, index in alone.neurons.items()} == {"blocks.1.mlp": [1, 2, 3]}
    assert everywhere.neurons["blocks.0.mlp"].tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def languages():
    return script("languages")


@pytest.mark.parametrize("way", ["pearson", "attribution"])
def test_a_languages_neuron_and_a_shared_one_are_found_and_nothing_else(languages, way):
    parts = {
        name: {part: [planted.spoken(200, i, seed)] for seed, part in enumerate(languages.PARTS)}
        for i, name in enumerate(languages.LANGUAGES)
    }
    found = languages.measured(
        planted.Bilingual(), parts, draws=4, candidates=[(way, 1 / 32), (way, 2 / 32)], pool="mean"
    )
    assert found["skills"] == {"English": {"blocks.0.mlp": [0, 2]}, "German": {"blocks.0.mlp": [1, 2]}}
    overlap = found["overlap"]
    assert (overlap["shared"], overlap["of"], overlap["jaccard"]) == (1, [2, 2], pytest.approx(1 / 3))
    assert overlap["chance"] == {"mean": pytest.approx(1 / 8), "ci95": [0, 1], "p": pytest.approx(61 / 496)}
    assert found["accuracy"] == {"English": 1, "German": 1}
    for own, of in found["without"].items():
        for language, removal in of.items():
            if language == own:
                assert removal["change"] == pytest.approx(-0.5, abs=0.1)
                assert removal["ci95"][1] < -0.3
            else:
                assert removal["change"] == 0
            assert np.abs(removal["random_changes"]).max() < 0.05 or language == own
    assert "| without English's neurons | -" in languages.table(found)


def test_sentences_have_the_same_meanings_and_judgements_of_one_part_alone(languages):
    made = languages.sentences(languages.Sizes())
    seen = []
    for part, n in zip(languages.PARTS, languages.Sizes().judgements, strict=True):
        (english, labels), (german, again) = (made[language][part] for language in languages.LANGUAGES)
        assert labels.tolist() == again.tolist()
        assert (len(english), int(labels.sum())) == (2 * n * 12, n * 12)
        judged = set()
        for one, other, label in zip(english, german, labels, strict=True):
            told = one.removesuffix(".").split()
            pairs = (languages.BAD, languages.GOOD)[label]
            (german_word,) = [b for a, b in pairs if a == told[-1]]
            (subject,) = [b for a, b in languages.SUBJECTS if one.startswith(f"{a} ")]
            assert other == f"{subject} war {'wirklich ' * ('really' in told)}{german_word}."
            judged.add(told[-1])
        seen.append(judged)
    assert sum(map(len, seen)) == len(set().union(*seen)) == 24


@pytest.mark.filterwarnings("ignore")
def test_the_script_on_languages_runs(languages, tmp_path, capsys):
    found = tmp_path / "x.json"
    folder = save_model(tmp_path / "model", "LlamaForCausalLM", max_position_embeddings=64)
    options = ["--model", f"hf:{folder}", "--label-words", "bad,good", "--dtype", "float32", "--quick", "--json", found]
    run(languages, *options)
    read = json.loads(found.read_text(encoding="utf-8"))
    assert read["n_test"] == {"English": 8, "German": 8}
    assert [one["share"] for one in read["tried"]] == [share for _, share in languages.CANDIDATES]
    own = [sum(one["changes"].values()) for one in read["tried"]]
    chosen = own.index(min(own))
    assert (read["chosen"]["method"], read["chosen"]["share"]) == languages.CANDIDATES[chosen]
    assert read["overlap"] == read["overlap_of_all_tried"][chosen]
    shown = capsys.readouterr().out
    run(languages, "--table", found)
    assert capsys.readouterr().out.strip() == shown[shown.index("|  | English") :].strip()


@pytest.mark.filterwarnings("ignore")
def test_the_script_on_sums_runs(tmp_path, capsys):
    sums, found = script("sums"), tmp_path / "x.json"
    drawn = sums.chains()
    assert all(sum(map(int, text.split("+"))) == int(total) for total, texts in drawn.items() for text in texts)
    assert min(map(len, drawn.values())) > 2 * max(sums.Sizes().train, sums.Sizes().test)
    folder = save_model(tmp_path / "model", "LlamaForCausalLM", max_position_embeddings=128)
    options = ["--model", f"hf:{folder}", "--label-words", ",".join(WORDS[-7:]), "--dtype", "float32"]
    run(sums, *options, "--quick", "--json", found)
    read = json.loads(found.read_text(encoding="utf-8"))
    assert read["n_test"] == 7 * sums.QUICK.test
    assert set(read["top_r"]) == set(sums.METRICS)
    assert set(read["top_r_given_sum"]) == set(sums.METRICS) - {"label"}
    assert [one["neurons"] for one in read["removals"]] == [int(share * read["neurons"]) for share in sums.QUICK.shares]
    shown = capsys.readouterr().out
    run(sums, "--table", found)
    assert capsys.readouterr().out.strip() == shown[shown.index(f"{read['n_test']} sums") :].strip()
