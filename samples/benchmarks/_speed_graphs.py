"""The graphs that speed.py times: ours, torch's own export, and those of other quantizers, all of one model."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, TRAJECTORY
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.runner import CompiledTarget

if TYPE_CHECKING:
    import torch

Feed = Mapping[str, NDArray[np.generic]]
TARGET = "onnxruntime-cpu"
EXPORT, QDQ = Step(uses="export-float"), Step(uses="export-qdq")
HERE = Path(__file__).parent
CALIBRATE = Step(uses="calibrate", options={"samples": 2})


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


RANDOM: Mapping[str, Callable[[int], "torch.nn.Module"]] = {"unet": unet, "dit-xl": dit}
"""Networks with random weights; the number is that of the transformer's blocks."""
TRAINED: Mapping[str, ModelRef] = {
    "emoji-dit": ModelRef(path="../models/emoji-dit", sampling_steps=4, guidance=1.5),
    "emoji-unet": ModelRef(path="../models/emoji-unet", sampling_steps=4, guidance=1.5),
    "terrain": ModelRef(path="./_terrain.py:make", sampling_steps=2),
}
MODELS = ("emoji-dit", "emoji-unet", "unet", "dit-xl", "terrain")
FORMATS: Mapping[str, list[str]] = {"W8A8": ["w8a8_token"], "W4A8": ["w4a8_token", "w8a8_token"]}
"""Formats of each plan, the most wanted first."""
CONVOLUTIONS = ["w8a8o8_step"]
"""Further formats for UNets: convolutions on integers need a rounded output."""
FLOATS = ("float32", "torch.onnx.export")


def graphs_of(model: str, depth: int, place: Path, rows: int, *, peers: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the path of each graph by name, and what did not come to a graph, with the reason."""
    if model in RANDOM:
        make_checkpoint(model, depth, place / "checkpoint")
    graphs = {"float32": Path(compiled(model, place, None))}
    graphs |= {name: Path(compiled(model, place, schemes)) for name, schemes in FORMATS.items()}
    failed = {}
    for name, peer in PEERS.items():
        if not peers and name not in FLOATS:
            continue
        path = place / "peers" / name / f"{rows}-rows" / "model.onnx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                peer(model, place, path, rows)
            except Exception as e:  # whatever a peer raises is its result
                failed[name] = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
                continue
        graphs[name] = path
    return graphs, failed


def make_checkpoint(model: str, depth: int, checkpoint: Path) -> None:
    import torch
    from diffusers import DDIMScheduler

    if not checkpoint.exists():
        torch.manual_seed(0)
        RANDOM[model](depth).save_pretrained(checkpoint / ("unet" if model == "unet" else "transformer"))
        DDIMScheduler().save_pretrained(checkpoint / "scheduler")


def compiled(model: str, place: Path, schemes: list[str] | None) -> str:
    """Return the path of the float graph, or of one whose layers have the first of the schemes that fits."""
    if schemes is None:
        return str(run(model, place, [CALIBRATE, EXPORT])[FLOAT_GRAPH].path)
    return str(run(model, place, quantized(model, schemes))[GRAPH].path)


def quantized(model: str, schemes: list[str]) -> list[Step]:
    """Return the steps that round all layers to nearest."""
    wanted = [*schemes, *([] if "dit" in model else CONVOLUTIONS)]
    uniform = Step(uses="uniform", options={"schemes": wanted})
    return [CALIBRATE, EXPORT, uniform, Step(uses="distill", options={"updates": 0}), Step(uses="merge"), QDQ]


def run(model: str, place: Path, steps: list[Step]) -> CompiledTarget:
    """Compile the model with these steps."""
    recipe = Recipe(model=model_in(model, place), targets=(TARGET,), steps=tuple(steps))
    return compile(recipe, Store(place / "store"), base=HERE)[TARGET]


def model_in(model: str, place: Path) -> ModelRef:
    return TRAINED.get(model) or ModelRef(path=str(place / "checkpoint"), sampling_steps=1)


def calls(model: str, place: Path, rows: int) -> Iterator[Feed]:
    """Yield the inputs of the recorded calls, cut or repeated to `rows`, that in the middle first.

    They have the types of our graphs, which take whole timesteps as floating-point numbers too.
    """
    done = run(model, place, [CALIBRATE, EXPORT])
    trajectory, specs = done[TRAJECTORY], done[FLOAT_GRAPH].inputs
    middle = len(trajectory.timesteps) // 2
    for step in sorted(range(len(trajectory.timesteps)), key=lambda step: step != middle):
        call = {name: value.numpy() for name, value in trajectory.call(step).items() if name in specs}
        shared = trajectory.shared
        cut = {n: v if n in shared else np.resize(v, (rows, *v.shape[1:])) for n, v in call.items()}
        yield {name: value.astype(specs[name].dtype) for name, value in cut.items()}


def middle_step(model: str, place: Path) -> int:
    return len(run(model, place, [CALIBRATE])[TRAJECTORY].timesteps) // 2


def without_shapes(model: str, place: Path, folder: Path) -> Path:
    """Write our float graph without the shapes of its values: onnxruntime.quantization infers its own."""
    import onnx

    graph = onnx.load(compiled(model, place, None))
    del graph.graph.value_info[:]
    path = folder / "float.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="float.onnx.data")
    return path


def torch_export(model: str, place: Path, path: Path, rows: int) -> None:
    """torch.onnx.export by itself, for calls of this shape."""
    from _torch_export import export

    export(*as_function(model, place, rows), path)


def as_function(model: str, place: Path, rows: int) -> "tuple[torch.nn.Module, dict[str, torch.Tensor]]":
    """Return the denoiser as a function of the tensors of a call, and these tensors."""
    import torch
    from _torch_export import function_of

    call = {name: torch.from_numpy(value) for name, value in next(calls(model, place, rows)).items()}
    return function_of(Checkpoint.resolve(model_in(model, place), HERE).open(), list(call)), call


def quantize_dynamic(model: str, place: Path, path: Path, rows: int) -> None:
    """onnxruntime.quantization: integer weights by channel, inputs by tensor when it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        without_shapes(model, place, path.parent),
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def quantize_static(model: str, place: Path, path: Path, rows: int) -> None:
    """onnxruntime.quantization: the same weights, inputs with the ranges of the recorded calls."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Recorded(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = calls(model, place, rows)

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    quantize_static(
        without_shapes(model, place, path.parent),
        path,
        Recorded(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )


def modelopt(model: str, place: Path, path: Path, rows: int) -> None:
    """modelopt.torch: INT8_DEFAULT_CFG calibrated on a recorded call, exported by torch's older exporter."""
    import modelopt.torch.quantization as mtq
    import torch
    from _torch_export import export

    denoiser, call = as_function(model, place, rows)
    with torch.no_grad():
        mtq.quantize(denoiser, mtq.INT8_DEFAULT_CFG, lambda module: module(*call.values()))
    export(denoiser, call, path, dynamo=False, any_batch=True)


PEERS: Mapping[str, Callable[[str, Path, Path, int], None]] = {
    "torch.onnx.export": torch_export,
    "quantize_dynamic": quantize_dynamic,
    "quantize_static": quantize_static,
    "modelopt INT8": modelopt,
}
