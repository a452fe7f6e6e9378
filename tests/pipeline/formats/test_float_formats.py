"""FP8 and NVFP4 layers beside INT8, INT4 and float ones in one plan, from sensitivity to an engine for Blackwell."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import oracle
import pytest
import torch
from assigning import SAMPLES
from exported import export
from harness import Artifacts, run_pass
from onnx import numpy_helper
from safetensors.torch import load_file
from tiny import tiny_dit

from intaglio.exporters.lint.lint import Lint
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.exporters.verify.verify import Verify
from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.start import learns_input
from intaglio.passes.merge import MergeAdapters
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.passes.uniform import UniformPlan
from intaglio.pipeline.artifacts.keys import (
    ADAPTER,
    ENGINE,
    GRAPH,
    MODEL,
    PLAN,
    QUANTIZED,
    SENSITIVITY,
    TARGET,
    TRAJECTORY,
    VERIFICATION,
    WORKLOAD,
)
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.formats.known import known_schemes
from intaglio.pipeline.formats.layer import Layer, admitted_schemes, illegal
from intaglio.pipeline.formats.nvfp4 import Nvfp4Weight
from intaglio.pipeline.formats.schemes import FLOAT, Float
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.simulation.input import InputRounding

NAMES = (
    *("nvfp4_step", "fp8_token", "w8a8_token", "w4a16", "fp8_static", "nvfp4_static", "nvfp4a16"),
    *("float", "fp8_step"),
)
BLACKWELL = load_target("tensorrt-rtx-blackwell")
STORED = {"fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return export(tiny_dit(), tmp_path_factory.mktemp("dit")) | {TARGET: BLACKWELL}


def mixed(layers: tuple[Layer, ...]) -> QuantPlan:
    """A plan with all of NAMES, one after the other; layers that do not admit theirs have w8a8."""
    chosen = {}
    for place, layer in enumerate(layers):
        own = {scheme.name: scheme for scheme in admitted_schemes(layer)}
        name = NAMES[place % len(NAMES)]
        chosen[layer.name] = own.get(name, own["w8a8_token" if layer.op == "linear" else "fp8_step"])
    return QuantPlan(layers, chosen)


def test_assign_mixes_four_number_formats_and_float():
    best = ("nvfp4_step", "fp8_token", "w8a8_token", "w4a16", "float")
    layers = tuple(Layer(name=f"l{i}", op="linear", shape=(64, 128), bias=True) for i in range(5))
    schemes = {name: known_schemes(64)[name] for name in best}
    error = {
        layer.name: {name: (0.0 if name == "float" else 1e-6 if name == own else 1e-2,) for name in best}
        for layer, own in zip(layers, best, strict=True)
    }
    table = Sensitivity(((0, 1),), (1.0,), layers, {layer.name: schemes for layer in layers}, error, samples=SAMPLES)
    artifacts = {SENSITIVITY: table, TARGET: BLACKWELL, WORKLOAD: Workload({layer.name: 64 for layer in layers}, ())}
    size = sum(layer.size_bytes(schemes[own]) for layer, own in zip(layers, best, strict=True)) / (5 * 64 * 129 * 2)
    step = AssignPrecision(schemes={"linear": best}, budget=Budget(size=size + 1e-6), front=0)
    plan = run_pass(step, artifacts, Path())[PLAN]
    assert [plan.schemes[layer.name].name for layer in layers] == list(best)


def test_sizes_and_reasons():
    layer = Layer(name="a", op="linear", shape=(64, 128), bias=True)
    schemes = known_schemes()
    assert layer.size_bytes(schemes["fp8_token"]) == 64 * 128 + 4 * 64 * 2
    assert layer.size_bytes(schemes["nvfp4_step"]) == 64 * 128 // 2 + 64 * 8 + 4 + 4 * 64
    lacks = {
        "tensorrt-10.3-orin": "fp8 needs compute capability 8.9, and the target's GPUs have 8.7",
        "tensorrt-rtx": "fp8 needs compute capability 8.9, and the target's GPUs have 7.5",
        "tensorrt-rtx-ada": None,
        "tensorrt-10.16-thor": None,
    }
    for name, reason in lacks.items():
        said = illegal(layer, schemes["fp8_token"], load_target(name))
        assert said is None if reason is None else said.endswith(reason)
    said = illegal(layer, schemes["nvfp4_step"], load_target("tensorrt-rtx-ada"))
    assert said.endswith("not nvfp4_step: nvfp4 needs compute capability 10.0, and the target's GPUs have 8.9")
    assert illegal(layer, schemes["nvfp4_step"], BLACKWELL) is None
    odd = layer.model_copy(update={"shape": (64, 40)})
    assert illegal(odd, schemes["nvfp4_step"], BLACKWELL) == (
        "a: K = 40 must be a multiple of the group size 16 and larger than it"
    )


def test_sensitivity_measures_them_and_a_small_budget_takes_nvfp4(recorded, tmp_path):
    linear = ("nvfp4_step", "fp8_token", "w8a8_token")
    measure = MeasureSensitivity(schemes=(*linear, "fp8_step"), buckets=1, rows=2, samples=2)
    found = recorded | run_pass(measure, recorded, tmp_path / "sensitivity")
    errors = found[SENSITIVITY].error["transformer_blocks.0.attn1.to_q"]
    assert 0 < errors["w8a8_token"][0] < errors["fp8_token"][0] < errors["nvfp4_step"][0]
    step = AssignPrecision(schemes={"linear": linear, "conv": ("fp8_step",)}, budget=Budget(size=0.4))
    plan = run_pass(step, found, tmp_path / "assign")[PLAN]
    names = {scheme.name for scheme in plan.schemes.values()}
    assert {"nvfp4_step", "w8a8_token"} <= names


@pytest.mark.parametrize("updates", [2, 0])
def test_a_mixed_plan_is_trained_merged_built_and_verified(updates, recorded, tmp_path):
    made = recorded | {PLAN: mixed(recorded[MODEL].layers())}
    distill = Distill(updates=updates, samples=2, rank=2)
    verify = Verify(samples=2, rows=4, gap_db_tolerance=6.0)  # random weights and 3 steps
    for step in (distill, MergeAdapters(), ExportQdq(), Lint(), BuildTensorRT(), verify):
        for key, artifact in run_pass(step, made, tmp_path / step.name).items():
            root = tmp_path / step.name / key.name
            root.mkdir()
            artifact.save(root)
            made[key] = key.type.load(root)
    layers = made[QUANTIZED].layers
    assert {data.scheme.name for data in layers.values()} >= set(NAMES) - {"float"}
    verified = made[VERIFICATION].layers
    assert verified.keys() == layers.keys()
    assert max(found.codes_differing for found in verified.values()) == 0
    rounded = {name for name, data in layers.items() if not isinstance(data.scheme.input, Float)}
    assert max(verified[name].rel_l2 for name in rounded) < 1e-5  # float32 sums of some hundred products
    assert made[ENGINE].low_precision_products == len(rounded)
    packed = load_file(tmp_path / "merge" / "QUANTIZED" / "quantized.safetensors")
    written = {each.name: each for each in onnx.load(made[GRAPH].path).graph.initializer}
    for name, data in layers.items():
        dtype = STORED.get(data.scheme.weight.kind)
        assert dtype is None or packed[f"{name}:codes"].dtype == dtype
        if isinstance(data.scheme.weight, Nvfp4Weight):
            assert packed[f"{name}:group"].dtype == torch.float8_e4m3fn
            assert packed[f"{name}:codes"].nbytes == data.codes.numel() // 2
            graph_codes = numpy_helper.to_array(written[f"{name}/weight" if f"{name}/weight" in written else name])
            assert graph_codes.dtype == ml_dtypes.float4_e2m1fn
            assert np.array_equal(oracle.places(graph_codes.astype(np.float32), graph_codes.dtype), data.codes.numpy())
    trained = [name for name in layers if updates and made[ADAPTER].layers[name].a is not None]
    assert len(trained) == (len(layers) if updates else 0)


def test_nvfp4_weights_are_those_of_the_oracle_and_are_packed_as_onnx_packs_them():
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 1, 24).unsqueeze(1)
    w[3], w[5, 16:32] = 0, 0
    form = Nvfp4Weight()
    scale, group = form.fit(w)
    assert scale.shape == (1, 1)
    assert group.shape == (24, 4)
    stored = form.stored_groups(group)
    codes = form.quantize(w, form.code_scale(scale, group))
    numbers, worth = oracle.nvfp4_weight(w.numpy(), scale.item(), stored.float().numpy())
    assert np.array_equal(codes.numpy(), oracle.places(numbers, ml_dtypes.float4_e2m1fn))
    assert np.array_equal(form.dequantize(codes, form.code_scale(scale, stored.float())).numpy(), numbers * worth)
    packed = numpy_helper.from_array(form.elements(codes), "w").raw_data
    assert form.pack(codes).numpy().tobytes() == packed
    assert torch.equal(form.unpack(form.pack(codes), (24, 64)), codes)
    assert UniformPlan(schemes=("nvfp4_step",)).schemes == ("nvfp4_step",)
    assert FLOAT.group_size is None


def test_an_nvfp4_input_beyond_the_calibrated_range_is_not_clipped(recorded: Artifacts) -> None:
    trajectory, name = recorded[TRAJECTORY], "transformer_blocks.0.attn1.to_q"
    scheme = known_schemes()["nvfp4_step"]
    largest = trajectory.amax[name][0]
    tables = trajectory.tables({name: scheme})[name]
    assert tables.amax_T[0] == 4 * largest
    rounding = InputRounding(scheme.input, tables, StepClock(trajectory.timesteps))
    x = largest * torch.linspace(0.1, 3.5, 64).reshape(1, 64)
    with rounding.clock.at(0):
        q, scale, amax, _ = rounding(x)
    assert (q * scale * amax - x).abs().max() < 0.2 * x.max()  # numbers of a block are 2/6 of its largest apart
    assert not learns_input(scheme)
    assert learns_input(known_schemes()["fp8_step"])
