"""The report: schemas, the page's text, the page in a browser, the terminal's tables, the file on disk."""

from __future__ import annotations

import copy
import functools
import html
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from browsing import barriers, draw_all, unheard

from skillfast import report
from skillfast.errors import DataError
from skillfast.report.formatting import MINUS
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.skills import Skills

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("report_sample", Path(__file__).parents[1] / "report_sample.py")
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)

HOSTILE = "</script><b id=hostile>&amp;\u2028"


def both(n_classes=10, **options):
    """What the files hold, as dicts."""
    results = sample.sample_results(n_classes, **options)
    return results, sample.sample_skills(results)


def typed(results, skills):
    """The records of both, as they are read."""
    return records.made(BenchResults, results), records.made(Skills, skills)


def rendered(results, skills):
    return report.render(*typed(results, skills))


@functools.cache
def validator(name):
    schema = records.schema({"results": BenchResults, "skills": Skills}[name])
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def at(values, path):
    *parents, last = path.split(".")
    for key in parents:
        values = values[key]
    return values, last


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of elements outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.inside = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


# schemas


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_samples_follow_the_schemas(n_classes, optional):
    results, skills = both(n_classes, optional=optional)
    validator("results").validate(results)
    validator("skills").validate(skills)


REQUIRED = [
    "schema", "environment", "config", "model", "dataset", "baseline", "removal_matrix", "selectivity", "oracle",
    "random_control", "cost", "environment.torch", "config.seed", "config.max_site_share", "model.sites",
    "model.trained.from", "dataset.n_test", "baseline.per_class", "selectivity.ratio", "selectivity.ci95",
    "selectivity.regret",
    "selectivity.harm.cross_fitted", "selectivity.at_least.harm_ratio", "oracle.removal_matrix",
    "oracle.target_drop", "random_control.draws",
    "layer_contribution.ci95", "cost.seconds.sweep", "cost.peak_device_bytes", "interference.overlap",
    "interference.linkage", "interference.strongest.angle", "standard_metrics.rank_preservation",
    "standard_metrics.per_class",
]  # fmt: skip


@pytest.mark.parametrize("path", REQUIRED)
def test_schema_misses_a_missing_key(path):
    results, _ = both()
    parent, key = at(results, path)
    del parent[key]
    with pytest.raises(jsonschema.ValidationError):
        validator("results").validate(results)


@pytest.mark.parametrize(
    "path",
    ["", "model", "dataset", "baseline", "selectivity", "selectivity.ci95", "oracle", "random_control", "cost",
     "layer_contribution", "interference", "interference.strongest", "interference.strongest.competition",
     "standard_metrics", "standard_metrics.ci95"],
)  # fmt: skip
def test_schema_refuses_a_misspelt_key(path):
    results, _ = both()
    parent, key = at({"": results, **results}, path)
    parent[key]["strictratio"] = 1.0
    with pytest.raises(jsonschema.ValidationError):
        validator("results").validate(results)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "skillfast.bench/2"),
        ("baseline.accuracy", 97.2),
        ("baseline.per_class", ["0.9", 0.8]),
        ("removal_matrix", [[-88.0, 0.0], [0.0, -90.0]]),
        ("removal_matrix", [-0.88, 0.0]),
        ("selectivity.harm.plug_in", -0.1),
        ("selectivity.target_drop", None),
        ("selectivity.ratio", "56.4"),
        ("selectivity.ci95", None),
        ("random_control.draws", 0),
        ("model.sites", [{"name": "blocks.0.mlp", "kind": "ffn", "block": 0, "heads": None, "width": 4}]),
        ("dataset.classes", ["cat", "cat"]),
        ("config.finetune", "last"),
        ("cost.peak_rss_bytes", 1.5),
        ("interference", {"overlap": [[1.0, 1.2], [1.2, 1.0]]}),
        ("interference.angles_deg", [[0.0, 181.0], [1.0, 2.0]]),
        ("interference.competition", [{"classes": ["cat", "dog"]}]),
        ("standard_metrics.cosine", 1.1),
        ("standard_metrics.reasons", {"bad_luck": ["cat"]}),
        ("layer_contribution.per_block", [{"block": 0, "share": 0.5}]),
    ],
)
def test_schema_refuses_a_wrong_value(path, value):
    results, _ = both()
    parent, key = at(results, path)
    parent[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validator("results").validate(results)


def test_schema_takes_null_ratios_and_intervals():
    results, _ = both()
    for key in ("ratio", "strict_ratio", "harm_ratio"):
        results["selectivity"][key] = results["selectivity"]["at_least"][key] = None
    results["selectivity"]["ci95"]["regret"] = results["selectivity"]["harm"]["ci95"] = None
    validator("results").validate(results)


@pytest.mark.parametrize(
    "change",
    [
        lambda skills: skills.pop("fingerprint"),
        lambda skills: skills.update(schema="skillfast.skills/0"),
        lambda skills: skills["skills"][0].pop("metric"),
        lambda skills: skills["skills"][0].update(nuerons={}),
        lambda skills: skills["skills"][0]["neurons"].update({"head": [-1]}),
        lambda skills: skills["skills"][0]["neurons"].update({"head": [3, 3]}),
        lambda skills: skills["skills"][0]["neurons"].update({"head": 3}),
    ],
)
def test_skills_schema_refuses(change):
    _, skills = both()
    change(skills)
    with pytest.raises(jsonschema.ValidationError):
        validator("skills").validate(skills)


# the page's text


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_page_is_one_file(n_classes, optional):
    page = rendered(*both(n_classes, optional=optional))
    tags = Elements(page).tags
    links = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "srcset", "action")]
    assert links == ["data:,"]
    assert len(page.encode()) < 1_500_000 or n_classes > 10
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attrs["content"] for tag, attrs in tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none';")
    assert ("contribution" in {attrs.get("id") for _, attrs in tags}) == optional
    for name in ("overlap", "angles", "contribution-blocks", "embeddings-title"):
        assert (name in {attrs.get("id") for _, attrs in tags}) == optional


