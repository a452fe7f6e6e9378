"""The command `intaglio`: every option of a pass is set in the recipe or with --set, none exists here alone."""

import json
import logging
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import JsonValue, ValidationError
from typer.core import TyperGroup

from intaglio.exporters.measure.bench import Bench
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import GRAPH, LINT, MODEL, PLAN, PROFILE, TARGET
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.verification import dotted
from intaglio.pipeline.cli.explain import Explanation, explain, explain_pass, lint_rules, names_by_kind
from intaglio.pipeline.cli.printing import (
    EscapedFormatter,
    duration,
    figure,
    plan_row,
    print_bench,
    print_json,
    print_machine,
    print_profile,
    print_table,
    print_target,
    say,
    shortened,
    target_rows,
)
from intaglio.pipeline.cli.schema import FILE as SCHEMA_FILE
from intaglio.pipeline.contract.artifact import Outputs, State
from intaglio.pipeline.contract.context import Context, terminal
from intaglio.pipeline.contract.processes import processes
from intaglio.pipeline.contract.recipe import Recipe, Step, beside, validation_problems
from intaglio.pipeline.contract.yaml_text import DEEPEST, read_yaml
from intaglio.pipeline.errors import INTERRUPTED, IntaglioError, RecipeError, exit_codes, numbered
from intaglio.pipeline.files import read_json_object
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.output_files import check_output, write_output
from intaglio.pipeline.runs.manifest import Manifest, compiled_folders, target_name
from intaglio.pipeline.runs.publish import made_from
from intaglio.pipeline.runs.registry import find_pass, named_passes, pass_module
from intaglio.pipeline.runs.runner import StepEvent, compile, plan
from intaglio.pipeline.runs.store import Store

REPORT_FILE = "report.html"
METRICS_FILE = "metrics.json"
MOST_CHANGES = 1000
"""Times that --set, or --insert, is given."""


class _Commands(TyperGroup):
    """Ends a command with one message and its exit code where the user can act; the traceback comes with --debug."""

    def invoke(self, ctx: Any) -> Any:  # a Context of the click inside typer
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read the output has enough: typer ends quietly
            raise
        except KeyboardInterrupt:
            goes_on = ": the same command goes on from here" if ctx.invoked_subcommand == "run" else ""
            message, exit_code = f"interrupted{goes_on}", INTERRUPTED
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("click", "typer"):  # what they say of the command line
                raise
            if ctx.params["debug"]:
                traceback.print_exception(error)
            message, exit_code = _told(error)
        say(f"intaglio: {message}", error=True)
        raise typer.Exit(exit_code)


