"""An input with which a graph cannot compute what torch computes is an error that names the input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import nn

from intaglio.exporters.deploy.call_inputs import CallInputs, table_sizes
from intaglio.exporters.deploy.denoiser import CompiledDenoiser
from intaglio.pipeline.artifacts.graph import Graph, Interface, TensorSpec, fixed_constant
from intaglio.pipeline.errors import CallError, RecipeError
from intaglio.pipeline.model.call_form import CallForm

TABLES = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[batch, 2, width] x, int64[batch] timestep, int64[batch, 1] labels, float[batch, 3] text,
 bool[batch] mask) => (float[batch, 2, wide] y)
<float[5, 2] classes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int8[2, 4] codes = {0, 1, 2, 3, 4, 5, 6, 7}, float unit = {0.5},
 float[7] other = {0, 1, 2, 3, 4, 5, 6}, int64[1] last = {1}>
{
    places = Squeeze (labels, last)
    same = Cast <to = 7> (places)
    picked = Gather (classes, same)
    row = DequantizeLinear (codes, unit)
    columns = Gather <axis = 1> (row, labels)
    more = Gather (other, timestep)
    y = Identity (x)
}
"""
SPECS = {
    "x": TensorSpec("float32", ("batch", 2, "width")),
    "timestep": TensorSpec("int64", ("batch",)),
    "labels": TensorSpec("int64", ("batch", 1)),
    "text": TensorSpec("float32", ("batch", 3)),
    "mask": TensorSpec("bool", ("batch",)),
}
USUAL = {
    "x": torch.ones(2, 2, 8),
    "timestep": torch.tensor([1, 2]),
    "labels": torch.tensor([[0], [3]]),
    "text": torch.ones(2, 3),
    "mask": torch.tensor([True, False]),
}
NAN, INF = float("nan"), float("inf")


def graph(folder: Path) -> Graph:
    onnx.save(onnx.parser.parse_model(TABLES), folder / "model.onnx")
    interface = Interface(arguments=(*SPECS, "scale"), sample="x", constants={"scale": 2})
    outputs = {"y": TensorSpec("float32", ("batch", 2, "width"))}
    return Graph(folder / "model.onnx", SPECS, outputs, sizes={"width": (8, 12)}, interface=interface)


