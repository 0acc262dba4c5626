"""Every number of a report, read off the page and computed again from the runs' files by other means."""

import json
import math
import re
import shlex
from html.parser import HTMLParser
from statistics import median

import numpy as np
import pytest
import yaml
from scipy import stats

from abkd.analysis.report import write_report
from abkd.analysis.report.words import model_words

LABELS = ["1", "2", "3-5", "6-10", "11-100", "101-1000", "1001+"]
SEEDS = (0, 1, 2)
SETTINGS = {
    "forward": {"kind": "forward_kl"},
    "ours": {"kind": "alpha_beta", "alpha": 0.2, "beta": 0.7},
    "moving": {"kind": "alpha_beta", "alpha": {"from": 1.0, "to": 0.4, "shape": "linear"}, "beta": 0.6},
    "jsd": {"kind": "jsd", "mix": 0.5},
}
DECIMALS = {"forward_kl": 3, "reverse_kl": 3, "alpha_beta": 3, "next_token_loss": 3, "entropy": 3}
DECIMALS |= {"rouge_l": 1, "sets_mean": 1, "num_parameters": 0, "cross_entropy": 3, "softened_entropy": 3}
DECIMALS |= {"calibration_error": 3}
PERCENT = {"token_agreement": 1, "agreement": 1, "top1": 2, "top5": 2}
LOWER = ("forward_kl", "reverse_kl", "alpha_beta", "next_token_loss", "cross_entropy", "calibration_error")
HIGHER = ("token_agreement", "rouge_l", "sets_mean")


class Node:
    def __init__(self, tag, attributes=(), parent=None):
        self.tag, self.attributes, self.parent = tag, dict(attributes), parent
        self.children: list = []

    @property
    def text(self) -> str:
        return "".join(each if isinstance(each, str) else each.text for each in self.children)

    def all(self, tag=None, **attributes):
        """Every element below with this tag and these attributes, in order."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and wanted.items() <= child.attributes.items():
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag=None, **attributes):
        (found,) = self.all(tag, **attributes)
        return found


class Tree(HTMLParser):
    """The page as a tree; every element but <meta> must be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.root = self.here = Node("document")
        self.feed(text)
        self.close()
        assert self.here is self.root

    def handle_starttag(self, tag, attrs):
        node = Node(tag, attrs, self.here)
        self.here.children.append(node)
        if tag != "meta":
            self.here = node

    def handle_endtag(self, tag):
        assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def report_of(folder, *runs, **options):
    file = folder / "report.html"
    write_report(list(runs), file, **options)
    return Tree(file.read_text(encoding="utf-8")).root


def recipe_of(name="run", seed=0, divergence=None, task="language_model", **changes):
    content = {
        "task": task,
        "teacher": {"kind": "in_process", "path": "models/teacher"},
        "student": {"kind": "shrink", "keep_layers": 2},
        "data": {"train": "data/train.jsonl", "num_held_out": 20, "validation": ""},
        "objective": {"divergence": divergence, "kd_weight": 1.0 if divergence else 0.0, "ce_weight": 0.0},
        "training": {"num_steps": 60, "batch_size": 4, "accumulation": 1, "learning_rate": 0.0005, "seed": seed},
        "evaluation": {"num_generated": 2},
        "run_dir": f"runs/{name}",
        "resume": False,
    }
    return {**content, **changes}


