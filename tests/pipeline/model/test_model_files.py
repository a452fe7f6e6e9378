"""Only those files of a model's folder are read that the denoiser needs, and none outside of it."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiTTransformer2DModel
from tiny import save_folder, tiny_dit

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.pipeline_folder import PipelineFolder
from intaglio.pipeline.model.ref import ModelRef

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tiny_dit(), tmp_path / "model")


def copied(folder: Path, path: str = "model") -> Path:
    """Return the stored copy of the model at `path`, which is beside the recipe in `folder`."""
    (folder / "stored").mkdir()
    Checkpoint.resolve(ModelRef(path=path), folder).save(folder / "stored")
    return folder / "stored"


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_only_what_is_read_is_copied(folder: Path) -> None:
    beside = folder / "transformer"
    (beside.parent.parent / "private.txt").write_text("only mine")
    (beside / "secret.json").symlink_to(folder.parent / "private.txt")
    (beside / "nowhere.json").symlink_to("nowhere")
    (beside / "endless.safetensors").symlink_to("/dev/zero")
    (beside / "notes.json").write_text("{}")
    os.mkfifo(beside / "waits.json")
    Path(os.fsdecode(os.fsencode(beside) + b"/caf\xe9.txt")).touch()
    read = [f"model/{file}" for file in (SCHEDULER, "transformer/config.json", WEIGHTS)]
    assert names(copied(folder.parent)) == ["checkpoint.json", *read]


@pytest.mark.parametrize(
    ("file", "put", "message"),
    [
        (WEIGHTS, lambda file: file.symlink_to("/dev/zero"), r"model\.safetensors: is a link out of .*model: put"),
        (WEIGHTS, os.mkfifo, r"model\.safetensors: is not a regular file"),
        (WEIGHTS, lambda file: file.symlink_to("nowhere"), r"model\.safetensors: cannot be read: No such file"),
        ("transformer/config.json", lambda file: file.symlink_to("/dev/zero"), r"config\.json: is a link out of"),
        ("transformer/config.json", lambda file: file.write_text("[1]"), r"config\.json: holds a list where"),
        (SCHEDULER, os.mkfifo, r"scheduler_config\.json: is not a regular file"),
        (
            SCHEDULER,
            lambda file: file.write_text('{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000000000000}'),
            r"scheduler_config\.json: num_train_timesteps is 1000000000000, but at most 100000 is accepted",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_where_the_user_has_it(file, put, message, folder):
    (folder / file).unlink()
    put(folder / file)
    with pytest.raises(RecipeError, match=message) as raised:
        copied(folder.parent)
    assert str(folder) in str(raised.value)


def test_weights_for_which_there_is_no_room_are_not_begun(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"the weights have 8.* bytes, and 1 are free"):
        copied(folder.parent)
    assert not list((folder.parent / "stored").rglob("*.safetensors"))


def as_snapshot(folder: Path, cache: Path) -> Path:
    """The folder as the hub keeps it: every file a link to its blob."""
    snapshot = cache / "models--owner--name/snapshots/0123abc"
    (cache / "models--owner--name/blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = cache / f"models--owner--name/blobs/{number}", snapshot / file.relative_to(folder)
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_a_snapshot_of_the_hub_is_copied_though_its_files_are_links(inner, folder):
    snapshot = as_snapshot(folder, folder.parent / "hub")
    stored = copied(folder.parent, str((snapshot / inner).relative_to(folder.parent)))
    assert torch.equal(Checkpoint.load(stored).open().module.proj_out_2.weight, tiny_dit().proj_out_2.weight)
    assert not any(file.is_symlink() for file in stored.rglob("*"))


@pytest.mark.parametrize("shards", [False, True])
def test_a_variant_alone_is_taken_and_computed_in_float32(shards, folder):
    shutil.rmtree(folder / "transformer")
    options = {"max_shard_size": "200KB"} if shards else {}
    tiny_dit().half().save_pretrained(folder / "transformer", variant="fp16", **options)
    assert (len(list(folder.rglob("*.safetensors"))) > 1) == shards
    opened = Checkpoint.resolve(ModelRef(path="model"), folder.parent).open().module
    for module in (opened, Checkpoint.load(copied(folder.parent)).open().module):
        assert module.proj_out_2.weight.dtype == torch.float32
        assert torch.equal(module.proj_out_2.weight, tiny_dit().proj_out_2.weight.half().float())


def test_plain_weights_come_before_a_variant(folder):
    tiny_dit().half().save_pretrained(folder / "transformer", variant="fp16")
    stored = copied(folder.parent)
    assert [file.name for file in stored.rglob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert torch.equal(Checkpoint.load(stored).open().module.proj_out_2.weight, tiny_dit().proj_out_2.weight)


def test_of_two_variants_none_is_guessed(folder):
    for variant in ("fp16", "non_ema"):
        shutil.copyfile(folder / WEIGHTS, folder / f"transformer/diffusion_pytorch_model.{variant}.safetensors")
    (folder / WEIGHTS).unlink()
    with pytest.raises(RecipeError, match="holds the variants fp16, non_ema and no plain weights: keep one"):
        copied(folder.parent)


def test_an_index_names_files_beside_it(folder):
    shutil.rmtree(folder / "transformer")
    tiny_dit().save_pretrained(folder / "transformer", max_shard_size="200KB")
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("diffusion_pytorch_model-00001", "../other-00001"))
    with pytest.raises(RecipeError, match=r"index\.json: names '\.\./other-00001.*, which is no safetensors file"):
        copied(folder.parent)


def test_pickled_weights_are_refused_before_anything_is_run(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "transformer/diffusion_pytorch_model.bin")
    advice = r"the folder holds diffusion_pytorch_model\.bin: save the weights as safetensors with diffusers\.DiT"
    with pytest.raises(RecipeError, match=rf"no safetensors in .*model/transformer, .*: {advice}"):
        Checkpoint.resolve(ModelRef(path="model"), folder.parent)


def test_another_model_than_a_denoiser_is_named(tmp_path):
    options = {"block_out_channels": (8,), "norm_num_groups": 8}
    control = ControlNetModel(down_block_types=("DownBlock2D",), cross_attention_dim=8, attention_head_dim=4, **options)
    control.save_pretrained(tmp_path / "alone")
    control.save_pretrained(tmp_path / "inside/controlnet")
    AutoencoderKL(**options).save_pretrained(tmp_path / "vae")
    for path, message in {
        "alone": "alone is a ControlNetModel, which is no denoiser: name the folder of the UNet or transformer",
        "inside": r"inside holds no denoiser: .*, there is controlnet \(ControlNetModel\)",
        "vae": "vae is a AutoencoderKL, which is no denoiser: name the folder of the whole pipeline",
    }.items():
        with pytest.raises(RecipeError, match=message):
            Checkpoint.resolve(ModelRef(path=path), tmp_path)


@pytest.mark.parametrize("path", ["model/whole.safetensors", "single"])
def test_a_checkpoint_in_one_file_is_told_how_it_becomes_a_folder(path, folder):
    (folder.parent / "single").mkdir()
    for place in (folder, folder.parent / "single"):
        shutil.copyfile(folder / WEIGHTS, place / "whole.safetensors")
    with pytest.raises(RecipeError, match=r"from_single_file\('.*whole\.safetensors'\)\.save_pretrained"):
        Checkpoint.resolve(ModelRef(path=path), folder.parent)


@pytest.mark.parametrize(
    ("files", "second"),
    [
        (["transformer/diffusion_pytorch_model.safetensors"], False),
        (["transformer/diffusion_pytorch_model-00001-of-00002.safetensors"], False),
        (["transformer/diffusion_pytorch_model.fp16.safetensors"], True),
    ],
)
def test_a_download_takes_plain_weights_of_components_and_fp16_where_there_are_no_others(
    files, second, tmp_path, monkeypatch
):
    from huggingface_hub.utils import filter_repo_objects

    there = [
        *files, "model_index.json", "whole.safetensors", "whole_vae.safetensors", "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/merges.txt",
        "transformer/config.json", "transformer/diffusion_pytorch_model.non_ema.safetensors",
        "vae/onnx/model.safetensors", "checkpoint-500/unet/config.json", SCHEDULER,
    ]  # fmt: skip
    taken = []

    def snapshot(name, allow_patterns, ignore_patterns):
        taken.append(list(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        for file in taken[-1]:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text('{"_class_name": "DiTTransformer2DModel"}')
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with suppress(RecipeError):  # its bytes are no weights
        Checkpoint.resolve(ModelRef(path="hub:owner/name"), tmp_path)
    settings = ["model_index.json", "tokenizer/merges.txt", "transformer/config.json", SCHEDULER]
    plain = [*([] if second else files), "text_encoder/model.safetensors"]
    expected = [sorted([*settings, *plain])]
    if second:
        expected.append(sorted([*settings, *files, "text_encoder/model.fp16.safetensors"]))
    assert [sorted(each) for each in taken] == expected


def test_components_are_copied_without_links_out_variants_and_foreign_files(folder):
    component = folder / "text_encoder"
    component.mkdir()
    (folder / "model_index.json").write_text(
        json.dumps({
            "_class_name": "StableDiffusionPipeline", "layers": [1, 2, 3], "safety_checker": [None, None],
            "transformer": ["diffusers", "DiTTransformer2DModel"], "text_encoder": ["transformers", "CLIPTextModel"],
        })
    )  # fmt: skip
    (folder.parent / "private.txt").write_text("only mine")
    (component / "secret.json").symlink_to(folder.parent / "private.txt")
    (component / "nowhere.json").symlink_to("nowhere")
    for name in ("config.json", "model.fp16.safetensors", "flax_model.msgpack", "pytorch_model.bin", "merges.txt"):
        (component / name).write_text(name)
    around = PipelineFolder.around(Checkpoint.resolve(ModelRef(path="model"), folder.parent))
    assert (around.absent(), around.settings()) == (["safety_checker"], {"layers": [1, 2, 3]})
    (folder.parent / "stored").mkdir()
    around.save(folder.parent / "stored")
    assert names(folder.parent / "stored") == [
        "model_index.json", *(f"text_encoder/{name}" for name in ("config.json", "merges.txt", "model.safetensors")),
    ]  # fmt: skip
    assert (folder.parent / "stored/text_encoder/model.safetensors").read_text() == "model.fp16.safetensors"


def test_an_error_of_diffusers_names_the_users_folder_also_when_a_copy_is_read(folder):
    file = folder / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": "x"}))
    message = r"DiTTransformer2DModel of %s raised TypeError: 'str' object cannot"
    with pytest.raises(RecipeError, match=message % "./model/transformer"):
        Checkpoint.resolve(ModelRef(path="./model"), folder.parent).open()
    with pytest.raises(RecipeError, match=message % "the model's folder transformer") as raised:
        Checkpoint.load(copied(folder.parent)).open()
    assert "stored" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_model_is_the_one_that_diffusers_reads(folder):
    read = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    found = Checkpoint.load(copied(folder.parent)).open().module
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), read.parameters(), strict=True))
