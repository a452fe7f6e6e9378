"""Speed in ONNX Runtime on this CPU: our graphs beside float32, torch's exporter and other quantizers, in one table.

    python samples/benchmarks/speed.py [emoji-dit emoji-unet unet dit-xl terrain] [--threads 1,2] [--json]

`emoji-dit` and `emoji-unet` are the sample models. `unet` is convolutional, 128 and 256 channels at 32 x 32; `dit-xl`
has the width of DiT-XL/2 (1152) and one block unless --depth says otherwise; both have random weights. `terrain` is a
network that others trained (`_terrain.py`), left out where its package is not unpacked.

All graphs of a model are called by turns in one process with the same session options, so other jobs on the machine
disturb all of them alike. A speed is the median of each round's own ratio to the fastest float32 graph, which is ours
or that of torch's exporter. Ratios are of CPU time with one thread, which other jobs stretch less, and by the clock
with more threads. SQNR and PSNR in dB compare the prediction of the call in the middle with the float32 graph; the peak
of PSNR is the range of the prediction. Every layer has the first of the wanted formats that it admits, weights are
rounded to nearest, and nothing is trained; convolutions of transformers stay in float, as other quantizers leave them.
"""

import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from _speed_graphs import (
    FLOATS,
    FORMATS,
    HERE,
    MODELS,
    PEERS,
    calls,
    graphs_of,
    middle_step,
    model_in,
    quantized,
    run,
)
from _terrain import WEIGHTS
from full_size import alone, folder
from numpy.typing import NDArray

from intaglio.pipeline.artifacts.graph import STEP_INPUT
from intaglio.pipeline.artifacts.keys import GRAPH
from intaglio.pipeline.files import one_line
from intaglio.pipeline.model.checkpoint import Checkpoint

COLUMNS = ("float32", "torch.onnx.export", *FORMATS, *(name for name in PEERS if name not in FLOATS))
TARGETS = {("emoji-dit", "W8A8"): 2.0, ("emoji-unet", "W8A8"): 2.0}
"""Speeds to reach with one thread on a CPU with VNNI, compared with the fastest float32 graph."""


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    depth: Annotated[int, typer.Option(help="blocks of dit-xl")] = 1,
    rounds: Annotated[int, typer.Option(help="calls of each graph, by turns")] = 15,
    rows: Annotated[int, typer.Option(help="rows of a call; a sample with guidance has two")] = 2,
    threads: Annotated[str, typer.Option(help="threads of a session")] = "1,2",
    peers: Annotated[bool, typer.Option(help="compare with other quantizers")] = True,
    layers: Annotated[bool, typer.Option(help="also run every layer alone, by fused kernels and as written")] = False,
    work: Annotated[Path | None, typer.Option(help="a folder for all files; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    if unknown := sorted(set(models or ()) - set(MODELS)):
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(MODELS)}")
    found, failed, kernels, apart = [], {}, {}, {}
    with folder(work) as place:
        for model in models or MODELS:
            if model == "terrain" and not WEIGHTS.exists():
                failed[model] = f"{WEIGHTS} is not there: real_networks.py --install downloads it"
                continue
            here = place / (f"{model}-{depth}" if model == "dit-xl" else model)
            graphs, why = alone(graphs_of, model, depth, here, rows, peers=peers)
            for count in map(int, threads.split(",")):
                found += [{"model": model, **row} for row in alone(timed, graphs, model, here, rounds, rows, count)]
            why |= {name: "ONNX Runtime does not load it" for name in graphs if not any_row(found, model, name)}
            failed |= {f"{model}, {name}": text for name, text in why.items()}
            kernels[model] = alone(times_of_operators, graphs, model, here, rows)
            apart |= {model: alone(layer_by_layer, model, here)} if layers else {}
    if as_json:
        figures = {"figures": found, "failed": failed, "kernels": kernels, "layers": apart}
        print(json.dumps({"machine": machine()} | figures))
        return
    further = [f"{model}, {name}: {value:.2e}" for model, each in apart.items() for name, value in each.items()]
    print("\n\n".join([machine(), table(found), missed(found, kernels), "\n".join([*notes(failed), *further])]))


def any_row(found: list[dict[str, Any]], model: str, graph: str) -> bool:
    return any((row["model"], row["graph"]) == (model, graph) for row in found)


def machine() -> str:
    """Return one line: the CPU, whether its own 8-bit kernels are exact, and the versions."""
    from intaglio.exporters.runtimes.onnxruntime.session import exact_kernels

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cpu = (
        f"{named.get('model name', platform.processor())}, family {named.get('cpu family')} model {named.get('model')}"
    )
    flags = named.get("flags", "").split()
    vnni = ", ".join(flag for flag in flags if "vnni" in flag or flag == "amx_int8") or "no VNNI"
    settings = ", ".join(f"{key}={value}" for key, value in exact_kernels().items()) or "ONNX Runtime's own"
    import onnxruntime

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "nvidia-modelopt"))
    return f"CPU: {cpu} ({vnni}); 8-bit kernels: {settings}; onnxruntime {onnxruntime.__version__}, {libraries}"


