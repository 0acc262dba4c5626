"""The folder of a search: new, or a search's own; nothing is left where the search does not begin."""

import pytest

from abkd import InputError
from abkd.recipe import read_recipe
from abkd.tune.folder import check_inputs, open_study
from abkd.tune.metrics import Metric
from abkd.tune.options import Search

SEARCH = Search(Metric("score", True))


@pytest.fixture
def recipe(recipe_file):
    return read_recipe(str(recipe_file))


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checking_leaves_nothing_behind(recipe, tmp_path):
    before = entries(tmp_path)
    assert len(check_inputs(recipe).train) == 8
    assert entries(tmp_path) == before


@pytest.mark.parametrize("is_there", [[], ["study.lock"], ["study.lock", "study.db", "trials", "new"]])
def test_a_folder_that_another_process_has_just_made_or_works_in_is_taken(recipe, tmp_path, is_there):
    (tmp_path / "run").mkdir()
    for name in is_there:
        (tmp_path / "run" / name).touch()
    check_inputs(recipe)
    assert entries(tmp_path / "run") == sorted(is_there)


def test_a_folder_of_anything_else_is_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").touch()
    with pytest.raises(InputError, match="exists and holds no search; give another with run_dir=PATH"):
        check_inputs(recipe)


def test_a_folder_made_for_a_study_that_cannot_be_opened_is_removed(recipe, tmp_path):
    with pytest.raises(InputError, match="cannot be opened"):
        open_study(recipe, SEARCH, "sqlite:////no/such/folder/x.db", None)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run/trials").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be opened"):
        open_study(recipe, SEARCH, "sqlite:////no/such/folder/x.db", None)
    assert (tmp_path / "run/trials").exists()


def test_the_study_is_the_folders_own_file_and_name_unless_others_are_given(recipe, tmp_path):
    with open_study(recipe, SEARCH, None, None) as study:
        assert study.name == "run" and (tmp_path / "run/study.db").exists()
