"""Define the command `intaglio`. Options of a pass are set in the recipe or with --set, and nowhere else."""

import json
import logging
import os
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from intaglio.pipeline.cli.console import STDOUT, duration, open_standard_streams, print_json, print_table
from intaglio.pipeline.cli.explain import Explanation, explain, explain_pass, names_by_kind
from intaglio.pipeline.cli.options import (
    DEFAULT_STORE,
    InsertOption,
    MinutesOption,
    RecipePath,
    SetOption,
    StoreOption,
    all_names,
    changed_recipe,
    json_option,
)
from intaglio.pipeline.cli.printing import (
    EscapedFormatter,
    plan_row,
    print_machine,
    print_target,
    say,
    shortened,
    target_rows,
)
from intaglio.pipeline.cli.schema import FILE as SCHEMA_FILE
from intaglio.pipeline.contract.context import terminal
from intaglio.pipeline.contract.processes import processes
from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.entry_points import named_commands
from intaglio.pipeline.errors import INTERRUPTED, IntaglioError, exit_codes, numbered
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.output_files import write_output
from intaglio.pipeline.runs.manifest import Manifest, compiled_folders
from intaglio.pipeline.runs.registry import named_passes
from intaglio.pipeline.runs.runner import CompiledTarget, StepEvent, compile, plan
from intaglio.pipeline.runs.store import Store

REPORT_FILE = "report.html"


class _Commands(TyperGroup):
    """Commands of the core and of the group `intaglio.commands`.

    An error ends a command with one message and an exit code; --debug adds the traceback.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands. Raises RecipeError if two distributions provide one name."""
        return [*super().list_commands(ctx), *named_commands()]

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return the command of this name, or None. The module of a command outside the core is imported here."""
        own = super().get_command(ctx, name)
        if own is not None or (point := named_commands().get(name)) is None:
            return own
        alone = typer.Typer(add_completion=False)
        alone.command(name)(point.load())
        return typer.main.get_command(alone)

    def invoke(self, ctx: Any) -> Any:  # the Context of typer's own click
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # nobody reads the output any more: typer ends without a message
            raise
        except KeyboardInterrupt:
            goes_on = ": run the same command again to continue" if ctx.invoked_subcommand == "run" else ""
            message, exit_code = f"interrupted{goes_on}", INTERRUPTED
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("click", "typer"):  # they report usage errors
                raise
            if ctx.params["debug"]:
                traceback.print_exception(error)
            message, exit_code = _told(error)
        say(f"intaglio: {message}", error=True)
        raise typer.Exit(exit_code)


def _told(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code for the exception that ended a command."""
    match error:
        case IntaglioError():
            problems = [shortened(problem) for problem in error.problems]
            return problems[0] if len(problems) == 1 else numbered(problems), error.exit_code
        case OSError(filename=str(name), strerror=str(reason)):
            return f"{name}: {reason}", 1
        case OSError():
            return str(error), 1
        case MemoryError():
            return "there is not enough memory for this", 1
    kind = type(error).__name__
    return f"unexpected {kind}: {shortened(str(error))}: run `intaglio --debug COMMAND` to see where", 1


app = typer.Typer(
    cls=_Commands,
    epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in exit_codes().items())}.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line. The list of commands itself can fail, before a command is invoked."""
    # Threads of torch that wait for others release their core. By default they spin: beside another job, a call of a
    # model took ten times as long. Torch reads this variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    open_standard_streams()
    try:
        app()
    except IntaglioError as error:
        say(f"intaglio: {_told(error)[0]}", error=True)
        raise SystemExit(error.exit_code) from error
    except OSError as error:  # the help cannot be printed
        say(f"intaglio: {error.filename or STDOUT}: {error.strerror}", error=True)
        raise SystemExit(1) from error


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Compile a diffusion model into quantized ONNX graphs and TensorRT engines."""  # the group reads --debug