def test_page_is_accessible():
    tags = Elements(rendered(*both())).tags
    assert dict(tags)["html"] == {"lang": "en"}
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attrs["aria-label"] for _, attrs in tags if "plot" in attrs.get("class", "").split())
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_page_says_the_result():
    results, skills = both()
    results["selectivity"] |= {"target_drop": 0.8725, "other_change": -0.0041, "ratio": 212.8}
    words = Elements(rendered(results, skills)).words
    assert "costs that class 87.2 percentage points of accuracy, while the other classes lose 0.41 on average" in words
    assert "213\N{MULTIPLICATION SIGN}" in words
    assert "no removal" not in words  # the oracle is a reference, not a bound
    assert "skillfast bench --no-pretrained --finetune all --dataset digits" in words
    assert "What this does not say It was not certified that the traced neurons hold all" in words
    assert "version = {0.1.0}" in words


def test_class_names_are_escaped():
    page = rendered(*both(names={3: HOSTILE}))
    found = Elements(page)
    assert all(attrs.get("id") != "hostile" for _, attrs in found.tags)
    assert [tag for tag, _ in found.tags].count("script") == 5
    assert HOSTILE in html.unescape(page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    # plotly reads labels as markup: there the name stays escaped once more
    assert data["figures"]["removal-matrix"]["data"][0]["x"][3] == html.escape(HOSTILE, quote=False)


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_undefined_is_said(nothing):
    results, skills = both()
    for source in ("selectivity", "oracle", "random_control"):
        for key in ("ratio", "strict_ratio", "harm_ratio"):
            results[source][key], results[source]["at_least"][key] = nothing, None
    results, skills = typed(results, skills)
    results.removal_matrix[0][1] = nothing  # what no file holds: records are not checked as they change
    results.baseline.per_class[2] = nothing
    page = report.render(results, skills)
    words = Elements(page).words
    assert words.count("not defined (denominator is 0)") == 9
    assert not re.search(r"\b(nan|NaN|inf|None|null)\b", words)
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]


def test_figures_are_plotly_figures():
    graph_objects = pytest.importorskip("plotly.graph_objects")
    from skillfast.report.bench.page import make_figures

    for n_classes in (2, 21):
        for figure in make_figures(*typed(*both(n_classes))).values():
            graph_objects.Figure(figure)