def measured_of(rng, shift=0.0):
    student = rng.dirichlet(np.ones(7)).tolist()
    sets = {
        name: {
            "metric": "rouge_l",
            "mean": mean,
            "sd": float(rng.uniform(0.1, 0.6)),
            "interval": [mean - 1.5, mean + 1.25],
            "self_bleu": float(rng.uniform(2, 40)),
            "ended": float(rng.uniform()),
            "answers": [[f"{name} says {shift}", "two"], ["three", "four"]],
        }
        for name, mean in (("dolly", 20 + 3 * shift + float(rng.normal())), ("vicuna", 15 + float(rng.normal())))
    }
    return {
        **{key: float(2 - shift + 0.1 * rng.normal()) for key in ("forward_kl", "reverse_kl", "alpha_beta")},
        "next_token_loss": float(3 + rng.normal()),
        "token_agreement": float(np.clip(0.5 + 0.2 * shift + 0.02 * rng.normal(), 0, 1)),
        "entropy": float(2 + rng.normal()),
        "num_tokens": 1364,
        "num_parameters": 113274432,
        "rouge_l": float(20 + 4 * rng.normal()),
        "answers": [f"first answer, {shift}", "second answer"],
        "rank_mass": {"labels": LABELS, "student": student, "teacher": rng.dirichlet(np.ones(7)).tolist()},
        "sets": sets,
        "sets_mean": float(np.mean([each["mean"] for each in sets.values()])),
    }


def lines_of(rng, num_steps=60, scale=1.0, unit="tokens"):
    lines = []
    for step in range(1, num_steps + 1):
        kd = float(scale * 4 * math.exp(-step / 12) + 0.05 * rng.uniform())
        line = {"step": step, "loss": 1.5 * kd, "kd": kd, "ce": 0.0, "grad_norm": 40 * kd, f"num_{unit}": 100.0 + step}
        line |= {f"{unit}_per_s": float(rng.uniform(50, 90)), "peak_memory_gib": 2 + 0.01 * step, "epoch": 0.1}
        lines.append(line | {"student_entropy": float(rng.uniform(1, 4)), "learning_rate": 5e-4 * (1 - step / 60)})
        if step % 20 == 0:
            lines.append({"step": step, "validation_forward_kl": 3 - step / 30, "epoch": 0.1})
    return lines


def write_run(folder, recipe, results=None, lines=(), before=None, environment=None):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, content in (("results.json", results), ("before.json", before)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Four settings, three seeds each but the last, which has one; (folder, runs by setting, their results)."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("grid")
    teacher, before = measured_of(rng, 1.5), measured_of(rng, -1)
    runs, results = {}, {}
    for number, (name, divergence) in enumerate(SETTINGS.items()):
        for seed in SEEDS[: 1 if name == "jsd" else 3]:
            after = measured_of(rng, 0.6 * number)
            content = {"teacher": teacher, "before": before, "after": after, "training_s": 100.0 + 9 * seed}
            recipe = recipe_of(f"{name}-{seed}", seed, divergence)
            run = write_run(folder / f"{name}-{seed}", recipe, content, lines_of(rng, scale=1 + number))
            runs.setdefault(name, []).append(run)
            results.setdefault(name, []).append(content)
    return folder, runs, results


@pytest.fixture(scope="module")
def page(grid):
    folder, runs, _ = grid
    return report_of(folder, *(run for each in runs.values() for run in each))


def shown(key, value):
    if key in PERCENT:
        return f"{100 * value:.{PERCENT[key]}f}%"
    return f"{value:,.{DECIMALS[key]}f}".replace("-", "−")


def cell(page, key, of):
    """The one cell of a measure of a row; the page is walked once."""
    if not hasattr(page, "cells"):
        named = [td for td in page.all("td") if "data-of" in td.attributes]
        keys = [
            (td.attributes.get("data-measure", td.attributes.get("data-set")), td.attributes["data-of"]) for td in named
        ]
        page.cells = dict(zip(keys, named, strict=True))
        assert len(page.cells) == len(named)
    return page.cells[key, of]


def first_line(node):
    """A cell's number, without what is small below it."""
    return "".join(each if isinstance(each, str) else each.text for each in node.children if small_is_not(each))


def small_is_not(each):
    return isinstance(each, str) or each.tag != "small"


def letters(grid):
    return dict(zip(grid[1], "ABCD", strict=True))


@pytest.mark.parametrize("key", [*DECIMALS, *PERCENT])
def test_results_are_the_means_and_deviations_over_the_seeds(page, grid, key):
    _, runs, results = grid
    if key not in results["forward"][0]["after"]:
        assert not page.all("td", data_measure=key)
        return
    for role, title in (("teacher", "teacher"), ("before", "student before")):
        assert first_line(cell(page, key, title)) == shown(key, results["ours"][0][role][key])
    for name, letter in letters(grid).items():
        values = np.array([each["after"][key] for each in results[name]])
        found = cell(page, key, letter)
        assert first_line(found) == shown(key, values.sum() / len(values))
        if len(values) > 1:
            sd = math.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1))
            expected = [f"sd {shown(key, sd)}"] if sd else []
            assert [small.text for small in found.all("small")] == expected
            for run, value in zip(runs[name], values, strict=True):
                assert first_line(cell(page, key, run.name)) == shown(key, value)
        else:
            assert not found.all("small")


