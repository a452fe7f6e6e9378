"""A model whose weights stay in their files compiles to the artifacts of the same model in memory."""

from pathlib import Path

import pytest
from tiny import save_folder, tiny_dit

from intaglio import Recipe, Store, compile
from intaglio.pipeline.model import checkpoint, stored_weights
from intaglio.pipeline.simulation.layer import QuantizedLayer
from intaglio.pipeline.stored_tensors import StoredTensor

RECIPE = """
model: {path: model, sampling_steps: 2, guidance: 2.0}
targets: [onnxruntime-cpu]
steps:
- calibrate: {samples: 1}
- uniform: {schemes: [w4a8_token, w8a8_token, w8a8o8_step]}
- distill: {updates: 0}
- merge
- export-float
- export-qdq
- verify: {samples: 1}
"""


def test_stored_weights_give_the_artifacts_of_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_folder(tiny_dit(), tmp_path / "model")
    recipe = Recipe.parse(RECIPE)
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
