"""Pictures that a recipe names in `call` reach the pipeline, which draws from the compiled folder as its own does."""

import os
import struct
import zlib
from typing import Any

import diffusers
import joined_pipelines as joined
import numpy as np
import pytest
import torch
from PIL import Image

import intaglio
from intaglio import Recipe, RecipeError, Store, bind, compile
from intaglio.pipeline.model.recording import record
from intaglio.pipeline.numerics import quality

STEPS = 2
SIZE = {"height": 8, "width": 8}


def image_to_image() -> tuple[Any, dict[str, Any]]:
    return joined.sd(diffusers.StableDiffusionImg2ImgPipeline, joined.unet()), {
        "image": joined.picture(),
        "strength": 1.0,
    }


def components(call: dict[str, Any], **more: Any) -> Recipe:
    steps = ({"components": {"call": call, **more}},)
    return Recipe.model_validate({"model": "model", "targets": ["onnxruntime-cpu"], "steps": steps})


@pytest.mark.parametrize(
    ("make", "more"), [(image_to_image, {"strength": 1.0}), (joined.inpainting, SIZE)], ids=["img2img", "inpainting"]
)
def test_a_pipeline_that_takes_pictures_draws_the_same_from_a_folder(make, more, tmp_path):
    pipe, given = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    files = {name: f"pictures/{name}.png" for name, value in given.items() if isinstance(value, Image.Image)}
    for name, file in files.items():
        given[name].save(tmp_path / file)
    plain = {**given, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    record(pipe, {"prompt": ["a", "b"], **plain, "generator": torch.Generator().manual_seed(0)}).save(
        tmp_path / "c.safetensors"
    )
    steps = [
        {"calibrate": {"samples": 2}},
        {"uniform": {"schemes": ["w8a8_step"]}},
        {"distill": {"updates": 0}},
        "merge",
        "export-float",
        "export-qdq",
        {"components": {"call": {**files, **more}}},
    ]
    model = {"path": "model", "conditions": "c.safetensors", "sampling_steps": STEPS}
    recipe = Recipe.model_validate({"model": model, "targets": ["onnxruntime-cpu"], "steps": steps})
    compile(recipe, Store(tmp_path / "store"), base=tmp_path, out=tmp_path / "out")
    made = intaglio.load_pipeline(tmp_path / "out/onnxruntime-cpu", threads=1)
    made.set_progress_bar_config(disable=True)
    call = {"prompt": ["a", "b"], **plain, "output_type": "pt"}
    found, expected = (each(**call, generator=torch.Generator().manual_seed(1)).images for each in (made, pipe))
    assert not torch.equal(found, expected)
    assert quality.psnr_db(quality.mean_squared_error(found, expected), 1.0).min() > 35


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"image: .*photo.png: cannot be read: No such file"),
        (b"", r"image: .*photo.png: is no picture that can be read \(.*\): give a PNG, JPEG, WebP or BMP file"),
        (b"GIF89a" + bytes(50), r"image: .*photo.png: is no picture that can be read"),
        (png(4, 4, bytes(52))[:45], r"image: .*photo.png: is no picture that can be read"),
        (png(5000, 5000, b""), r"image: .*photo.png: has 5000 x 5000 pixels, and at most 16,777,216 are read"),
        (png(60000, 60000, b""), r"image: .*photo.png: is no picture that can be read .*bomb"),
        (png(2000, 2000, bytes(100)), r"image: .*photo.png: is no picture that can be read"),
    ],
    ids=["missing", "empty", "another format", "cut off", "large", "bomb", "few rows"],
)
def test_a_file_that_is_no_picture_is_one_clear_error_before_the_run(content, message, tmp_path):
    if content is not None:
        (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(RecipeError, match=message) as raised:
        bind(components({"image": ["photo.png"]}), base=tmp_path)
    assert len(raised.value.problems) == 1


def test_a_pipe_in_a_pictures_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.png")
    with pytest.raises(RecipeError, match=r"photo.png: is not a regular file"):
        bind(components({"image": "photo.png"}), base=tmp_path)


def test_another_picture_is_another_step_and_prompts_are_texts(tmp_path):
    def option(picture: Image.Image, **more: Any) -> Any:
        picture.save(tmp_path / "photo.png")
        call = {"image": "photo.png", "prompt": "a sign that says photo.png"}
        return bind(components(call, **more), base=tmp_path)[0].steps[0].configured

    first, again, other = (option(joined.picture(size)) for size in (8, 8, 16))
    assert first.pictures == again.pictures != other.pictures
    opened = other.opened(other.call)
    assert (opened["image"].size, opened["image"].mode) == ((16, 16), "RGB")
    assert opened["prompt"] == "a sign that says photo.png"
    with pytest.raises(RecipeError, match=r"photo.png: its sha256 is \w+, not 0"):
        option(joined.picture(), pictures={"photo.png": "0"})


def test_gray_values_of_16_bits_are_not_cut_off(tmp_path):
    values = np.array([[0, 257, 1000], [32768, 65000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "photo.png")
    step = bind(components({"image": "photo.png"}), base=tmp_path)[0].steps[0].configured
    opened = step.opened(step.call)["image"]
    assert opened.mode == "RGB"
    assert np.asarray(opened)[..., 1].tolist() == [[0, 1, 4], [128, 253, 255]]
