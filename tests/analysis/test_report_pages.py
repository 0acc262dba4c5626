"""Reports of whatever there is: hostile texts, torn and foreign folders, runs that have only begun, no run at all."""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_report import SETTINGS, Tree, cell, first_line, lines_of, measured_of, recipe_of, report_of, write_run

from abkd.analysis.report import report_after, write_report
from abkd.analysis.report.markup import Markup, element
from abkd.analysis.report.words import objective_words, path_in_plane
from abkd.cli import main
from abkd.errors import InputError

HOSTILE = (
    "</script></td><img src=x onerror=alert(1)><script>alert(2)</script>\"'><a href='//evil'>&lt;b&gt; \ud800\0 \u202e"
)
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "h4", "p", "div",
    "span", "i", "b", "small", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "figure", "figcaption",
    "svg", "g", "path", "circle", "rect", "text", "article", "blockquote", "details", "summary", "pre", "code",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "id", "class", "title", "scope", "tabindex", "role",
    "aria-label", "dir", "style", "d", "x", "y", "cx", "cy", "r", "width", "height", "viewbox", "fill",
    "stroke-dasharray", "data-run", "data-of", "data-measure", "data-set", "data-plane", "data-cost", "data-bucket",
    "data-class", "data-panel", "data-at",
}  # fmt: skip


def finished(folder, name="run", seed=0, divergence=SETTINGS["ours"], **changes):
    rng = np.random.default_rng(seed)
    results = {role: measured_of(rng, shift) for role, shift in (("teacher", 2), ("before", -1), ("after", 1))}
    return write_run(folder / name, recipe_of(name, seed, divergence, **changes), results, lines_of(rng))


def hostile_run(folder):
    rng = np.random.default_rng(0)
    measured = measured_of(rng)
    measured |= {"answers": [HOSTILE], "questions": [HOSTILE], HOSTILE: 1.0, "per_class": [[HOSTILE, 3, 0.5]]}
    measured |= {"sets": {HOSTILE: measured["sets"]["dolly"] | {"answers": [[HOSTILE]]}}, "top1_interval": [HOSTILE, 1]}
    measured |= {
        "confusions": [[HOSTILE, HOSTILE, 1, 0.5]],
        "rank_mass": {"labels": [HOSTILE], "student": [1], "teacher": [1]},
    }
    path = HOSTILE.replace("\ud800", "")  # which no YAML can hold
    teacher, divergence = {"kind": path, "path": path}, {"kind": "jsd", "mix": path}
    recipe = recipe_of("x", 0, divergence, task=path, teacher=teacher)
    lines = [*lines_of(rng), {"step": 61, "warning": HOSTILE}, {"step": 1, HOSTILE: 1.0}, {"step": 2, HOSTILE: 2.0}]
    environment = {"command": [HOSTILE], "platform": HOSTILE, "versions": {HOSTILE: HOSTILE}, "commit": HOSTILE}
    results = {"teacher": measured, "before": measured, "after": measured}
    return write_run(folder / "<script>alert(3)<", recipe, results, lines, environment=environment)


def test_hostile_texts_are_inert(tmp_path):
    page = report_of(tmp_path, hostile_run(tmp_path), finished(tmp_path))
    assert {node.tag for node in page.all()} <= ELEMENTS
    assert {name for node in page.all() for name in node.attributes} <= ATTRIBUTES
    styles = {node.attributes["style"].rstrip("0123456789abcdef") for node in page.all() if "style" in node.attributes}
    assert styles <= {"background:#"}
    answer = page.one("section", id="answers").all("blockquote")[0]
    assert (
        answer.text == HOSTILE.replace("\ud800", "\ufffd").replace("\0", "\ufffd")
        and answer.attributes["dir"] == "auto"
    )
    for name in ("trained", "results", "mass", "curves", "warnings", "repeat"):
        assert "onerror=alert(1)" in page.one("section", id=name).text


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path):
    finished(tmp_path)
    page = report_of(tmp_path, tmp_path / "run")
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    text = (tmp_path / "report.html").read_text("utf-8")
    assert not any(
        word in text for word in ("src=", "href=", "url(", "@import", "http:", "https:", "<script", "javascript")
    )


def test_an_element_escapes_text_and_not_markup():
    assert element("b", "<i>", Markup("<i></i>"), None, [1, "&"]) == "<b>&lt;i&gt;<i></i>1&amp;</b>"
    assert (
        element("b", class_="a\"'", data_x=1.0, open=True, id=None)
        == '<b class="a&quot;&#x27;" data-x="1.00" open></b>'
    )


