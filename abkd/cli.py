"""The command line. Exit codes: 0 done, 2 the user's mistake, 1 ours, 130 interrupted.

Only config and errors are imported at the top: `abkd --help` and a recipe's mistakes never wait for torch.
"""

import argparse
import errno
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abkd import ranks
from abkd.caching import options as cache_options
from abkd.config import ImageRecipe, InProcess, LanguageRecipe, Recipe
from abkd.errors import InputError
from abkd.recipe import RECIPES, parse_recipe, read_recipe, recipe_names
from abkd.rundir import RECIPE, RunDir
from abkd.tune import options as tune_options

QUICK = (
    "data.max_train_rows=2",
    "data.max_validation_rows=2",
    "training.num_steps=2",
    "training.batch_size=1",
    "training.warmup_steps=0",
    "training.validate_every=0",
    "evaluation.num_generated=1",
    "evaluation.max_new_tokens=12",
)
"""What `abkd demo --quick` changes."""
_RECIPE_HELP = "a shipped recipe's name or a YAML file; ONE+OTHER lays the second over the first"
DONE, USERS_MISTAKE, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    options = _parse(arguments)
    try:
        code = options.run(options)
        ranks.leave()
        return code
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _refuse(f"the disk is full ({error}); free some, then go on with resume=true")
    except KeyboardInterrupt:
        if ranks.is_first():
            print("\nabkd: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        if ranks.others_refused():  # it broke off what the ranks do together
            return USERS_MISTAKE
        raise


def _refuse(message: str) -> int:
    """Said by one rank alone."""
    if ranks.may_refuse():
        for line in message.splitlines():
            print(f"abkd: {line}", file=sys.stderr)
    return USERS_MISTAKE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse ends the list of overrides at the first option; those after it are taken up here."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="abkd", description="Distil models with the alpha-beta-divergence.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    def add_recipe(command: argparse.ArgumentParser) -> None:
        command.add_argument("recipe", help=_RECIPE_HELP)
        add_overrides(command)

    def add_overrides(command: argparse.ArgumentParser) -> None:
        command.add_argument("overrides", nargs="*", metavar="key=value", help="as in training.learning_rate=1e-4")

    add_recipe(add("train", _train, "train a student as a recipe says, and measure it before and after"))
    add_recipe(
        add(
            "check",
            _check,
            "check a recipe, its models, every row of its data and the memory it needs, without running it",
        )
    )
    evaluate = add("eval", _eval, "measure runs' students, or models, beside their teacher and the student before")
    evaluate.add_argument("targets", metavar="RUN_OR_MODEL", nargs="+", help="folders of runs or of models, or hub ids")
    evaluate.add_argument("--recipe", help="where a target is a model: the recipe that names teacher and data")
    evaluate.add_argument("--json", action="store_true", help="print the measures as JSON, answers included")
    evaluate.set_defaults(overrides=[])
    generate = add("generate", _generate, "write the teacher's answers to a recipe's training prompts as data (SeqKD)")
    generate.add_argument("recipe", help=_RECIPE_HELP)
    generate.add_argument("--output", required=True, metavar="FILE.jsonl", help="go on with it if it is there")
    generate.add_argument("--max-new-tokens", type=_count, default=256, help="an answer that does not end is left out")
    generate.add_argument("--temperature", type=_non_negative, default=1.0, help="0 decodes greedily")
    generate.add_argument("--top-p", type=_share, default=1.0, help="draw from the most probable tokens of this mass")
    generate.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="what samples")
    generate.add_argument("--vllm-memory", type=_share, default=0.8, help="share of the GPU's memory for vLLM")
    generate.add_argument("--batch-size", type=_count, default=16)
    generate.add_argument("--seed", type=int, default=0)
    add_overrides(generate)
    cache = add("cache", _cache, "write the teacher's targets down; or verify a cache, or say what it is")
    cache.add_argument("recipe", help=f"{_RECIPE_HELP}; or verify FOLDER, or info FOLDER")
    cache_options.add_arguments(cache)
    add_overrides(cache)
    report = add("report", _report, "write one HTML file about runs: results, curves, the plane, answers, cost")
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs, finished or not")
    report.add_argument("--output", metavar="FILE.html", type=Path, default=Path("report.html"))
    report.add_argument("--metric", help="what colours the plane, as forward_kl; else ROUGE-L, top-1 or agreement")
    tune = add("tune", _tune, "search for the alpha and beta of a recipe, and say which points differ from the best")
    tune.add_argument("recipe", help=_RECIPE_HELP)
    tune_options.add_arguments(tune)
    add_overrides(tune)
    recipes = add("recipes", _recipes, "list the shipped recipes, or print one")
    recipes.add_argument("name", nargs="?", help="print this recipe")
    advise = add(
        "advise", _advise, "look at teacher and student without training, and propose (alpha, beta) to start from"
    )
    advise.add_argument("recipe", help=_RECIPE_HELP)
    advise.add_argument("--examples", type=_count, default=200, help="training examples looked at")
    advise.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_overrides(advise)
    explore = add("explore", _explore, "a page for learning the plane: drag (alpha, beta) and see what it does")
    explore.add_argument("recipe", nargs="?", help=f"rows of its teacher and student too; {_RECIPE_HELP}")
    explore.add_argument("--port", type=int, default=0, help="on this machine alone; 0 takes a free one")
    add_overrides(explore)
    figures = add("figures", _figures, "draw the paper's figures from our own numbers, and those of runs and searches")
    figures.add_argument("runs", metavar="RUN", nargs="*", help="folders of runs, for curves, surfaces, sensitivities")
    figures.add_argument("--trials", metavar="tune.json", help="of a search, for the surface over (alpha, beta)")
    figures.add_argument("--output", metavar="FOLDER", default="figures", help="gets NAME.png; default: figures")
    demo = add("demo", _demo, "distil a real small language model under three divergences and compare them")
    demo.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    add_overrides(demo)
    return parser


