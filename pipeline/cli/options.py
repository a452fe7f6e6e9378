"""Define options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import JsonValue, ValidationError

from intaglio.pipeline.cli.explain import names_by_kind
from intaglio.pipeline.contract.recipe import Recipe, Step, beside, validation_problems
from intaglio.pipeline.contract.yaml_text import DEEPEST, read_yaml
from intaglio.pipeline.errors import RecipeError

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]


SetOption = Annotated[list[str], typer.Option("--set", metavar="STEP.FIELD=V", help="Change an option of a step.")]


InsertOption = Annotated[list[str], typer.Option("--insert", metavar="after:STEP=PASS", help="Insert a step.")]


MinutesOption = Annotated[
    float | None,
    typer.Option(
        metavar="M",
        min=0,
        help="Minutes in which the run should end on this machine: amounts that the recipe does not give, such as"
        " samples and updates, are chosen for it. One call of the model is timed.",
    ),
]


StoreOption = Annotated[
    Path, typer.Option("--store", metavar="DIR", envvar="INTAGLIO_STORE", help="Folder that keeps finished steps.")
]


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of one target of a run.")]


DEFAULT_STORE = Path(".intaglio/store")
MOST_CHANGES = 1000
"""Largest number of --set options, and of --insert options."""


def all_names() -> list[str]:
    """Return all names that can be explained, for completion in the shell."""
    return [name for names in names_by_kind().values() for name in names]


def json_option(what: str) -> Any:
    """Return the option --json, which every command has."""
    return typer.Option("--json", help=f"Print {what} as JSON.")


def changed_recipe(path: Path, sets: list[str], inserts: list[str]) -> Recipe:
    """Return the recipe with the changes from the command line."""
    recipe = Recipe.read(path)
    for option, given in (("--insert", inserts), ("--set", sets)):
        if len(given) > MOST_CHANGES:
            raise RecipeError(f"{option}: given {len(given)} times, at most {MOST_CHANGES}: write it in the recipe")
    for text in inserts:
        place, equals, uses = text.partition("=")
        named = f"--insert {_brief(text)}"
        if not (place.startswith("after:") and equals and uses):
            raise RecipeError(f"{named}: write it as after:STEP=PASS")
        try:
            step = Step.model_validate(beside(uses, path.parent))
        except ValidationError as error:
            raise RecipeError(*(f"{named}: {each}" for each in validation_problems(error, Step))) from error
        recipe = recipe.insert(step, after=place.removeprefix("after:"))
    for text in sets:
        place, equals, value = text.partition("=")
        named = f"--set {_brief(text)}"
        step_name, *option_path = place.split(".")
        if not (equals and option_path and all(option_path)):
            raise RecipeError(f"{named}: write it as STEP.FIELD=VALUE")
        if len(option_path) > DEEPEST:
            raise RecipeError(f"{named}: an option of {len(option_path)} nested names: at most {DEEPEST} are read")
        parsed: JsonValue = read_yaml(value, named)  # type: ignore[assignment]  # plain values
        recipe = recipe.with_option(step_name, tuple(option_path), parsed)
    return recipe


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