def test_a_run_that_has_only_begun(tmp_path):
    page = report_of(tmp_path, write_run(tmp_path / "run", recipe_of(divergence=SETTINGS["ours"])))
    assert "nothing logged yet" in page.one("section", id="trained").text
    assert "No run has results yet." in page.one("section", id="results").text
    assert "No run has logged two lines yet." in page.one("section", id="curves").text
    assert "Go on with it" in page.one("section", id="repeat").text


def test_an_interrupted_run_shows_what_it_has(tmp_path):
    rng = np.random.default_rng(0)
    before = {"teacher": measured_of(rng, 2), "before": measured_of(rng, -1)}
    run = write_run(tmp_path / "run", recipe_of(divergence=SETTINGS["ours"]), lines=lines_of(rng, 30), before=before)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 31, "warning": "half a li')
    page = report_of(tmp_path, run)
    assert "unfinished, at step 30 of 60" in page.one("section", id="trained").text
    assert "No results yet: run." in page.one("section", id="results").text
    assert first_line(cell(page, "forward_kl", "student before")) == f"{before['before']['forward_kl']:.3f}"
    assert page.one("section", id="warnings").text.endswith("None was logged.")
    assert f"abkd train {run / 'recipe.yaml'} resume=true" in page.one("section", id="repeat").text


def test_warnings_are_told(tmp_path):
    run = finished(tmp_path)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 60, "warning": "the gradient is 0"}) + "\n")
    page = report_of(tmp_path, run)
    assert [td.text for td in page.one("section", id="warnings").all("td")] == ["the gradient is 0"]
    assert "1 warning" in page.one("p", class_="lead").text


def test_no_run_is_a_page_too(tmp_path):
    page = report_of(tmp_path)
    assert page.one("h1").text == "0 runs" and "There is no run to report." in page.text


