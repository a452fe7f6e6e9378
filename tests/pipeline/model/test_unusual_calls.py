"""A pipeline whose denoiser is called in an unusual way is recorded, and its graph takes the same calls.

The sample is the second argument, the hidden states of a language model have their layers before their rows, there is
one timestep for each frame, the first of which is given, a list has one size for each row, and the scheduler gets the
negated output.
"""

import logging
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from harness import run_pass
from quantizing import with_plan
from torch import nn

import intaglio
from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.verify.parity import Comparison
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, MODEL, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import CallError
from intaglio.pipeline.formats.schemes import W8A8_STEP
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.call_form import CallForm
from intaglio.pipeline.model.call_rows import Start
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.form_search import formed
from intaglio.pipeline.model.recording import Recording, record
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler

STEPS, FRAMES = 3, 4


class Unusual(nn.Module):
    """Reads the states of two layers of a language model; each frame has its own timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.text, self.time = nn.Linear(6, 6), nn.Linear(8, 6), nn.Linear(1, 6)

    def forward(self, states, noisy, timesteps=None, sizes=None, return_dict=True):
        texts = sum(self.text(states[k]).view(len(noisy), -1, 6).mean(1, keepdim=True) for k in (0, 2))
        clean = self.time(torch.zeros(1, 1, 1))  # the first call of this layer has a constant input
        moved = self.layer(noisy)
        moved += texts + clean  # into the output of the layer
        scales = torch.stack([torch.full((1, 1), sizes[row] / 8) for row in range(len(noisy))])
        return (moved * scales + self.time(timesteps[..., None].float() / 1000),)


class Pipeline:
    """Draws clips (R, FRAMES, 6), and keeps the first frame."""

    def __init__(self, module: nn.Module) -> None:
        self.transformer, self.scheduler = module, diffusers.FlowMatchEulerDiscreteScheduler()

    def __call__(self, states, latents, steps=STEPS):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            times = t * torch.ones(len(latents), FRAMES)
            times[:, 0] = 0
            (found,) = self.transformer(states, latents, timesteps=times, sizes=[8] * len(latents), return_dict=False)
            latents = self.scheduler.step(-found, t, latents).prev_sample
        return latents


def given(rows: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(rows)
    return {"states": torch.randn(3, rows, 5, 8, generator=rng), "latents": torch.randn(rows, 4, 6, generator=rng)}


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(Pipeline(Unusual()), given(2))


def model_of(recording: Recording) -> DenoiserModel:
    module, scheduler = Unusual(), diffusers.FlowMatchEulerDiscreteScheduler()
    return recording.given_to(DenoiserModel(module, scheduler, recording.sample_shape))


def test_the_sampler_repeats_the_pipeline(recording, tmp_path):
    recording.save(tmp_path / "c.safetensors")
    model = model_of(Recording.load(tmp_path / "c.safetensors"))
    assert (model.names.sample, model.names.timestep, model.output_scale) == ("noisy", "timesteps", -1.0)
    assert model.form is not None
    assert (model.form.row_axes, model.form.row_lists) == ({"states": 1}, ("sizes",))
    assert torch.equal(model.conditions["states"], given(2)["states"].transpose(0, 1))
    assert torch.equal(model.conditions["timesteps"], torch.tensor([0.0, 1, 1, 1]).expand(2, 4))
    start = Start(given(2)["latents"], dict(model.conditions), {})
    found = Sampler(model, STEPS, 1.0).sample(denoise_with(model.module, model), start)
    torch.testing.assert_close(found, Pipeline(Unusual())(**given(2)))


@pytest.mark.parametrize("name", ["states", "sizes"])
def test_rows_on_the_second_axis_and_lists_of_rows_are_found_by_calls(recording, name):
    module, model = Unusual(), replace(model_of(recording), form=None)
    if name == "states":
        model = replace(model, module=module, constants={"sizes": [8] * 6})
        assert formed(model, STEPS).form == CallForm(row_axes={"states": 1})
    else:
        first = {**model.conditions, "states": model.conditions["states"][:, [0, 0, 2]].flatten(1, 2)[:, :15]}
        module.forward = lambda states, noisy, timesteps, sizes: Unusual.forward(  # type: ignore[method-assign]
            module, states.view(-1, 3, 5, 8).transpose(0, 1), noisy, timesteps, sizes
        )
        model = replace(model, module=module, conditions=first)
        model = replace(model, constants={"sizes": [8]})
        assert formed(model, STEPS).form == CallForm(row_lists=("sizes",))


def test_the_graph_draws_the_same_in_the_pipeline(recording, tmp_path):
    folder = Path(__file__).parent
    recording.save(tmp_path / "c.safetensors")
    source = f"""
import sys, diffusers
from intaglio import DenoiserModel
sys.path.insert(0, {str(folder)!r})
from test_unusual_calls import Unusual

def make():
    return DenoiserModel(Unusual(), diffusers.FlowMatchEulerDiscreteScheduler(), (4, 6))
"""
    (tmp_path / "unusual.py").write_text(source)
    ref = ModelRef(path="./unusual.py:make", conditions="c.safetensors", sampling_steps=STEPS)
    start = {MODEL: Checkpoint.resolve(ref, tmp_path), TARGET: load_target("onnxruntime-cpu")}
    start |= run_pass(Calibrate(samples=2), start, tmp_path / "calibrate")
    assert start[TRAJECTORY].timesteps[0] == pytest.approx(1000)
    (tmp_path / "float").mkdir()
    graph = run_pass(ExportFloat(), start, tmp_path / "export")
    graph[FLOAT_GRAPH].save(tmp_path / "float")
    assert graph[FLOAT_GRAPH].inputs["timesteps"].shape == ("batch", FRAMES)
    pipe = Pipeline(Unusual())
    expected = pipe(**given(3))
    pipe.transformer = intaglio.load(tmp_path / "float", threads=1)
    torch.testing.assert_close(pipe(**given(3)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CallError, match=r"noisy has 2 at axis 0, but the graph accepts 3"):
        pipe.transformer(
            given(2)["states"].transpose(0, 1), given(2)["latents"], timesteps=torch.ones(2, FRAMES), sizes=[8] * 2
        )
    # the layer's output is compared as it was before the model added to it
    planned = with_plan(start | graph, lambda _: W8A8_STEP)
    made = run_pass(ExportQdq(), planned, tmp_path / "qdq")[GRAPH]
    both = Comparison.of(start[MODEL].open(), planned[QUANTIZED], made, OnnxRuntime())
    context = Context(scratch=tmp_path, seed=0, log=logging.getLogger("test"))
    errors = both.layer_parity(start[TRAJECTORY].call(0), context)
    assert errors.keys() == {"layer", "text", "time"}
    assert max(each.rel_l2 for each in errors.values()) < 1e-5
    _, found = both.departures(start[TRAJECTORY].call(0))
    assert max(found[name].own_rel_l2 for name in ("layer", "text")) < 1e-5
