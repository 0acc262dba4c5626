"""Ranges, lines and grids of the plane that is searched."""

import pytest

from abkd import InputError
from abkd.tune.plane import Line, Plane, Range


def test_the_papers_grid_is_its_scripts_loops():
    expected = [
        (tenth / 10, (total - tenth) / 10) for total in (8, 9, 10, 11) for tenth in range(1, 11) if tenth <= total
    ]
    assert Plane().paper_grid() == expected
    assert len(expected) == 8 + 9 + 10 + 10 and (0.2, 0.7) in expected and (0.8, 0.3) in expected


def test_the_papers_grid_keeps_to_ranges_and_line():
    assert Plane(line=Line("alpha+beta", 1.0)).paper_grid() == [(k / 10, (10 - k) / 10) for k in range(1, 11)]
    assert Plane(line=Line("alpha", 1.0)).paper_grid() == [(1.0, 0.0), (1.0, 0.1)]
    assert Plane(line=Line("alpha-beta", 0.0)).paper_grid() == [(0.4, 0.4), (0.5, 0.5)]
    assert Plane(beta=Range(-1, 1)).paper_grid() == Plane().paper_grid()
    assert all(a <= 0.3 and b <= 0.6 for a, b in Plane(Range(0, 0.3), Range(0, 0.6)).paper_grid())
    with pytest.raises(InputError, match=r"no point of the paper's grid is on alpha\+beta=0.5; use --sampler grid"):
        Plane(line=Line("alpha+beta", 0.5)).paper_grid()
    with pytest.raises(InputError, match="is in alpha 2 to 3 and beta 0 to 1"):
        Plane(alpha=Range(2, 3)).paper_grid()


def test_a_grid_has_every_combination_alpha_first():
    plane = Plane(Range.parse("0:1:0.5", "--alpha"), Range.parse("0.1:0.3:0.1", "--beta"))
    assert plane.grid() == [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.1, 0.2, 0.3)]


def test_the_coordinates_of_a_grid_are_short_numbers():
    assert Range(0, 1, 0.1).values() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert Range(-0.3, 0.3, 0.25).values() == [-0.3, -0.05, 0.2]


@pytest.mark.parametrize(
    "text, free, on_it",
    [
        ("alpha+beta=1", {"alpha": (0, 1)}, lambda a, b: a + b == pytest.approx(1)),
        ("alpha+beta=1.4", {"alpha": (0.4, 1)}, lambda a, b: a + b == pytest.approx(1.4)),
        ("alpha+beta=.5", {"alpha": (0, 0.5)}, lambda a, b: a + b == pytest.approx(0.5)),
        ("alpha - beta = 0.25", {"alpha": (0.25, 1)}, lambda a, b: a - b == pytest.approx(0.25)),
        ("alpha=1", {"beta": (0, 1)}, lambda a, b: a == 1),
        ("beta=0.7", {"alpha": (0, 1)}, lambda a, b: b == 0.7),
    ],
)
def test_a_line_leaves_one_coordinate_free(text, free, on_it):
    plane = Plane(line=Line.parse(text))
    assert {name: (range_.low, range_.high) for name, range_ in plane.free.items()} == free
    ((name, (low, high)),) = free.items()
    for drawn in (low, low + 0.37 * (high - low), high):
        alpha, beta = plane.point({name: drawn})
        assert on_it(alpha, beta) and -1e-9 <= alpha <= 1 + 1e-9 and -1e-9 <= beta <= 1 + 1e-9
        assert plane.holds(alpha, beta) and plane.drawn(alpha, beta) == {name: pytest.approx(drawn)}
    assert not plane.holds(0.123, 0.456)
    assert all(on_it(*point) for point in plane.grid())


@pytest.mark.parametrize("text", ["alpha+beta=2.5", "alpha=1.2", "beta=-0.1", "alpha-beta=3"])
def test_a_line_that_misses_the_bounds_is_refused(text):
    with pytest.raises(InputError, match="misses alpha 0 to 1 and beta 0 to 1; widen --alpha and --beta"):
        Plane(line=Line.parse(text))


@pytest.mark.parametrize("text", ["gamma=1", "alpha", "alpha=", "alpha=nan", "2*alpha+beta=1", "alpha=beta"])
def test_a_line_of_another_form_is_refused(text):
    with pytest.raises(InputError, match="is refused: give one of alpha=NUMBER, beta=NUMBER, alpha"):
        Line.parse(text)


@pytest.mark.parametrize("text", ["", "0", "0:1:2:3", "a:b", "0:inf", "nan:1"])
def test_a_range_of_another_form_is_refused(text):
    with pytest.raises(InputError, match=r"^--beta: .* is refused: give LOW:HIGH or LOW:HIGH:STEP"):
        Range.parse(text, "--beta")


@pytest.mark.parametrize("text", ["1:0", "0.5:0.5", "0:1:0", "0:1:-0.1"])
def test_an_empty_range_is_refused(text):
    with pytest.raises(InputError, match="LOW must be below HIGH, and STEP above 0"):
        Range.parse(text, "--alpha")
