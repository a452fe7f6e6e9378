"""A step needs little more memory than the weights it reads, so that full-size models compile on a common machine."""

import logging
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import peak_memory
import pytest
import torch
from forked import printed_forked
from harness import Artifacts, run_pass
from tiny import save_folder, tiny_dit, wide_dit

from intaglio.exporters.float_graph.agreement import TOLERANCE
from intaglio.exporters.float_graph.export_float import _magnitudes
from intaglio.exporters.float_graph.own_weights import ModelWeights
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.graph import Graph, TensorSpec
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TARGET, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.contract.artifact import AnyKey
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.schemes import W8A8_STEP, W8A8_TOKEN
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.numerics.quality import SampleRange
from intaglio.pipeline.runs.memory import forget_peak, resident_bytes

KEYS: tuple[AnyKey, ...] = (MODEL, TRAJECTORY, PLAN, TARGET)
LAYERS = 4
"""Largest layers, in float32, that a step may take: what is read, and what is computed from it."""
BESIDE = {"distill": 40e6, "merge": 40e6, "export-float": 80e6, "export-qdq": 40e6}
"""Bytes that a step may take beside: its tensors below 1 MiB, and what larger graphs take, before all those of torch's
exporter. Measured, with the layers: 44, 42, 96 and 8 MB, where the weights have 254 MB."""
BOTH = ("distill", "merge", "export-qdq")
"""Steps that map no whole file. In export-float, the runtime maps the graph's weights, which it does not change: the
system drops them where memory is short."""


def save(module: torch.nn.Module, folder: Path) -> None:
    """Every artifact that the steps read and do not make, from the module, whose weights are shards in bfloat16."""
    save_folder(module, folder / "model")
    shutil.rmtree(folder / "model" / "transformer")
    module.bfloat16().save_pretrained(folder / "model" / "transformer", max_shard_size="40MB")
    model = Checkpoint.resolve(ModelRef(path=str(folder / "model"), sampling_steps=1), Path())
    artifacts: Artifacts = {MODEL: model, TARGET: load_target("onnxruntime-cpu")}
    artifacts |= run_pass(Calibrate(samples=2), artifacts, folder / "scratch")
    layers = model.layers()
    schemes = {layer.name: W8A8_TOKEN if layer.op == "linear" else W8A8_STEP for layer in layers}
    artifacts |= {PLAN: QuantPlan(layers, schemes)}
    for key in KEYS:
        (folder / key.name).mkdir()
        artifacts[key].save(folder / key.name)


@pytest.mark.long
def test_a_step_holds_a_few_layers_whatever_the_size_of_the_model(tmp_path: Path):
    save(tiny_dit(), tmp_path / "small")
    save(module := wide_dit(), tmp_path / "large")
    sizes = [4 * parameter.numel() for parameter in module.parameters()]
    for step, beside in BESIDE.items():  # each in a process of its own, on what the steps before it made
        printed = printed_forked(peak_memory.print_peaks, step, tmp_path, out=tmp_path / step)
        with_files, allocated = map(int, printed.split())
        allowed = beside + LAYERS * max(sizes)
        assert allowed < 0.6 * sum(sizes)
        assert 0 < allocated <= allowed, f"{step}: {allocated / 1e6:.0f} MB"
        assert step not in BOTH or with_files <= allowed, f"{step}: {with_files / 1e6:.0f} MB"


def test_ranges_are_taken_as_values_come(tmp_path: Path):
    """A value and the next one are there at once, and what their magnitudes are taken from: not all of the chain."""
    count, value_bytes = 32, 1 << 24
    record_chain(2, value_bytes, tmp_path)
    before = resident_bytes("VmRSS")
    forget_peak()
    record_chain(count, value_bytes, tmp_path)
    assert resident_bytes("VmHWM") - before <= count / 2 * value_bytes


def test_a_lean_session_keeps_no_buffer_for_a_later_value(tmp_path: Path):
    """The values have 48, 64 and 48 MB: a session that keeps the first buffer for the last value has 112 MB at once."""
    (tmp_path / "model.onnx").write_bytes(onnx.parser.parse_model(RETURNING).SerializeToString())
    # in a process that has freed nothing before
    found = printed_forked(peak_memory.print_lean_peak, tmp_path / "model.onnx", out=tmp_path / "peak")
    assert 60e6 <= int(found) <= 80e6


RETURNING = """
<ir_version: 10, opset_import: ["": 21]>
graph (float[1] x) => (float[1] y)
<int64[1] few = {12000000}, int64[1] many = {16000000}>
{
    a = Expand (x, few)
    b = ReduceMax (a)
    c = Expand (b, many)
    d = ReduceMax (c)
    e = Expand (d, few)
    y = ReduceMax (e)
}
"""


def record_chain(count: int, value_bytes: int, folder: Path) -> None:
    """Ranges of a graph of `count` values, each made from the one before."""
    x = ir.val("sample", ir.DataType.FLOAT, ["batch", value_bytes // 4])
    values = [x]
    for place in range(count):
        node = ir.node("Sin", [values[-1]])
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = f"v{place}", x.dtype, x.shape
        values.append(node.outputs[0])
    nodes = [node for value in values[1:] if (node := value.producer()) is not None]
    graph = ir.Graph([x], [values[-1]], nodes=nodes, opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), folder / "chain.onnx")
    sample = torch.zeros(1, 1, value_bytes // 4)
    trajectory = Trajectory(
        (0.0,), {"sample": sample}, sample, {}, {}, {}, {}, {}, {}, samples=SampleRange(-1.0, 1.0, 0.25)
    )
    chain = Graph(folder / "chain.onnx", {"sample": TensorSpec("float32", ("batch", value_bytes // 4))}, {}, ())
    _magnitudes(
        chain, trajectory, TOLERANCE, ModelWeights(chain, None), Context(folder, None, logging.getLogger("chain"))
    )
