"""Define the commands `intaglio kit` and `intaglio triton`."""

from pathlib import Path
from typing import Annotated

import typer

from intaglio.pipeline.cli.console import print_json
from intaglio.pipeline.cli.options import json_option
from intaglio.pipeline.cli.printing import say
from intaglio.pipeline.files import printable
from intaglio.pipeline.formats.target import target_names

MOST_VERSION = (1 << 63) - 1
"""Largest version that Triton reads, as an int64."""


def kit_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of one of its targets.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="T", autocompletion=target_names, help="TensorRT target, if the run has several."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Archive; default RECIPE-TARGET.tar.gz.")] = None,
    as_json: Annotated[bool, json_option("the path of the written file")] = False,
) -> None:
    """Pack a TensorRT target into an archive, from which a device with only TensorRT builds and checks the engine."""
    from intaglio.exporters.deploy import kit

    _print_written(kit.write_kit(folder, out, target), as_json)


def _print_written(file: Path, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(file)})
    else:
        say(printable(file))


def triton_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of one of its targets.")],
    out: Annotated[Path, typer.Option(metavar="REPO", help="The server's model repository.")],
    target: Annotated[
        str | None, typer.Option(metavar="T", autocompletion=target_names, help="Target, if the run has several.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the model; default RECIPE-TARGET.")] = None,
    version: Annotated[int, typer.Option(min=1, max=MOST_VERSION, help="Version of the model.")] = 1,
    vnni: Annotated[
        bool, typer.Option("--vnni", help="Write the faster 8-bit kernels of CPUs with VNNI, for a server that has it.")
    ] = False,
    as_json: Annotated[bool, json_option("the path of the written file")] = False,
) -> None:
    """Write a target as a model of NVIDIA's Triton Inference Server, for its ONNX Runtime or TensorRT backend."""
    from intaglio.exporters.deploy import triton

    write = triton.write_model
    _print_written(write(folder, out, target=target, name=name, version=version, vnni=vnni), as_json)