def test_the_smallest_table_that_an_input_picks_from_is_found():
    model = onnx.parser.parse_model(TABLES)
    assert table_sizes(model.graph) == {"labels": 4, "timestep": 7}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> CompiledDenoiser:
    def call(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if given["x"].shape[2] == 9:
            raise RuntimeError("Concat: dimensions must match")
        return {"y": given["x"][:, :, : 10 if given["x"].shape[2] == 11 else None]}

    return CompiledDenoiser(graph(tmp_path_factory.mktemp("graph")), call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": USUAL["x"] * NAN}, "x has NaN or Inf"),
        ({"x": USUAL["x"] * INF}, "x has NaN or Inf"),
        ({"text": USUAL["text"] * NAN}, "text has NaN or Inf"),
        ({"x": USUAL["x"].double() * 1e300}, "x has values beyond torch.float32"),
        ({"x": USUAL["x"].numpy()}, "x is a numpy.ndarray: give a tensor of torch"),
        ({"x": USUAL["x"].tolist()}, "x is a list: give a tensor of torch"),
        ({"text": np.ones((2, 3))}, "text is a numpy.ndarray"),
        ({"x": USUAL["x"].long()}, r"x is of torch\.int64: give floating-point numbers"),
        ({"x": USUAL["x"].to(torch.complex64)}, r"x is of torch\.complex64: give floating-point numbers"),
        ({"text": USUAL["text"] * 1j}, r"text is complex, but the graph accepts torch\.float32 only"),
        ({"x": USUAL["x"].to("meta")}, "x is a tensor on the device meta"),
        (
            {"x": USUAL["x"].to_sparse()},
            r"x is a tensor on the device cpu with the layout torch\.sparse_coo: give a dense",
        ),
        ({"x": torch.tensor(1.0)}, r"x has the shape \(\), but the graph accepts \(batch, 2, width\)"),
        ({name: value[:0] for name, value in USUAL.items()}, "x has 0 at axis 0, but the graph accepts 1 or more"),
        ({"x": USUAL["x"][:, :, :0]}, "x has 0 at axis 2, but the graph accepts 1 or more"),
        ({"x": USUAL["x"][None]}, r"x has the shape \(1, .*\), but the graph accepts \(batch, 2, width\)"),
        ({"timestep": torch.tensor([1, 1, 1])}, "timestep has 3 values for 2 rows: give 1 or 2"),
        ({"timestep": 1.5}, r"timestep has 1\.5, which torch\.int64 cannot hold"),
        ({"timestep": NAN}, "timestep has the index nan, but the table has the indices 0 to 6"),
        ({"timestep": 2**70}, "timestep is 1180591620717411303424: Overflow"),
        ({"timestep": 7}, "timestep has the index 7, but the table has the indices 0 to 6"),
        ({"timestep": "1"}, "timestep is a str: give a tensor"),
        ({"labels": torch.tensor([[0], [-1]])}, "labels has the index -1, but the table has the indices 0 to 3"),
        ({"labels": torch.tensor([[0], [4]])}, "labels has the index 4, but the table has the indices 0 to 3"),
        ({"labels": torch.tensor([[0], [1.9]])}, r"labels has 1\.9, which torch\.int64 cannot hold"),
        ({"labels": torch.tensor([[True], [False]])}, r"labels is of torch\.bool: give whole numbers from 0 to 3"),
        ({"mask": torch.tensor([0.0, 0.5])}, r"mask has 0\.5, which torch\.bool cannot hold"),
        ({"text": torch.full((2, 3), 2**24 + 1)}, r"text has 1\.67772e\+07, which torch\.float32 cannot hold"),
        ({"text": torch.ones(3, 3)}, "text has 3 at axis 0, but the graph accepts 2"),
        ({"scale": np.ones(3)}, r"called with scale = array\(\[1\., 1\., 1\.\]\), but compiled with 2"),
        ({"more": torch.ones(2)}, "called with more, which it was compiled without"),
        (
            {"x": torch.ones(2, 2, 9)},
            r"called with x \(2, 2, 9\), .*, but compiled for width 8 and 12: the graph .* these inputs: Concat",
        ),
        ({"x": torch.ones(2, 2, 11)}, "the axis width of the output has the size 10, but 11 in the inputs"),
    ],
)
def test_what_it_cannot_compute_with_is_refused_by_name(net, changes, message):
    with pytest.raises(CallError, match=message):
        net(**USUAL | changes)


def test_other_forms_of_the_same_numbers_are_taken(net):
    expected = net(**USUAL).sample
    same = {
        "timestep": torch.tensor(1.0),
        "labels": torch.tensor([[0.0], [3.0]]),
        "text": torch.ones(2, 3, dtype=torch.int64),
        "mask": torch.tensor([1, 0]),
    }
    for name, value in same.items():
        assert torch.equal(net(**USUAL | {name: value}).sample, expected), name
    assert torch.equal(net(**USUAL | {"x": torch.ones(2, 8, 2).mT}).sample, expected)
    assert net(**USUAL | {"x": USUAL["x"].half()}).sample.dtype == torch.float16
    assert net(**USUAL | {"x": torch.ones(2, 2, 12)}).sample.shape == (2, 2, 12)


def test_no_gradient_is_lost_in_silence(net):
    changed = USUAL | {"x": nn.Parameter(USUAL["x"])}
    with pytest.raises(CallError, match=r"x requires a gradient, .* call it under torch\.no_grad"):
        net(**changed)
    with torch.no_grad():
        assert not net(**changed).sample.requires_grad