def test_steps_and_places():
    from skillfast.report.bench import figures

    results, skills = both()
    found = typed(results, skills)[0]
    drawn = figures.removal_matrix(found)["data"][0]["z"], figures.removal_steps(found)["layout"]["meta"]["oracle"]
    for rows, matrix in zip(drawn, (results, results["oracle"]), strict=True):
        assert rows == [pytest.approx([100 * v for v in row], abs=0.005) for row in matrix["removal_matrix"]]
    places = figures.location_steps(*typed(results, skills))
    neurons = skills["skills"][3]["neurons"]
    drawn = sum(sum(bars["y"]) for bars in places["frames"][4]["data"])
    assert drawn == sum(map(len, neurons.values()))
    mlp = next(i for i, trace in enumerate(places["data"]) if trace["name"] == "MLP")
    assert places["frames"][4]["data"][mlp]["y"][3] == len(neurons["blocks.3.mlp"])


def test_page_names_the_strongest_interference():
    results, skills = both()
    words = Elements(rendered(results, skills)).words
    assert (
        "The strongest competition: airplane and truck. Without the skill of airplane, truck changes by +5.00" in words
    )
    assert "points and its margin by +0.81 beyond random neurons; without that of truck, airplane by +4.00" in words
    assert "Chance alone can do that (q = 0.62)." in words
    assert (
        "In 80 % of the cases this test would find competition that shifts both margins by +0.60 (+3.00 points) and "
        "linkage that shifts both margins by -0.90 (-7.00 points) beyond random neurons; medians over all pairs."
    ) in words.replace("\N{MINUS SIGN}", "-")
    assert "explained by the oracle" not in words
    results["interference"]["oracle_explains"] = results["interference"]["competition"]
    assert "explained by the oracle airplane truck +0.81 (+5.00)" in Elements(rendered(results, skills)).words
    assert "The other class that turns most is truck, by 19.9° without the skill of airplane." in words
    results["interference"]["strongest"] = dict.fromkeys(results["interference"]["strongest"])
    results["interference"]["competition"] = []
    words = Elements(rendered(results, skills)).words
    assert "No two classes compete. No two classes are linked." in words
    assert "turns most" not in words


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "would not notice that a class suffers"),
        ({"cosine": 0.5, "rank_preservation": 0.3, "knn_accuracy_change": -0.3}, "Here the averages move as well"),
        ({"cosine": 0.5}, "Part of these averages hardly moves"),
        ({"cosine": None}, "a cosine similarity of not defined"),
    ],
)
def test_page_says_what_embeddings_show(values, text):
    results, skills = both()
    results["standard_metrics"] |= {
        "target_drop": 0.4, "cosine": 0.95, "rank_preservation": 0.92, "knn_accuracy_change": -0.01, **values,
    }  # fmt: skip
    words = Elements(rendered(results, skills)).words
    assert "Each removal costs its class 40.0 points on average" in words
    assert text in words


def test_page_of_a_model_without_embeddings():
    results, skills = both()
    del results["standard_metrics"]
    for key in ("angles_deg", "own_angle_deg", "other_angle_deg", "ci95"):
        del results["interference"][key]
    results["interference"]["strongest"]["angle"] = None
    validator("results").validate(results)
    found = Elements(rendered(results, skills))
    assert "The strongest competition: airplane and truck." in found.words
    assert "angles" not in {attrs.get("id") for _, attrs in found.tags}
    assert "What the dashboards see" not in found.words


def test_page_says_what_was_left_out():
    results, skills = both()
    results["standard_metrics"]["reasons"] = {"zero_or_not_finite": {"cat": 1200}, "one_image": ["dog"]}
    results["interference"]["reasons"] = {"no_direction": ["bird"]}
    results["interference"]["angles_deg"][0][2] = None
    results["layer_contribution"]["per_block"][1] |= {"share": None, "ci95": None}
    words = Elements(rendered(results, skills)).words
    assert "1,200 embeddings that were zero or not finite, under the removal of cat." in words
    assert "for dog: one test example" in words
    assert "for bird: no angle" in words


@pytest.mark.parametrize(
    ("fraction", "shown", "in_cell"),
    [
        (0.0, "0", "0"),
        (-0.874, f"{MINUS}87.4", f"{MINUS}87"),
        (0.0041, "0.41", "0.4"),
        (-1.0, f"{MINUS}100.0", f"{MINUS}100"),
        (-0.0001, f"{MINUS}0.01", "0"),
        (1e-7, "0.00", "0"),
        (0.09996, "10.0", "10"),
        (None, "not defined", ""),
    ],
)
def test_points(fraction, shown, in_cell):
    from skillfast.report import formatting

    assert formatting.points(fraction) == shown
    assert formatting.cell(fraction) == in_cell


