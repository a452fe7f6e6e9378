"""The command `intaglio init`."""

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
        typer.Option(metavar="T", autocompletion=target_names, help="What it is to run on, once for each."),
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recipe.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Annotated[bool, json_option("what was found in the model")] = False,
) -> None:
    """Look at a model, without reading its weights, and write a recipe for it with what was found as comments."""
    from intaglio.exporters.starter.starter import look_at, recipe_text

    if not out.parent.is_dir():
        raise RecipeError(f"{out}: there is no folder {out.parent}")
    check_output(out)
    if out.exists() and not force:
        raise RecipeError(f"{out}: is there: give another --out, or --force to write over it")
    found = look_at(model, tuple(target), out.parent)
    write_output(out, recipe_text(found, schema=(out.parent / SCHEMA_FILE).is_file(), name=out.name))
    if as_json:
        print_json({"out": str(out), **found.to_json()})
    else:
        say(f"{out}: {found.summary}")
        for number, line in enumerate(found.next_steps(str(out)), start=1):
            say(f"  {number}. {line}")
