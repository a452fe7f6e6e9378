"""A pipeline whose steps two denoisers share, such as Wan 2.2's, draws with both compiled."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from harness import run_pass
from quantizing import with_plan
from typer.testing import CliRunner

import intaglio
from intaglio import RecipeError
from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.components import Components
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, TARGET, TRAJECTORY
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, LayerScheme
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.pipeline_folder import PipelineFolder
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.numerics import quality

STEPS = 4
BOTH = ("transformer", "transformer_2")
WITHOUT = ("text_encoder", "tokenizer", "vae")


def rows(seed: int) -> torch.Tensor:
    return torch.randn(2, tiny_pipelines.LENGTH, 64, generator=torch.Generator().manual_seed(seed))


CALL = tiny_pipelines.CALLS[tiny_pipelines.wan_experts] | {
    "prompt_embeds": rows(1),
    "negative_prompt_embeds": rows(2),
    "num_inference_steps": STEPS,
    "output_type": "latent",
}
PLAIN = CALL | {"guidance_scale": 1.0, "negative_prompt_embeds": None}


def drawn(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).frames


def compiled(model: Checkpoint, folder: Path) -> Path:
    """A denoiser in W8A8 with a scale for each of its own steps."""
    folder.mkdir()
    start: Any = {MODEL: model, TARGET: load_target("onnxruntime-cpu")}
    start |= run_pass(Calibrate(samples=2), start, folder / "calibrate")

    def called(layer: Layer) -> LayerScheme:
        return W8A8_STEP if layer.name in start[TRAJECTORY].amax else FLOAT

    start |= run_pass(ExportFloat(), start, folder / "float")
    made = run_pass(ExportQdq(), with_plan(start, called), folder / "qdq")
    (folder / "out").mkdir()
    made[GRAPH].save(folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline, and a folder with its files and a recording of each denoiser."""
    folder, pipe = tmp_path_factory.mktemp("experts"), tiny_pipelines.wan_experts()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    for name in BOTH:
        made = intaglio.record(pipe, PLAIN, PLAIN | {"prompt_embeds": rows(2)}, denoiser=name)
        made.save(folder / f"{name}.safetensors")
    return pipe, folder


def resolved(folder: Path, name: str) -> Checkpoint:
    ref = ModelRef(path="model", subfolder=name, conditions=f"{name}.safetensors", sampling_steps=STEPS, guidance=2.0)
    return Checkpoint.resolve(ref, folder)


def test_each_is_compiled_over_its_own_steps_and_both_draw_in_the_pipeline(recorded, tmp_path):
    pipe, folder = recorded
    models = {name: resolved(folder, name) for name in BOTH}
    expected = drawn(pipe)
    outs = [compiled(model, tmp_path / name) for name, model in models.items()]
    around = PipelineFolder.around(models["transformer"])
    (tmp_path / "stored").mkdir()
    around.save(tmp_path / "stored")
    assert not any((tmp_path / "stored" / name).exists() for name in BOTH)
    (outs[0] / "pipeline").mkdir()
    Components.write(outs[0] / "pipeline", around, {}, WITHOUT)
    made = intaglio.load_pipeline(*outs, threads=1)
    first, second = made.transformer.graph.timesteps, made.transformer_2.graph.timesteps
    assert (*first, *second) == tuple(float(t) for t in pipe.scheduler.timesteps)
    assert min(first) >= 800 > max(second)
    error = quality.mean_squared_error(drawn(made), expected)
    assert quality.psnr_db(error, float(expected.max() - expected.min())).min() > 35
    with pytest.raises(RecipeError, match=r"also calls transformer_2: compile it with model.subfolder"):
        intaglio.load_pipeline(outs[0])
    with pytest.raises(RecipeError, match=r"is transformer, as is .*: give one folder for each denoiser"):
        intaglio.load_pipeline(outs[0], outs[0])
    original = intaglio.load_pipeline(outs[0], transformer_2=pipe.transformer_2, threads=1)
    assert original.transformer_2 is pipe.transformer_2


def test_the_second_begins_with_the_samples_that_the_first_left(recorded):
    pipe, folder = recorded
    states = []

    def note(_: Any, step: int, timestep: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states.append((float(timestep), kept["latents"]))
        return {}

    generator = torch.Generator().manual_seed(0)
    made = intaglio.record(
        pipe, PLAIN | {"generator": generator, "callback_on_step_end": note}, denoiser="transformer_2"
    )
    last = [state for time, state in states if time >= 800][-1]
    assert torch.equal(made.start, last)
    model = made.given_to(resolved(folder, "transformer_2").open())
    sampler = Sampler(model, STEPS, 1.0)
    start = sampler.start(3, torch.Generator().manual_seed(0), rows=(1, 0))
    assert torch.equal(start.noise, last[[1, 0, 1]])
    call, *_ = sampler.drive(lambda inputs: inputs["hidden_states"] * 0, start)
    assert torch.equal(call.inputs["hidden_states"], start.noise)


def test_a_recording_at_other_steps_is_refused(recorded):
    _, folder = recorded
    with pytest.raises(RecipeError, match=r"2 timesteps .* no steps of sampling_steps: 9: record with num_inf\w+=9"):
        Sampler(resolved(folder, "transformer_2").open(), 9, 2.0)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("transformer_3", 2, "WanPipeline has no component 'transformer_3' with weights"),
        ("tokenizer", 2, "WanPipeline has no component 'tokenizer' with weights"),
        (
            "transformer_2",
            1,
            "did not call its WanTransformer3DModel at any of 1 steps: record with more num_inference_steps",
        ),
    ],
)
def test_a_denoiser_that_is_not_there_or_not_called_cannot_be_recorded(recorded, name, steps, message):
    with pytest.raises(RecipeError, match=message):
        intaglio.record(recorded[0], PLAIN | {"num_inference_steps": steps}, denoiser=name)


def test_a_subfolder_without_a_denoiser_is_refused(recorded):
    with pytest.raises(RecipeError, match=r"subfolder: model has no transformer_3/config.json of a diffusers class"):
        Checkpoint.resolve(ModelRef(path="model", subfolder="transformer_3"), recorded[1])


def test_a_pipeline_with_one_denoiser_has_all_steps():
    pipe = tiny_pipelines.sd()
    pipe.set_progress_bar_config(disable=True)
    call = tiny_pipelines.CALLS[tiny_pipelines.sd] | {"prompt": "a", "guidance_scale": 1.0, "num_inference_steps": 2}
    made = intaglio.record(pipe, call | {"output_type": "latent"})
    assert (made.times, made.start) == ((), None)
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)


def test_the_first_recipe_names_the_other_denoiser(recorded, tmp_path):
    written = tmp_path / "recipe.yaml"
    result = CliRunner().invoke(app, ["init", str(recorded[1] / "model"), "--out", str(written)])
    assert result.exit_code == 0, result.output
    text = written.read_text()
    assert (
        "# transformer_2 shares its steps: compile it by a recipe of its own, with `subfolder: transformer_2`" in text
    )
    assert "transformer_2: " not in text.replace("subfolder: transformer_2", "")  # it is no component to compile
    assert "text_encoder" in text