def timed(
    graphs: Mapping[str, Path], model: str, place: Path, rounds: int, rows: int, threads: int
) -> list[dict[str, Any]]:
    """Time the graphs by turns, after one round that is not counted."""
    call = next(calls(model, place, rows)) | {STEP_INPUT: np.array(middle_step(model, place))}
    sessions, feeds = {}, {}
    for name, path in graphs.items():
        try:
            session = opened(name, path, threads=threads)
            feeds[name] = {entry.name: call[entry.name] for entry in session.get_inputs()}
            session.run(None, feeds[name])
        except Exception as e:  # its errors have no common class
            typer.echo(f"{model}, {name}: {one_line(e)}", err=True)
            continue
        sessions[name] = session
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    outputs = {}
    for _ in range(rounds + 1):
        for name, session in sessions.items():
            began = time.perf_counter(), time.process_time()
            outputs[name] = session.run(None, feeds[name])[0]
            times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    clock = {name: [each[threads == 1] for each in spent[1:]] for name, spent in times.items()}
    fastest = min((name for name in FLOATS if name in clock), key=lambda name: statistics.median(clock[name]))
    found = []
    for name, mine in clock.items():
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(clock[fastest], mine, strict=True)], n=4)
        row = {"graph": name, "threads": threads, "rows": rows, "milliseconds": 1e3 * statistics.median(mine)}
        row |= {"speed": ratio, "speed_quartiles": [low, high], "fastest_float": fastest, "bytes": size(graphs[name])}
        if name != "float32":
            row |= decibels(outputs[name], outputs["float32"])
        found.append(row)
    return found


def opened(name: str, path: Path, threads: int, profile: Path | None = None) -> Any:
    """Open a graph in a session; our float32 graph as the steps of a recipe open it."""
    from intaglio.exporters.runtimes.onnxruntime.runtime import with_kernels
    from intaglio.exporters.runtimes.onnxruntime.session import open_session

    model = with_kernels(path) if name == "float32" else None
    return open_session(model or path, threads=threads, profile=profile, data=path.parent if model else None)


