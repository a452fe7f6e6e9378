"""Layers beside each other in a float graph as torch's exporter writes it, then quantized and written for a runtime."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import onnx
import torch
from harness import run_pass
from onnx import helper, numpy_helper
from quantizing import integers

from intaglio.exporters.float_graph.sites import LAYER_KEY
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.pipeline.artifacts.graph import Graph, TensorSpec
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, PLAN, QUANTIZED, TARGET
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.layer import Layer, admitted_schemes
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.target import Target, load_target
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.basis import Balance
from intaglio.pipeline.numerics.low_rank import Branch
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.simulation.model import quantize_model

SCHEMES = {
    scheme.name: scheme
    for op, shape in (("linear", (64, 64)), ("conv", (64, 64, 3, 3)))
    for scheme in admitted_schemes(Layer(name="a", op=op, shape=shape, bias=True), (32,))
}
"""All there are, with groups of 32."""
TIMESTEPS = (900.0, 500.0, 100.0)
RANGES = LayerTables(
    amax_T=torch.tensor([3.0, 2.0, 0.5]),
    shift_T=torch.tensor([0.6, -0.4, 0.2]),
    output_amax_T=torch.tensor([4.0, 2.5, 1.5]),
)

Shape = tuple[int, ...]


def target_of(runtime: str) -> Target:
    """A target of this runtime that takes every scheme, so that a row is tested before a target offers it."""
    shipped = load_target("onnxruntime-cpu" if runtime == "onnxruntime" else "tensorrt-rtx")
    formats = {"linear": tuple(SCHEMES), "conv": tuple(SCHEMES)}
    return shipped.model_copy(update={"runtime": runtime, "formats": formats, "group_sizes": (32, 64)})


def float_graph(
    folder: Path,
    layers: Mapping[str, torch.nn.Module],
    shapes: Shape | Mapping[str, Shape],
    seen: Mapping[str, float] = MappingProxyType({}),
) -> Graph:
    """All on one input `x` of this shape, or each on its own, `name.x`; `seen` are magnitudes of values."""
    own = shapes if isinstance(shapes, Mapping) else None
    entering = {f"{n}.x": own[n] for n in layers} if own else {"x": shapes}
    nodes, constants, outputs = [], [], []
    for name, layer in layers.items():
        x = f"{name}.x" if own else "x"
        rank, weight = len(entering[x]), layer.weight.detach().numpy()
        bias = [] if layer.bias is None else [f"{name}.bias"]
        if layer.bias is not None:
            constants.append(numpy_helper.from_array(layer.bias.detach().numpy(), f"{name}.bias"))
        if not isinstance(layer, torch.nn.Linear):
            zeros = layer._reversed_padding_repeated_twice
            ends = [x, f"{name}.weight", *bias], [f"{name}.y"]
            window = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups}
            made = [helper.make_node("Conv", *ends, pads=[*zeros[-2::-2], *zeros[::-2]], **window)]
        elif rank == 2 and bias:
            made = [helper.make_node("Gemm", [x, f"{name}.weight", *bias], [f"{name}.y"], transB=1)]
        else:
            weight = weight.T.copy()
            made = [helper.make_node("MatMul", [x, f"{name}.weight"], [f"{name}.product" if bias else f"{name}.y"])]
            made += [helper.make_node("Add", [f"{name}.product", *bias], [f"{name}.y"])] if bias else []
        constants.append(numpy_helper.from_array(weight, f"{name}.weight"))
        for node in made:
            node.name = f"{name}/{node.op_type}"
            node.metadata_props.add(key=LAYER_KEY, value=name)
        nodes += made
        outputs.append(helper.make_tensor_value_info(f"{name}.y", 1, ["batch", *[None] * (rank - 1)]))
    inputs = [helper.make_tensor_value_info(x, 1, ["batch", *shape[1:]]) for x, shape in entering.items()]
    graph = helper.make_graph(nodes, "float", inputs, outputs, constants)
    folder.mkdir(exist_ok=True)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx")
    specs = {x: TensorSpec("float32", ("batch", *shape[1:])) for x, shape in entering.items()}
    ends = {name: (f"{name}.x" if own else "x", f"{name}.y") for name in layers}
    return Graph(folder / "model.onnx", specs, {}, (), ends, amax=dict(seen))


def make(
    folder: Path,
    layers: Mapping[str, torch.nn.Module],
    shapes: Shape | Mapping[str, Shape],
    schemes,
    runtime: str,
    amax: Mapping[str, torch.Tensor] | None = None,
    balances: Mapping[str, Balance] | None = None,
    shift: Mapping[str, torch.Tensor] | None = None,
    seen: Mapping[str, float] = MappingProxyType({}),
    branches: Mapping[str, Branch] = MappingProxyType({}),
) -> tuple[Graph, dict[str, QuantizedLayer]]:
    """The layers quantized, written for the runtime, and their simulation; where no ranges are given: RANGES."""
    graph = float_graph(folder, layers, shapes, seen)
    table = tuple(
        Layer(
            name=n,
            op="linear" if isinstance(m, torch.nn.Linear) else "conv",
            shape=tuple(m.weight.shape),
            bias=m.bias is not None,
        )
        for n, m in layers.items()
    )
    model = torch.nn.ModuleDict(layers).eval()
    tables = {
        n: replace(
            RANGES,
            amax_T=(amax or {}).get(n, RANGES.amax_T),
            shift_T=(shift or {}).get(n, RANGES.shift_T),
            output_share_N=torch.linspace(1, 0.1, len(m.weight)),
        )
        for n, m in layers.items()
    }
    made = quantize_model(model, schemes, StepClock(TIMESTEPS), tables, balances or {}, branches)
    artifacts = {
        FLOAT_GRAPH: graph,
        QUANTIZED: integers(made, TIMESTEPS),
        PLAN: QuantPlan(table, schemes),
        TARGET: target_of(runtime),
    }
    return run_pass(ExportQdq(), artifacts, folder / "qdq")[GRAPH], made
