"""What a cache is made of, checked before torch is imported."""

from pathlib import Path
from typing import Any

from abkd.caching.options import CacheOptions
from abkd.config import ImageRecipe, LanguageRecipe, Recipe
from abkd.errors import InputError
from abkd.image_inputs import check_image_inputs
from abkd.inputs import check_language_inputs
from abkd.teachers.cache.manifest import check_output


def check(recipe: Recipe, options: CacheOptions, folder: Path) -> Any:
    """The inputs of the recipe, which need no run_dir.

    Raises:
        InputError: there is no teacher; the folder holds something else; what `abkd.inputs.check_inputs` refuses;
            targets that the task has not.
    """
    if recipe.teacher is None:
        raise InputError("teacher: there is none to be cached; set one in the recipe")
    check_output(folder)
    match recipe:
        case LanguageRecipe():
            return check_language_inputs(recipe)
        case ImageRecipe():
            if options.kind != "logits":
                raise InputError(f"--targets={options.kind}: is of language models; images have --targets logits")
            if recipe.teacher is not None and recipe.teacher.kind == "cached":
                raise InputError("teacher.kind=cached: is cached already; set the teacher itself in the recipe")
            return check_image_inputs(recipe)
    raise AssertionError(recipe.task)
