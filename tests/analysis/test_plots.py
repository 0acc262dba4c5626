from matplotlib import image

from abkd.analysis.mass import RankMass
from abkd.analysis.panels import Bars, Curve, Curves, Plane, Point, Surface
from abkd.analysis.plots import OTHER_STYLES, STYLES, _styles, draw, draw_comparison
from abkd.analysis.table import print_table

MASS = RankMass(("1", "2+"), (0.6, 0.4), (0.9, 0.1))
PNG = b"\x89PNG"


def test_the_figure_is_a_png_for_one_and_for_several_students(tmp_path):
    curve = [(0, 2.0), (10, 1.0)]
    draw_comparison({"forward KL": {"alpha-beta": curve}}, {"alpha-beta": MASS}, tmp_path / "one.png")
    students = {"forward KL": curve, "somebody": [(0, 1.0)]}
    draw_comparison({"a": students, "b": students}, {"before": MASS, "somebody": MASS}, tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def curves(*labels, **options):
    return Curves("t", "x", "y", tuple(Curve(label, (1.0, 2.0), (1.0, 2.0)) for label in labels), **options)


def test_every_kind_of_panel_is_drawn(tmp_path):
    steps = Curve("teacher", (0.0, 1.0), (0.5, 0.5))
    spread = Curves("t", "x", "y", (Curve("a", (0.0, 1.0), (1.0, 2.0), (0.1, 0.0)),), y_range=(0.0, 3.0))
    points = [Point(0.0, 0.0, 1.0, 1), Point(1.0, 0.0, 2.0, 1), Point(0.0, 1.0, 3.0, 2)]
    surface = Surface("t", "nats", tuple(points), points[0])
    on_a_line = Surface("t", "nats", (points[1], Point(0.5, 0.5, 2.0, 1), points[2]), None)
    many = Plane(tuple((f"run {index}", 0.1 * index, 0.5) for index in range(9)))
    panels = (
        curves("a", behind=steps, log_x=True, log_y=True),
        spread,
        Bars("t", "x", "y", ("1", "2"), {"a": (1.0, -1.0)}),
    )
    panels += (surface, on_a_line, Plane((("mine", 0.2, 0.7),)), many)
    assert draw(panels, tmp_path / "all.png") == tmp_path / "all.png"
    height, width, _ = image.imread(tmp_path / "all.png").shape
    assert width / height > 1.9  # two rows of four


def test_a_layout_gives_each_panel_its_place(tmp_path):
    wordy = curves(*map(str, range(7)))
    for panel, layout, shape in ((curves("a"), "", 2.3), (curves("a"), "a;b", 0.6), (wordy, "", 4.4)):
        draw((panel, curves("b")), tmp_path / "two.png", layout)
        height, width, _ = image.imread(tmp_path / "two.png").shape
        assert abs(width / height - shape) < 0.1


def test_a_label_looks_the_same_in_all_panels_and_unlike_its_neighbours():
    panels = (curves("forward KL (1, 0)", "mine"), curves("yours", "mine"), curves("α-β (0.2, 0.7)", "α-β (0.2, 0.4)"))
    styles = _styles(panels)
    assert styles["forward KL (1, 0)"] == STYLES["forward KL"]
    assert styles["α-β (0.2, 0.7)"] == STYLES["α-β"]
    for panel in panels:
        assert len({styles[curve.label] for curve in panel.curves}) == len(panel.curves)
        assert len({styles[curve.label][0] for curve in panel.curves}) == len(panel.curves)
    many = _styles((curves(*map(str, range(2 * len(OTHER_STYLES)))),))
    assert len(set(many.values())) == len(OTHER_STYLES)


def test_the_table_shows_what_there_is(capsys):
    print_table({"teacher": {"forward_kl": 0.0, "token_agreement": 1.0}, "student": {"forward_kl": 1.23456}})
    text = capsys.readouterr().out
    assert "1.235" in text and "100.0%" in text
    assert "ROUGE" not in text
