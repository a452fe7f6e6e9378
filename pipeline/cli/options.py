"""Define options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from intaglio.pipeline.cli.explain import names_by_kind

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]


SetOption = Annotated[list[str], typer.Option("--set", metavar="STEP.FIELD=V", help="Change an option of a step.")]


InsertOption = Annotated[list[str], typer.Option("--insert", metavar="after:STEP=PASS", help="Insert a step.")]


StoreOption = Annotated[
    Path, typer.Option("--store", metavar="DIR", envvar="INTAGLIO_STORE", help="Folder that keeps finished steps.")
]


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of one target of a run.")]


DEFAULT_STORE = Path(".intaglio/store")


def all_names() -> list[str]:
    """Return all names that can be explained, for completion in the shell."""
    return [name for names in names_by_kind().values() for name in names]


def json_option(what: str) -> Any:
    """Return the option --json, which every command has."""
    return typer.Option("--json", help=f"Print {what} as JSON.")
