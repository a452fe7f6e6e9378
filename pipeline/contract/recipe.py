"""Define the recipe that a user writes: a model, targets, a seed and the steps in order."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self, TypeAlias, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from intaglio.pipeline.contract.yaml_text import MOST_CHARACTERS, read_yaml
from intaglio.pipeline.errors import RecipeError, did_you_mean
from intaglio.pipeline.files import printable, read_text
from intaglio.pipeline.model.ref import ModelRef

MOST_TARGETS, MOST_STEPS = 100, 1000
M = TypeVar("M", bound=BaseModel)
LISTED_PROBLEMS = 50
"""Largest number of problems of one recipe that a message lists."""


def _as_name(text: str) -> str:
    if not text.isprintable() or not text:
        raise ValueError("a name is not empty, and has no control characters")
    return text


Name: TypeAlias = Annotated[str, Field(max_length=1000), AfterValidator(_as_name)]


class Step(BaseModel):
    """Use of a pass in a recipe, written as its name, as its name with options, or with all three fields.

    >>> Step.model_validate({"calibrate": {"samples": 8}})
    Step(name='calibrate', uses='calibrate', options={'samples': 8})
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    """Name of the step, by default that of the pass: `assign`; `keep-first` for `./my.py:KeepFirst`."""
    uses: Name
    options: Mapping[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, written: object) -> object:
        spelled: dict[object, object]
        if isinstance(written, str):
            spelled = {"uses": written}
        elif isinstance(written, dict) and "uses" in written:
            spelled = dict(written)
        elif isinstance(written, dict) and len(written) == 1:
            ((uses, options),) = written.items()
            spelled = {"uses": uses, "options": options or {}}
        else:
            raise ValueError("write a step as `name`, as `name: {options}`, or with the fields uses, name and options")
        return {"name": default_step_name(str(spelled["uses"])), **spelled}

    def written(self) -> object:
        """Return the shortest form that parses to this step."""
        if self.name != default_step_name(self.uses):
            return self.model_dump(mode="json")
        return {self.uses: dict(self.options)} if self.options else self.uses


class Recipe(BaseModel):
    """Recipe whose syntax is valid; `bind` checks that its passes exist and fit each other and the targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    targets: tuple[str, ...] = Field(min_length=1, max_length=MOST_TARGETS)
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63)
    steps: tuple[Step, ...] = Field(min_length=1, max_length=MOST_STEPS)

    @field_validator("model", mode="before", json_schema_input_type=str | ModelRef)
    @classmethod
    def _path_alone(cls, written: object) -> object:
        return {"path": written} if isinstance(written, str) else written

    @classmethod
    def parse(cls, text: str, *, source: str = "recipe") -> Self:
        """Read a recipe from YAML. Raises RecipeError with every problem of the text.

        >>> recipe = Recipe.parse("{model: models/dit, targets: [tensorrt-rtx], steps: [calibrate, ./my.py:KeepFirst]}")
        >>> recipe.model.path, recipe.model.sampling_steps, [step.name for step in recipe.steps]
        ('models/dit', 20, ['calibrate', 'keep-first'])
        >>> Recipe.parse("{model: models/dit, target: [tensorrt-rtx], steps: []}")
        Traceback (most recent call last):
        intaglio.pipeline.errors.RecipeError: 3 problems:
          1. recipe: targets: is missing
          2. recipe: steps: Tuple should have at least 1 item after validation, not 0 (got [])
          3. recipe: target: no such option: did you mean 'targets'?
        """
        written = read_yaml(text, source)
        try:
            return validated(cls, written)
        except RecipeError as error:
            raise RecipeError(*(f"{source}: {problem}" for problem in error.problems)) from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a recipe file. Raises RecipeError as `parse` does, and if the path is not a regular file."""
        return cls.parse(read_text(path, most=4 * MOST_CHARACTERS), source=printable(path))

    def insert(self, step: Step, *, after: str) -> Self:
        """Return a recipe with one more step."""
        position = self._position(after) + 1
        return self.model_copy(update={"steps": (*self.steps[:position], step, *self.steps[position:])})

    def with_option(self, step: str, path: tuple[str, ...], option: JsonValue) -> Self:
        """Return a recipe with another value for one option of one step, at any depth.

        >>> recipe = Recipe.parse("{model: models/dit, targets: [tensorrt-rtx], steps: [assign: {front: 8}]}")
        >>> recipe.with_option("assign", ("budget", "size"), 0.3).steps[0].options
        {'front': 8, 'budget': {'size': 0.3}}
        """
        position = self._position(step)
        found = self.steps[position]
        changed = found.model_copy(update={"options": _replaced(found.options, path, option)})
        return self.model_copy(update={"steps": (*self.steps[:position], changed, *self.steps[position + 1 :])})

    def to_yaml(self) -> str:
        """Write the recipe as YAML, from which `Recipe.parse` makes an equal recipe."""
        fields = self.model_dump(mode="json", exclude={"steps"})
        return yaml.safe_dump({**fields, "steps": [step.written() for step in self.steps]}, sort_keys=False, width=120)

    def _position(self, name: str) -> int:
        names = [step.name for step in self.steps]
        if name not in names:
            raise RecipeError(f"no step {name!r} in the recipe{did_you_mean(name, names)}")
        return names.index(name)


