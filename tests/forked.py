"""Runs a command in a process of its own, without the ten seconds of importing torch and diffusers.

The process is forked from one that has imported these libraries, and nothing of intaglio. So it reads modules, entry
points and versions as a process that was just started does.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

LIBRARIES = ["torch.export", "torch.onnx", "diffusers.models.transformers", "diffusers.models.unets", "onnxruntime"]


def run_forked(*arguments: str, site: Path, out: Path, err: Path) -> int:
    """Run `intaglio` with `site` first on its path, and what it prints in two files; return its exit code."""
    return _exit_code(start_forked(*arguments, site=site, out=out, err=err))


def start_forked(*arguments: str, site: Path, out: Path, err: Path) -> BaseProcess:
    """Start what `run_forked` runs, and return the process."""
    return _start(_run, arguments, site, out.absolute(), err.absolute())


def printed_forked(function: Callable[..., object], *arguments: object, out: Path, site: Path | None = None) -> str:
    """Call a function in a process of its own, with `site` first on its path; return what it prints, in `out` too."""
    assert _exit_code(_start(_call, function, arguments, out.absolute(), site)) == 0
    return out.read_text(encoding="utf-8")


def _start(target: Callable[..., object], *arguments: object) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _exit_code(process: BaseProcess) -> int:
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _call(function: Callable[..., object], arguments: tuple[object, ...], out: Path, site: Path | None) -> None:
    if site is not None:
        sys.path.insert(0, str(site))
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
    function(*arguments)
    sys.stdout.flush()


def _run(arguments: tuple[str, ...], site: Path, out: Path, err: Path) -> None:
    assert not [name for name in sys.modules if name.partition(".")[0] == "intaglio"]
    sys.path.insert(0, str(site))
    sys.dont_write_bytecode = True
    sys.argv = ["intaglio", *arguments]
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    from intaglio.pipeline.cli.app import main

    main()
