"""Speed, error and size on ONNX Runtime's CPU provider: ours against float32 and against other quantizers.

    python samples/benchmarks/ort_speed.py [dit unet] [--depth 28] [--json]

`dit` has the width of DiT-XL/2 (1152) and 4 blocks unless --depth says otherwise; `unet` is convolutional, 128 and 256
channels at 32 x 32. Weights are as diffusers initializes them, so errors compare roundings, not pictures. All graphs
are timed by turns in one process with the same session options. A speed is the median of each round's own ratio to
float32, with its quartiles, by the clock and by the CPU time of the process, which other jobs stretch less. The error
is that of one prediction, relative L2 to float32.

For `unet` every layer is also run alone, on what enters it in full precision, by ONNX Runtime's fused kernels and
without its optimizations: how far apart they are there, against how far apart the whole graphs are.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from full_size import alone, folder
from numpy.typing import NDArray

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.graph import STEP_INPUT
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, TRAJECTORY
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.runner import CompiledTarget

if TYPE_CHECKING:
    import torch

Feed = Mapping[str, NDArray[np.generic]]
TARGET = "onnxruntime-cpu"
QDQ = Step(uses="export-qdq")


def dit(depth: int) -> "torch.nn.Module":
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def unet(_: int) -> "torch.nn.Module":
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    )


MODELS: Mapping[str, Callable[[int], "torch.nn.Module"]] = {"dit": dit, "unet": unet}
SCHEMES: Mapping[str, Mapping[str, list[str]]] = {
    "dit": {"w8a8": ["w8a8_token"], "w4a8": ["w4a8_token", "w8a8_token"]},  # the other quantizers take no convolution
    "unet": {"w8a8": ["w8a8_token", "w8a8o8_step"]},
}


def main(
    models: Annotated[list[str] | None, typer.Argument(help=", ".join(MODELS))] = None,
    depth: Annotated[int, typer.Option(help="blocks of the transformer")] = 4,
    rounds: Annotated[int, typer.Option(help="calls of each graph, by turns")] = 15,
    batches: Annotated[str, typer.Option(help="rows of a call")] = "1,2",
    threads: Annotated[str, typer.Option(help="threads of a session")] = "1,2",
    work: Annotated[Path | None, typer.Option(help="a folder for all files; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    with folder(work) as place:
        for model in models or MODELS:
            here = place / (f"{model}-{depth}" if model == "dit" else model)
            rows, failed = measure(model, depth, here, rounds, numbers(batches), numbers(threads))
            found = alone(layer_by_layer, here) if model == "unet" else {}
            if as_json:
                print(json.dumps({"model": model, "figures": rows, "failed": failed, "layers": found}), flush=True)
            else:
                lines = [model, *map(line, rows), *(f"  {name}: {why}" for name, why in failed.items())]
                print("\n".join([*lines, *(f"  {what}: {value:.2e}" for what, value in found.items())]), flush=True)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def measure(
    model: str, depth: int, place: Path, rounds: int, batches: list[int], threads: list[int]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each graph, batch and number of threads; and what did not come to a graph, with the reason."""
    alone(make_checkpoint, model, depth, place / "checkpoint")
    graphs = {"float32": Path(alone(compiled, place, None)["path"])}
    graphs |= {f"intaglio {n}": Path(alone(compiled, place, s)["path"]) for n, s in SCHEMES[model].items()}
    failed = {}
    for name, peer in PEERS.items():
        path = place / "peers" / name / "model.onnx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                alone(peer, place, path)
            except Exception as e:  # whatever a peer raises is its result
                failed[name] = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
                continue
        graphs[name] = path
    rows = []
    for count in threads:
        rows += alone(timed, graphs, place, rounds, batches, count)["rows"]
    for name in sorted(graphs.keys() - {row["graph"] for row in rows}):
        failed[name] = "ONNX Runtime does not load it"
    return rows, failed


