"""The kinds of teachers in a recipe: what each takes, how one takes another's place, what does not go together."""

import pytest

from abkd.config import Cached, InProcess, Mixture, Served
from abkd.errors import InputError
from abkd.recipe import parse_recipe, read_recipe

STUDENT = "student={kind: pretrained, path: student}"
SERVED = ["teacher.kind=served", "teacher.url=http://host:8000", "teacher.model=big", "teacher.tail=lump"]


def refused(*overrides):
    with pytest.raises(InputError) as caught:
        read_recipe("demo", overrides)
    return str(caught.value).splitlines()


def test_a_teacher_without_a_kind_is_in_process():
    assert read_recipe("demo").teacher == read_recipe("demo", ["teacher.kind=in_process"]).teacher
    assert isinstance(read_recipe("demo").teacher, InProcess)


def test_another_kind_takes_the_place_of_one_that_did_not_say_its_own(tmp_path):
    teacher = read_recipe("demo", [STUDENT, "teacher.path=cache", "teacher.kind=cached"]).teacher
    assert teacher == Cached(kind="cached", path="cache")
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nteacher: {kind: cached, path: cache}\nstudent: {kind: pretrained, path: s}\n")
    assert read_recipe(str(file)).teacher == Cached(kind="cached", path="cache")
    assert read_recipe(str(file), ["teacher.path=other", "teacher.tail=uniform"]).teacher.tail == "uniform"
    back = read_recipe(str(file), ["teacher={path: model}"])
    assert back.teacher == InProcess(path="model")


def test_a_served_teacher_has_defaults_but_for_the_tail():
    teacher = read_recipe("demo", [STUDENT, *SERVED]).teacher
    assert isinstance(teacher, Served) and (teacher.k, teacher.num_connections, teacher.api) == (20, 8, "auto")
    assert refused(STUDENT, *SERVED[:-1]) == ["teacher.tail: missing; add it to the recipe or the command line"]


def test_a_password_in_a_url_is_refused_and_not_repeated():
    (line,) = refused(STUDENT, *SERVED, "teacher.url=http://me:hunter2@host")
    assert "hunter2" not in line and line.startswith("teacher.url: ") and "ABKD_API_KEY" in line


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "http:// host"])
def test_what_is_no_url_is_refused(url):
    assert refused(STUDENT, *SERVED, f"teacher.url={url}")[0].startswith("teacher.url: is no http://HOST:PORT")


def test_a_mixture_holds_teachers_of_any_kind_and_comes_back_from_its_yaml():
    members = "[{path: a}, {kind: cached, path: b}, {kind: served, url: 'http://h', model: m, tail: uniform}]"
    recipe = read_recipe("demo", [STUDENT, "teacher.kind=mixture", f"teacher.teachers={members}"])
    assert isinstance(recipe.teacher, Mixture)
    assert [type(each) for each in recipe.teachers] == [InProcess, Cached, Served]
    assert parse_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "members, weights, message",
    [
        ("[{path: a}]", "[]", "teacher: teachers has 1 of them, and a mixture needs 2 or more"),
        ("[{path: a}, {path: b}]", "[1]", "teacher: weights has 1 numbers for 2 teachers; give one for each"),
        ("[{path: a}, {path: b}]", "[1, 0]", "teacher.weights.1: 0 is refused: input should be greater than 0"),
        ("[{path: a}, {kind: cached}]", "[]", "teacher.teachers.1.path: missing; add it to"),
        ("[{path: a}, {kind: mixture}]", "[]", "teacher.teachers.1.kind: 'mixture' is unknown; use one of 'in_"),
        ("[{path: a}, {path: b, dtyp: x}]", "[]", "teacher.teachers.1.dtyp: unknown key; did you mean 'dtype'?"),
        ("[{path: a}, {kind: cached, path: b, tail: lump}]", "[]", "teacher: tail=lump has no row to mix"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_mixture_names_its_place(members, weights, message):
    lines = refused(STUDENT, "teacher.kind=mixture", f"teacher.teachers={members}", f"teacher.weights={weights}")
    assert [line for line in lines if line.startswith(message)]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "student.kind=shrink needs a teacher to shrink, and teacher.kind=cached loads none; set teacher.path, "),
        ([STUDENT, "rollouts={kind: on_policy}"], "teacher.kind=cached knows what the teacher says of the data"),
    ],
)
def test_what_a_cache_cannot_do_is_refused(overrides, message):
    (line,) = refused("teacher.kind=cached", "teacher.path=c", *overrides)
    assert line.startswith(f"recipe: {message}")


def test_a_key_of_another_kind_says_of_which():
    (line,) = refused("teacher.tail=lump")
    assert line.startswith(
        "teacher.tail: unknown key; it is of teacher.kind=cached or served; known here are adapter, "
    )


def test_another_model_than_the_teacher_can_be_shrunk():
    recipe = read_recipe("demo", ["teacher.kind=cached", "teacher.path=c", "student.path=model"])
    assert recipe.student.kind == "shrink" and recipe.student.path == "model"