def test_import_is_cheap():
    code = (
        "import sys, skillfast.report\n"
        "assert not {'torch', 'plotly', 'rich', 'jinja2', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


# the page in a browser


def until(page, told):
    """Wait for what a script tells to be true."""
    for _ in range(200):
        if found := page.evaluate(told):
            return found
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {told}")


SLOWLY = """() => {
    const own = Plotly.newPlot;
    window.HALF_DRAWN = [];
    Plotly.newPlot = (id, ...given) => {
        HALF_DRAWN.push(id);
        return new Promise((done) => setTimeout(done, 300)).then(() => own(id, ...given));
    };
}"""
BARS = "(document.getElementById('removal-steps').data ?? [{ y: [] }]).map((trace) => trace.y[%d] ?? null)"


def steps_of(page):
    """Press every control; what the page then shows."""
    step = page.locator("#stepper")
    told = {"opened": int(step.get_attribute("data-step"))}
    page.click("#next")
    told["pressed"] = int(step.get_attribute("data-step"))
    told["status"] = page.inner_text("#status")
    until(page, f"{BARS % (told['pressed'] - 1)}[0] !== null")
    told["bars"] = page.evaluate(BARS % (told["pressed"] - 1))
    told["heard"] = page.get_attribute("#removal-steps", "aria-label")
    told["marked"] = page.evaluate("document.getElementById('removal-matrix').layout.shapes[0]")
    told["address"] = page.evaluate("location.hash")
    page.click("#play")
    until(page, f"Number(document.getElementById('stepper').dataset.step) !== {told['pressed']}")
    page.click("#play")
    told["played"] = int(step.get_attribute("data-step"))
    page.locator("#slider").fill("1")
    told["slid"] = int(step.get_attribute("data-step"))
    page.check("#zoom")
    told["scale"] = until(
        page,
        "(() => { const { zmax } = document.getElementById('removal-matrix').data[0]; return zmax < 50 && zmax })()",
    )
    told["drawn"] = draw_all(page)
    places = "JSON.stringify(document.getElementById('location-steps').data.map((trace) => trace.y))"
    before = page.evaluate(places)
    page.select_option("#located", "1")
    until(page, f"{places} !== {json.dumps(before)}")
    told["width"] = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    told["numbers"] = page.eval_on_selector_all(
        ".heatmap-label text", "all => [...new Set(all.map((text) => getComputedStyle(text).fill))]"
    )
    return told


def test_page_of_many_classes_draws_what_is_near(browser, tmp_path):
    """Its figures are compact, the others wait for the window, and the graph has the strongest connections alone."""
    results, skills = both(200, blocks=2)
    path = saved(tmp_path, results, skills)
    assert "data-packed" in path.read_text(encoding="utf-8")

    def look(page):
        drawn = page.locator(".plot:has(.main-svg)").count()
        page.evaluate("document.getElementById('overlap').scrollIntoView()")
        page.wait_for_selector("#overlap .main-svg")
        far = page.evaluate("document.getElementById('class-accuracy').data?.length")
        page.evaluate(SLOWLY)  # so that the step changes while its figure is half drawn
        page.evaluate("document.getElementById('removal-steps').scrollIntoView()")
        until(page, "HALF_DRAWN.includes('removal-steps')")
        page.fill("#search", "truck of kind 19")
        page.press("#search", "Enter")
        return (
            drawn,
            far,
            page.evaluate("document.getElementById('overlap').data[0].z[1][0]"),
            page.locator("#nodes button").count(),
            page.locator("#card h3").inner_text(),
            int(page.locator("#stepper").get_attribute("data-step")),
            until(page, f"{BARS % 199}[0] !== null && {BARS % 199}"),
        )

    drawn, far, shared, nodes, title, step, bars = browser.visit(path, look, width=820)
    assert 0 < drawn < 13
    assert far is None
    assert shared == pytest.approx(results["interference"]["overlap"][1][0], abs=5e-4)
    assert 40 <= nodes <= 52  # and the chosen class with its own
    assert (title, step) == ("truck of kind 19", 200)
    assert bars[0] == pytest.approx(100 * results["removal_matrix"][199][199])


def found_by_search(page):
    page.fill("#search", " TRU")
    until(page, "document.querySelectorAll('#matches li').length === 1")
    told = {"said": page.inner_text("#matching")}
    shown = (
        "Array.from(document.querySelectorAll('table[data-skills] tbody tr:not(.mean)')).filter((row) => !row.hidden)"
    )
    told["shown"] = page.evaluate(f"[...new Set({shown}.map((row) => row.cells[0].textContent))]")
    page.press("#search", "Enter")
    told["card"] = page.inner_text("#card")
    told["focus"] = page.evaluate("[document.activeElement.id, document.activeElement.ariaLabel]")
    told["step"] = page.input_value("#removed")
    told["place"] = page.text_content("#located-name")
    page.fill("#search", "")
    until(page, f"{shown}.length > 20")
    return told


def test_skills_are_found_by_name(browser, tmp_path):
    results, skills = both()
    told = browser.visit(saved(tmp_path, results, skills), found_by_search)
    assert told["said"] == "1 of 10 skills match. Tables by skill show no others."
    assert told["shown"] == ["truck"]
    assert (told["step"], told["place"]) == ("10", "truck")
    from skillfast.report.bench import words

    found = typed(results, skills)[0]
    for rows in (words.verdict_rows(found), words.share_rows(found)[1]):
        assert all(value in told["card"] for value in rows[-1][1:])
    assert "airplane and truck compete" in told["card"]
    assert told["focus"] == ["card", "truck"]


def walked(page):
    """Go through the graph by keyboard; what it tells, and what is lit."""
    page.locator("#nodes button[tabindex='0']").focus()
    page.keyboard.press("End")
    told = {"title": page.inner_text("#told h3"), "items": page.locator("#told li").all_inner_texts()}
    told["near"] = page.locator("#arcs .near").count()
    told["name"] = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    told["pressed"] = page.locator("#nodes button[aria-pressed='true']").inner_text()
    told["step"] = page.input_value("#removed")
    told["focus"] = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")
    told["kept"] = page.locator("#nodes button[aria-pressed='true']").count()
    told["above"] = page.inner_text("#told h3")
    page.hover("#nodes li:first-child button")
    told["pointed"] = page.inner_text("#told h3")
    arcs = page.locator("#arcs .arc").count()
    page.uncheck("#kinds label:last-of-type input")
    told["hidden"] = arcs - page.locator("#arcs .arc").count()
    return told


def test_graph_is_walked_by_keyboard(browser, tmp_path):
    results, skills = both()
    told = browser.visit(saved(tmp_path, results, skills), walked)
    assert told["title"] == "truck"
    assert told["items"][0] == "Removing airplane takes 2.00 points from truck."
    assert told["items"][1].startswith("airplane and truck compete")
    overlap = results["interference"]["overlap"][9]
    assert sum("share" in item for item in told["items"]) >= min(5, sum(0 < v < 1 for v in overlap))
    assert told["name"] == f"truck, {told['near']} connections"
    assert told["near"] <= len(told["items"])
    assert told["pressed"] == told["focus"] == "truck"
    assert told["step"] == "10"
    assert (told["kept"], told["above"], told["pointed"]) == (0, "ship", "airplane")
    assert told["hidden"] == 20


def shut_out(page):
    """What axe-core finds when all is unfolded and a skill is chosen; and that it finds a field without a name."""
    for details in page.locator("details").all():
        details.evaluate("(element) => (element.open = true)")
    page.press("#search", "Enter")
    found = barriers(page) + unheard(page)
    page.emulate_media(color_scheme="dark")
    found += barriers(page, "color-contrast")
    page.evaluate("document.getElementById('search').parentElement.replaceWith(document.getElementById('search'))")
    return found, barriers(page, "label"), unheard(page)


def test_report_shuts_nobody_out(browser, tmp_path):
    found, planted, heard = browser.visit(saved(tmp_path, *both(3, blocks=1, names={1: HOSTILE})), shut_out, width=820)
    assert found == []
    assert len(planted) == 1
    assert heard == ["searchbox"]


def test_long_names_keep_their_ends():
    from skillfast.report.bench import figures

    names = {0: "a very long name, 17", 1: "<b>", 2: "fourteen chars"}
    shown = figures.removal_matrix(typed(*both(3, names=names))[0])["layout"]["xaxis"]["ticktext"]
    assert shown == ["a very l…e, 17", "&lt;b&gt;", "fourteen chars"]


def test_graph_has_the_strongest_connections():
    from skillfast.report.bench.connections import connections

    results, _ = both(60, blocks=1)
    overlap = [[float(i == j) for j in range(60)] for i in range(60)]
    pairs = {(i, i + 1): 0.5 + 0.001 * i for i in range(0, 60, 2)} | {(0, j): 0.0101 * j for j in range(2, 60)}
    for (i, j), share in pairs.items():
        overlap[i][j] = overlap[j][i] = share
    results["interference"]["overlap"] = overlap
    found = connections(typed(results, sample.sample_skills(results))[0])
    drawn = found["drawn"]
    edges = drawn["edges"][: drawn["drawn"]]
    assert [name for _, name in drawn["kinds"]] == [
        "a removal harms (1)", "compete (1)", "are linked (0)", f"share neurons ({len(pairs)})"
    ]  # fmt: skip
    assert [edge[:3] for edge in edges[:3]] == [[0, 0, 59], [1, 0, 59], [3, 0, 59]]
    strongest = sorted(pairs, key=lambda pair: -pairs[pair])
    shares = [tuple(edge[1:3]) for edge in edges if edge[0] == 3]
    assert shares == strongest[:20]
    assert len({end for edge in edges for end in edge[1:3]}) <= 40
    # of a class that is asked for, its strongest are known
    assert {tuple(edge[1:3]) for edge in drawn["edges"] if 2 in edge[1:3]} == {(2, 3), (0, 2)}
    assert len(found["rows"]) == drawn["drawn"]
    assert f"Of {len(pairs) + 2} connections among 60 classes the graph shows {drawn['drawn']}:" in found["say"][1]
    results["interference"] |= {"competition": [], "overlap": [[float(i == j) for j in range(60)] for i in range(60)]}
    results["verdicts"] = None
    assert connections(typed(results, sample.sample_skills(results))[0]) is None


@pytest.mark.parametrize("where", ["removals[0].skill", "competition[0].classes", "harmed", "verdicts"])
def test_names_must_be_those_of_the_data(where):
    results, skills = both()
    if where == "removals[0].skill":
        results["dataset"]["classes"][0] = "zeppelin"
    elif where == "verdicts":
        results["verdicts"]["zeppelin"] = results["verdicts"].pop("airplane")
    elif where == "harmed":
        results["verdicts"]["airplane"]["harmed"] = ["zeppelin"]
    else:
        results["interference"]["competition"][0]["classes"][0] = "zeppelin"
    with pytest.raises(DataError, match=rf"expected [^;]*classes[^;]*{re.escape(where)}"):
        rendered(results, skills)


def saved(folder, *found):
    path = folder / "report.html"
    path.write_text(rendered(*found), encoding="utf-8")
    return path


@pytest.mark.parametrize(("n_classes", "blocks", "width"), [(2, 2, 390), (16, 24, 1280)])
def test_page_opens_and_steps(browser, tmp_path, n_classes, blocks, width):
    results, skills = both(n_classes, blocks=blocks, names={1: HOSTILE})
    told = browser.visit(saved(tmp_path, results, skills), steps_of, fragment="#step=2", width=width)
    assert told["drawn"] == 14
    assert told["opened"] == 2
    step = 2 % n_classes
    assert told["pressed"] == step + 1
    assert told["address"] == f"#step={step + 1}"
    assert f"({step + 1} of {n_classes})" in told["status"]
    assert (told["marked"]["y0"] + told["marked"]["y1"]) / 2 == step
    assert told["bars"][0] == pytest.approx(100 * results["removal_matrix"][step][step])
    assert told["bars"][2] == pytest.approx(100 * results["oracle"]["removal_matrix"][step][step])
    own = f"{told['bars'][0]:.3g}".replace("-", "\N{MINUS SIGN}")
    assert f" class of the removed skill: {own} (" in told["heard"]
    assert told["played"] == (step + 1) % n_classes + 1
    assert told["slid"] == 1
    assert told["width"] <= 0
    assert told["numbers"]
    assert {*told["numbers"]} <= {"rgb(0, 0, 0)", "rgb(255, 255, 255)"}  # one of them is readable on any colour


def test_numbers_on_every_colour_of_a_scale_are_readable():
    """Black or white has a contrast of 4.5 (WCAG) with any mixture of two neighbours."""
    from skillfast.report.parts import DIVERGING, SEQUENTIAL

    def luminance(channels):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    dark = style[style.index("prefers-color-scheme: dark") :]
    for colours in (style.removesuffix(dark), dark):
        of = dict(re.findall(r"(--[a-z0-9-]+): #([0-9a-f]{6})", colours))
        for scale in (DIVERGING, SEQUENTIAL):
            marks = [[int(of[name[4:-1]][i : i + 2], 16) / 255 for i in (0, 2, 4)] for _, name in scale]
            for (one, other), step in itertools.product(itertools.pairwise(marks), range(51)):
                mixed = [(a * (50 - step) + b * step) / 50 for a, b in zip(one, other, strict=True)]
                light = luminance(mixed) + 0.05
                assert max(1.05 / light, light / 0.05) >= 4.5


# the file


def written(directory, results, skills):
    (directory / "results.json").write_text(json.dumps(results))
    (directory / "skills.json").write_text(json.dumps(skills))
    return directory


def test_write_report(tmp_path):
    results, skills = both()
    results["selectivity"]["ratio"] = float("nan")
    path = report.write_report(written(tmp_path, results, skills))
    assert path == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json", "skills.json"]
    results["selectivity"]["ratio"] = None
    assert path.read_text(encoding="utf-8") == rendered(results, skills)


def without(values, key):
    values = copy.deepcopy(values)
    del values[key]
    return values


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", None, "expected a file, got none"),
        ("skills.json", None, "expected a file, got none"),
        ("results.json", "{", "expected JSON"),
        ("skills.json", b"\xff\xfe", "expected JSON"),
        ("results.json", "[]", "expected schema 'skillfast.bench/1', got 'list'"),
        ("results.json", '{"schema": "skillfast.bench/9"}', "'skillfast.bench/1', got 'skillfast.bench/9'"),
        ("results.json", json.dumps(without(both()[0], "oracle")), "got none named oracle"),
        ("skills.json", json.dumps(both()[1] | {"fingerprint": "other"}), "got 'other'"),
        ("skills.json", json.dumps(both()[1] | {"skills": []}), "expected `array` of length >= 1 at skills, got []"),
        (
            "skills.json",
            json.dumps(both()[1] | {"skills": [both()[1]["skills"][0] | {"neurons": {"blocks.99.mlp": [0]}}]}),
            "got blocks.99.mlp",
        ),
    ],
)  # fmt: skip
def test_write_report_refuses(tmp_path, name, content, message):
    written(tmp_path, *both())
    (tmp_path / "report.html").write_text("older")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        report.write_report(tmp_path)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+", str(caught.value))
    assert (tmp_path / "report.html").read_text() == "older"


