from abkd.analysis.mass import RankMass
from abkd.analysis.plots import draw_comparison
from abkd.analysis.table import print_table

MASS = RankMass(("1", "2+"), (0.6, 0.4), (0.9, 0.1))


def test_the_figure_is_a_png_for_one_and_for_several_students(tmp_path):
    curve = [(0, 2.0), (10, 1.0)]
    draw_comparison({"forward KL": {"alpha-beta": curve}}, {"alpha-beta": MASS}, tmp_path / "one.png")
    students = {"forward KL": curve, "somebody": [(0, 1.0)]}
    draw_comparison({"a": students, "b": students}, {"before": MASS, "somebody": MASS}, tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_what_there_is(capsys):
    print_table({"teacher": {"forward_kl": 0.0, "token_agreement": 1.0}, "student": {"forward_kl": 1.23456}})
    text = capsys.readouterr().out
    assert "1.235" in text and "100.0%" in text
    assert "ROUGE" not in text
