"""A real pipeline of diffusers runs around a tiny denoiser, and what it gave is enough to run the denoiser alone."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from tiny import save_folder, tiny_dit
from tiny_families import flux

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.recording import Recording, record
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler

ROWS, TEXT = 3, 5


def pipeline() -> diffusers.FluxPipeline:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(scheduler=scheduler, transformer=flux().module, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(height: int = 64, seed: int = 0, rows: int = ROWS) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(rows, TEXT, 64, generator=generator),
        "pooled_prompt_embeds": torch.randn(rows, 64, generator=generator),
        "height": height,
        "width": 64,
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": generator,
    }


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(pipeline(), call(), call(seed=1, rows=1))


def test_rows_are_told_from_what_they_share(recording):
    assert recording.sample_shape == (16, 64)
    assert {n: tuple(t.shape) for n, t in recording.conditions.items()} == {
        "encoder_hidden_states": (ROWS, TEXT, 64),
        "pooled_projections": (ROWS, 64),
        "guidance": (ROWS,),
    }
    assert {n: tuple(t.shape) for n, t in recording.shared.items()} == {"img_ids": (16, 3), "txt_ids": (TEXT, 3)}
    assert torch.equal(recording.conditions["pooled_projections"], call()["pooled_prompt_embeds"])
    assert torch.equal(recording.null["pooled_projections"], call(seed=1, rows=1)["pooled_prompt_embeds"])


def test_how_the_scheduler_was_set_is_known(recording):
    assert recording.timestep_scale == pytest.approx(1e-3)  # Flux takes its timestep in [0, 1]
    assert list(recording.schedule) == ["mu", "sigmas"]
    assert recording.schedule["sigmas"] == pytest.approx((1.0, 0.5))


def test_the_file_gives_back_what_was_recorded(recording, tmp_path):
    recording.save(tmp_path / "c.safetensors")
    loaded = Recording.load(tmp_path / "c.safetensors")
    assert loaded.sample_shape == recording.sample_shape
    assert (loaded.timestep_scale, loaded.schedule, loaded.constants) == (
        recording.timestep_scale,
        recording.schedule,
        recording.constants,
    )
    for part in ("conditions", "null", "shared"):
        given, found = getattr(recording, part), getattr(loaded, part)
        assert given.keys() == found.keys()
        assert all(torch.equal(found[name], given[name]) for name in given)


def test_a_folder_with_its_recording_draws_samples_at_two_sizes(recording, tmp_path):
    pipe = pipeline()
    pipe.transformer.save_pretrained(tmp_path / "model/transformer")
    pipe.scheduler.save_pretrained(tmp_path / "model/scheduler")
    recording.save(tmp_path / "usual.safetensors")
    record(pipe, call(height=96)).save(tmp_path / "other.safetensors")
    ref = ModelRef(path="model", conditions="usual.safetensors", other_size="other.safetensors", sampling_steps=2)
    checkpoint = Checkpoint.resolve(ref, tmp_path)
    (tmp_path / "stored").mkdir()
    checkpoint.save(tmp_path / "stored")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # the copy stands alone
    model = Checkpoint.load(tmp_path / "stored").open()
    assert model.other is not None
    assert model.other.sample_shape == (24, 64)
    sampler = Sampler(model, 2, guidance=2.0)
    assert sampler.guidance == 2.0
    start = sampler.start(2, torch.Generator().manual_seed(0))
    assert sampler.sample(denoise_with(model.module, model), start).isfinite().all()


def test_the_denoiser_computes_what_it_did_in_the_pipeline(recording):
    """Noise by noise: the pipeline's own first latents, and its result."""
    pipe = pipeline()
    latents = torch.randn(ROWS, 16, 64, generator=torch.Generator().manual_seed(3))
    expected = pipe(**call(), latents=latents).images
    model = recording.given_to(flux())
    sampler = Sampler(model, 2, 1.0)
    x = latents
    pipe.scheduler.set_timesteps(**recording.schedule)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            start = sampler.start(ROWS, torch.Generator())
            inputs = sampler.rows(x, t, start) | dict(recording.conditions)
            x = pipe.scheduler.step(denoise_with(model.module, model)(inputs), t, x).prev_sample
    torch.testing.assert_close(x, expected)


def test_without_its_recording_a_folder_says_what_is_missing(tmp_path):
    flux().module.save_pretrained(tmp_path / "model/transformer")
    with pytest.raises(RecipeError, match=r"no sample_size: name a file of intaglio\.record"):
        Checkpoint.resolve(ModelRef(path="model"), tmp_path).open()


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(RecipeError, match=r"x.safetensors was not written by intaglio\.record"):
        Recording.load(tmp_path / "x.safetensors")
    Path("y.safetensors").write_bytes(b"no")
    with pytest.raises(RecipeError, match=r"y.safetensors: is not a safetensors file"):
        Recording.load(Path("y.safetensors"))


def test_a_file_of_conditions_that_is_not_there_is_one_clear_error(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(RecipeError, match=r"no file gone\.safetensors beside the recipe"):
        Checkpoint.resolve(ModelRef(path="model", conditions="gone.safetensors"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_shape": [10**9, 8]}, "more than 33,554,432 numbers"),
        ({"sample_shape": []}, r"\(\) is no shape of a sample"),
        ({"sample_shape": "x"}, "sample_shape: Input should be a valid tuple"),
        ({"timestep_scale": float("nan")}, "timestep_scale: Input should be a finite number"),
        ({"schedule": {"mu": "x"}}, "schedule.mu.float: Input should be a valid number"),
        ({"constants": 1}, "constants: Input should be a valid dictionary"),
    ],
)
def test_a_recording_that_says_something_else_is_one_clear_error(change, message, tmp_path):
    settings = {"sample_shape": [4, 8, 8], "timestep_scale": 1.0, "schedule": {}, "constants": {}}
    save_file({"x": torch.zeros(2)}, tmp_path / "c.safetensors", {"intaglio": json.dumps(settings | change)})
    with pytest.raises(RecipeError, match=rf"c\.safetensors: .*{message}"):
        Recording.check(tmp_path / "c.safetensors")


def test_a_recording_with_nan_is_refused_by_name_and_minus_infinity_is_a_mask(tmp_path):
    file = tmp_path / "c.safetensors"
    Recording((4, 8, 8), conditions={"mask": torch.tensor([[0.0, -torch.inf]])}).save(file)
    assert Recording.load(file).conditions["mask"][0, 1] == -torch.inf
    Recording((4, 8, 8), conditions={"text": torch.tensor([[0.0, torch.nan]])}).save(file)
    with pytest.raises(RecipeError, match=r"c\.safetensors: text has NaN: record it again"):
        Recording.load(file)


def test_a_recording_is_looked_at_before_a_run(tmp_path):
    save_folder(tiny_dit(), tmp_path / "dit")
    os.mkfifo(tmp_path / "waits.safetensors")
    with pytest.raises(RecipeError, match=r"waits\.safetensors: is not a regular file"):
        Checkpoint.resolve(ModelRef(path="dit", conditions="waits.safetensors"), tmp_path)


def test_a_pipeline_that_fails_is_blamed_in_one_line():
    with pytest.raises(RecipeError, match=r"a call of FluxPipeline raised TypeError: .*unexpected keyword argument"):
        record(pipeline(), {"no_such_argument": 1})
    with pytest.raises(RecipeError, match="SimpleNamespace has no scheduler"):
        record(SimpleNamespace(unet=torch.nn.Identity()), {})