@app.command("run")
def run_command(
    recipe: RecipePath,
    set_: SetOption = [],  # noqa: B006 - typer reads it, nothing changes it
    insert: InsertOption = [],  # noqa: B006
    minutes: MinutesOption = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the results.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("{target: its folder, report, steps and warnings}")] = False,
) -> None:
    """Run a recipe. After an interruption, run the same command again to continue."""
    _log_to_terminal()
    changed = changed_recipe(recipe, set_, insert)
    kept = Store(store)
    if minutes is not None:
        changed = _in_time(changed, minutes, recipe.parent, kept)
    folder = Path("build") / recipe.stem if out is None else out
    events: list[StepEvent] = []

    def tell(event: StepEvent) -> None:
        events.append(event)
        _log_step(event)

    compiled = compile(changed, kept, out=folder, on_step=tell, base=recipe.parent)
    if not processes().first:
        return
    found = {target: _results(target, result, events) for target, result in compiled.items()}
    if as_json:
        print_json({target: asdict(results) for target, results in found.items()})
        return
    for target, results in found.items():
        say(f"{target}: {results.report or results.folder}")
        for warning in results.warnings:
            say(f"{target}: WARNING: {warning}")


def _in_time(recipe: Recipe, minutes: float, base: Path, store: Store) -> Recipe:
    """Return the recipe with amounts that end in time, and say what was chosen; all processes run the same one."""
    from intaglio.pipeline.runs.effort import choose_effort

    every = processes()
    choice = every.agree(choose_effort(recipe, minutes, base, store) if every.first else None)
    assert choice is not None  # the first process has made it
    for line in choice.lines():
        logging.getLogger(__name__).info("%s", line)
    return choice.taken.recipe


@dataclass(frozen=True)
class _Results:
    """Results of a run for one target; `report` is None where the recipe makes none. `warnings` are sentences."""

    folder: str
    report: str | None
    steps: list[dict[str, Any]]
    warnings: tuple[str, ...]


def _results(target: str, result: CompiledTarget, events: Sequence[StepEvent]) -> _Results:
    folder = result.folder
    assert folder is not None  # `out` was given
    report = folder / REPORT_FILE
    steps = [
        {"step": event.place.step, "status": event.status, "seconds": event.seconds}
        for event in events
        if event.place.target == target and event.status != "runs"
    ]
    return _Results(str(folder), str(report) if report.is_file() else None, steps, result.warnings)


@app.command("plan")
def plan_command(
    recipe: RecipePath,
    set_: SetOption = [],  # noqa: B006
    insert: InsertOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("{target: steps}")] = False,
) -> None:
    """Show which steps are in the store, which would run, and the time, the memory and the disk that they take."""
    planned = plan(changed_recipe(recipe, set_, insert), Store(store), base=recipe.parent)
    if as_json:
        print_json({target: [asdict(step) for step in steps] for target, steps in planned.items()})
        return
    for target, steps in planned.items():
        columns = ("step", "", "time, measured or estimated", "memory", "disk, in the store")
        print_table(target, columns, [plan_row(step) for step in steps])


@app.command("doctor")
def doctor_command(
    imports: Annotated[
        bool,
        typer.Option("--imports", help="Also import every package, to find broken ones (seconds)."),
    ] = False,
    as_json: Annotated[bool, json_option("all findings")] = False,
) -> None:
    """Show what is installed and what works here. Exits with 1 if nothing can be compiled."""
    from intaglio.pipeline.cli.doctor import examine

    found = examine(imports)
    if as_json:
        print_json(found.to_json())
    else:
        print_machine(found)
    if not any(each.compile.here for each in found.targets.values()):
        raise typer.Exit(1)


