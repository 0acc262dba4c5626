"""What sections are made of: numbers with bounds, and what every recipe has."""

from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is refused: input should be a number")
    return value


Real = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Recipe(Section):
    """What a recipe of any task has."""

    task: str
    teacher: Any
    student: Any
    data: Any
    objective: Any
    training: Any
    evaluation: Any
    run_dir: str = Field(min_length=1)
    """A new folder; an existing one is never written over."""
    resume: bool = False
    """Go on with the run in run_dir from its last whole checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe under the keys of a recipe file; `parse_recipe` reads it back to an equal one."""
        return self.model_dump(by_alias=True)

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `read_recipe` reads it back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