def test_an_argument_that_is_given_twice_is_refused(net):
    with pytest.raises(CallError, match="called with x twice: by position and by name"):
        net(USUAL["x"], **USUAL)


def test_a_component_names_itself(tmp_path):
    call = CallInputs(graph(tmp_path), {}, "vae.decode")
    with pytest.raises(CallError, match=r"^vae\.decode: x has NaN or Inf"):
        call.tensors(USUAL | {"x": USUAL["x"] * NAN}, torch.device("cpu"))
    with pytest.raises(CallError, match=r"^vae\.decode was called without labels"):
        call.tensors({**USUAL, "labels": None}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "NoSuchModel"}, "compiled from NoSuchModel, which diffusers .* does not have"),
        ({"kind": "DDIMScheduler"}, "compiled from DDIMScheduler, which diffusers .* does not have"),
        ({"kind": "utils"}, "compiled from utils, which diffusers .* does not have"),
        ({"kind": "UNet2DModel", "config": {"down_block_types": 3}}, r"graph\.json raised TypeError: "),
    ],
)
def test_a_model_that_cannot_be_made_is_said(tmp_path, changes: dict[str, Any], message):
    made = replace(graph(tmp_path), interface=Interface(**changes))
    with pytest.raises(RecipeError, match=message):
        CompiledDenoiser(made, lambda given: {"y": given["x"]})


def test_lists_tuples_and_dicts_are_one_for_a_graph_and_rows_are_grouped(tmp_path):
    interface = Interface(
        arguments=("x", "timestep", "labels", "text", "mask", "sizes"),
        sample="x",
        constants={"sizes": [[1, 2]]},
        form=CallForm(repeats={"text": 2}, apart=("x",)),
    )
    made = graph(tmp_path)
    inputs = CallInputs(replace(made, interface=interface), {"sizes": [[1, 2]], "added.0": 3})
    flat = inputs.flat({"x": [torch.ones(2, 8)] * 3, "text": torch.arange(6), "added": [torch.ones(1)]})
    assert flat["x"].shape == (3, 2, 8)
    assert flat["text"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert flat["added.0"].shape == (1,)
    with pytest.raises(CallError, match="text has 5 rows: give 2 for each row of the sample"):
        inputs.flat({"text": torch.arange(5)})
    with pytest.raises(CallError, match=r"x has rows of the shapes \[\(2,\), \(3,\)\]: give rows of one shape"):
        inputs.flat({"x": [torch.ones(2), torch.ones(3)]})


FIXED = {"text_mask": torch.tensor([[True, False]]), "grid": torch.tensor([4, 6])}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "text_mask",
            torch.tensor([[1, 0], [1, 1]]),
            r"^text_mask has 1 at \(1, 1\), but the graph was compiled with 0",
        ),
        ("text_mask", torch.ones(2, 3), r"^text_mask has the shape \(2, 3\), but compiled with \(1, 2\): its values"),
        ("grid", torch.tensor([4, 8]), r"^grid has 8 at \(1,\), but the graph was compiled with 6: its values decide"),
        ("grid", None, "without grid, which it was compiled with"),
    ],
)
def test_an_input_that_is_a_constant_of_the_graph_has_its_value(tmp_path, name, value, message):
    made = graph(tmp_path)
    constants = {**made.interface.constants, **{n: fixed_constant(tensor) for n, tensor in FIXED.items()}}
    made = replace(made, interface=replace(made.interface, constants=constants))
    (tmp_path / "saved").mkdir()
    made.save(tmp_path / "saved")
    inputs = CallInputs(Graph.load(tmp_path / "saved"), {}, "")
    right = {**USUAL, "text_mask": torch.tensor([[1, 0], [1, 0]]), "grid": torch.tensor([4.0, 6.0])}
    assert set(inputs.tensors(right, torch.device("cpu"))) == set(USUAL)
    with pytest.raises(CallError, match=message):
        inputs.tensors({**right, name: value}, torch.device("cpu"))