def pooled_half_width(groups, n, m):
    repeated = [np.array(each) for each in groups if len(each) > 1]
    dof = sum(len(each) - 1 for each in repeated)
    sd = math.sqrt(sum(((each - each.mean()) ** 2).sum() for each in repeated) / dof)
    return stats.t.ppf(0.975, dof) * sd * math.sqrt(1 / n + 1 / m)


def test_a_difference_is_called_one_beyond_the_spread_alone(page, grid):
    _, _, results = grid
    names, verdicts = letters(grid), set()
    for key in (*LOWER, *HIGHER):
        if key not in results["forward"][0]["after"]:
            continue
        values = {name: [each["after"][key] for each in results[name]] for name in names}
        for one in names:
            wins = []
            for other in names:
                if one == other:
                    continue
                change = np.mean(values[one]) - np.mean(values[other])
                half = pooled_half_width(values.values(), len(values[one]), len(values[other]))
                wins.append((change < 0) == (key in LOWER) and abs(change) > half)
                if names[one] < names[other]:
                    found = cell(page, key, f"{names[one]}-{names[other]}")
                    sign = "+" if change >= 0 else "−"
                    words, allowed = (shown(key, abs(each)).replace("%", " pp") for each in (change, half))
                    assert first_line(found) == sign + words
                    assert found.one("small").text == f"± {allowed}"
                    assert bool(found.all("b")) == (abs(change) > half)
                    verdicts.add(bool(abs(change) > half))
            assert bool(cell(page, key, names[one]).all("b")) == all(wins)
    assert verdicts == {True, False}


def test_evaluation_sets_have_deviation_interval_and_self_bleu(page, grid):
    _, runs, results = grid
    rows = {"teacher": results["ours"][0]["teacher"], "student before": results["ours"][0]["before"]}
    rows |= {run.name: result["after"] for name in runs for run, result in zip(runs[name], results[name], strict=True)}
    for whose, measured in rows.items():
        for name, each in measured["sets"].items():
            found = cell(page, name, whose)
            assert first_line(found) == f"{each['mean']:.1f} ({each['sd']:.2f})"
            interval = "{:.1f} to {:.1f}".format(*each["interval"])
            said = [interval, f"Self-BLEU {each['self_bleu']:.1f}, {100 * each['ended']:.0f}% ended"]
            assert [small.text for small in found.all("small")] == said


