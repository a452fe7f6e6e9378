"""Define the command `intaglio init`."""

from pathlib import Path
from typing import Annotated

import typer

from intaglio.pipeline.cli.console import print_json
from intaglio.pipeline.cli.options import json_option
from intaglio.pipeline.cli.printing import say
from intaglio.pipeline.cli.schema import FILE as SCHEMA_FILE
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import target_names
from intaglio.pipeline.output_files import check_output, write_output


def init_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A diffusers folder, ./file.py:factory, or hub:owner/name.")
    ],
    target: Annotated[
        list[str],
        typer.Option(metavar="T", autocompletion=target_names, help="Target; repeat the option for several."),
    ] = [],  # noqa: B006
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            min=0,
            help="Minutes in which a run should end on this machine. One call of the model is timed for this.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the recipe.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Annotated[bool, json_option("the facts about the model")] = False,
) -> None:
    """Inspect a model and write a recipe for it, with the findings as comments.

    Weights are read only with --minutes.
    """
    from intaglio.exporters.starter.starter import look_at, next_steps, recipe_text

    if not out.parent.is_dir():
        raise RecipeError(f"{out}: the folder {out.parent} does not exist")
    check_output(out)
    if out.exists() and not force:
        raise RecipeError(f"{out}: already exists: choose another --out, or pass --force")
    found = look_at(model, tuple(target), out.parent, minutes)
    write_output(out, recipe_text(found, schema=(out.parent / SCHEMA_FILE).is_file(), name=out.name))
    if as_json:
        print_json({"out": str(out), **found.to_json()})
    else:
        say(f"{out}: {found.summary}")
        for number, line in enumerate(next_steps(found, str(out)), start=1):
            say(f"  {number}. {line}")
