"""A new weight format is one file of code, a row of the lowering table and a name in a target: `sixbit.py` is the file.

Nothing in the package knows it, and it goes from sensitivity to verification, to the bit as all others do.
"""

from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
import torch
from exported import once
from harness import Artifacts, run_pass
from onnx import numpy_helper
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from sixbit import W6A8_TOKEN, SixBitWeight, six_bit_schemes
from tiny import tiny_dit

from intaglio import Pass
from intaglio.exporters.lint.lint import Lint
from intaglio.exporters.qdq import lowering
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.report.figures.schemes import scheme_rows
from intaglio.exporters.runtimes.onnxruntime.build import BuildOnnxRuntime
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.verify.verify import Verify
from intaglio.passes.assign.assign import AssignPrecision, Budget
from intaglio.passes.balance import BalanceLayers
from intaglio.passes.distill.distill import Distill
from intaglio.passes.merge import MergeAdapters
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.passes.uniform import UniformPlan
from intaglio.pipeline.artifacts.keys import ENGINE, GRAPH, MODEL, PLAN, QUANTIZED, TARGET, VERIFICATION
from intaglio.pipeline.cli.explain import explain
from intaglio.pipeline.formats import known
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.target import load_target

NAME = "w6a8_token"
SHIPPED = load_target("onnxruntime-cpu")
TARGET_LINE = {"formats": {**SHIPPED.formats, "linear": (*SHIPPED.formats["linear"], NAME)}}
ROW = lowering.Lowering("linear", W6A8_TOKEN, lowering.per_channel, True, "8-bit codes hold 6 bits")


@pytest.fixture
def six_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is known, and its row is in the table."""
    families = known.scheme_families()
    monkeypatch.setattr(known, "scheme_families", lambda: (*families, six_bit_schemes))
    rows = OnnxRuntime().lowerings()
    monkeypatch.setattr(OnnxRuntime, "lowerings", lambda _: (*rows, ROW))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny DiT, its trajectory, its float graph, and a target that runs the format."""
    return once(tiny_dit, tmp_path_factory) | {TARGET: SHIPPED.model_copy(update=TARGET_LINE)}


def compiled(start: Artifacts, steps: list[Pass], folder: Path) -> Artifacts:
    """Run the steps one after the other; each reads the files that the steps before it have written."""
    made = dict(start)
    for step in steps:
        for key, artifact in run_pass(step, made, folder / step.name).items():
            root = folder / step.name / key.name
            root.mkdir()
            artifact.save(root)
            made[key] = key.type.load(root)
    return made


def planned_by_sensitivity() -> list[Pass]:
    """A plan that is too small for 8 bits everywhere, and need not be as small as 4 bits."""
    measure = MeasureSensitivity(schemes=("w8a8_token", "w8a8_step", NAME), buckets=1, rows=2, samples=2)
    choices = {"linear": ("w8a8_token", NAME), "conv": ("w8a8_step",)}
    return [measure, AssignPrecision(schemes=choices, budget=Budget(size=0.42))]


def planned_without() -> list[Pass]:
    return [UniformPlan(schemes=(NAME, "w8a8_step"))]


@pytest.mark.parametrize(("plan", "updates"), [(planned_by_sensitivity, 2), (planned_without, 0)])
def test_a_toy_format_goes_from_sensitivity_to_verification(plan, updates, recorded, six_bit, tmp_path):
    steps = [
        *plan(),
        *([BalanceLayers()] if updates else []),
        Distill(updates=updates, samples=2, rank=2),
        MergeAdapters(),
        ExportQdq(),
        Lint(),
        BuildOnnxRuntime(),
        Verify(samples=2, rows=4, bisect=True, gap_db_tolerance=6.0),  # random weights and 3 steps
    ]
    made = compiled(recorded, steps, tmp_path)
    six = {name: data for name, data in made[QUANTIZED].layers.items() if data.scheme == W6A8_TOKEN}
    assert len(six) > 3
    assert (tmp_path / "merge" / "QUANTIZED" / "quantized.json").read_text().count('"kind": "six"') == len(six)
    packed = load_file(tmp_path / "merge" / "QUANTIZED" / "quantized.safetensors")
    graph = onnx.load(made[GRAPH].path)
    written = {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
    for name, data in six.items():
        assert data.codes.abs().max() <= 31
        assert packed[f"{name}:codes"].nbytes == data.codes.numel() * 6 // 8
        assert np.array_equal(written[f"{name}/weight"], data.codes.numpy().T)
    verified = made[VERIFICATION]
    assert verified.layers.keys() == made[QUANTIZED].layers.keys()
    assert max(verified.layers[name].rel_l2 for name in six) < 1e-5  # float32 sums of some hundred products
    assert max(verified.layers[name].codes_differing for name in six) == 0
    rounded = [data for data in made[QUANTIZED].layers.values() if data.scheme.by_token]
    assert made[ENGINE].low_precision_products >= len(rounded) >= len(six)
    (row,) = (each for each in scheme_rows(made[PLAN]) if each.name == NAME)
    assert (row.code, row.meaning, row.layers) == ("6t", "6-bit weight, 8-bit input with one scale per token", len(six))


def test_its_codes_are_those_of_the_oracle(recorded, six_bit, tmp_path):
    steps = [UniformPlan(schemes=(NAME, "w8a8_step")), Distill(updates=0), MergeAdapters()]
    layers = compiled(recorded, steps, tmp_path)[QUANTIZED].layers
    module = recorded[MODEL].open().module
    for name, data in layers.items():
        if data.scheme == W6A8_TOKEN:
            w = module.get_submodule(name).weight.detach().numpy()
            expected = oracle.weight_codes(w, data.scale_NG.numpy(), -31, 31, w.shape[1])
            assert np.array_equal(data.codes.numpy(), expected), name


def test_its_name_and_size_follow_from_the_value_and_six_bit_codes_are_packed(six_bit):
    assert W6A8_TOKEN.name == NAME
    assert known.known_schemes()[NAME] == W6A8_TOKEN
    layer = Layer(name="a", op="linear", shape=(8, 64), bias=True)
    assert layer.size_bytes(W6A8_TOKEN) == 8 * 64 * 6 // 8 + 4 * 8 * 2
    codes = torch.tensor([[-31, 31, 0, 1], [-1, 7, -8, 30]], dtype=torch.int8)
    stored = SixBitWeight().pack(codes)
    assert stored.nbytes == 6
    assert torch.equal(SixBitWeight().unpack(stored, (2, 4)), codes)
    (said,) = explain(NAME)
    assert said.facts["weight"] == "6 bits; One scale for each output channel, w: (N, K) -> scale: (N, 1)."


def test_it_is_refused_where_nothing_lists_it():
    with pytest.raises(ValidationError, match=f"no scheme '{NAME}'"):
        UniformPlan(schemes=(NAME,))
    with pytest.raises(ValidationError, match="no weight format of kind 'six': float, int"):
        TypeAdapter(known.StoredScheme).validate_python(W6A8_TOKEN.model_dump())
