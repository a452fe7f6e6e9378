"""The JSON files of every artifact, byte by byte: `files` holds them as they were written for these values."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from intaglio.pipeline.artifacts.components import Compiled, Components
from intaglio.pipeline.artifacts.findings import Finding, Findings
from intaglio.pipeline.artifacts.front import Front, Point
from intaglio.pipeline.artifacts.graph import Engine, Graph, Interface, ScaledBy, TensorSpec
from intaglio.pipeline.artifacts.layer_times import LayerTimes
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.profile import LayerTime, Profile
from intaglio.pipeline.artifacts.provenance import Provenance
from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError, LayerAdapter, Quantized, QuantizedLayerData
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.artifacts.verification import (
    Departure,
    Latency,
    LayerParity,
    Report,
    Verification,
    VerificationFigures,
)
from intaglio.pipeline.artifacts.workload import Unreached, Workload
from intaglio.pipeline.contract.artifact import Artifact
from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16
from intaglio.pipeline.model.pipeline_folder import PipelineFolder
from intaglio.pipeline.numerics.basis import Balance, LayerBalance
from intaglio.pipeline.numerics.low_rank import Branch
from intaglio.pipeline.numerics.quality import SampleRange

FILES = Path(__file__).with_name("files")
LINEAR = Layer(name="to_q", op="linear", shape=(2, 64), bias=True)
CONV = Layer(name="conv", op="conv", shape=(4, 2, 3, 3), bias=False, padded=True)
ODD = Layer(name="misté", op="linear", shape=(2, 64), bias=False)
TABLE = torch.ones(2)
SAMPLES = SampleRange(-1.25, 1.0, 0.25)
CODES = torch.zeros(2, 64, dtype=torch.int8)
BALANCE = Balance(torch.ones(64), 16)
BRANCH = Branch(torch.ones(3, 64), torch.ones(2, 3))


def plan() -> QuantPlan:
    basis = LayerBalance(BALANCE, TABLE, TABLE, 1.5)
    schemes = {LINEAR.name: w4a16(32), CONV.name: W8A8_STEP, ODD.name: FLOAT}
    reasons = {ODD.name: "it is never called"}
    return QuantPlan((LINEAR, CONV, ODD), schemes, {LINEAR.name: basis}, {LINEAR.name: BRANCH}, reasons)


def graph(folder: Path) -> Graph:
    (folder / "model.onnx").write_bytes(b"onnx")
    return Graph(
        folder / "model.onnx",
        {"sample": TensorSpec("float32", ("batch", 3, 8)), "step": TensorSpec("int64", ())},
        {"noise": TensorSpec("float32", ("batch", 3, 8))},
        timesteps=(999.0, 1e-05),
        nodes={"to_q": ("in", "out")},
        timestep=None,
        sizes={"width": (8, 12)},
        amax={"in": 1e20, "out": 0.1},
        interface=Interface(
            "DiT", {"depth": 2, "tail": [1, None, {"a": True}], "top": math.inf}, ("x",), "x", {"y": 1.0}
        ),
        scaled={"in": ScaledBy("to_q", 0)},
    )


def sensitivity() -> Sensitivity:
    return Sensitivity(
        layers=(LINEAR, CONV),
        buckets=((0, 2), (2, 4)),
        weights=(1.0, 0.25),
        schemes={"to_q": {"w4a16": w4a16(32)}, "conv": {"float": FLOAT}},
        error={"to_q": {"w4a16": (0.1, 1e-07)}, "conv": {"float": (0.0, 0.0)}},
        drift={"to_q": {"w4a16": 0.5}},
        stderr={"to_q": {"w4a16": (math.nan, 0.0)}},
        measured={"to_q": ("w4a16",)},
        apart={"to_q": {"w4a16": {"weight": (0.1, 0.2)}}},
        groups={"to_q": "content"},
        metrics={"content": "mse"},
        rank_correlation=None,
        samples=SAMPLES,
    )


def provenance() -> Provenance:
    recipe = Recipe.parse("{model: models/tiny, targets: [onnxruntime-cpu], steps: [{assign: {budget: {size: 0.5}}}]}")
    run = RunRecord(step="assign", origin="x", key="0" * 64, ingredients="{}", outputs={"PLAN": "a" * 64}, seconds=2)
    return Provenance(recipe, {"MODEL": "b" * 64}, (run,))


def components(folder: Path) -> Components:
    (folder / "model").mkdir()
    (folder / "model/model_index.json").write_text('{"_class_name": "P", "vae": ["diffusers", "VAE"]}')
    made = {"vae": Compiled("tensorrt-10", {"encode": "m:Out", "decode": ""}), "text": Compiled("onnxruntime-cpu", {})}
    (folder / "made").mkdir()
    return Components.write(folder / "made", PipelineFolder(folder / "model"), made, without=("vae",))


def trajectory(half: bool) -> Trajectory:
    x = torch.zeros(2, 1)
    return Trajectory((2.0, 1.5), {"x": x}, x.clone(), {}, {}, {}, {}, samples=SAMPLES, half=half)


def verification(*warnings: str) -> Verification:
    figures = VerificationFigures(
        departure_output_rel_l2=1e-05,
        departure_own_rel_l2_max=0.0,
        departure_input_rel_l2_max=0.0,
        psnr_peak=2.25,
        psnr_db=31.42,
        psnr_db_min=24.1,
        psnr_simulated_db=31.54,
        sqnr_db=28.9,
        sqnr_db_min=21.6,
        sqnr_simulated_db=29.02,
        fidelity_gap_db=0.12,
        fidelity_gap_error_db=0.05,
        parity_rel_l2=0.013,
        parity_other_rel_l2=math.nan,
        parity_layer_rel_l2_max=4.1e-07,
        fp16_bytes=100000.0,
    )
    layers = {"to_q": LayerParity(4.1e-07, 4096, 3, 1)}
    return Verification(
        figures, layers, {"to_q": Departure(0.0, 1e-06)}, warnings, samples={"deployed": torch.zeros(1, 1)}
    )


POINT = Point({"size": 0.5, "latency": 1.0}, 0.001, {"to_q": "w4a16"})
STEPPED = QuantizedLayerData(W8A8_STEP, CODES + 1, torch.ones(2, 1), tables=LayerTables(amax_T=TABLE), balance=BALANCE)
DRAWN = (DrawnError(0, math.inf),)
ARTIFACTS: dict[str, Callable[[Path], Artifact]] = {
    "adapter": lambda _: Adapter({"to_q": LayerAdapter(torch.ones(2, 1))}, (0.5, math.nan), 0.25, DRAWN, 2.0),
    "engine": lambda _: Engine("tensorrt", "10.3", 3, None, plan=b"plan", layers=("to_q",)),
    "engine_on_device": lambda _: Engine("tensorrt", "on device", None, None, command="trtexec --onnx=model.onnx"),
    "front": lambda _: Front((POINT, Point({"size": 1.0}, 0.0, {"to_q": "float"})), POINT, SAMPLES, 1.5),
    "graph": graph,
    "latency": lambda _: Latency(rows=8, float32_ms=30.0, compiled_ms=12.5),
    "layer_times": lambda _: LayerTimes({"to_q": {"float": 0.5, "w8a8_token": 1e-05}}, 2.5e-10),
    "lint": lambda _: Findings((Finding("int4-shape", "warning", "node <7>", "it is odd", "make it even"),)),
    "lint_nothing": lambda _: Findings(()),
    "metrics": lambda _: Report(
        "<html>", {"psnr_db": 31.42, "latency_ms": None, "engine": {"low_precision_products": 3}}
    ),
    "plan": lambda _: plan(),
    "profile": lambda _: Profile(
        runtime="tensorrt",
        made_by="trtexec",
        runs=3,
        rows=None,
        layers={"to_q": LayerTime(scheme="w4a16", microseconds=1, bytes=72)},
        rest_microseconds={"misté": 1e-05},
    ),
    "provenance": lambda _: provenance(),
    "quantized": lambda _: Quantized(
        (7.0, 1.5), {"to_q": QuantizedLayerData(W8A8_TOKEN, CODES, torch.ones(2, 1)), "conv": STEPPED}
    ),
    "sensitivity": lambda _: sensitivity(),
    "trajectory": lambda _: trajectory(False),
    "trajectory_half": lambda _: trajectory(True),
    "verification": lambda _: verification(),
    "verification_warned": lambda _: verification("the samples are hardly those of the model"),
    "workload": lambda _: Workload(
        {"to_q": 64.0, "conv": 0.5}, (("to_q", "to_k"),), (Unreached(ODD, "it is never called"),)
    ),
    "workload_whole": lambda _: Workload({"to_q": 64.0}),
    "components": components,
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_is_saved_as_these_bytes_and_again_after_it_was_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    made = ARTIFACTS[name](tmp_path / "start")
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        made.save(folder)
        (file,) = (path for path in folder.rglob("*.json") if path.name != "model_index.json")
        expected = FILES / f"{name}.json"
        assert file.read_bytes() == expected.read_bytes()
        made = type(made).load(folder)


def test_a_whole_number_of_rows_is_saved_without_a_point(tmp_path: Path) -> None:
    Workload({"to_q": 64}).save(tmp_path)
    assert (tmp_path / "workload.json").read_text() == '{\n "rows": {\n  "to_q": 64\n },\n "same_input": []\n}\n'