def _train(options: argparse.Namespace) -> int:
    recipe = read_recipe(options.recipe, options.overrides)
    inputs = _check_together(recipe)
    _say("loading torch and transformers")
    _quieten_libraries()
    from abkd.analysis.table import print_table
    from abkd.run import train

    results = train(recipe, inputs, _say)
    if results is None:
        return _interrupted(recipe.run_dir)
    if ranks.is_first():
        print_table({name: results[name] for name in ("teacher", "before", "after") if name in results})
    run_dir = RunDir(Path(recipe.run_dir))
    _say(f"the student is in {run_dir.student}, all figures are in {run_dir.path}")
    return DONE


def _check_together(recipe: Recipe) -> Any:
    """The inputs, checked on every rank of the launch, after the launch itself."""
    from abkd.engine import check_launcher
    from abkd.inputs import check_inputs

    check_launcher(recipe.training)
    ranks.join(on_cpu=recipe.training.device == "cpu")
    return ranks.on_all(lambda: check_inputs(recipe))


def _check(options: argparse.Namespace) -> int:
    recipe = read_recipe(options.recipe, options.overrides)
    from abkd.inputs import check_inputs

    inputs = check_inputs(recipe)
    print(recipe.to_yaml(), end="")
    for line in (*inputs.models, inputs.summary):
        _say(line)
    if not isinstance(recipe, LanguageRecipe):
        _say("the recipe is valid; weights are compared with their networks when they are loaded")
        return DONE
    _say("the recipe is valid; prompt lengths and vocabularies are checked when the tokenizer is loaded")
    _say("loading torch and transformers, for the memory that a step needs")
    _quieten_libraries()
    from abkd.fit import say_memory

    say_memory(recipe, _say)
    return DONE


