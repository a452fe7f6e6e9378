"""One model that NVIDIA's Model Optimizer quantized, as an ONNX file by its own exporters and by ours.

    python samples/benchmarks/modelopt_export.py [--rounds 15] [--json]

emoji-dit, calibrated on calls of its own sampler: INT8_DEFAULT_CFG, whose inputs of normalizations are switched off,
and INT4_AWQ_CFG, of linear layers. Theirs are torch.onnx.export on the quantized module, and modelopt.torch._deploy,
which packs weights and needs `nvidia-modelopt[onnx]`. All graphs are timed by turns on one thread of ONNX Runtime; a
speed is the median of each round's own ratio to float32, by the CPU time of the process. The error is relative L2 to
what the quantized module computes in torch; ours keeps tables of embeddings in float16.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from _efficientdm_peers import quiet
from full_size import alone, folder
from speed import relative, size

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.graph import STEP_INPUT
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, MODEL, TRAJECTORY
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.runner import CompiledTarget

if TYPE_CHECKING:
    import torch

CONFIGS = ("INT8_DEFAULT_CFG", "INT4_AWQ_CFG")
CALIBRATE = Step(uses="calibrate", options={"samples": 4})
ROWS = slice(0, 2)
"""Rows of a recorded call that are timed and compared."""


def main(
    rounds: Annotated[int, typer.Option(help="calls of each graph, by turns")] = 15,
    work: Annotated[Path | None, typer.Option(help="a folder for all files; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    with folder(work) as place:
        graphs = {"float32": str(alone(compiled, place, None))}
        failed = {}
        for name in CONFIGS:
            alone(quantize, place, name)
            graphs[f"{name}, intaglio"] = alone(compiled, place, name)
            for how, export in EXPORTERS.items():
                try:
                    graphs[f"{name}, {how}"] = alone(export, place, name)
                except Exception as e:  # whatever it raises is its result
                    failed[f"{name}, {how}"] = first_line(e)
        rows, unloaded = alone(timed, graphs, place, rounds)
        failed |= unloaded
        if as_json:
            print(json.dumps({"figures": rows, "failed": failed}))
        else:
            print("\n".join([*map(line, rows), *(f"{name}: {why}" for name, why in failed.items())]))


def compiled(place: Path, name: str | None) -> str:
    """The float graph, or that of the model that was saved under this name."""
    steps = [CALIBRATE, Step(uses="export-float")]
    if name is not None:
        uses = "intaglio.passes.imports.modelopt:ImportModelopt"
        options = {"path": str(place / name / "saved.pt")}
        steps += [Step(name="import-modelopt", uses=uses, options=options), Step(uses="export-qdq")]
    return str(run(place, steps)[FLOAT_GRAPH if name is None else GRAPH].path)


def run(place: Path, steps: list[Step]) -> CompiledTarget:
    ref = ModelRef(path="models/emoji-dit", guidance=1.5)
    recipe = Recipe(model=ref, targets=("onnxruntime-cpu",), steps=tuple(steps))
    return compile(recipe, Store(place / "store"), base=Path(__file__).parents[1])["onnxruntime-cpu"]


def middle_call(place: Path) -> "Mapping[str, torch.Tensor]":
    """Rows of the recorded call in the middle."""
    trajectory = run(place, [CALIBRATE])[TRAJECTORY]
    return trajectory.call(len(trajectory.timesteps) // 2, ROWS)


def quantize(place: Path, name: str) -> None:
    """The quantized module as Model Optimizer saves it, and what it predicts."""
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    import torch

    from intaglio.pipeline.model.calls import denoise_with

    if (place / name / "predicted.npy").exists():
        return
    done = run(place, [CALIBRATE])
    model, trajectory = done[MODEL].open(), done[TRAJECTORY]
    config = copy.deepcopy(getattr(mtq, name))
    unlike = "nn.LayerNorm" if name == "INT8_DEFAULT_CFG" else "nn.Conv2d"
    config["quant_cfg"].append({"quantizer_name": "*", "parent_class": unlike, "enable": False})

    def calibrate(module: "torch.nn.Module") -> None:
        for step in range(len(trajectory.timesteps)):
            denoise_with(module, model)(trajectory.call(step))

    with torch.no_grad(), quiet():
        mtq.quantize(model.module, config, calibrate)
    (place / name).mkdir(exist_ok=True)
    mto.save(model.module, place / name / "saved.pt")
    with torch.no_grad():
        predicted = denoise_with(model.module, model)(middle_call(place))
    np.save(place / name / "predicted.npy", predicted.numpy())


def restored(place: Path, name: str) -> "tuple[torch.nn.Module, Mapping[str, torch.Tensor]]":
    """The quantized module as a function of the three tensors that it takes, and those."""
    import modelopt.torch.opt as mto
    import torch

    from intaglio.pipeline.model.calls import denoise_with

    model = run(place, [CALIBRATE])[MODEL].open()
    with quiet():
        mto.restore(model.module, place / name / "saved.pt")

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model.module

        def forward(
            self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
        ) -> torch.Tensor:
            call = {"hidden_states": hidden_states, "timestep": timestep, "class_labels": class_labels}
            return denoise_with(self.module, model)(call)

    call = middle_call(place)
    return Denoiser().eval(), {name: call[name] for name in ("hidden_states", "timestep", "class_labels")}


def deployed(place: Path, name: str) -> str:
    """Export with Model Optimizer's own exporter, and return the path."""
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    path = place / name / "deployed" / "model.onnx"
    if not path.exists():
        denoiser, call = restored(place, name)
        with quiet():
            content, _ = get_onnx_bytes_and_metadata(denoiser, tuple(call.values()), model_name="model")
            OnnxBytes.from_bytes(content).write_to_disk(str(path.parent))
    return str(path)