def test_figures_that_are_not_finite_are_shown_and_never_best(tmp_path):
    runs = [
        finished(tmp_path, f"{name}-{seed}", seed, SETTINGS[name]) for name in ("ours", "forward") for seed in (0, 1)
    ]
    results = json.loads((runs[0] / "results.json").read_text("utf-8"))
    results["after"] |= {"forward_kl": float("inf"), "entropy": float("nan")}
    (runs[0] / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (runs[0] / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n', encoding="utf-8"
    )
    page = report_of(tmp_path, *runs)
    assert first_line(cell(page, "forward_kl", "A")) == "∞" and first_line(cell(page, "entropy", "A")) == "nan"
    assert not page.one("td", data_measure="forward_kl", data_of="A").all("b")
    assert "ours-0" not in [
        line.attributes["data-run"] for line in page.one("figure", data_panel="loss").all("path", class_="line")
    ]


def test_only_runs_of_one_teacher_and_data_stand_beside_each_other(tmp_path):
    other = {"kind": "in_process", "path": "models/another"}
    page = report_of(
        tmp_path, finished(tmp_path, "a"), finished(tmp_path, "b", 1), finished(tmp_path, "c", teacher=other)
    )
    results = page.one("section", id="results")
    assert [each.text.split(",")[0] for each in results.all("p", class_="group")] == [
        "A: teacher models/teacher",
        "B: teacher models/another",
    ]
    both, alone = (results.one("td", data_measure="forward_kl", data_of=letter) for letter in "AB")
    assert "sd" in both.text and "sd" not in alone.text and "2 seeds" in results.text


def test_one_seed_calls_no_difference_one(tmp_path):
    page = report_of(tmp_path, finished(tmp_path, "a"), finished(tmp_path, "b", divergence=SETTINGS["forward"]))
    part = page.one("section", id="results")
    assert "its spread over seeds is not known" in part.text and not part.all("b")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (None, None, "does not exist"),
        ("notes.txt", "hello", "is no run's folder, it has no recipe.yaml"),
        ("recipe.yaml", "", "is torn, or no recipe of abkd"),
        ("recipe.yaml", "a: [", "is torn, or no recipe of abkd"),
        ("recipe.yaml", "flour: 200 g\neggs: 2", "is torn, or no recipe of abkd"),
        ("results.json", '{"after": {', "results.json is torn"),
        ("results.json", "[1]", "results.json is torn or of something else"),
        ("results.json", '{"after": 3}', "something else than measures under 'after'"),
        ("results.json", '{"after": {"rank_mass": {"labels": ["1"]}}}', "something else than measures under 'after'"),
        ("results.json", '{"teacher": {"sets": {"a": {}}}}', "something else than measures under 'teacher'"),
        ("environment.json", "{", "environment.json is torn"),
        ("metrics.jsonl", b"\xff\xfe", "is no text in UTF-8"),
    ],
)
def test_one_line_names_a_missing_torn_or_foreign_folder(tmp_path, capsys, name, content, says):
    good, run = finished(tmp_path, "good"), tmp_path / "bad"
    if name in ("results.json", "environment.json", "metrics.jsonl"):
        write_run(run, recipe_of())
    elif name:
        run.mkdir()
    if name:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "page.html"
    assert main(["report", str(good), str(run), "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("abkd: run: ") and str(run) in line and says in line
    assert not output.exists()


def test_a_folder_of_runs_says_what_to_give(tmp_path):
    finished(tmp_path / "all", "one")
    with pytest.raises(InputError, match=r"it holds 1 runs: give .*all/\*/"):
        write_report([tmp_path / "all"], tmp_path / "page.html")


def test_a_metric_that_no_run_has_and_a_file_that_cannot_be_written(tmp_path):
    run = finished(tmp_path)
    with pytest.raises(InputError, match="metric: no run has a figure 'beauty'"):
        write_report([run], tmp_path / "page.html", metric="beauty")
    with pytest.raises(InputError, match=r"output: .* cannot be written"):
        write_report([run], tmp_path / "nowhere" / "page.html")


def test_a_finished_run_never_fails_for_its_report(tmp_path, monkeypatch):
    said = []
    report_after([finished(tmp_path)], tmp_path / "report.html", said.append)
    assert said == [f"report: {tmp_path / 'report.html'}"] and (tmp_path / "report.html").exists()
    monkeypatch.setattr("abkd.analysis.report.read_runs", lambda runs: 1 / 0)
    report_after([tmp_path / "run"], tmp_path / "report.html", said.append)
    assert "no report was written (ZeroDivisionError" in said[1]


def test_the_same_runs_give_the_same_bytes(tmp_path):
    runs = [finished(tmp_path, name, seed) for seed, name in enumerate("ab")]
    texts = []
    for _ in range(2):
        write_report([*runs, runs[0]], tmp_path / "page.html")
        texts.append((tmp_path / "page.html").read_bytes())
    assert texts[0] == texts[1]
    assert Tree(texts[0].decode()).root.one("h1").text == "2 runs"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "page.html"]


def test_the_command_loads_no_torch(tmp_path):
    finished(tmp_path)
    code = (
        f"import sys; from abkd.cli import main; code = main(['report', {str(tmp_path / 'run')!r}, '--output', "
        f"{str(tmp_path / 'page.html')!r}]); sys.exit(code or bool({{'torch', 'matplotlib'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"the report is in {tmp_path / 'page.html'}\n"


@pytest.mark.parametrize(
    ("objective", "words", "path"),
    [
        ({"divergence": {"kind": "reverse_kl"}}, "reverse KL", ((0, 1), (0, 1))),
        ({"divergence": {"kind": "jsd", "mix": 0.5}, "ce_weight": 0.5}, "JSD (mix 0.5) + 0.5 · cross-entropy", None),
        ({"kd_weight": 0.0, "ce_weight": 1.0, "divergence": None}, "cross-entropy", None),
        (
            {
                "calibration": {"kind": "ttm", "divergence": {"kind": "alpha_beta", "alpha": 1.0, "beta": 0.2}},
                "kd_weight": 9.0,
            },
            "9 · TTM of α-β (1, 0.2)",
            ((1, 0.2), (1, 0.2)),
        ),
        ({"calibration": {"kind": "dist", "inter_weight": 1.0}}, "DIST", None),
        (
            {"divergence": {"kind": "alpha_beta", "alpha": 0.2, "beta": {"from": 0, "to": 1, "shape": "cosine"}}},
            "α-β (0.2, 0→1)",
            ((0.2, 0), (0.2, 1)),
        ),
        (
            {"divergence": {"kind": "alpha_beta", "alpha": {"from": 2, "to": 9, "shape": "constant"}, "beta": 0}},
            "α-β (2, 0)",
            ((2, 0), (2, 0)),
        ),
    ],
)
def test_objectives_in_words_and_in_the_plane(objective, words, path):
    assert objective_words({"objective": objective}) == words
    assert path_in_plane({"objective": objective}) == path