def _eval(options: argparse.Namespace) -> int:
    options.overrides += [target for target in options.targets if "=" in target and not Path(target).exists()]
    targets = [target for target in options.targets if target not in options.overrides]
    found = {name: _target_of(name, options.recipe, options.overrides) for name in targets}
    if not found:
        raise InputError("target: there is none; give the folder of a run, or a model with --recipe RECIPE")
    _check_comparable({name: recipe for name, (recipe, *_) in found.items()})
    inputs = [_check_together(recipe) for recipe, *_ in found.values()]
    say = _say_aside if options.json else _say
    say("loading torch and transformers")
    _quieten_libraries()
    from abkd.analysis.table import print_table
    from abkd.evaluate import Target, evaluate

    measured = evaluate({name: Target(*each) for name, each in found.items()}, inputs[0], say)
    if not ranks.is_first():
        return DONE
    if options.json:
        print(json.dumps(measured, indent=2))
    else:
        print_table(measured)
    return DONE


def _target_of(name: str, recipe_name: str | None, overrides: Sequence[str]) -> tuple[Recipe, Recipe, Path | None]:
    """(the recipe whose student is the run's or the model, that of the student before, the run's folder)."""
    run_dir = RunDir(Path(name))
    student, folder = name, None
    if (run_dir.path / RECIPE).exists():
        if not run_dir.student.exists():
            raise InputError(f"target: {name!r} has no student yet; finish it with resume=true")
        recipe_name, student, folder = recipe_name or str(run_dir.path / RECIPE), str(run_dir.student), run_dir.path
    elif recipe_name is None:
        raise InputError(f"target: {name!r} is no run; for a model name teacher and data with --recipe RECIPE")
    before = read_recipe(recipe_name, overrides)
    content = before.to_dict()
    changes = {"student": _as_student(before.task, content["student"], student), "resume": False, "run_dir": "-"}
    return parse_recipe(content | changes), before, folder


def _check_comparable(recipes: dict[str, Recipe]) -> None:
    """Measures stand beside each other only for one teacher, one data set, one protocol."""
    (first, reference), *others = recipes.items()
    for name, recipe in others:
        here, there = recipe.to_dict(), reference.to_dict()
        for section in ("teacher", "data", "evaluation"):
            if here[section] != there[section]:
                keys = here[section] or there[section]
                field = next(key for key in keys if (here[section] or {}).get(key) != (there[section] or {}).get(key))
                values = [(each[section] or {}).get(field) for each in (here, there)]
                raise InputError(
                    f"target: {name!r} has {section}.{field}={values[0]!r} and {first!r} has {values[1]!r}; "
                    f"measure them apart, or set {section}.{field} for both"
                )


def _generate(options: argparse.Namespace) -> int:
    _one_process("generate")
    recipe = _language_recipe("generate", options)
    if not isinstance(recipe.teacher, InProcess):
        found = "there is none" if recipe.teacher is None else f"kind={recipe.teacher.kind} loads none"
        raise InputError(f"teacher: {found} to write answers; set teacher.kind=in_process teacher.path=PATH")
    from abkd.inputs import check_language_inputs, check_vllm

    memory = options.vllm_memory if options.engine == "vllm" else None
    if memory is not None:
        check_vllm("--engine")
        if recipe.teacher.quantization != "none":
            raise InputError(
                f"teacher.quantization={recipe.teacher.quantization} is not for vLLM; set teacher.quantization=none "
                "and teacher.dtype=bfloat16, or leave out --engine vllm"
            )
    recipe = recipe.model_copy(update={"run_dir": "-", "resume": False})
    inputs = check_language_inputs(recipe)
    _say("loading torch and transformers")
    _quieten_libraries()
    from abkd.answers import write_answers
    from abkd.generation import Sampling

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    how: dict[str, Any] = {"batch_size": options.batch_size, "seed": options.seed, "vllm_memory": memory}
    write_answers(recipe, inputs, Path(options.output), sampling, **how, say=_say)
    return DONE