def exported(place: Path, name: str) -> str:
    """Export with torch, which Model Optimizer tells how to write its quantizers, and return the path."""
    import torch

    path = place / name / "exported" / "model.onnx"
    if not path.exists():
        denoiser, call = restored(place, name)
        path.parent.mkdir(exist_ok=True)
        with torch.no_grad(), quiet():
            torch.onnx.export(
                denoiser,
                tuple(call.values()),
                path,
                dynamo=False,
                opset_version=21 if name.startswith("INT4") else 20,
                input_names=list(call),
                output_names=["output"],
            )
    return str(path)


EXPORTERS: Mapping[str, Callable[[Path, str], str]] = {
    "torch.onnx.export": exported,
    "modelopt _deploy": deployed,
}


def timed(graphs: Mapping[str, str], place: Path, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time the graphs by turns, after one uncounted round. Also returns the graphs that do not load, and why."""
    from intaglio.exporters.runtimes.onnxruntime.session import open_session

    call = {name: value.numpy() for name, value in middle_call(place).items()} | {STEP_INPUT: np.array(0)}
    sessions, failed = {}, {}
    for name, path in graphs.items():
        try:
            sessions[name] = open_session(Path(path), threads=1)
        except Exception as e:  # its errors have no common class
            failed[name] = first_line(e)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    outputs = {}
    for _ in range(rounds + 1):
        for name, session in sessions.items():
            feed = {entry.name: call[entry.name] for entry in session.get_inputs()}
            began = time.process_time()
            outputs[name] = session.run(None, feed)[0]
            times[name].append(time.process_time() - began)
    rows = []
    for name in sessions:
        ratios = [a / b for a, b in zip(times["float32"][1:], times[name][1:], strict=True)]
        config = name.partition(",")[0]
        predicted = outputs["float32"] if name == "float32" else np.load(place / config / "predicted.npy")
        rows.append(
            {
                "graph": name,
                "milliseconds": 1e3 * statistics.median(times[name][1:]),
                "cpu_speed": statistics.median(ratios),
                "cpu_speed_quartiles": statistics.quantiles(ratios, n=4)[::2],
                "error": relative(outputs[name], predicted),
                "error_to_float": relative(outputs[name], outputs["float32"]),
                "bytes": size(Path(graphs[name])),
            }
        )
    return rows, failed


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def line(row: dict[str, Any]) -> str:
    low, high = row["cpu_speed_quartiles"]
    return (
        f"{row['graph']:42} {row['bytes'] / 1e6:6.2f} MB, {row['milliseconds']:6.1f} ms,"
        f" {row['cpu_speed']:.2f} times float32 [{low:.2f}, {high:.2f}] by CPU time,"
        f" error {row['error']:.1e} to modelopt, {row['error_to_float']:.1e} to float32"
    )


if __name__ == "__main__":
    typer.run(main)