def make_checkpoint(model: str, depth: int, checkpoint: Path) -> dict[str, str]:
    import torch
    from diffusers import DDIMScheduler

    if not checkpoint.exists():
        torch.manual_seed(0)
        MODELS[model](depth).save_pretrained(checkpoint / ("unet" if model == "unet" else "transformer"))
        DDIMScheduler().save_pretrained(checkpoint / "scheduler")
    return {}


def compiled(place: Path, schemes: list[str] | None) -> dict[str, str]:
    """The float graph, or one whose layers have the first of the schemes that fits, rounded to nearest."""
    steps = [Step(uses="calibrate", options={"samples": 2}), Step(uses="export-float")]
    if schemes is not None:
        steps += [
            Step(uses="uniform", options={"schemes": schemes}),
            Step(uses="distill", options={"updates": 0}),
            Step(uses="merge"),
            QDQ,
        ]
    done = run(place, steps)
    return {"path": str(done[FLOAT_GRAPH if schemes is None else GRAPH].path)}


def run(place: Path, steps: list[Step]) -> CompiledTarget:
    """Compile the model in `place` with these steps."""
    recipe = Recipe(model=model_in(place), targets=(TARGET,), steps=tuple(steps))
    return compile(recipe, Store(place / "store"), base=Path(__file__).parent)[TARGET]


def model_in(place: Path) -> ModelRef:
    return ModelRef(path=str(place / "checkpoint"), sampling_steps=1)


def calls(place: Path, rows: int) -> Iterator[Feed]:
    """Inputs of the recorded call, cut or repeated to `rows`."""
    trajectory = run(place, [Step(uses="calibrate", options={"samples": 2})])[TRAJECTORY]
    for step in range(len(trajectory.timesteps)):
        call = {name: value.numpy() for name, value in trajectory.call(step).items()}
        yield {name: np.resize(value, (rows, *value.shape[1:])) for name, value in call.items()}


def float_graph(place: Path) -> Path:
    return Path(compiled(place, None)["path"])


def without_shapes(place: Path, folder: Path) -> Path:
    """The float graph without the shapes of its values: onnxruntime.quantization finds its own, and is at odds else."""
    import onnx

    model = onnx.load(float_graph(place))
    del model.graph.value_info[:]
    path = folder / "float.onnx"
    onnx.save(model, path, save_as_external_data=True, location="float.onnx.data")
    return path