def test_probability_mass_in_bars_and_numbers(page, grid):
    _, _, results = grid
    expected = [
        results["ours"][0]["teacher"]["rank_mass"]["teacher"],
        results["ours"][0]["before"]["rank_mass"]["student"],
    ]
    for name in SETTINGS:
        expected.append(np.mean([each["after"]["rank_mass"]["student"] for each in results[name]], axis=0))
    part = page.one("section", id="mass")
    numbers = [td.text for td in part.all("td")]
    assert numbers == [f"{100 * share:.1f}%" for row in expected for share in row]
    assert [td.attributes["data-bucket"] for td in part.all("td")] == LABELS * len(expected)
    widths = np.array([float(bar.attributes["width"]) for bar in part.all("rect")]).reshape(len(expected), 7)
    np.testing.assert_allclose(widths / widths.sum(1, keepdims=True), np.array(expected), atol=1e-4)
    lefts = np.array([float(bar.attributes["x"]) for bar in part.all("rect")]).reshape(len(expected), 7)
    np.testing.assert_allclose(lefts[:, 1:], np.cumsum(widths, axis=1)[:, :-1], atol=0.05)
    inside = [text.text for text in part.all("text") if text.attributes["class"].startswith("in")]
    assert inside == [f"{100 * share:.0f}%" for row in expected for share in row if 460 * share > 28]


def axis_of(drawing, name):
    """(place, value) of the ticks -> a function from places to values, logarithmic where the ticks are."""
    suffix = {"k": 1e3, "M": 1e6}
    ticks = [
        (float(t.attributes["data-at"]), float(t.text.rstrip("kM")) * suffix.get(t.text[-1], 1))
        for t in drawing.all("text", class_=f"tick-{name}")
    ]
    places, values = np.array(ticks).T
    is_log = values.min() > 0 and not np.allclose(
        np.diff(values) / np.diff(places), (values[1] - values[0]) / (places[1] - places[0]), rtol=0.02
    )
    slope, start = np.polyfit(places, np.log(values) if is_log else values, 1)
    return lambda at: np.exp(slope * np.array(at) + start) if is_log else slope * np.array(at) + start