def _told(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code of what ended a command."""
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
    return f"unexpected {kind}: {shortened(str(error))}: `intaglio --debug` before the command shows where", 1


app = typer.Typer(
    cls=_Commands,
    epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in exit_codes().items())}.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def all_names() -> list[str]:
    """What can be explained, for the shell."""
    return [name for names in names_by_kind().values() for name in names]


def json_option(what: str) -> Any:
    """The option --json, which every command has."""
    return typer.Option("--json", help=f"Print {what} as JSON.")


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="STEP.FIELD=V", help="Another value for an option.")]
InsertOption = Annotated[list[str], typer.Option("--insert", metavar="after:STEP=PASS", help="One more step.")]
StoreOption = Annotated[
    Path, typer.Option("--store", metavar="DIR", envvar="INTAGLIO_STORE", help="Where finished steps are kept.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="One target's folder of what a run wrote.")]
DEFAULT_STORE = Path(".intaglio/store")


def main() -> None:
    """The console script."""
    app()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from, as a traceback.")] = False,
) -> None:
    """Compiles a diffusion model into quantized ONNX graphs and TensorRT engines."""  # the group looks at --debug


@app.command("run")
def run_command(
    recipe: RecipePath,
    set_: SetOption = [],  # noqa: B006 - typer reads it, nothing changes it
    insert: InsertOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Results, one folder a target.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("{target: where its results are, and every step}")] = False,
) -> None:
    """Run a recipe. Run again after an interruption, it goes on where it was."""
    _log_to_terminal()
    changed = _changed(recipe, set_, insert)
    folder = Path("build") / recipe.stem if out is None else out
    events: list[StepEvent] = []

    def tell(event: StepEvent) -> None:
        events.append(event)
        _log_step(event)

    compiled = compile(changed, Store(store), out=folder, on_step=tell, base=recipe.parent)
    if not processes().first:
        return
    found = {target: _results(target, result.folder, events) for target, result in compiled.items()}
    if as_json:
        print_json(found)
        return
    for target, results in found.items():
        say(f"{target}: {results['report'] or results['folder']}")


def _results(target: str, folder: Path | None, events: Sequence[StepEvent]) -> dict[str, Any]:
    assert folder is not None  # `out` was given
    report = folder / REPORT_FILE
    steps = [
        {"step": event.place.step, "status": event.status, "seconds": event.seconds}
        for event in events
        if event.place.target == target and event.status != "runs"
    ]
    return {"folder": str(folder), "report": str(report) if report.is_file() else None, "steps": steps}


@app.command("plan")
def plan_command(
    recipe: RecipePath,
    set_: SetOption = [],  # noqa: B006
    insert: InsertOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("{target: steps}")] = False,
) -> None:
    """Say what a run would take from the store, what it would do, and how long that took before."""
    planned = plan(_changed(recipe, set_, insert), Store(store), base=recipe.parent)
    if as_json:
        print_json({target: [asdict(step) for step in steps] for target, steps in planned.items()})
        return
    for target, steps in planned.items():
        print_table(target, ("step", "", "took, or will take", "held"), [plan_row(step) for step in steps])


@app.command("doctor")
def doctor_command(
    imports: Annotated[
        bool, typer.Option("--imports", help="Import every package, torch too: what is broken is found, in seconds.")
    ] = False,
    as_json: Annotated[bool, json_option("all that is found")] = False,
) -> None:
    """Say what is installed here, and what can be done with it. Exits with 1 where nothing can be compiled."""
    from intaglio.pipeline.cli.doctor import examine

    found = examine(imports)
    if as_json:
        print_json(asdict(found))
    else:
        print_machine(found)
    if not any(each["compile"].here for each in found.targets.values()):
        raise typer.Exit(1)


@app.command("init")
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
    from intaglio.pipeline.cli.starter import look_at, recipe_text

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


@app.command("explain")
def explain_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", autocompletion=all_names, help="A pass, target, scheme, rule, metric, artifact."
        ),
    ] = None,
    as_json: Annotated[bool, json_option("{kind: all that is known}")] = False,
) -> None:
    """Say all that is known of a name, or list the names that there are."""
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
    out: Annotated[Path | None, typer.Option(metavar="FILE", help=f"Where it goes, such as {SCHEMA_FILE}.")] = None,
    as_json: Annotated[bool, json_option("where it was written; the schema itself is JSON in any case")] = False,
) -> None:
    """Print the JSON schema of recipes, by which editors complete and check them."""
    from intaglio.pipeline.cli.schema import editor_line, recipe_schema

    text = json.dumps(recipe_schema(), indent=1) + "\n"
    if out is None:
        say(text, end="")
        return
    write_output(out, text)
    if as_json:
        print_json({"out": str(out)})
    else:
        say(f"{out}: begin recipes beside it with `{editor_line(out.name)}`")


@app.command("passes")
def passes_command(
    as_json: Annotated[bool, json_option("{pass: all that is known of it, or why it cannot be imported}")] = False,
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
        typer.Argument(metavar="TARGET", autocompletion=target_names, help="One of them, with all facts."),
    ] = None,
    as_json: Annotated[bool, json_option("{target: all that is known of it}")] = False,
) -> None:
    """List the targets a recipe can name, or say all that is known of one, and where each fact comes from."""
    targets = [load_target(each) for each in (target_names() if name is None else [name])]
    if as_json:
        print_json({target.name: target.model_dump(mode="json") for target in targets})
    elif name is None:
        columns = ("target", "opset", "linear", "conv", "device", "memory", "GB/s", "fp16 TFLOPS", "int8 TOPS")
        print_table("", columns, [row for target in targets for row in target_rows(target)])
    else:
        print_target(targets[0])


@app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What a run was given as --out, or one target of it.")],
    as_json: Annotated[bool, json_option("{target: metrics}")] = False,
) -> None:
    """Print the metrics of every target in a folder of results; without a report, what the files themselves say."""
    metrics = _read_metrics(folder)
    if as_json:
        print_json(metrics)
        return
    flat = {target: {n: figure(each) for n, each in dotted(found)} for target, found in metrics.items()}
    names = list(dict.fromkeys(name for found in flat.values() for name in found))
    rows = [(name, *(found.get(name, "") for found in flat.values())) for name in names]
    print_table(str(folder), ("metric", *flat), rows)


@app.command("diff")
def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="One target of what a run wrote, or all of it.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Likewise: targets of one name are compared.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page, such as diff.html.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("all that differs")] = False,
) -> None:
    """Say what differs between two compiled folders: figures, layers, samples, recipes and versions."""
    if out is not None:
        check_output(out)
    module = import_module("intaglio.exporters.report.difference")
    found = module.compare(first, second, Store(store))
    if out is not None:
        write_output(out, module.page(found))
    if as_json:
        print_json([each.to_json() for each in found])
        return
    for each in found:
        print_table(each.title, ("", "A", "B", "B - A", ""), each.rows())


@app.command("lint")
def lint_command(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="An ONNX model, by whomever.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="T", autocompletion=target_names, help="What it is to run on; see `intaglio targets`."),
    ] = None,
    as_json: Annotated[bool, json_option("the findings")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules, and what each looks for.")] = False,
) -> None:
    """Say what the target would refuse, compute wrongly or not on integers. Exits with 1 where there are errors."""
    if rules:
        _print_rules(as_json)
        return
    if model is None or target is None:
        raise RecipeError("lint: give an ONNX model and its --target, or --rules")
    artifacts: Outputs = {GRAPH: Graph(model, {}, {}), TARGET: load_target(target)}
    step = find_pass("lint", Path()).pass_class.model_validate({"refuse": "nothing"})
    found = State(step.run(State(artifacts, reader="lint"), Context(scratch=Path())), reader="lint")[LINT]
    if as_json:
        print_json(asdict(found))
    else:
        rows = [(f.level, f.rule, f.node, f"{f.message}: {f.fix}") for f in found.findings]
        print_table(f"{model}: {len(rows)} findings", ("", "rule", "node", "what to do"), rows)
    if found.at("error"):
        raise typer.Exit(1)


def _print_rules(as_json: bool) -> None:
    rules = lint_rules()
    if as_json:
        facts = ("level", "finds", "fix", "why")
        print_json({name: {fact: getattr(rule, fact) for fact in facts} for name, rule in rules.items()})
        return
    for rule in rules.values():
        say(f"{rule.name:<18} {rule.level:<8} {rule.finds}")


@app.command("profile")
def profile_command(
    folder: Folder,
    rows: Annotated[int | None, typer.Option(min=1, max=10_000, help="Rows of the call that is timed.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, max=10_000, help="Calls that are timed.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Threads of ONNX Runtime, 0 for all cores.")
    ] = None,
    trtexec: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What trtexec --exportProfile wrote: read, nothing is run.")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What trtexec --exportLayerInfo wrote, beside --trtexec.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the times as JSON, for assign.profile.")
    ] = None,
    as_json: Annotated[bool, json_option("the times")] = False,
) -> None:
    """Say how long each layer of a compiled graph takes, which `assign.profile` can count with."""
    if out is not None:
        check_output(out)
    with tempfile.TemporaryDirectory() as scratch:
        if not (folder / "graph.json").exists():
            raise RecipeError(f"{folder}: no graph.json in it: give one target's folder of what `intaglio run` wrote")
        found = find_pass("profile", Path()).pass_class
        graph, plan, target = Graph.load(folder), QuantPlan.load(folder), load_target(target_name(folder))
        if trtexec is not None:
            profile = pass_module("profile").read_trtexec(graph, plan, trtexec, layers)
        else:
            if not found.applies(target):
                raise RecipeError(f"{target.name} is not for ONNX Runtime: give trtexec's --exportProfile as --trtexec")
            given = {"rows": rows, "runs": runs, "threads": threads}
            step = found.model_validate({name: n for name, n in given.items() if n is not None})
            state = State({GRAPH: graph, PLAN: plan, TARGET: target}, reader="profile")
            profile = State(step.run(state, Context(scratch=Path(scratch), seed=0)), reader="profile")[PROFILE]
        if out is not None:
            write_output(out, profile.to_json())
        if as_json:
            print_json(profile.model_dump(mode="json"))
        elif out is None:
            print_profile(str(folder), profile)


@app.command("sample")
def sample_command(
    folder: Folder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture, such as grid.png.")],
    rows: Annotated[
        list[int],
        typer.Option("--class", "--row", metavar="N", help="A class, or row of what was recorded; several in turn."),
    ] = [],  # noqa: B006
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to draw, by the whole pipeline.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="DIR", help="The whole diffusers pipeline for --prompt: its folder or hub id.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; those of the recipe if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    samples: Annotated[int, typer.Option(help="How many are drawn.")] = 8,
    compare: Annotated[bool, typer.Option("--compare", help="Full precision above, from the same noise.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("the figures")] = False,
) -> None:
    """Draw samples with a compiled graph, in ONNX Runtime, as its recipe samples."""
    with tempfile.TemporaryDirectory() as scratch:
        import intaglio
        from intaglio.exporters.report import pictures

        pictures.check_file(out)
        checkpoint = made_from(folder, Store(store), MODEL)
        steps = checkpoint.ref.sampling_steps if steps is None else steps
        wanted = pictures.Drawing(samples, steps, tuple(rows), prompt, pipeline, compare)
        drawn = pictures.draw(checkpoint, intaglio.load(folder), wanted, Context(Path(scratch), seed))
        pictures.save_picture(drawn, out)
        distances = pictures.distances(drawn)
        if as_json:
            print_json({"out": str(out), "samples": samples, "steps": steps, "seed": seed, **distances})
            return
        say(f"{out}: {samples} samples, {steps} steps", end="")
        say(", {psnr_db:.2f} dB to full precision, {psnr_db_min:.2f} at worst".format(**distances) if compare else "")


@app.command("bench")
def bench_command(
    folder: Folder,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Trajectories of each engine, by turns.")] = 5,
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="Rows of a call; one sample with guidance has two.")] = 2,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="Threads of ONNX Runtime, 0 for all cores.")] = 1,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("the figures")] = False,
) -> None:
    """Say how fast, how large and how hungry for memory the graph is, beside full precision in the same run."""
    with tempfile.TemporaryDirectory() as scratch:
        run = pass_module("benchmark").bench
        found: Bench = run(folder, Store(store), Context(Path(scratch)), rounds=rounds, rows=rows, threads=threads)
        if as_json:
            print_json(found.model_dump(mode="json"))
        else:
            print_bench(str(folder), found)


@app.command("kit")
def kit_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="One target of what a run wrote, or all of it.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="T", autocompletion=target_names, help="Which of several targets for TensorRT."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The archive; default RECIPE-TARGET.tar.gz.")] = None,
    as_json: Annotated[bool, json_option("where it was written")] = False,
) -> None:
    """Pack a target for TensorRT for a device that has TensorRT alone: it builds the engine, checks and times it."""
    _print_written(import_module("intaglio.exporters.deploy.kit").write_kit(folder, out, target), as_json)


def _print_written(file: Path, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(file)})
    else:
        say(str(file))


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="One target of what a run wrote, or all of it.")],
    as_json: Annotated[bool, json_option("{folder: what departs}")] = False,
) -> None:
    """Say whether every file is the one that the run delivered, by its manifest. Exits with 1 where one is not."""
    found = {each: list(Manifest.read(each).departures(each)) for each in compiled_folders(folder)}
    if as_json:
        print_json({str(each): problems for each, problems in found.items()})
    else:
        for each, problems in found.items():
            say("\n".join([f"{each}: {'not what was delivered' if problems else 'as delivered'}", *problems]))
    if any(found.values()):
        raise typer.Exit(1)


@app.command("triton")
def triton_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="One target of what a run wrote, or all of it.")],
    out: Annotated[Path, typer.Option(metavar="REPO", help="The server's model repository.")],
    target: Annotated[
        str | None, typer.Option(metavar="T", autocompletion=target_names, help="Which of several targets.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the model; default RECIPE-TARGET.")] = None,
    version: Annotated[int, typer.Option(min=1, help="Of the model.")] = 1,
    vnni: Annotated[
        bool, typer.Option("--vnni", help="The server's CPU has VNNI: its own 8-bit kernels are exact, and faster.")
    ] = False,
    as_json: Annotated[bool, json_option("where it was written")] = False,
) -> None:
    """Write a target as a model of NVIDIA's Triton Inference Server, for its ONNX Runtime or its TensorRT."""
    write = import_module("intaglio.exporters.deploy.triton").write_model
    _print_written(write(folder, out, target=target, name=name, version=version, vnni=vnni), as_json)


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


def _changed(path: Path, sets: list[str], inserts: list[str]) -> Recipe:
    """The recipe with what the command line says otherwise."""
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
            raise RecipeError(f"{named}: an option {len(option_path)} names deep, the most that is read is {DEEPEST}")
        parsed: JsonValue = read_yaml(value, named)  # type: ignore[assignment]  # plain values
        recipe = recipe.with_option(step_name, tuple(option_path), parsed)
    return recipe


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _described(name: str) -> Explanation | str:
    """Or why it cannot be imported."""
    try:
        return explain_pass(name)
    except IntaglioError as error:
        return str(error)


def _read_metrics(folder: Path) -> dict[str, dict[str, object]]:
    """Return the metrics by target. Raises RecipeError for a folder that has none."""
    read_files = import_module("intaglio.exporters.report.report").metrics_of_files
    reports = [folder] if (folder / METRICS_FILE).exists() else [f.parent for f in folder.glob(f"*/{METRICS_FILE}")]
    try:
        there = sorted({*compiled_folders(folder), *reports})
    except RecipeError:
        there = sorted(reports)
        if not there:
            raise
    return {
        each.resolve().name: read_json_object(each / METRICS_FILE)
        if (each / METRICS_FILE).exists()
        else read_files(each)
        for each in there
    }