def quantize_dynamic(place: Path, path: Path) -> dict[str, str]:
    """onnxruntime.quantization: integer weights by channel, inputs by tensor when it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        without_shapes(place, path.parent),
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )
    return {}


def quantize_static(place: Path, path: Path) -> dict[str, str]:
    """onnxruntime.quantization: the same weights, inputs with the ranges of the recorded call."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Recorded(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = calls(place, 2)

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    quantize_static(
        without_shapes(place, path.parent),
        path,
        Recorded(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )
    return {}


def modelopt_torch(place: Path, path: Path, *, dynamo: bool = False) -> dict[str, str]:
    """modelopt.torch: INT8_DEFAULT_CFG calibrated on the recorded call, exported by torch."""
    import modelopt.torch.quantization as mtq
    import torch
    from _torch_export import export, function_of

    call = {name: torch.from_numpy(value) for name, value in next(calls(place, 2)).items()}
    denoiser = function_of(Checkpoint.resolve(model_in(place), Path()).open(), list(call))
    with torch.no_grad():
        mtq.quantize(denoiser, mtq.INT8_DEFAULT_CFG, lambda module: module(*call.values()))
    export(denoiser, call, path, dynamo=dynamo, any_batch=not dynamo)
    return {}


def modelopt_torch_dynamo(place: Path, path: Path) -> dict[str, str]:
    """The same by the exporter that torch recommends."""
    return modelopt_torch(place, path, dynamo=True)


def modelopt_onnx(place: Path, path: Path) -> dict[str, str]:
    """modelopt.onnx: Q/DQ put into the float graph, calibrated on the recorded call."""
    from modelopt.onnx.quantization import quantize

    quantize(
        str(without_shapes(place, path.parent)),
        quantize_mode="int8",
        calibration_data=dict(next(calls(place, 2))),
        calibration_eps=["cpu"],
        use_external_data_format=True,
        output_path=str(path),
    )
    return {}


PEERS: Mapping[str, Callable[[Path, Path], dict[str, str]]] = {
    "onnxruntime dynamic": quantize_dynamic,
    "onnxruntime static": quantize_static,
    "modelopt torch": modelopt_torch,
    "modelopt torch, dynamo": modelopt_torch_dynamo,
    "modelopt onnx": modelopt_onnx,
}


def timed(graphs: Mapping[str, Path], place: Path, rounds: int, batches: list[int], threads: int) -> dict[str, Any]:
    """Time the graphs by turns, after one round that is not counted."""
    from intaglio.exporters.runtimes.onnxruntime.session import open_session

    sessions = {}
    for name, path in graphs.items():
        try:
            sessions[name] = open_session(path, threads=threads)
        except Exception:  # its errors have no common class
            continue
    rows = []
    for batch in batches:
        call = next(calls(place, batch)) | {STEP_INPUT: np.array(0)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
        outputs = {}
        for _ in range(rounds + 1):
            for name, session in sessions.items():
                feed = {entry.name: call[entry.name] for entry in session.get_inputs()}
                began = time.perf_counter(), time.process_time()
                outputs[name] = session.run(None, feed)[0]
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        whole = outputs["float32"]
        for name, path in graphs.items():
            if name not in sessions:
                continue
            pairs = list(zip(times["float32"][1:], times[name][1:], strict=True))
            speed, cpu = (statistics.quantiles([a[i] / b[i] for a, b in pairs], n=4) for i in (0, 1))
            rows.append(
                {
                    "graph": name,
                    "threads": threads,
                    "batch": batch,
                    "milliseconds": 1e3 * statistics.median(clock for clock, _ in times[name][1:]),
                    "speed": speed[1],
                    "speed_quartiles": [speed[0], speed[2]],
                    "cpu_speed": cpu[1],
                    "cpu_speed_quartiles": [cpu[0], cpu[2]],
                    "error": relative(outputs[name], whole),
                    "bytes": size(path),
                }
            )
    return {"rows": rows}


def layer_by_layer(place: Path) -> dict[str, float]:
    """Fused kernels against the graph as it is written: every layer alone on the same input, and the whole."""
    import torch

    from intaglio.exporters.runtimes.calls import graph_denoise
    from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
    from intaglio.exporters.verify.layer_run import run_layer
    from intaglio.pipeline.model.calls import denoise_with

    steps = [Step(uses="calibrate", options={"samples": 2}), Step(uses="export-float")]
    steps += [Step(uses="uniform", options={"schemes": SCHEMES["unet"]["w8a8"]})]
    graph = run(place, [*steps, Step(uses="distill", options={"updates": 0}), Step(uses="merge"), QDQ])[GRAPH]
    model = Checkpoint.resolve(model_in(place), Path()).open()
    entered: dict[str, torch.Tensor] = {}
    for name in graph.nodes:
        layer = model.module.get_submodule(name)
        layer.register_forward_hook(lambda _, args, __, name=name: entered.__setitem__(name, args[0]))
    call = {name: torch.from_numpy(value) for name, value in next(calls(place, 2)).items()}
    with torch.no_grad():
        whole = denoise_with(model.module, model)(call).numpy()
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


def line(row: dict[str, Any]) -> str:
    low, high = row["speed_quartiles"]
    return (
        f"  {row['threads']} threads, batch {row['batch']}: {row['graph']:20} {row['milliseconds']:7.1f} ms, "
        f"{row['speed']:.2f} times float32 [{low:.2f}, {high:.2f}], by CPU time {row['cpu_speed']:.2f}, "
        f"error {row['error']:.4f}, {row['bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    typer.run(main)
