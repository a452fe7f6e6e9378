"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from intaglio.pipeline.cli.explain import names_by_kind

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]


SetOption = Annotated[list[str], typer.Option("--set", metavar="STEP.FIELD=V", help="Another value for an option.")]


InsertOption = Annotated[list[str], typer.Option("--insert", metavar="after:STEP=PASS", help="One more step.")]


StoreOption = Annotated[
    Path, typer.Option("--store", metavar="DIR", envvar="INTAGLIO_STORE", help="Where finished steps are kept.")
]


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="One target's folder of what a run wrote.")]


DEFAULT_STORE = Path(".intaglio/store")


def all_names() -> list[str]:
    """What can be explained, for the shell."""
    return [name for names in names_by_kind().values() for name in names]


def json_option(what: str) -> Any:
    """The option --json, which every command has."""
    return typer.Option("--json", help=f"Print {what} as JSON.")