def _tune(options: argparse.Namespace) -> int:
    _one_process("tune")
    recipe = read_recipe(options.recipe, options.overrides).model_copy(update={"resume": False})
    search = tune_options.read_search(options, recipe)
    from abkd.tune.folder import check_inputs, open_study

    inputs = check_inputs(recipe)
    with open_study(recipe, search, options.storage, options.study) as study:
        _say("loading torch and transformers")
        _quieten_libraries()
        from abkd.tune.runs import Runs
        from abkd.tune.search import tune

        finished = tune(recipe, study, Runs(recipe, inputs, _say), _say, take_over=options.take_over)
    if not finished:
        _say("stopped; the same command goes on")
        return INTERRUPTED
    _picture_search(Path(recipe.run_dir))
    return DONE


def _picture_search(folder: Path) -> None:
    """The report over all trials, and the surface over (alpha, beta)."""
    from abkd.analysis.report import REPORT, report_after
    from abkd.run_figures import make_figures
    from abkd.tune.search import TUNE

    trials = sorted(run for run in (folder / "trials").iterdir() if (run / RECIPE).exists())
    report_after(trials, folder / REPORT, _say)
    make_figures(folder / "figures", trials=folder / TUNE)
    _say(f"the surface over (alpha, beta) is in {folder / 'figures'}")


def _language_recipe(command: str, options: argparse.Namespace) -> LanguageRecipe:
    recipe = read_recipe(options.recipe, options.overrides)
    if not isinstance(recipe, LanguageRecipe):
        raise InputError(f"{command}: is for language models, and the recipe's task is {recipe.task}")
    return recipe


def _as_student(task: str, section: dict[str, Any], path: str) -> dict[str, Any]:
    """The student's section for a trained one at `path`: a model, or an adapter for the model of `section`."""
    if task == "image_classification":
        if section["kind"] == "clip":
            return section | {"prompts": path}
        return section | {"path": path, "new_head": False} | ({"pretrained": False} if "pretrained" in section else {})
    if (Path(path) / "adapter_config.json").exists() and not (Path(path) / "config.json").exists():
        return {"kind": "pretrained", "path": section.get("path", path), "adapter": path}
    return {"kind": "pretrained", "path": path}


def _report(options: argparse.Namespace) -> int:
    from abkd.analysis.report import write_report

    write_report(options.runs, options.output, metric=options.metric)
    _say(f"the report is in {options.output}")
    return DONE


def _cache(options: argparse.Namespace) -> int:
    _one_process("cache")
    if options.recipe in ("verify", "info"):
        cache_options.refuse_any(options, f"cache {options.recipe}")
        return _look_at_cache(options.recipe, options.overrides)
    wanted = cache_options.options_of(options)
    recipe = read_recipe(options.recipe, options.overrides).model_copy(update={"run_dir": "-", "resume": False})
    if not options.output:
        raise InputError("--output: missing; give the folder of the cache")
    from abkd.caching.check import check

    folder = Path(options.output)
    inputs = check(recipe, wanted, folder)
    _say("loading torch and transformers")
    _quieten_libraries()
    if isinstance(recipe, LanguageRecipe):
        from abkd.caching.texts import cache_texts

        cache_texts(recipe, inputs, wanted, folder, _say)
    elif isinstance(recipe, ImageRecipe):
        from abkd.caching.pictures import cache_pictures

        cache_pictures(recipe, inputs, wanted, folder, _say)
    return DONE


def _look_at_cache(what: str, folders: Sequence[str]) -> int:
    if len(folders) != 1:
        raise InputError(f"cache {what}: give the folder of one cache, got {len(folders)}")
    from abkd.caching.looking import describe_cache, verify_cache

    if what == "info":
        for line in describe_cache(Path(folders[0])):
            _say(line)
        return DONE
    problems = verify_cache(Path(folders[0]))
    for problem in problems:
        print(f"abkd: {problem}", file=sys.stderr)
    if not problems:
        _say(f"{folders[0]}: every shard is what its checksum says")
    return USERS_MISTAKE if problems else DONE


