"""The places of samples in the picture, and the distances between them."""

from pathlib import Path

import diffusers
import pytest
import torch
from tiny import save_folder, tiny_dit

from intaglio.exporters.report.pictures import COMPILED, FULL, Drawing, distances, draw, picture
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.recording import Recording
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import OneCall, Sampler


def grey(*levels: float) -> torch.Tensor:
    """A picture of one pixel for each level."""
    return torch.tensor(levels).view(-1, 1, 1, 1)


def pixels(image) -> list[list[int]]:
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def test_below_each_line_are_those_of_the_other_denoiser():
    image = picture([grey(-1, 0.2, 1), grey(-1, -0.2, 1)], columns=2, enlarged=1)
    assert pixels(image) == [[0, 153], [0, 102], [255, 255], [255, 255]]  # white where there is no picture


def test_frames_of_a_clip_are_a_line():
    clips = torch.tensor([[-1, 0.2, 1], [1, -0.2, -1]]).view(2, 1, 3, 1, 1)
    assert pixels(picture([clips, -clips], enlarged=1)) == [[0, 153, 255], [255, 102, 0], [255, 102, 0], [0, 153, 255]]


def test_samples_far_outside_of_an_image_are_shown_in_their_own_range():
    assert pixels(picture([grey(-20, 0, 10), grey(-25, 0, 15)], enlarged=1)) == [[0, 170, 255], [0, 170, 255]]


def test_pixels_are_enlarged_not_blurred():
    assert pixels(picture([grey(-1, 1)], enlarged=2)) == [[0, 0, 255, 255]] * 2


def test_distances_are_of_each_sample_to_its_own_reference():
    full = torch.ones(2, 3, 4, 4)
    full[:, :, 2:] = -3  # a range of 4, and a mean square of 5
    compiled = full.clone()
    compiled[0] += 0.4
    compiled[1] += 0.04
    assert distances({FULL: full, COMPILED: compiled}) == {
        "psnr_db": pytest.approx(30),  # 10 log10(4^2 / 0.4^2) = 20, and 40
        "psnr_db_min": pytest.approx(20),
        "sqnr_db": pytest.approx(24.95, abs=0.01),  # 10 log10(5 / 0.4^2) = 14.95, and 34.95
        "sqnr_db_min": pytest.approx(14.95, abs=0.01),
        "cosine": pytest.approx(0.99254, abs=1e-5),  # the mean with (1.04 + 3 * 2.96) / sqrt(10 (1.04^2 + 2.96^2))
        "cosine_min": pytest.approx(0.98521, abs=1e-5),  # (1.4 + 3 * 2.6) / sqrt(10 (1.4^2 + 2.6^2))
        "error_max": pytest.approx(0.4),
    }
    assert distances({COMPILED: compiled}) == {}


@pytest.mark.parametrize("steps", [0, -1, 2000, 10**12])
def test_steps_that_no_scheduler_has_are_refused_before_anything_is_read(steps):
    with pytest.raises(RecipeError, match=f"--steps {steps}: give 1 to 1000"):
        Drawing(1, steps)


def test_steps_that_the_models_scheduler_does_not_have_are_refused(tmp_path):
    save_folder(tiny_dit(), tmp_path / "dit")
    diffusers.DDIMScheduler(num_train_timesteps=10).save_pretrained(tmp_path / "dit/scheduler")
    checkpoint = Checkpoint.resolve(ModelRef(path="dit"), tmp_path)
    with pytest.raises(
        RecipeError, match="--steps 11: DDIMScheduler, the model's scheduler, refuses this number of steps"
    ):
        draw(checkpoint, tiny_dit(), Drawing(1, 11), Context(tmp_path))


def test_conditions_are_the_rows_that_were_asked_for_in_turn():
    classes = Sampler(DenoiserModel(tiny_dit(), OneCall(), (3, 8, 8), classes=4), 1, 2.0)
    start = classes.start(5, torch.Generator().manual_seed(0), rows=(3, 1))
    assert start.conditions["class_labels"].tolist() == [3, 1, 3, 1, 3]
    assert start.null["class_labels"].tolist() == [4] * 5
    assert torch.equal(start.noise, classes.start(5, torch.Generator().manual_seed(0)).noise)


def save_pipeline(folder: Path) -> Checkpoint:
    """A whole pipeline with a text encoder, and its denoiser as a recipe names it."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = transformers.CLIPTextConfig(vocab_size=6, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, **sizes)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=8),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    recording = Recording((4, 8, 8), conditions={"encoder_hidden_states": torch.zeros(1, 8, 32)})
    recording.save(folder / "conditions.safetensors")
    ref = ModelRef(path=".", sampling_steps=2, guidance=3.0, conditions="conditions.safetensors")
    return Checkpoint.resolve(ref, folder)


def unet() -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_a_text_is_drawn_by_the_whole_pipeline_with_either_denoiser(tmp_path):
    checkpoint = save_pipeline(tmp_path / "pipe")

    def of(prompt: str, compiled: torch.nn.Module) -> dict[str, torch.Tensor]:
        wanted = Drawing(2, 2, prompt=prompt, pipeline=str(tmp_path / "pipe"), compare=True)
        return dict(draw(checkpoint, compiled, wanted, Context(tmp_path)))

    same = of("a a", checkpoint.open().module)
    assert same[FULL].shape == (2, 3, 8, 8)
    assert same[FULL].min() >= -1
    assert torch.equal(same[COMPILED], same[FULL])
    other = of("a b", unet())
    assert not torch.allclose(other[FULL], same[FULL], atol=1e-3)
    assert not torch.allclose(other[COMPILED], other[FULL], atol=1e-3)


def test_a_pipeline_without_texts_is_told_so(tmp_path):
    parts = {"transformer": tiny_dit(), "vae": diffusers.AutoencoderKL(), "scheduler": diffusers.DDIMScheduler()}
    diffusers.DiTPipeline(**parts).save_pretrained(tmp_path / "pipe")
    checkpoint = Checkpoint.resolve(ModelRef(path=str(save_folder(tiny_dit(), tmp_path / "model"))), tmp_path)
    wanted = Drawing(1, 1, prompt="a cat", pipeline=str(tmp_path / "pipe"))
    with pytest.raises(RecipeError, match="DiTPipeline takes no text: draw rows of conditions, --class N"):
        draw(checkpoint, tiny_dit(), wanted, Context(tmp_path))
