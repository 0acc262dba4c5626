"""The numbers of the figures, by brute force, and that each is drawn."""

import math

import pytest
import torch

from abkd.analysis.figures import ALPHAS, BETAS, FIGURES, RUN_FIGURES, Figure, draw_figures, effect_panels
from abkd.analysis.panels import Curve, Curves, Plane
from abkd.analysis.sweep import Run
from abkd.divergences import alpha_beta

PNG = b"\x89PNG"


def step_per_mass(p, q, alpha, beta):
    """LogR over the mass moved of a small step of autograd on the logits ln q."""
    logits = q.log().requires_grad_()
    log_p = p.log().unsqueeze(0)
    alpha_beta(student=logits.log_softmax(-1).unsqueeze(0), teacher=log_p, alpha=alpha, beta=beta).sum().backward()
    after = (logits.detach() - 1e-4 * logits.grad).softmax(-1)
    return ((after / q).log() / ((after - q).abs().sum() / 2)).tolist()


def test_the_effect_of_alpha():
    factor, step, _, _ = effect_panels()
    q = torch.full((41,), 1 / 41, dtype=torch.float64)
    for alpha, curve, stepped in zip(ALPHAS, factor.curves, step.curves, strict=True):
        assert curve.label == stepped.label == f"α = {alpha:g}"
        for error, value in list(zip(curve.x, curve.y, strict=True))[::25]:
            p = 0.01 + error
            truth = math.log(p / 0.01) if alpha == 0 else (p**alpha - 0.01**alpha) / alpha
            assert value == pytest.approx(truth)
        p = q * torch.tensor(stepped.x, dtype=torch.float64).exp()
        assert p.sum().item() == pytest.approx(1)
        assert stepped.y == pytest.approx(step_per_mass(p, q, alpha, beta=0.7), rel=1e-6, abs=1e-6)


def test_the_effect_of_beta():
    _, _, factor, step = effect_panels()
    for beta, curve, stepped in zip(BETAS, factor.curves, step.curves, strict=True):
        assert curve.y == pytest.approx([q**beta for q in curve.x])
        half = torch.tensor(stepped.x, dtype=torch.float64)
        rest = torch.tensor([0.5, 1 - 0.5 * math.cosh(0.01)], dtype=torch.float64)
        q = torch.cat([half, half, rest[:1]])
        p = torch.cat([half * math.exp(0.01), half * math.exp(-0.01), rest[1:]])
        assert q.sum().item() == pytest.approx(1) and p.sum().item() == pytest.approx(1)
        assert stepped.y == pytest.approx(step_per_mass(p, q, 0.0, beta)[: len(half)], rel=1e-6, abs=1e-6)
    flat = step.curves[0].y
    assert max(flat) - min(flat) < 0.01 and flat[0] == pytest.approx(4, abs=0.01)  # half of the mass, by LogR / 2, is 1


def test_a_step_goes_from_over_to_under_estimated_classes():
    _, _, by_error, _ = FIGURES["mass"].numbers()
    for name, moved in by_error.bars.items():
        assert sum(moved) == pytest.approx(0, abs=1e-9), name
        assert sum(moved[:4]) < -0.8, name


def test_what_the_page_says_of_the_mass():
    by_rank, _, _, by_error = FIGURES["mass"].numbers()
    forward, reverse, alpha_beta = "forward KL (1, 0)", "reverse KL (0, 1)", "α-β (0.2, 0.7)"
    assert all(gained[0] > 0.8 for gained in by_rank.bars.values())
    for name in (reverse, alpha_beta):
        assert sum(by_rank.bars[name][4:]) < sum(by_rank.bars[forward][4:]) - 0.2
        assert by_error.bars[name][0] > by_error.bars[forward][0] + 0.1
        assert by_error.bars[name][6] < by_error.bars[forward][6] - 0.1


def results(alpha, beta, value):
    mass = {"labels": ["1", "2+"], "student": [0.5, 0.5], "teacher": [0.6, 0.4]}
    after = {"token_agreement": value, "entropy": 2 - beta, "rank_mass": mass}
    before = {"token_agreement": 0.1, "entropy": 3.0, "rank_mass": mass}
    return {"before": before, "after": after, "num_steps": 9, "student_step": 9}


def runs():
    points = {
        "forward KL": (1.0, 0.0),
        "reverse KL": (0.0, 1.0),
        "α-β (0.2, 0.7)": (0.2, 0.7),
        "α-β (0.2, 0.4)": (0.2, 0.4),
    }
    return [
        Run(name, *point, [{"step": 5, "validation_entropy": 2.5}], results(*point, sum(point) / 2))
        for name, point in points.items()
    ]


def numbers(name, *arguments):
    return RUN_FIGURES[name].numbers(*arguments)


def test_what_runs_show():
    given = runs(), [{"alpha": 0.5, "beta": 0.5, "entropy": 1.0}]
    (curves,) = numbers("curves", *given)
    assert [curve.x for curve in curves.curves] == [(0, 5, 9)] * 4
    (masses,) = numbers("masses", *given)
    assert list(masses.bars) == ["teacher", "before", *(run.name for run in given[0])]
    agreement, entropy = numbers("surface", *given)
    assert agreement.best[:2] in {(1.0, 0.0), (0.0, 1.0)} and len(agreement.points) == 4
    assert len(entropy.points) == 5
    (sweep,) = numbers("sensitivity", *given)
    assert sweep.curves == (Curve("α = 0.2", (0.4, 0.7), (1.6, pytest.approx(1.3)), (0.0, 0.0)),)
    assert numbers("runs", *given) == (Plane(tuple((run.name, run.alpha, run.beta) for run in given[0])),)


def test_before_is_shown_where_all_runs_began_alike():
    first, second, *_ = runs()
    other = results(0.0, 1.0, 0.5)
    other["before"] = other["before"] | {"rank_mass": first.results["after"]["rank_mass"] | {"student": [0.1, 0.9]}}
    (masses,) = numbers("masses", [first, second._replace(results=other)], [])
    assert list(masses.bars) == ["teacher", "forward KL", "reverse KL"]


def test_bars_of_many_runs_are_shared_out():
    first, *_ = runs()
    panels = numbers("masses", [first._replace(name=str(index)) for index in range(13)], [])
    assert [len(panel.bars) for panel in panels] == [2 + 6, 2 + 6, 2 + 1]
    assert [*panels[2].bars] == ["teacher", "before", "12"]


def test_nothing_to_show_is_no_panel():
    assert all(figure.numbers([], []) == () for figure in RUN_FIGURES.values())
    off_the_plane = Run("jsd", None, None, [{"step": 1, "loss": 1.0}])
    assert all(figure.numbers([off_the_plane], []) == () for figure in RUN_FIGURES.values())


def test_all_are_drawn(tmp_path, monkeypatch):
    line = Curves("title", "x", "y", (Curve("a", (0.0, 1.0), (0.0, 1.0)),))
    monkeypatch.setattr("abkd.analysis.figures.FIGURES", {"toy": Figure(lambda: (line,), "one line")})
    files = draw_figures(tmp_path / "new" / "figures", runs())
    assert [file.name for file in files] == ["toy.png", *(f"{name}.png" for name in RUN_FIGURES)]
    assert all(file.read_bytes().startswith(PNG) for file in files)
    assert [file.name for file in draw_figures(tmp_path)] == ["toy.png"]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_a_place_for_each_panel(name):
    figure = FIGURES[name]
    if name != "toy":  # its fit is looked at in test_toy
        assert len(set(figure.layout) - {";", "."}) == len(figure.numbers())
    assert figure.caption and "\n" not in figure.caption