@pytest.mark.parametrize(
    "key",
    [
        "loss",
        "kd",
        "grad_norm",
        "student_entropy",
        "learning_rate",
        "tokens_per_s",
        "peak_memory_gib",
        "validation_forward_kl",
    ],
)
def test_curves_are_the_means_of_the_logged_lines(page, grid, key):
    panel = page.one("figure", data_panel=key)
    x, y = axis_of(panel, "x"), axis_of(panel, "y")
    drawn = {line.attributes["data-run"]: line.attributes["d"] for line in panel.all("path", class_="line")}
    names = [run.name for runs in grid[1].values() for run in runs]
    assert sorted(drawn) == sorted(names)
    for name in names:
        lines = [json.loads(line) for line in (grid[0] / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        logged = np.array([(line["step"], line[key]) for line in lines if key in line])
        size = -(-len(logged) // 25)
        chunks = [logged[start : start + size].mean(axis=0) for start in range(0, len(logged), size)]
        places = np.array([pair.split(" ") for pair in drawn[name].removeprefix("M").split("L")], dtype=float)
        np.testing.assert_allclose(x(places[:, 0]), [step for step, _ in chunks], rtol=2e-3, atol=0.02)
        np.testing.assert_allclose(
            y(places[:, 1]), [value for _, value in chunks], rtol=1e-2, atol=2e-3 * logged[:, 1].max()
        )
    assert (f"means of {size} lines" in panel.text) == (size > 1)


def test_terms_that_say_nothing_new_are_not_drawn(page):
    assert {panel.attributes["data-panel"] for panel in page.all("figure") if "data-panel" in panel.attributes} == {
        "loss", "kd", "grad_norm", "student_entropy", "learning_rate", "tokens_per_s", "peak_memory_gib",
        "validation_forward_kl",
    }  # fmt: skip


def test_the_plane_places_and_colours_the_runs_by_the_sets(page, grid):
    part = page.one("section", id="plane")
    means = {
        letter: np.mean([each["after"]["sets_mean"] for each in grid[2][name]])
        for name, letter in letters(grid).items()
    }
    assert {td.attributes["data-plane"]: td.text for td in part.all("td") if "data-plane" in td.attributes} == {
        letter: f"{mean:.1f}" for letter, mean in means.items()
    }
    drawing = part.one("svg")
    x, y = axis_of(drawing, "x"), axis_of(drawing, "y")
    spots = {spot.one("title").text[0]: spot.attributes for spot in drawing.all("circle")}
    points = {letter: (x(float(each["cx"])), y(float(each["cy"]))) for letter, each in spots.items()}
    assert points == {
        "A": pytest.approx((1, 0), abs=5e-3),
        "B": pytest.approx((0.2, 0.7), abs=5e-3),
        "C": pytest.approx((0.4, 0.6), abs=5e-3),
    }
    (start,) = drawing.all("path", class_="moved")
    across, down = re.match(r"M([\d.]+) ([\d.]+)L", start.attributes["d"]).groups()
    assert (x(float(across)), y(float(down))) == pytest.approx((1, 0.6), abs=5e-3)
    best, worst = max(means, key=means.get), min(means, key=means.get)
    swatches = dict(zip(means, [each.attributes["style"] for each in part.all("i", class_="swatch")], strict=True))
    assert swatches[best].endswith("#fde725") and swatches[worst].endswith("#440154")
    assert all(swatches[letter].endswith(each["fill"]) for letter, each in spots.items())
    assert ["1", "0"] in [[td.text for td in row.all("td")[:2]] for row in part.all("tr")]
    assert ["1 → 0.4", "0.6"] in [[td.text for td in row.all("td")[:2]] for row in part.all("tr")]


def test_another_metric_colours_the_plane_the_lowest_best(grid, tmp_path):
    _, runs, results = grid
    part = report_of(tmp_path, runs["forward"][0], runs["ours"][0], metric="forward_kl").one("section", id="plane")
    values = {"A": results["forward"][0]["after"]["forward_kl"], "B": results["ours"][0]["after"]["forward_kl"]}
    assert {td.attributes["data-plane"]: td.text for td in part.all("td") if "data-plane" in td.attributes} == {
        letter: f"{value:.3f}" for letter, value in values.items()
    }
    fills = {spot.one("title").text[0]: spot.attributes["fill"] for spot in part.all("circle")}
    assert fills[min(values, key=values.get)] == "#fde725" and fills[max(values, key=values.get)] == "#440154"


def test_the_cost_is_that_of_the_log(page, grid):
    _, runs, results = grid
    part = page.one("section", id="cost")
    for name in runs:
        for run, result in zip(runs[name], results[name], strict=True):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
            cells = {td.attributes["data-cost"]: td.text for td in part.one("tr", data_run=run.name).all("td")}
            seconds = result["training_s"]
            assert cells == {
                "training_s": f"{seconds:.1f} s",
                "num_steps": "60",
                "num_counted": f"{sum(line.get('num_tokens', 0) for line in lines):,.0f} tokens",
                "per_s": f"{median(line['tokens_per_s'] for line in lines if 'loss' in line):.1f} tokens/s",
                "peak_memory_gib": "2.60 GiB",
                "num_parameters": "113,274,432",
            }


def test_answers_stand_side_by_side_with_their_prompts(tmp_path):
    rng = np.random.default_rng(1)
    results = {role: measured_of(rng, shift) for role, shift in (("teacher", 2), ("before", -1), ("after", 1))}
    results["after"]["questions"] = ["What is asked?", "And then?"]
    run = write_run(tmp_path / "run", recipe_of(divergence=SETTINGS["ours"]), results)
    first, second, *of_sets = report_of(tmp_path, run).one("section", id="answers").all("article")
    assert first.one("p", class_="prompt").text == "What is asked?"
    assert [each.text for each in first.all("h4")] == ["teacher", "student before", "A α-β (0.2, 0.7)"]
    assert [each.text for each in first.all("blockquote")] == [f"first answer, {shift}" for shift in (2, -1, 1)]
    assert second.one("p", class_="prompt").text == "And then?"
    assert [each.text for each in of_sets[0].all("blockquote")] == [f"dolly says {shift}" for shift in (2, -1, 1)]
    assert len(of_sets) == 4


def test_image_runs_show_what_their_results_have(tmp_path):
    def measured(top1, low, high, right):
        return {
            "num_images": 400,
            "top1": top1,
            "top1_interval": [low, high],
            "top5": 0.987654,
            "cross_entropy": 1.23456,
            "calibration_error": 0.0456,
            "new_measure": 12.3456,
            "num_parameters": 77587,
            "confusions": [["hen", "fox", 31, 0.31]],
            "per_class": [["hen", 200, right], ["fox", 200, 0.875]],
        }

    results = {
        "before": measured(0.3, 0.25, 0.35, 0.1),
        "after": measured(0.71234, 0.6655, 0.7544, 0.55),
        "training_s": 7200,
    }
    recipe = recipe_of(task="image_classification", data={"train": "cifar", "test": ""}, teacher=None)
    lines = lines_of(np.random.default_rng(2), unit="images")
    page = report_of(tmp_path, write_run(tmp_path / "run", recipe, results, lines))
    assert first_line(cell(page, "top1", "A")) == "71.23%"
    assert cell(page, "top1", "A").one("small").text == "66.55% to 75.44%"
    for key in ("top5", "cross_entropy", "calibration_error", "num_parameters"):
        assert first_line(cell(page, key, "A")) == shown(key, results["after"][key])
    assert first_line(cell(page, "new_measure", "A")) == "12.35"
    assert "400 test images" in page.one("section", id="results").text
    assert [td.text for td in page.one("tr", data_class="hen").all("td")] == ["10.0%", "55.0%"]
    assert [td.text for td in page.one("tr", data_class="fox").all("td")] == ["87.5%", "87.5%"]
    assert "hen taken for fox" in page.text and "31.0%" in page.text
    costs = {td.attributes["data-cost"]: td.text for td in page.one("section", id="cost").all("td")}
    assert costs["training_s"] == "2.00 h"
    assert costs["num_counted"] == f"{sum(100 + step for step in range(1, 61)):,} images"
    assert not page.all("section", id="plane") and not page.all("section", id="answers")


def test_what_was_trained_and_how_to_do_it_again(grid, page):
    part = page.one("section", id="trained")
    facts = {pair.one("dt").text: pair.one("dd").text for pair in part.all("div") if pair.all("dt")}
    assert facts["Teacher"] == "models/teacher" and facts["Student"] == "2 layers of the teacher"
    assert facts["Length"] == "60 steps" and facts["Batch"] == "4 examples" and "Objective" not in facts
    head = [th.text for th in part.one("thead").all("th")]
    assert head == ["Run", "State", "Objective", "Seed"]
    row = part.one("tr", data_run="ours-1")
    assert [td.text for td in row.all("td")] == ["finished", "α-β (0.2, 0.7)", "1"]
    folder = grid[0] / "ours-1"
    again = page.one("article", data_run="ours-1")
    command, *_ = [code.text for code in again.all("code")]
    assert shlex.split(command) == ["abkd", "train", str(folder / "recipe.yaml"), f"run_dir={folder}-again"]
    assert again.one("details").one("pre").text == (folder / "recipe.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    "section, words",
    [
        ({"kind": "cached", "path": "caches/a"}, "the cache caches/a"),
        ({"kind": "served", "model": "big", "url": "http://host"}, "big at http://host"),
        (
            {"kind": "mixture", "teachers": [{"path": "a"}, {"kind": "cached", "path": "b"}]},
            "a mixture of a and the cache b",
        ),
        ({"kind": "shrink", "keep_layers": 3, "path": "a"}, "3 layers of a"),
        ({"kind": "shrink", "layers": [0, 2], "path": ""}, "2 layers of the teacher"),
    ],
)
def test_a_model_in_a_few_words(section, words):
    assert model_words(section) == words