@app.command("explain")
def explain_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", autocompletion=all_names, help="A pass, target, scheme, rule, metric, artifact."
        ),
    ] = None,
    as_json: Annotated[bool, json_option("{kind: all facts}")] = False,
) -> None:
    """Explain a name, or list all names that can be explained."""
    if name is None:
        kinds = names_by_kind()
        if as_json:
            print_json(kinds)
            return
        for kind, names in kinds.items():
            say(f"{kind}: {', '.join(names)}")
        return
    found = explain(name)
    if as_json:
        print_json({each.kind: each.to_json() for each in found})
        return
    for position, each in enumerate(found):
        say("\n" * bool(position), end="")
        if each.kind == "target":
            print_target(load_target(each.name))
        else:
            say("\n".join(each.lines()))


@app.command("schema")
def schema_command(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help=f"Output file, such as {SCHEMA_FILE}.")] = None,
    as_json: Annotated[bool, json_option("the path of the written file")] = False,
) -> None:
    """Print the JSON schema of recipes, with which editors complete and check them."""
    from intaglio.pipeline.cli.schema import editor_line, recipe_schema

    text = json.dumps(recipe_schema(), indent=1) + "\n"
    if out is None:
        say(text, end="")
        return
    write_output(out, text)
    if as_json:
        print_json({"out": str(out)})
    else:
        say(f"{out}: start each recipe in its folder with the line `{editor_line(out.name)}`")


@app.command("passes")
def passes_command(
    as_json: Annotated[bool, json_option("{pass: all facts, or the reason why it cannot be imported}")] = False,
) -> None:
    """List the passes, with their options."""
    found = {name: _described(name) for name in named_passes()}
    if as_json:
        print_json({n: {"fault": each} if isinstance(each, str) else each.to_json() for n, each in found.items()})
        return
    for name, each in found.items():
        lines = [each] if isinstance(each, str) else [each.doc.partition("\n")[0], *each.option_lines()]
        say(name)
        for line in lines:
            say(f"    {line}")


@app.command("targets")
def targets_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", autocompletion=target_names, help="Target to show with all facts."),
    ] = None,
    as_json: Annotated[bool, json_option("{target: all facts}")] = False,
) -> None:
    """List the targets that a recipe can name, or show all facts of one target with their sources."""
    targets = [load_target(each) for each in (target_names() if name is None else [name])]
    if as_json:
        print_json({target.name: target.model_dump(mode="json") for target in targets})
    elif name is None:
        columns = ("target", "opset", "linear", "conv", "device", "memory", "GB/s", "fp16 TFLOPS", "int8 TOPS")
        print_table("", columns, [row for target in targets for row in target_rows(target)])
    else:
        print_target(targets[0])


@app.command()  # its function gives its name: no string of the core is the name of a pass
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of one of its targets.")],
    as_json: Annotated[bool, json_option("{folder: missing, changed and added files}")] = False,
) -> None:
    """Compare every file with the manifest of the run. Exits with 1 if one is missing, changed or added."""
    found = {each: list(Manifest.read(each).departures(each)) for each in compiled_folders(folder)}
    if as_json:
        print_json({str(each): problems for each, problems in found.items()})
    else:
        for each, problems in found.items():
            say(
                "\n".join(
                    [
                        f"{each}: {'files differ from the manifest' if problems else 'all files match the manifest'}",
                        *problems,
                    ]
                )
            )
    if any(found.values()):
        raise typer.Exit(1)


def _log_to_terminal() -> None:
    handler: logging.Handler = logging.StreamHandler()
    if terminal().is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=terminal(), show_path=False, show_level=False, markup=False)
    handler.setFormatter(EscapedFormatter())
    logger = logging.getLogger("intaglio")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if processes().first else logging.WARNING)


def _log_step(event: StepEvent) -> None:
    place = event.place
    match event.status:
        case "runs":
            what = "runs"
        case "done":
            what = f"done in {duration(event.seconds)}"
        case "hit":
            what = f"is in the store (took {duration(event.seconds)})"
    logging.getLogger(__name__).info("%s %d/%d %s %s", place.target, place.position, place.count, place.step, what)


def _described(name: str) -> Explanation | str:
    """Explain a pass, or return the reason why it cannot be imported."""
    try:
        return explain_pass(name)
    except IntaglioError as error:
        return str(error)
