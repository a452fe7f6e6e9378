from pathlib import Path

import pytest
from tiny import save_folder, tiny_dit

from intaglio import Recipe, Store, compile
from intaglio.exporters.float_graph import own_weights
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model import checkpoint, stored_weights
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.cost import measure_cost
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs import memory
from intaglio.pipeline.runs.runner import plan

RECIPE = """
model: {path: model, sampling_steps: 4, guidance: 2.0}
targets: [onnxruntime-cpu]
steps:
  - calibrate: {samples: 8}
  - sensitivity:
      {buckets: 2, rows: 4, bases: [], probes: 2, samples: 16, direct: 0.1, apart: screened}
  - assign
  - distill: {updates: 10, samples: 4}
"""


def test_a_call_is_timed_and_the_model_counted(tmp_path):
    save_folder(tiny_dit(), tmp_path)
    cost = measure_cost(Checkpoint.resolve(ModelRef(path=str(tmp_path), sampling_steps=4, guidance=2.0), Path()))
    assert (cost.layers, cost.steps, cost.rows_per_sample) == (21, 4, 2)
    assert cost.seconds_per_row > 0
    # the first layers of a block have most of it behind them: the mean is beyond the middle
    assert 0.5 < cost.from_layer < 0.8
    # the first convolution computes all, the two blocks all and half of it, the two at the end next to nothing
    assert 2.3 < cost.from_units < 2.8


def test_a_plan_that_never_ran_is_estimated_by_its_rows(store: Store, tmp_path):
    save_folder(tiny_dit(), tmp_path / "model")
    steps = plan(Recipe.parse(RECIPE), store, base=tmp_path)["onnxruntime-cpu"]
    estimate = {step.step: step.estimate_s for step in steps}
    assert estimate["assign"] is None
    per_row = estimate["calibrate"] / (4 * 8 * 2)
    drawn = 3 * 4 * 2 * 4  # four samples in four steps, by full precision, at the start and at the end
    assert estimate["distill"] / per_row == pytest.approx(3 * 10 * 4 * 2 + drawn)
    along = (2 + 2) * 16  # once and again, and back with the gradients by inputs and weights
    sampled = along * 4 * 2 + (1 + 0.05 * 21) * 4 * 2 * 4
    fixed = 4 * 4 + sampled + 2 * 4 * (2 + 1 + 2 * 2)  # two probes, each with both gradients
    measured = estimate["sensitivity"] / per_row - fixed
    assert 2 * 4 * (0.1 * 3 * 21 * 0.5) < measured < 2 * 4 * (0.1 * 3 * 21 * 0.8) + 4 * 3


def test_a_plan_says_the_memory_and_the_disk_of_each_step(store: Store, tmp_path, monkeypatch):
    save_folder(tiny_dit(), tmp_path / "model")
    recipe = Recipe.parse(
        "{model: {path: model, sampling_steps: 1}, targets: [onnxruntime-cpu], steps: [{calibrate: {samples: 1}},"
        " {uniform: {schemes: [w8a8_token]}}, {distill: {updates: 1}}, merge, export-float, export-qdq]}"
    )
    sizes = [parameter.numel() for parameter in tiny_dit().parameters()]
    count = sum(sizes)

    def figures(of: str) -> dict[str, int | None]:
        return {each.step: getattr(each, of) for each in plan(recipe, store, base=tmp_path)["onnxruntime-cpu"]}

    few = memory.INTERPRETER + 4 * count
    assert figures("estimate_bytes") == {
        "calibrate": few, "uniform": few, "distill": memory.least_bytes(count), "merge": few, "export-float": few,
        "export-qdq": None,
    }  # fmt: skip
    monkeypatch.setattr(checkpoint, "FEW", 0.0)
    assert figures("estimate_bytes")["merge"] == memory.INTERPRETER + 16 * max(sizes)
    assert figures("estimate_bytes")["distill"] == memory.least_bytes(count)
    stored = figures("disk_bytes")
    assert {name: stored[name] for name in ("merge", "export-float", "export-qdq")} == {
        "merge": count, "export-float": 4 * count, "export-qdq": count,
    }  # fmt: skip
    assert stored["calibrate"] is None
    monkeypatch.setattr(own_weights, "LARGE_BYTES", 1)
    assert figures("disk_bytes")["export-float"] == 4 * count  # all weights are small, and none stays in its file
    monkeypatch.setattr(stored_weights, "LEAST_BYTES", 4 * max(sizes))
    assert figures("disk_bytes")["export-float"] == 4 * (count - sum(size for size in sizes if size == max(sizes)))
    first = recipe.model_copy(update={"steps": recipe.steps[:1]})
    outputs = compile(first, store, base=tmp_path)["onnxruntime-cpu"].runs[0].outputs.values()
    files = [file for digest in outputs for file in store.object_folder(digest).iterdir()]
    assert figures("disk_bytes")["calibrate"] == sum(file.stat().st_size for file in files)


def test_a_models_fault_in_a_plan_is_one_line(store: Store, tmp_path):
    source = """
import torch, diffusers
from intaglio.pipeline.model.checkpoint import DenoiserModel

class Wrong(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(4, 5)

    def forward(self, sample, timestep):
        return self.one(sample)[:, 7] + timestep.nothing

def make():
    return DenoiserModel(Wrong().eval(), diffusers.DDIMScheduler(), (4, 4))
"""
    (tmp_path / "wrong.py").write_text(source)
    recipe = Recipe.parse("{model: ./wrong.py:make, targets: [onnxruntime-cpu], steps: [calibrate]}")
    message = r"^model: Wrong cannot be called with sample \(1, 4, 4\), timestep \(1,\): it ended in IndexError: "
    with pytest.raises(RecipeError, match=message):
        plan(recipe, store, base=tmp_path)
