"""A model whose weights stay in their files compiles to the artifacts of the same model in memory."""

import json
import shutil
import sys
from pathlib import Path

import peak_memory
import pytest
from forked import printed_forked
from quantizing import TO_GRAPH
from tiny import save_folder, tiny_dit, wide_dit

from intaglio import Recipe, Store, compile
from intaglio.pipeline.model import checkpoint, stored_weights
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.stored_tensors import StoredTensor

RECIPE = f"""
model: {{path: model, sampling_steps: 2, guidance: 2.0}}
targets: [onnxruntime-cpu]
{TO_GRAPH}- verify: {{samples: 1}}
"""


BLOCKS = "distill: {updates: 2, scope: block, samples: 2, drawn: 1, rank: 2, enough_db: 200}"
"""Training of each block, which reads the weights of one block at a time."""


@pytest.mark.parametrize("distill", ["distill: {updates: 0}", BLOCKS])
def test_stored_weights_give_the_artifacts_of_weights_in_memory(
    distill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_folder(tiny_dit(), tmp_path / "model")
    recipe = Recipe.parse(RECIPE.replace("distill: {updates: 0}", distill))
    codes: list[bool] = []
    set_codes = QuantizedLayer.set_codes

    def watched(layer, codes_NK):
        set_codes(layer, codes_NK)
        codes.append(isinstance(layer.layer.weight, StoredTensor))

    monkeypatch.setattr(QuantizedLayer, "set_codes", watched)
    made = []
    for share, least in ((1.0, stored_weights.LEAST_BYTES), (0.0, 0)):
        monkeypatch.setattr(checkpoint, "FEW", share)
        monkeypatch.setattr(stored_weights, "LEAST_BYTES", least)
        codes.clear()
        runs = compile(recipe, Store(tmp_path / f"store{least}"), base=tmp_path)["onnxruntime-cpu"].runs
        made.append([(run.step, run.outputs) for run in runs])
        assert codes
        assert set(codes) == {least == 0}
    assert made[0] == made[1]


ALLOWED = 0.8
"""Share of a model's weights in float32 that a process may allocate to calibrate, round and merge it."""
FEWEST_CALLS = """
model: {path: model, sampling_steps: 1}
targets: [onnxruntime-cpu]
steps:
- calibrate: {samples: 1}
- uniform: {schemes: [w4a8_token, w8a8_token, w8a8o8_step]}
- distill: {updates: 0}
- merge
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits what a process allocates")
def test_a_model_is_calibrated_and_rounded_in_less_memory_than_its_weights_take(tmp_path: Path):
    models = {"small": tiny_dit(), "large": wide_dit()}
    for name, module in models.items():
        save_folder(module, tmp_path / name / "model")
        shutil.rmtree(tmp_path / name / "model" / "transformer")
        module.bfloat16().save_pretrained(tmp_path / name / "model" / "transformer", max_shard_size="20MB")
    whole = 4 * sum(parameter.numel() for parameter in models["large"].parameters())
    recipe = Recipe.parse(FEWEST_CALLS)
    kept = compile(recipe, Store(tmp_path / "store"), base=tmp_path / "large")["onnxruntime-cpu"].runs
    printed = printed_forked(peak_memory.print_compiled, tmp_path, FEWEST_CALLS, out=tmp_path / "printed")
    outputs, in_files, in_memory = json.loads(printed)
    assert outputs == [dict(run.outputs) for run in kept]
    assert in_files < ALLOWED * whole < in_memory, f"{in_files / whole:.2f} and {in_memory / whole:.2f} of the weights"
