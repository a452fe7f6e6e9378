"""The command `intaglio`: every option of a pass is set in the recipe or with --set, none exists here alone."""

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import JsonValue

from intaglio.pipeline.artifact import Outputs, State
from intaglio.pipeline.bench import Bench, EngineFigures
from intaglio.pipeline.context import Context, terminal
from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.graph import Graph
from intaglio.pipeline.keys import GRAPH, LINT, MODEL, PLAN, PROFILE, TARGET
from intaglio.pipeline.manifest import Manifest, compiled_folders
from intaglio.pipeline.plan import QuantPlan
from intaglio.pipeline.processes import processes
from intaglio.pipeline.profile import Profile
from intaglio.pipeline.publish import made_from
from intaglio.pipeline.recipe import Recipe, Step
from intaglio.pipeline.registry import find_pass, named_passes
from intaglio.pipeline.runner import PlannedStep, StepEvent, compile, plan
from intaglio.pipeline.store import Store
from intaglio.pipeline.target import Target, load_target, target_names

INTERRUPTED = 130
REPORT_FILE = "report.html"
METRICS_FILE = "metrics.json"

app = typer.Typer(
    help="Compiles a diffusion model into quantized ONNX graphs and TensorRT engines.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

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


@app.command("run")
def run_command(
    recipe: RecipePath,
    set_: SetOption = [],  # noqa: B006 - typer reads it, nothing changes it
    insert: InsertOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Results, one folder a target.")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Run a recipe. Run again after an interruption, it goes on where it was."""
    with _reported():
        _log_to_terminal()
        changed = _changed(recipe, set_, insert)
        folder = Path("build") / recipe.stem if out is None else out
        compiled = compile(changed, Store(store), out=folder, on_step=_log_step, base=recipe.parent)
        for target, result in compiled.items() if processes().first else ():
            assert result.folder is not None  # `out` was given
            report = result.folder / REPORT_FILE
            print(f"{target}: {report if report.is_file() else result.folder}")


@app.command("plan")
def plan_command(
    recipe: RecipePath,
    set_: SetOption = [],  # noqa: B006
    insert: InsertOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Say what a run would take from the store, what it would do, and how long that took before."""
    with _reported():
        planned = plan(_changed(recipe, set_, insert), Store(store), base=recipe.parent)
        for target, steps in planned.items():
            _print_table(target, ("step", "", "took, or will take"), [_plan_row(step) for step in steps])


@app.command("passes")
def passes_command() -> None:
    """List the passes, with their options."""
    with _reported():
        for name in named_passes():
            print(name)
            for line in _described(name):
                print(f"    {line}")


@app.command("targets")
def targets_command(
    name: Annotated[str | None, typer.Argument(metavar="TARGET", help="One of them, with all facts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print {target: all that is known of it} as JSON.")] = False,
) -> None:
    """List the targets a recipe can name, or say all that is known of one, and where each fact comes from."""
    with _reported():
        targets = [load_target(each) for each in (target_names() if name is None else [name])]
        if as_json:
            print(json.dumps({target.name: target.model_dump(mode="json") for target in targets}, indent=1))
        elif name is None:
            columns = ("target", "opset", "linear", "conv", "device", "memory", "GB/s", "fp16 TFLOPS", "int8 TOPS")
            _print_table("", columns, [row for target in targets for row in _target_rows(target)])
        else:
            _print_target(targets[0])


@app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What a run was given as --out.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print {target: metrics} as JSON.")] = False,
) -> None:
    """Print the metrics of every target in a folder of results."""
    with _reported():
        metrics = _read_metrics(folder)
        if as_json:
            print(json.dumps(metrics, indent=1))
            return
        flat = {target: dict(_flattened(found)) for target, found in metrics.items()}
        names = list(dict.fromkeys(name for found in flat.values() for name in found))
        rows = [(name, *(found.get(name, "") for found in flat.values())) for name in names]
        _print_table(str(folder), ("metric", *flat), rows)


def _print_rules(wanted: bool) -> None:
    """The command needs no model then: it ends here."""
    if wanted:
        with _reported():
            rules = _module_of("lint").RULES
        for rule in rules:
            print(f"{rule.name:<18} {rule.level:<8} {rule.finds}")
        raise typer.Exit


@app.command("lint")
def lint_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX model, by whomever.")],
    target: Annotated[str, typer.Option(metavar="T", help="What it is to run on; see `intaglio targets`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    rules: Annotated[
        bool,
        typer.Option("--rules", callback=_print_rules, is_eager=True, help="List the rules, and what each looks for."),
    ] = False,
) -> None:
    """Say what the target would refuse, compute wrongly or not on integers. Exits with 1 where there are errors."""
    with _reported():
        artifacts: Outputs = {GRAPH: Graph(model, {}, {}), TARGET: load_target(target)}
        step = find_pass("lint", Path()).pass_class.model_validate({"refuse": "nothing"})
        found = State(step.run(State(artifacts, reader="lint"), Context(scratch=Path())), reader="lint")[LINT]
        if as_json:
            print(found.to_json())
        else:
            rows = [(f.level, f.rule, f.node, f"{f.message}: {f.fix}") for f in found.findings]
            _print_table(f"{model}: {len(rows)} findings", ("", "rule", "node", "what to do"), rows)
        if found.at("error"):
            raise typer.Exit(1)


@app.command("profile")
def profile_command(
    folder: Folder,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the call that is timed.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Calls that are timed.")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="Threads of ONNX Runtime, 0 for all cores.")] = None,
    trtexec: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What trtexec --exportProfile wrote: read, nothing is run.")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What trtexec --exportLayerInfo wrote, beside --trtexec.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the times as JSON, for assign.profile.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the times as JSON.")] = False,
) -> None:
    """Say how long each layer of a compiled graph takes, which `assign.profile` can count with."""
    with _reported(), tempfile.TemporaryDirectory() as scratch:
        if not (folder / "graph.json").is_file():
            raise RecipeError(f"{folder}: no graph.json in it: give one target's folder of what `intaglio run` wrote")
        found = find_pass("profile", Path()).pass_class
        graph, plan, target = Graph.load(folder), QuantPlan.load(folder), load_target(folder.resolve().name)
        if trtexec is not None:
            profile = _module_of("profile").read_trtexec(graph, plan, trtexec, layers)
        else:
            if not found.applies(target):
                raise RecipeError(f"{target.name} is not for ONNX Runtime: give trtexec's --exportProfile as --trtexec")
            given = {"rows": rows, "runs": runs, "threads": threads}
            step = found.model_validate({name: n for name, n in given.items() if n is not None})
            state = State({GRAPH: graph, PLAN: plan, TARGET: target}, reader="profile")
            profile = State(step.run(state, Context(scratch=Path(scratch), seed=0)), reader="profile")[PROFILE]
        if out is not None:
            out.write_text(profile.to_json(), encoding="utf-8")
        if as_json:
            print(profile.to_json(), end="")
        elif out is None:
            _print_profile(str(folder), profile)


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
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; those of the recipe if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 8,
    compare: Annotated[bool, typer.Option("--compare", help="Full precision above, from the same noise.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Draw samples with a compiled graph, in ONNX Runtime, as its recipe samples."""
    with _reported(), tempfile.TemporaryDirectory() as scratch:
        import intaglio
        from intaglio.pipeline import pictures

        pictures.check_file(out)
        checkpoint = made_from(folder, Store(store), MODEL)
        steps = steps or checkpoint.ref.sampling_steps
        wanted = pictures.Drawing(samples, steps, tuple(rows), prompt, pipeline, compare)
        drawn = pictures.draw(checkpoint, intaglio.load(folder), wanted, Context(Path(scratch), seed))
        pictures.save_picture(drawn, out)
        distances = pictures.distances(drawn)
        if as_json:
            print(
                json.dumps({"out": str(out), "samples": samples, "steps": steps, "seed": seed, **distances}, indent=1)
            )
            return
        print(f"{out}: {samples} samples, {steps} steps", end="")
        print(", {psnr_db:.2f} dB to full precision, {psnr_db_min:.2f} at worst".format(**distances) if compare else "")


@app.command("bench")
def bench_command(
    folder: Folder,
    rounds: Annotated[int, typer.Option(min=1, help="Trajectories of each engine, by turns.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a call; one sample with guidance has two.")] = 2,
    threads: Annotated[int, typer.Option(min=0, help="Threads of ONNX Runtime, 0 for all cores.")] = 1,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say how fast, how large and how hungry for memory the graph is, beside full precision in the same run."""
    with _reported(), tempfile.TemporaryDirectory() as scratch:
        run = _module_of("benchmark").bench
        found: Bench = run(folder, Store(store), Context(Path(scratch)), rounds=rounds, rows=rows, threads=threads)
        if as_json:
            print(found.to_json(), end="")
        else:
            _print_bench(str(folder), found)


def _module_of(name: str) -> ModuleType:
    """Where the pass of this name is, and what else belongs to it."""
    return sys.modules[find_pass(name, Path()).pass_class.__module__]


@app.command("kit")
def kit_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="One target of what a run wrote, or all of it.")],
    target: Annotated[str | None, typer.Option(metavar="T", help="Which of several targets for TensorRT.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The archive; default RECIPE-TARGET.tar.gz.")] = None,
) -> None:
    """Pack a target for TensorRT for a device that has TensorRT alone: it builds the engine, checks and times it."""
    with _reported():
        print(import_module("intaglio.exporters.kit").write_kit(folder, out, target))


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="One target of what a run wrote, or all of it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print {folder: what departs} as JSON.")] = False,
) -> None:
    """Say whether every file is the one that the run delivered, by its manifest. Exits with 1 where one is not."""
    with _reported():
        found = {each: list(Manifest.read(each).departures(each)) for each in compiled_folders(folder)}
        if as_json:
            print(json.dumps({str(each): problems for each, problems in found.items()}, indent=1))
        else:
            for each, problems in found.items():
                print("\n".join([f"{each}: {'not what was delivered' if problems else 'as delivered'}", *problems]))
        if any(found.values()):
            raise typer.Exit(1)


@app.command("triton")
def triton_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="One target of what a run wrote, or all of it.")],
    out: Annotated[Path, typer.Option(metavar="REPO", help="The server's model repository.")],
    target: Annotated[str | None, typer.Option(metavar="T", help="Which of several targets.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the model; default RECIPE-TARGET.")] = None,
    version: Annotated[int, typer.Option(min=1, help="Of the model.")] = 1,
    vnni: Annotated[
        bool, typer.Option("--vnni", help="The server's CPU has VNNI: its own 8-bit kernels are exact, and faster.")
    ] = False,
) -> None:
    """Write a target as a model of NVIDIA's Triton Inference Server, for its ONNX Runtime or its TensorRT."""
    with _reported():
        write = import_module("intaglio.exporters.triton").write_model
        print(write(folder, out, target=target, name=name, version=version, vnni=vnni))


@contextmanager
def _reported() -> Iterator[None]:
    """Ends the command with one message and its exit code, without a traceback, where the user can act on it."""
    try:
        yield
    except IntaglioError as error:
        print(f"intaglio: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("intaglio: interrupted: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _log_to_terminal() -> None:
    handler: logging.Handler = logging.StreamHandler()
    if terminal().is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(console=terminal(), show_path=False, show_level=False, markup=False)
    logger = logging.getLogger("intaglio")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if processes().first else logging.WARNING)


def _log_step(event: StepEvent) -> None:
    place = event.place
    match event.status:
        case "runs":
            what = "runs"
        case "done":
            what = f"done in {_duration(event.seconds)}"
        case "hit":
            what = f"is in the store (took {_duration(event.seconds)})"
    logging.getLogger(__name__).info("%s %d/%d %s %s", place.target, place.position, place.count, place.step, what)


def _changed(path: Path, sets: list[str], inserts: list[str]) -> Recipe:
    """The recipe with what the command line says otherwise."""
    recipe = Recipe.read(path)
    for text in inserts:
        place, equals, uses = text.partition("=")
        if not (place.startswith("after:") and equals and uses):
            raise RecipeError(f"--insert {text}: write it as after:STEP=PASS")
        step = Step.model_validate(_beside_recipe(uses, path))
        recipe = recipe.insert(step, after=place.removeprefix("after:"))
    for text in sets:
        place, equals, value = text.partition("=")
        step_name, *option_path = place.split(".")
        if not (equals and option_path and all(option_path)):
            raise RecipeError(f"--set {text}: write it as STEP.FIELD=VALUE")
        recipe = recipe.with_option(step_name, tuple(option_path), _parsed(value, text))
    return recipe


def _beside_recipe(uses: str, recipe: Path) -> str:
    """A file is given relative to where the command runs; in the recipe it is relative to the recipe."""
    file, _, class_name = uses.rpartition(":")
    if not file.endswith(".py"):
        return uses
    return f"./{Path(os.path.relpath(file, recipe.parent)).as_posix()}:{class_name}"


def _parsed(value: str, text: str) -> JsonValue:
    try:
        parsed: JsonValue = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}: the value is not YAML") from error
    return parsed


def _plan_row(step: PlannedStep) -> tuple[str, str, str]:
    status = {"hit": "in the store", "runs": "runs", "depends": "runs if an earlier output changes"}[step.status]
    if step.seconds is not None:
        return step.step, status, _duration(step.seconds)
    return step.step, "runs", "seconds" if step.estimate_s is None else f"about {_duration(step.estimate_s)}"


def _target_rows(target: Target) -> Iterator[tuple[str, ...]]:
    """A row for each device, and one where there is none."""
    formats = (_in_short(target.formats[op]) for op in ("linear", "conv"))
    about: tuple[str, ...] = (target.name, str(target.opset_max), *formats)
    for device in target.devices:
        figures = (device.bandwidth_gb_s, device.fp16_tflops, device.int8_tops)
        yield *about, device.description, f"{device.memory_gb:g} GB", *(f"{figure:g}" for figure in figures)
        about = ("",) * len(about)
    if not target.devices:
        yield *about, "-", *("",) * 4


def _in_short(schemes: Sequence[str]) -> str:
    """By weight and input alone: `w8a8_token, w8a8s_step` -> `w8a8`"""
    return " ".join(dict.fromkeys(found[0] for scheme in schemes if (found := re.match(r"w\d+a\d+", scheme))))


def _print_target(target: Target) -> None:
    limits = target.limits
    lines = [
        f"{target.name}: {target.description}",
        f"runtime     {target.runtime}, opsets up to {target.opset_max}",
        *(f"{op:<11} {', '.join(schemes)}" for op, schemes in target.formats.items()),
        f"groups of   {', '.join(map(str, target.group_sizes))} input features",
        f"codes       {target.activation_dtype} inputs; reads {', '.join(limits.code_types)}",
        f"integers    {', '.join(limits.integer_products) or 'no product'}",
    ]
    if target.kernels:
        lines.append(
            f"kernels     {', else '.join(kernels.name for kernels in target.kernels)}: the first that are exact"
        )
    for device in target.devices:
        figures = f"{device.memory_gb:g} GB, {device.bandwidth_gb_s:g} GB/s"
        peak = f"{device.fp16_tflops:g} TFLOPS in float16, {device.int8_tops:g} TOPS in int8"
        lines += ["", f"{device.description}, compute capability {device.compute_capability}: {figures}, {peak}"]
        lines.append(f"    [{device.source}]")
    for fact in target.facts:
        lines += ["", fact.fact, f"    [{fact.source}]"]
    print("\n".join(lines))


def _print_profile(title: str, profile: Profile) -> None:
    """The longest first; what belongs to no layer below."""
    layers = sorted(profile.layers.items(), key=lambda item: -item[1].microseconds)
    rows = [(name, time.scheme, f"{time.microseconds:,.1f}", f"{time.bytes:,}") for name, time in layers]
    rest = [(name, "no layer", f"{microseconds:,.1f}", "") for name, microseconds in profile.rest_microseconds.items()]
    missing = [(name, "no kernel", "", "") for name in profile.missing]
    called = "" if profile.rows is None else f" of {profile.rows} rows"
    title = f"{title}: {profile.made_by}, medians of {profile.runs} calls{called}"
    _print_table(title, ("layer", "scheme", "µs", "bytes"), [*rows, *rest, *missing])


def _print_bench(title: str, bench: Bench) -> None:
    """A column for each engine, the ratios below, then what was not measured."""

    def mega(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:,.2f} MB"

    def row(name: str, text: Callable[[EngineFigures], str]) -> tuple[str, ...]:
        return name, *map(text, bench.engines.values())

    rows = [
        row("files", lambda e: mega(e.file_bytes)),
        row("load, first in its process", lambda e: f"{e.load_ms:,.0f} ms"),
        row("memory, resident", lambda e: mega(e.resident_bytes)),
        row("memory, peak", lambda e: mega(e.peak_bytes)),
        row("call, median", lambda e: f"{e.latency_ms:,.2f} ms"),
        row("call, quartiles", lambda e: "{:,.2f} to {:,.2f} ms".format(*e.latency_ms_quartiles)),
        row("call, CPU time", lambda e: f"{e.cpu_ms:,.2f} ms"),
        row(f"trajectory of {bench.steps} steps", lambda e: f"{e.trajectory_ms:,.1f} ms"),
    ]
    run = f"{bench.provider}, {bench.rows} rows, {bench.threads or 'all'} threads, {bench.rounds} rounds"
    _print_table(f"{title}: {run}", ("", *bench.engines), rows)
    print(f"trajectory {bench.trajectory_speedup_fp32:.2f}x as fast as float32", end="")
    print(f" ({bench.trajectory_cpu_speedup_fp32:.2f}x by CPU time)", end="")
    if bench.peak_memory_ratio is not None:
        print(f", peak memory {bench.peak_memory_ratio:.2f}x smaller", end="")
    print(f", files {bench.size_ratio_fp16:.2f}x smaller than fp16")
    for name, why in bench.left_out.items():
        print(f"{name}: left out, {why}")
    for name, command in bench.filled_by.items():
        print(f"{name}: not measured here: {command}")


def _described(name: str) -> Iterator[str]:
    """The first line of its docstring, then one line an option; or why it cannot be imported."""
    try:
        pass_class = find_pass(name, Path()).pass_class
    except IntaglioError as error:
        yield str(error)
        return
    yield (pass_class.__doc__ or "").strip().partition("\n")[0]
    for option, info in pass_class.model_fields.items():
        default = "required" if info.is_required() else f"= {info.get_default(call_default_factory=True)!r}"
        yield f"{option}: {_type_name(info.annotation)} {default}  {info.description or ''}".rstrip()


def _type_name(annotation: object) -> str:
    """`tuple[int, ...]`, `Budget`, `'device' | 'host'`"""
    inner = get_args(annotation)
    match get_origin(annotation):
        case None:
            return "..." if annotation is Ellipsis else getattr(annotation, "__name__", str(annotation))
        case origin if origin is Annotated:
            return _type_name(inner[0])
        case origin if origin is Literal:
            return " | ".join(map(repr, inner))
        case origin if origin in (Union, UnionType):
            return " | ".join(map(_type_name, inner))
        case origin:
            return f"{origin.__name__}[{', '.join(map(_type_name, inner))}]"


def _read_metrics(folder: Path) -> dict[str, JsonValue]:
    """target -> metrics"""
    files = sorted(folder.glob(f"*/{METRICS_FILE}"))
    if not files:
        raise RecipeError(f"{folder}: no */{METRICS_FILE} in it: give the folder that `intaglio run --out` wrote")
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _flattened(metrics: JsonValue, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `("a.b", "1")`"""
    match metrics:
        case dict():
            for name, inner in metrics.items():
                yield from _flattened(inner, f"{prefix}.{name}" if prefix else name)
        case float():
            yield prefix, f"{metrics:.4g}"
        case str():
            yield prefix, metrics
        case _:
            yield prefix, json.dumps(metrics)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
