"""A recipe out of a file and the command line: read, overridden, checked, each mistake in one line."""

import copy
import difflib
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from abkd.config import TASKS, Recipe
from abkd.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
_DEFAULT_KINDS = {"teacher": "in_process"}
"""Of sections that need not say theirs."""


def recipe_names() -> dict[str, str]:
    """Shipped recipes and pieces of recipes: name, with its folder for a piece -> the first line of the header.

    The demo comes first, then the recipes, then the pieces.
    """
    files = sorted(
        RECIPES.rglob("*.yaml"), key=lambda file: (len(file.relative_to(RECIPES).parts), file.stem != "demo", file)
    )
    return {
        file.relative_to(RECIPES).with_suffix("").as_posix(): file.read_text(encoding="utf-8")
        .split("\n", 1)[0]
        .lstrip("# ")
        for file in files
    }


def read_recipe(name_or_path: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name or any YAML file by path, with `key.sub=value` overrides, values read as YAML.

    `extends: OTHER` (or a list) in a file reads the other recipes first, by name or by a path relative to the file,
    and lays the file's own keys over them; `ONE+OTHER` for a name lays the second over the first. Setting a section's
    `kind` to another one starts that section afresh, in a file as on the command line, wherever it stands there.
    `tuned: {OTHER: {...}}` in a file holds keys that are laid over it too where OTHER is laid over that file.

    Raises:
        InputError: one line per mistake, each with the field, its value and what is allowed.
    """
    names = [name_or_path] if Path(name_or_path).expanduser().is_file() else name_or_path.split("+")
    content = _compose(names, Path(), ())
    content.pop("tuned", None)
    for override in sorted(overrides, key=lambda override: not override.partition("=")[0].endswith(".kind")):
        _apply_override(content, override)
    return parse_recipe(content)


def _compose(names: typing.Iterable[str], folder: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The content of several files, each over those before it, and after it what they have tuned for it."""
    content: dict[str, Any] = {}
    for name in names:
        _lay_over(content, _read(_find(name, folder), extended_by))
        _lay_over(content, copy.deepcopy(content.get("tuned", {}).get(name, {})))
    return content


def _find(name: str, folder: Path) -> Path:
    """The file of a shipped recipe, or the one at a path relative to `folder`."""
    own = RECIPES / f"{name}.yaml"
    file = own if own.is_file() and ".." not in name else folder / Path(name).expanduser()
    if not file.is_file():
        names = recipe_names()
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        shipped = ", ".join(name for name in names if "/" not in name)
        raise InputError(f"recipe: there is no shipped recipe or file {name!r}; {hint}shipped are {shipped}")
    return file


def _read(file: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file over that of the files it extends."""
    if file.resolve() in extended_by:
        raise InputError(f"extends: {file} extends itself, by way of {extended_by[-1]}; take one of them out")
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        place = f", line {where.line + 1}" if where else ""
        raise InputError(f"recipe: {file}{place} is not valid YAML: {_problem(error)}") from None
    if not isinstance(own, dict):
        raise InputError(f"recipe: {file} must hold sections such as teacher, student, data; it holds {own!r}")
    others = own.pop("extends", [])
    others = [others] if isinstance(others, str) else others
    if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
        raise InputError(f"extends: {others!r} in {file} is refused: give a recipe's name or path, or a list of them")
    tuned = own.get("tuned", {})
    if not isinstance(tuned, dict) or not all(isinstance(keys, dict) for keys in tuned.values()):
        raise InputError(f"tuned: {tuned!r} in {file} is refused: give sections for the name of another recipe")
    for name in tuned:
        _find(name, file.parent)
    content = _compose(others, file.parent, (*extended_by, file.resolve()))
    _lay_over(content, own)
    return content


def _lay_over(content: dict[str, Any], new: dict[str, Any]) -> None:
    """Sets the keys of `new`, section by section; a section of another kind takes the place of the old one."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            _start_afresh(key, content[key], value)
            _lay_over(content[key], value)
        else:
            content[key] = value


def _start_afresh(name: str, section: dict[str, Any], new: dict[str, Any]) -> None:
    """Empties a section that is about to become one of another kind."""
    if "kind" in new and section.get("kind", _DEFAULT_KINDS.get(name, new["kind"])) != new["kind"]:
        section.clear()


def parse_recipe(content: dict[str, Any]) -> Recipe:
    """The recipe that a mapping describes. Raises InputError as `read_recipe`."""
    task = content.get("task")
    if not isinstance(task, str) or task not in TASKS:
        found = "missing" if task is None else f"{task!r} is unknown"
        raise InputError(f"task: {found}; use one of {', '.join(map(repr, TASKS))}")
    try:
        return TASKS[task].model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(_explain(content, item, TASKS[task]) for item in error.errors())) from None


def _problem(error: Exception) -> str:
    """What is wrong with a file, in one line."""
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override: {override!r} is not key=value, as in training.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{key}: {text!r} is not a YAML value; quote it") from None
    section = content
    *parents, last = key.split(".")
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise InputError(f"{key}: {parent!r} is a single value, not a section")
    if last == "kind" and parents:
        _start_afresh(parents[-1], section, {last: value})
    section[last] = value if text else ""


def _explain(content: dict[str, Any], error: Any, recipe: type[Recipe]) -> str:
    """One line: field, value, what is allowed."""
    path, value, model = _walk(content, error["loc"], recipe)
    field = ".".join(path) or "recipe"
    if error["type"] == "extra_forbidden":
        names = sorted(_keys(model))
        close = difflib.get_close_matches(path[-1], names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        if others := _kinds_with(recipe, path):
            hint = f"it is of {path[0]}.kind={' or '.join(others)}; "
        return f"{field}: unknown key; {hint}known here are {', '.join(names)}"
    if error["type"] == "missing":
        return f"{field}: missing; add it to the recipe or the command line"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        found = f"{value['kind']!r} is unknown" if "kind" in value else "missing"
        name = next(key for key in reversed(path) if not key.isdigit())  # of the field, whatever its place in a list
        return f"{field}.kind: {found}; use one of {', '.join(map(repr, _kinds(model, name)))}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{field}: {value!r} is refused: it is a section and holds keys, as in {field}.KEY=VALUE"
    if error["type"] == "value_error":
        return f"{field}: {message}"
    return f"{field}: {value!r} is refused: {message[0].lower()}{message[1:]}"


def _kinds_with(recipe: type[Recipe], path: list[str]) -> list[str]:
    """The kinds of a recipe's section that have the key; none for a key that is not in a section of several kinds."""
    if len(path) != 2 or path[0] not in recipe.model_fields:
        return []
    members = [each for each in _members(recipe.model_fields[path[0]].annotation) if path[1] in _keys(each)]
    return [
        kind
        for each in members
        if "kind" in each.model_fields
        for kind in typing.get_args(each.model_fields["kind"].annotation)
    ]


def _kinds(model: Any, field: str) -> list[str]:
    """The kinds that a field of several sections can be of."""
    members = _members(model.model_fields[field].annotation)
    return [kind for member in members for kind in typing.get_args(member.model_fields["kind"].annotation)]


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, out of unions, annotations and None."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    return [member for part in typing.get_args(annotation) for member in _members(part)]


def _keys(model: Any) -> list[str]:
    """The keys of a section as a recipe writes them."""
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _walk(content: Any, loc: tuple, recipe: type[Recipe]) -> tuple[list[str], Any, type[BaseModel] | None]:
    """(the keys as the user wrote them, the value there, the model that holds the last key)."""
    path: list[str] = []
    value, model, holder = content, recipe, recipe
    for part in loc:
        if isinstance(value, list | tuple) and isinstance(part, int):
            name, value = path[-1], value[part]
            path.append(str(part))
            model = _model_of(holder, name, value)
            continue
        is_written = isinstance(value, dict) and part in value
        if not is_written and part not in _keys(model):
            continue  # the tag of a union
        path.append(str(part))
        value = value.get(part) if isinstance(value, dict) else value
        holder, model = model, _model_of(model, part, value)
    return path, value, holder


def _model_of(model: Any, name: Any, value: Any) -> Any:
    """The model of field `name`: for a union the member whose `kind` the value names."""
    if model is None or name not in model.model_fields:
        return model  # a name that the user gives, of one of several alike sections
    members = _members(model.model_fields[name].annotation)
    for member in members:
        kind = member.model_fields.get("kind")
        named = (
            isinstance(value, dict)
            and kind is not None
            and value.get("kind", kind.default) in typing.get_args(kind.annotation)
        )
        if kind is None or len(members) == 1 or named:
            return member
    return None
