"""Define the commands `intaglio show`, `intaglio diff` and `intaglio sample`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from intaglio.pipeline.artifacts.keys import MODEL
from intaglio.pipeline.artifacts.verification import dotted
from intaglio.pipeline.cli.console import figure, print_json, print_table
from intaglio.pipeline.cli.options import DEFAULT_STORE, Folder, StoreOption, json_option
from intaglio.pipeline.cli.printing import say
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import read_json_object
from intaglio.pipeline.output_files import check_output, write_output
from intaglio.pipeline.runs.manifest import compiled_folders
from intaglio.pipeline.runs.publish import made_from
from intaglio.pipeline.runs.store import Store

METRICS_FILE, WARNINGS = "metrics.json", "warnings"


def show_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of one of its targets.")],
    as_json: Annotated[bool, json_option("{target: metrics}")] = False,
) -> None:
    """Print the metrics of every target in a folder of results.

    Without a report, print the metrics that the other files contain.
    """
    metrics = _read_metrics(folder)
    if as_json:
        print_json(metrics)
        return
    flat = {target: {n: figure(each) for n, each in dotted(found)} for target, found in metrics.items()}
    names = dict.fromkeys(name for found in flat.values() for name in found if name != WARNINGS)
    rows = [(name, *(found.get(name, "") for found in flat.values())) for name in names]
    print_table(str(folder), ("metric", *flat), rows)
    for target, found in metrics.items():
        listed = found.get(WARNINGS)
        for warning in listed if isinstance(listed, list) else ():
            say(f"{target}: WARNING: {warning}")


def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run, or of one of its targets.")],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="The other folder; targets with the same name are compared.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page, such as diff.html.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("all that differs")] = False,
) -> None:
    """Compare two compiled folders: figures, layers, samples, recipes and versions."""
    if out is not None:
        check_output(out)
    from intaglio.exporters.report import difference

    found = difference.compare(first, second, Store(store))
    if out is not None:
        write_output(out, difference.page(found))
    if as_json:
        print_json([each.to_json() for each in found])
        return
    for each in found:
        print_table(each.title, ("", "A", "B", "B - A", ""), each.rows())


def sample_command(
    folder: Folder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture, such as grid.png.")],
    rows: Annotated[
        list[int],
        typer.Option(
            "--class", "--row", metavar="N", help="Class, or row of the recorded conditions; repeat it to draw several."
        ),
    ] = [],  # noqa: B006
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text prompt; it needs --pipeline.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="DIR", help="The whole diffusers pipeline for --prompt: its folder or hub id.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; those of the recipe if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    samples: Annotated[int, typer.Option(help="Number of samples to draw.")] = 8,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also draw in full precision, from the same noise, above the others.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, json_option("the figures")] = False,
) -> None:
    """Draw samples with a compiled graph in ONNX Runtime, with the sampler settings of its recipe."""
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
        if compare:
            say(", PSNR {psnr_db:.2f} dB to full precision, {psnr_db_min:.2f} at worst".format(**distances), end="")
            say(" (SQNR {sqnr_db:.2f} and {sqnr_db_min:.2f})".format(**distances), end="")
            say(", cosine similarity {cosine:.6f} and {cosine_min:.6f}".format(**distances), end="")
        say("")


def _read_metrics(folder: Path) -> dict[str, dict[str, object]]:
    """Return the metrics by target. Raises RecipeError for a folder that has none."""
    from intaglio.exporters.report import report

    read_files = report.metrics_of_files
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
