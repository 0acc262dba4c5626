"""What a recipe names, found, read and checked in under a second: before torch is imported, before any long work."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from abkd.config import HOW_ASKED, Cached, ImageRecipe, InProcess, LanguageRecipe, Mixture, Pretrained, Recipe, Served
from abkd.data.instructions import Instruction, hold_out, read_instructions
from abkd.errors import InputError
from abkd.image_inputs import ImageInputs, check_image_inputs
from abkd.models.adapters import find_adapter
from abkd.models.pretrained import find_model
from abkd.paths import find_path
from abkd.ranks import is_first, num_ranks
from abkd.rundir import ENVIRONMENT, RECIPE, RunDir
from abkd.teachers.cache.manifest import MANIFEST, Manifest


class Inputs(NamedTuple):
    train: list[Instruction]
    validation: list[Instruction]
    sets: dict[str, list[Instruction]]
    """Name -> rows of `evaluation.sets`."""
    models: list[str]
    """What will be loaded, and whether it is here or on a hub."""

    @property
    def summary(self) -> str:
        return f"data: {len(self.train):,} rows to train on, {len(self.validation):,} to validate with; all well-formed"


def check_inputs(recipe: Recipe) -> Inputs | ImageInputs:
    """Reads every row of data, looks at every model's headers, and at the run's folder.

    Raises:
        InputError: something is missing, torn, malformed, or would be written over.
    """
    run_dir = RunDir(Path(recipe.run_dir))
    if recipe.resume:
        _check_resumable(recipe, run_dir)
    elif is_first():
        run_dir.check_new()
    for package in recipe.training.report_to:
        if find_spec(package) is None:
            raise InputError(f"training.report_to: {package} is not installed; pip install {package}, or leave it out")
    match recipe:
        case LanguageRecipe():
            return check_language_inputs(recipe)
        case ImageRecipe():
            return check_image_inputs(recipe)
    raise AssertionError(recipe.task)


def check_language_inputs(recipe: LanguageRecipe) -> Inputs:
    _check_packages(recipe)
    named, adapters, models = {}, {}, []
    for field, teacher in named_teachers(recipe).items():
        match teacher:
            case InProcess(path=path, adapter=adapter):
                _check_no_cache(path, f"{field}.path", f"{field}.kind")
                named[f"{field}.path"], adapters[f"{field}.adapter"] = path, adapter
            case Cached():
                models.append(_check_cache(recipe, teacher, field))
            case Served(url=url, model=model):
                _check_served(recipe, field)
                models.append(f"{field}: {model} at {url}")
                if teacher.tokenizer:
                    named[f"{field}.tokenizer"] = teacher.tokenizer
    if recipe.student.path:
        named["student.path"] = recipe.student.path
    if isinstance(recipe.student, Pretrained):
        adapters["student.adapter"] = recipe.student.adapter
    for field, path in adapters.items():
        if path:
            find_adapter(path, field)
    for field, path in named.items():
        found = find_model(path, field)
        models.append(f"{field}: {path} ({found if found else 'from the model hub'})")
    data = recipe.data
    held_out = 0 if data.validation else data.num_held_out
    options: Any = {"subset": data.subset, "stream_rows": data.stream and data.max_train_rows + held_out}
    train = read_instructions(data.train, "data.train", split=data.split, **options)
    if recipe.data.validation:
        options = {"subset": data.subset if data.validation == data.train else "", "split": data.validation_split}
        options["stream_rows"] = data.stream and data.max_validation_rows
        validation = read_instructions(data.validation, "data.validation", **options)
    else:
        train, validation = hold_out(train, recipe.data.num_held_out, "data.num_held_out")
    train = train[: recipe.data.max_train_rows or None]
    if recipe.data.corpus and not (corpus := find_path(recipe.data.corpus, "data.corpus")).is_file():
        raise InputError(f"data.corpus: there is no file {str(corpus)!r}; give a text or JSONL file")
    sets = {}
    for name, section in recipe.evaluation.sets.items():
        field = f"evaluation.sets.{name}.path"
        sets[name] = read_instructions(section.path, field, split=section.split)[: section.max_rows or None]
    return Inputs(train, validation[: recipe.data.max_validation_rows or None], sets, models)


def named_teachers(recipe: LanguageRecipe) -> dict[str, InProcess | Cached | Served]:
    """Each teacher under the field that holds its section."""
    if isinstance(recipe.teacher, Mixture):
        return {f"teacher.teachers.{index}": each for index, each in enumerate(recipe.teachers)}
    return {"teacher": recipe.teacher} if recipe.teacher else {}


def _check_no_cache(path: str, field: str, kind: str) -> None:
    folder = find_path(path, field)
    if (folder / MANIFEST).is_file() and not (folder / "config.json").exists():
        raise InputError(f"{field}: {path!r} is a cache and not a model; set {kind}=cached")


def _check_served(recipe: LanguageRecipe, field: str) -> None:
    """A server gives some classes of each token at temperature 1; a mixture makes rows of them."""
    if isinstance(recipe.teacher, Mixture) or recipe.objective.kd_weight == 0:
        return
    _refuse_calibration(recipe, f"{field}.kind=served gives some classes of each", "use objective.divergence")
    name, asked = teacher_temperature(recipe)
    if asked != 1:
        raise InputError(
            f"{field}.kind=served gives rows at temperature 1, and here is objective.{name}={asked:g}; set "
            "objective.teacher_temperature=1"
        )


def _refuse_calibration(recipe: LanguageRecipe, found: str, way_out: str) -> None:
    """Of a teacher that is known at some classes of each token, as `found` says."""
    if (calibration := recipe.objective.calibration) is not None:
        raise InputError(
            f"objective.calibration.kind={calibration.kind} compares whole rows of logits, and {found}; {way_out}"
        )


def teacher_temperature(recipe: LanguageRecipe) -> tuple[str, float]:
    """The option that says it, and its value."""
    objective = recipe.objective
    if objective.teacher_temperature is None:
        return "temperature", objective.temperature
    return "teacher_temperature", objective.teacher_temperature


def _check_cache(recipe: LanguageRecipe, section: Cached, field: str) -> str:
    """The cache must be whole, of texts, and its targets of a kind that the objective can use."""
    folder = find_path(section.path, f"{field}.path")
    manifest = Manifest.read_whole(folder, f"{field}.path", "language_model")
    manifest.check_tail(section.tail, f"{field}.tail")
    if manifest.is_reduced:
        found = f"{field}.path={section.path!r} holds {manifest.described}"
        _refuse_calibration(recipe, found, "use objective.divergence, or cache hidden states")
    if manifest.is_reduced and recipe.objective.kd_weight > 0:
        _check_reduced(recipe, manifest, f"{field}.path={section.path!r}")
    return f"{field}: {manifest.described}, {manifest.num_examples:,} examples, {manifest.num_tokens:,} tokens"


def _check_reduced(recipe: LanguageRecipe, manifest: Manifest, field: str) -> None:
    """Top-k targets are at one temperature; a mixture makes rows of them, which a sample has not."""
    made = manifest.targets["temperature"]
    if isinstance(recipe.teacher, Mixture):
        if manifest.targets["kind"] == "sampled" or made != 1:
            raise InputError(
                f"{field}: the cache holds {manifest.described} at temperature {made:g}, and a mixture takes rows at "
                "temperature 1; cache them with --targets top_k --temperature 1, or hidden states"
            )
        return
    name, asked = teacher_temperature(recipe)
    if asked != made:
        raise InputError(
            f"{field}: the cache holds {manifest.described} at temperature {made:g}, and here is objective.{name}="
            f"{asked:g}; set objective.teacher_temperature={made:g}, or cache them with --temperature {asked:g}"
        )


def _check_packages(recipe: LanguageRecipe) -> None:
    """What only some recipes need, and an installation may be without."""
    student = recipe.student
    loaded = [teacher for teacher in recipe.teachers if isinstance(teacher, InProcess)]
    adapter = student.adapter if isinstance(student, Pretrained) else ""
    needed = {
        ("peft", "lora", "student.lora"): student.lora is not None,
        ("peft", "lora", "student.adapter"): bool(adapter),
        ("peft", "lora", "teacher.adapter"): any(teacher.adapter for teacher in loaded),
        ("bitsandbytes", "quantization", "teacher.quantization"): any(
            teacher.quantization != "none" for teacher in loaded
        ),
        ("deepspeed", "deepspeed", "training.engine"): recipe.training.engine == "zero2",
    }
    for (package, extra, field), is_needed in needed.items():
        if is_needed and find_spec(package) is None:
            raise InputError(f"{field}: needs the package {package}; install it with pip install 'abkd[{extra}]'")
    if getattr(recipe.rollouts, "engine", "") == "vllm":
        check_vllm("rollouts.engine")


def check_vllm(field: str) -> None:
    """vLLM must be there, and this process alone."""
    if num_ranks() > 1:
        raise InputError(f"{field}: vllm samples in one process, and these are {num_ranks()}; use transformers")
    if find_spec("vllm") is None:
        raise InputError(f"{field}: needs the package vllm; install it with pip install 'abkd[vllm]'")


def _what_counts(text: str) -> str:
    """A recipe without what may change before it is resumed: where a teacher's server is, and how it is asked."""
    content = yaml.safe_load(text)
    teacher = content["teacher"] or {}
    for section in [teacher, *teacher.get("teachers", [])]:
        if section.get("kind") == "served":
            for name in HOW_ASKED:
                section.pop(name, None)
    return yaml.safe_dump(content, sort_keys=False)


def _check_resumable(recipe: Recipe, run_dir: RunDir) -> None:
    """The recipe must be that of the run, but for `resume` itself, and so must the number of processes."""
    file = run_dir.path / RECIPE
    if not file.exists():
        raise InputError(f"resume: {str(run_dir.path)!r} holds no run to go on with; start it without resume=true")
    asked = _what_counts(recipe.model_copy(update={"resume": False}).to_yaml())
    started = _what_counts(file.read_text(encoding="utf-8"))
    if asked != started:
        pairs = zip(asked.splitlines(), started.splitlines(), strict=False)
        now, then = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("another recipe", "its own"))
        raise InputError(
            f"resume: {file} was started with {then!r}, not {now!r}; resume with: abkd train {file} resume=true"
        )
    processes = (run_dir.read_json(ENVIRONMENT) or {}).get("num_processes", 1)
    if processes != num_ranks() and run_dir.read_results() is None:
        raise InputError(
            f"resume: {str(run_dir.path)!r} was started with {processes} processes, this is {num_ranks()}, "
            f"which would change its steps; start as many"
        )