def default_step_name(uses: str) -> str:
    """Return the name of the pass, or that of its class in kebab-case.

    >>> default_step_name("assign"), default_step_name("./my.py:KeepFirst")
    ('assign', 'keep-first')
    """
    _, colon, class_name = uses.rpartition(":")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", class_name).lower() if colon else uses


def beside(reference: str, folder: Path) -> str:
    """Convert `file.py:name` from a path relative to the current folder into one relative to a recipe's `folder`.

    Other references stay as they are.
    """
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py"):
        return reference
    return f"./{Path(os.path.relpath(file, folder)).as_posix()}:{name}"


def validation_problems(error: ValidationError, model: type[BaseModel]) -> tuple[str, ...]:
    """Return one line for each problem, up to a limit: `budget.size: Input should be a valid number (got 'much')`."""
    problems = []
    found = error.errors(include_url=False)
    # a list that is short only because its items are wrong
    wrong = {detail["loc"][:-1] for detail in found}
    found = [detail for detail in found if detail["type"] != "too_short" or detail["loc"] not in wrong]
    for detail in found[:LISTED_PROBLEMS]:
        place = ".".join(printable(part)[:80] for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            *path, name = detail["loc"]
            problems.append(f"{place}: no such option{did_you_mean(str(name), _options(model, path))}")
        elif detail["type"] == "missing":
            problems.append(f"{place}: is missing")
        else:
            said = detail["msg"].removeprefix("Value error, ")
            at = f"{place}: " if place else ""
            problems.append(f"{at}{said} (got {_shortened(detail['input'])})")
    if len(found) > LISTED_PROBLEMS:
        problems.append(f"and {len(found) - LISTED_PROBLEMS} more")
    return tuple(problems)


def validated(kind: type[M], written: object, context: Mapping[str, object] | None = None) -> M:
    """Return a model from what is written in a recipe. Raises RecipeError with every problem, in one line each."""
    try:
        read = kind.model_validate(written, context=context)
    except ValidationError as error:
        raise RecipeError(*validation_problems(error, kind)) from error
    if problems := [*_truths_as_numbers(written, read.model_dump())]:
        raise RecipeError(*problems)
    return read


def _truths_as_numbers(written: object, read: object, place: str = "") -> Iterator[str]:
    """Yield a line for each true or false that was read as a number, as Python takes one for the other."""
    if isinstance(written, bool) and type(read) in (int, float):
        yield f"{place}: Input should be a number (got {str(written).lower()})"
    elif isinstance(written, Mapping) and isinstance(read, Mapping):
        for name in written:
            if name in read:
                yield from _truths_as_numbers(written[name], read[name], f"{place}.{name}".lstrip("."))
    elif isinstance(written, Sequence) and isinstance(read, Sequence) and not isinstance(written, str):
        for position, (a, b) in enumerate(zip(written, read, strict=False)):
            yield from _truths_as_numbers(a, b, f"{place}.{position}")


def _options(model: type[BaseModel], path: Iterable[int | str]) -> set[str]:
    """Return the names of the options at this place in a model."""
    there = {model}
    for part in path:  # list indices and mapping keys stay in the same model
        fields = [inner.model_fields[part] for inner in there if part in inner.model_fields]
        there = {inner for field in fields for inner in _models(field.annotation)} if fields else there
    return {name for inner in there for name in inner.model_fields}


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the models in a type."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _shortened(written: object) -> str:
    text = printable(repr(written))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _replaced(options: Mapping[str, JsonValue], path: tuple[str, ...], option: JsonValue) -> dict[str, JsonValue]:
    head, *rest = path
    if not rest:
        return {**options, head: option}
    inner = options.get(head)
    return {**options, head: _replaced(inner if isinstance(inner, dict) else {}, tuple(rest), option)}
