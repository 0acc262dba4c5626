"""What a task is, seen from `abkd.run`: a module with the same functions for language models and for image classifiers.

prepare(recipe, inputs, say, to_train)                  models and data, loaded
make_student(recipe, setup, say)                        before training
make_trainer(recipe, setup, student, run_dir, callbacks)
place(recipe, setup, student, device)                   student and teacher where this rank trains
measure_before(recipe, setup, student, keep)            figures of the teacher and the untrained student
measure(recipe, setup, model, keep)                     figures of one model
teacher_model(setup)                                    what gives the targets
load_trained(student, folder), is_adapted(student)      weights of a checkpoint
trained(recipe, student)                                what is to be saved
save_student(student, trainer, folder)                  -> what the first rank does to write it
model_card(recipe, results)                             README.md of the student
"""

from types import ModuleType

from abkd.config import Recipe
from abkd.tasks import images, language

TASKS: dict[str, ModuleType] = {"language_model": language, "image_classification": images}


def task_of(recipe: Recipe) -> ModuleType:
    return TASKS[recipe.task]