def test_a_failed_write_leaves_the_older_report(tmp_path, monkeypatch):
    written(tmp_path, *both())
    (tmp_path / "report.html").write_text("older")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json", "skills.json"]
    assert (tmp_path / "report.html").read_text() == "older"


# the terminal


def shown(table):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def test_summary_table():
    results, skills = both()
    results["selectivity"] |= {"target_drop": 0.8725, "regret": -0.0012}
    results["selectivity"]["ci95"] |= {"target_drop": [0.85, 0.89], "regret": [-0.0044, 0.002]}
    results["selectivity"]["harm"] = {
        "plug_in": 0.0072, "cross_fitted": -0.0003, "noise_floor": 0.0066, "ci95": [0.0, 0.0093],
    }  # fmt: skip
    text = shown(report.summary_table(typed(results, skills)[0]))
    assert "87.2 (85.0 to 89.0)" in text
    assert "96.0 % right on 500 test examples" in text
    assert "\N{MINUS SIGN}0.12 (\N{MINUS SIGN}0.44 to 0.20)" in text
    assert "\N{MINUS SIGN}0.03 to 0.72 (0 to 0.93)" in text
    assert "harm by chance alone │ 0.66" in text
    assert "ratio" not in text  # none is a headline
    assert "share of MLP" in text
    assert "share of" not in shown(report.summary_table(typed(*both(optional=False))[0]))


def test_comparison_table():
    results, _ = both()
    other = sample.sample_results(2, optional=False)
    other["model"]["name"] = "[bold]another"
    named = {name: records.made(BenchResults, found) for name, found in (("runs/[a]", results), ("runs/b", other))}
    text = shown(report.comparison_table(named))
    for word in ("runs/[a]", "runs/b", "[bold]another", "regret of the random control", "share of attention"):
        assert word in text