def _recipes(options: argparse.Namespace) -> int:
    if options.name:
        if options.name not in recipe_names():
            raise InputError(f"recipes: there is none named {options.name!r}; see: abkd recipes")
        print((RECIPES / f"{options.name}.yaml").read_text(encoding="utf-8"), end="")
        return DONE
    folder = ""
    for name, summary in recipe_names().items():
        if (here := name.rpartition("/")[0]) != folder:
            folder = here
            print(f"\n{folder}/ (a piece, to be laid over a recipe: gpt2_base+{name})")
        print(f"{name:28} {summary}")
    return DONE


def _advise(options: argparse.Namespace) -> int:
    _one_process("advise")
    recipe = read_recipe(options.recipe, options.overrides).model_copy(update={"run_dir": "-", "resume": False})
    from abkd.inputs import check_inputs

    inputs = check_inputs(recipe)
    say = _say_aside if options.json else _say
    say("loading torch and transformers")
    _quieten_libraries()
    from abkd.advise import look
    from abkd.analysis.table import advice_lines

    overview, advice = look(recipe, inputs, say, options.examples)
    if options.json:
        steps = {f"{alpha:g} {beta:g}": step._asdict() for (alpha, beta), step in overview.steps.items()}
        print(json.dumps({"overview": overview._asdict() | {"steps": steps}, "advice": advice._asdict()}, indent=2))
    else:
        for line in advice_lines(overview, advice):
            _say(line)
    return DONE


def _explore(options: argparse.Namespace) -> int:
    _one_process("explore")
    rows = []
    if options.recipe:
        recipe = read_recipe(options.recipe, options.overrides).model_copy(update={"run_dir": "-", "resume": False})
        from abkd.inputs import check_inputs

        inputs = check_inputs(recipe)
        _say("loading torch and transformers")
        _quieten_libraries()
        from abkd.own_rows import rows_of_recipe

        rows = rows_of_recipe(recipe, inputs, _say)
    from abkd.explore import serve

    serve(rows, options.port, _say)
    return DONE


def _figures(options: argparse.Namespace) -> int:
    _one_process("figures")
    runs, trials = [Path(run) for run in options.runs], options.trials and Path(options.trials)
    from abkd.run_figures import make_figures

    for file in make_figures(Path(options.output), runs, trials):
        _say(str(file))
    return DONE


def _demo(options: argparse.Namespace) -> int:
    _one_process("demo")
    options.recipe, options.overrides = "demo", [*(QUICK if options.quick else ()), *options.overrides]
    recipe = _language_recipe("demo", options)
    recipe = recipe.model_copy(update={"run_dir": str(_free_folder(Path(recipe.run_dir)))})
    from abkd.inputs import Inputs, check_inputs

    inputs = check_inputs(recipe)
    assert isinstance(inputs, Inputs)
    _say("loading torch and transformers")
    _quieten_libraries()
    from abkd.demo import run_demo

    return DONE if run_demo(recipe, inputs, _say) else INTERRUPTED


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is refused: must be at least 1")
    return number


def _non_negative(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is refused: must be a number, at least 0")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is refused: must be above 0, at most 1")
    return number


def _one_process(command: str) -> None:
    if ranks.num_ranks() > 1:
        raise InputError(f"{command}: is for one process; only train and eval run in several, as under torchrun")


def _free_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([path], numbered) if not folder.exists())


def _interrupted(run_dir: str) -> int:
    _say(f"stopped; go on with: {RunDir(Path(run_dir)).how_to_go_on}")
    return INTERRUPTED


def _say(line: str) -> None:
    if ranks.is_first():
        print(line, flush=True)


def _say_aside(line: str) -> None:
    """For commands whose standard output is for a program."""
    if ranks.is_first():
        print(line, file=sys.stderr, flush=True)


def _quieten_libraries() -> None:
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"transformers|torch|accelerate|peft|bitsandbytes")
