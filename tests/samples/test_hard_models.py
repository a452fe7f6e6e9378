"""The two sample models that are hard to quantize compile, and draw recognisable pictures in full precision."""

from pathlib import Path

import pytest

from intaglio import Recipe, Step, Store, compile
from intaglio.pipeline.artifacts.keys import GRAPH, PLAN, VERIFICATION
from intaglio.pipeline.model.ref import ModelRef

SAMPLES = Path(__file__).parents[2] / "samples"
MODELS = {
    "emoji-mixer": ModelRef(path="models/emoji-mixer/mixer.py:make", sampling_steps=24),
    "emoji-jump": ModelRef(path="models/emoji-jump", sampling_steps=3),
}
W8A16 = (
    Step(uses="calibrate", options={"samples": 2}),
    Step(uses="uniform", options={"schemes": ["w8a16"]}),
    Step(uses="distill", options={"updates": 0}),
    *(Step(uses=name) for name in ("merge", "export-float", "export-qdq", "lint")),
    Step(uses="verify", options={"samples": 2, "rows": 2}),
)


@pytest.mark.parametrize(
    ("name", "layers"), [("emoji-mixer", 34), pytest.param("emoji-jump", 73, marks=pytest.mark.long)]
)
def test_a_hard_model_compiles_with_8_bit_weights_and_draws_as_in_full_precision(name, layers, tmp_path):
    recipe = Recipe(model=MODELS[name], targets=("onnxruntime-cpu",), steps=W8A16)
    done = compile(recipe, Store(tmp_path), base=SAMPLES)["onnxruntime-cpu"]
    assert len(done[GRAPH].nodes) == layers
    assert {scheme.name for scheme in done[PLAN].schemes.values()} == {"w8a16"}
    samples = done[VERIFICATION].samples
    error = (samples["deployed"] - samples["full_precision"]).norm() / samples["full_precision"].norm()
    assert float(error) < 0.1  # an SQNR of 20 dB, below which a plan is no good