def times_of_operators(graphs: Mapping[str, Path], model: str, place: Path, rows: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each operator in one call on one thread, for the float32 graphs and ours."""
    call = next(calls(model, place, rows)) | {STEP_INPUT: np.array(middle_step(model, place))}
    found = {}
    for name in (*FLOATS, *FORMATS):
        if name not in graphs:
            continue
        session = opened(name, graphs[name], threads=1, profile=place / "kernels")
        inputs = {entry.name: call[entry.name] for entry in session.get_inputs()}
        for _ in range(CALLS + 1):
            session.run(None, inputs)
        file = Path(session.end_profiling())
        kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in json.loads(file.read_text()):
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                kernels[event["name"], event["args"]["op_name"]].append(event["dur"] / 1e3)
        file.unlink()
        operators: dict[str, float] = defaultdict(float)
        for (_, operator), spent in kernels.items():
            operators[operator] += statistics.median(spent[len(spent) // (CALLS + 1) :]) * len(spent) / (CALLS + 1)
        found[name] = dict(sorted(operators.items(), key=lambda each: -each[1]))
    return found


CALLS = 7
"""Profiled calls, after one that is not counted."""


def decibels(y: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    """Return SQNR, and PSNR with the range of the reference as the peak."""
    error = float(np.square(y - reference).mean())
    if error == 0:
        return {"sqnr_db": float("inf"), "psnr_db": float("inf")}
    signal, peak = float(np.square(reference).mean()), float(reference.max() - reference.min()) ** 2
    return {"sqnr_db": 10 * float(np.log10(signal / error)), "psnr_db": 10 * float(np.log10(peak / error))}


def layer_by_layer(model: str, place: Path) -> dict[str, float]:
    """Compare fused kernels with the graph as it is written: every layer alone on the same input, and the whole."""
    import torch

    from intaglio.exporters.runtimes.calls import graph_denoise
    from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
    from intaglio.exporters.verify.layer_run import run_layer
    from intaglio.pipeline.model.calls import denoise_with

    graph = run(model, place, quantized(model, FORMATS["W8A8"]))[GRAPH]
    denoiser = Checkpoint.resolve(model_in(model, place), HERE).open()
    entered: dict[str, torch.Tensor] = {}
    for name in graph.nodes:
        layer = denoiser.module.get_submodule(name)
        layer.register_forward_hook(lambda _, args, __, name=name: entered.__setitem__(name, args[0]))
    call = {name: torch.from_numpy(value) for name, value in next(calls(model, place, 2)).items()}
    with torch.no_grad():
        whole = denoise_with(denoiser.module, denoiser)(call).numpy()
    apart = []
    for name, x in entered.items():
        fused, plain = (run_layer(graph, name, x.numpy(), OnnxRuntime(optimize))[0] for optimize in (True, False))
        apart.append(relative(fused, plain))
    fused, plain = (graph_denoise(graph, OnnxRuntime(optimize))(call).numpy() for optimize in (True, False))
    return {
        "layers alone, fused to unfused, median": statistics.median(apart),
        "layers alone, fused to unfused, largest": max(apart),
        "the whole graph, fused to unfused": relative(fused, plain),
        "the whole graph, fused to float32": relative(fused, whole),
        "the whole graph, unfused to float32": relative(plain, whole),
    }


def relative(y: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """L2 error."""
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def size(path: Path) -> int:
    """Return the bytes of the model and of the files beside it that hold its tensors."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def table(found: list[dict[str, Any]]) -> str:
    """Write one row for each model and number of threads: milliseconds, speed, and dB of SQNR and PSNR."""
    lines = [["model, threads", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for key in dict.fromkeys((row["model"], row["threads"]) for row in found):
        cells = {row["graph"]: cell(row) for row in found if (row["model"], row["threads"]) == key}
        lines.append([f"{key[0]}, {key[1]}", *(cells.get(name, "-") for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(row: Mapping[str, Any]) -> str:
    quality = "" if row["graph"] in FLOATS else f", {row['sqnr_db']:.0f} / {row['psnr_db']:.0f} dB"
    return f"{row['milliseconds']:.1f} ms, {row['speed']:.2f}x{quality}"


def missed(found: list[dict[str, Any]], kernels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Write where the time goes in every model: the slowest operators of the float32 graphs and of ours."""
    lines = []
    for model, graphs in kernels.items():
        for name, operators in graphs.items():
            slowest = ", ".join(f"{operator} {ms:.2f}" for operator, ms in list(operators.items())[:7])
            lines.append(f"{model}, {name}: {sum(operators.values()):.1f} ms in operators: {slowest}")
    for row in found:
        wanted = TARGETS.get((row["model"], row["graph"]), 1.0 if row["graph"] in ("float32", *FORMATS) else 0.0)
        if row["threads"] == 1 and row["speed_quartiles"][1] < wanted:
            lines.append(f"{row['model']}, {row['graph']}: {row['speed']:.2f}x, and {wanted:.1f}x is the target")
    return "\n".join(lines)


def notes(failed: Mapping[str, str]) -> list[str]:
    return [f"{name}: {why}" for name, why in failed.items()]


if __name__ == "__main__":
    typer.run(main)
