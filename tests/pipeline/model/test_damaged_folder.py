"""Attack folders of models whose index, shards, configuration and weights do not belong together."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_folder, tiny_dit

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tiny_dit(), tmp_path) / "transformer"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_dit().save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    return tmp_path / "transformer"


def change(file: Path, edit: Callable[[dict[str, object]], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def resolved(folder: Path) -> Checkpoint:
    return Checkpoint.resolve(ModelRef(path=str(folder.parent)), Path())


def test_a_shard_that_is_not_there_is_named_with_its_index(shards: Path) -> None:
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(RecipeError, match=rf"index\.json: names {lost.name}, which is not beside it: download"):
        resolved(shards)


def test_a_tensor_in_two_shards_is_an_error_that_names_both(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    twice = next(iter(load_file(first)))
    save_file(load_file(second) | {twice: torch.ones(3)}, second)
    with pytest.raises(RecipeError, match=rf"both {first.name} and {second.name} hold {twice}: .*download the model"):
        resolved(shards)


def test_a_tensor_that_its_shard_does_not_hold_is_an_error(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    moved = next(iter(load_file(first)))
    change(shards / f"{WEIGHTS}.index.json", lambda index: index["weight_map"].update({moved: second.name}))
    with pytest.raises(RecipeError, match=rf"1 of 44 tensors are not in the files .* {moved}, .* not in {second.name}"):
        resolved(shards)


@pytest.mark.parametrize("stored", [False, True])
def test_a_tensor_that_the_index_leaves_out_is_missing_however_weights_are_read(stored: bool, shards: Path) -> None:
    change(shards / f"{WEIGHTS}.index.json", lambda index: index["weight_map"].pop("proj_out_2.weight"))
    with pytest.raises(RecipeError, match=r"1 weights of DiTTransformer2DModel are not in .*: download it again"):
        resolved(shards).open(stored=stored)


def test_weights_of_another_shape_than_the_configuration_are_named_with_both_shapes(folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update(attention_head_dim=16))
    message = (
        r"43 of 44 weights have another shape .*, such as pos_embed\.proj\.bias: \(64,\) in .*, \(32,\) by the conf"
    )
    with pytest.raises(RecipeError, match=message):
        resolved(folder).layers()


def test_weights_of_more_blocks_than_the_configuration_makes_are_an_error_and_not_left_out(folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update(num_layers=1))
    with pytest.raises(RecipeError, match=r"config\.json makes 1 blocks in transformer_blocks, .* of 2: the two"):
        resolved(folder).layers()


@pytest.mark.parametrize(("dtype", "named"), [(torch.int8, "I8"), (torch.bool, "BOOL")])
def test_weights_that_are_no_floats_are_an_error(dtype: torch.dtype, named: str, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"proj_out_2.weight": tensors["proj_out_2.weight"].to(dtype)}, folder / WEIGHTS)
    with pytest.raises(
        RecipeError, match=rf"1 of 44 weights are no floats, such as proj_out_2\.weight: {named} in .*full-"
    ):
        resolved(folder).open()


@pytest.mark.parametrize(
    ("written", "named"), [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ("foo", "foo")]
)
def test_a_model_that_another_library_quantized_is_refused_before_that_library_is_called(written, named, folder):
    change(folder / "config.json", lambda config: config.update(quantization_config=written))
    with pytest.raises(
        RecipeError, match=rf"config\.json: its quantization_config says that {named} quantized .*: give"
    ):
        resolved(folder)


def test_a_class_that_diffusers_does_not_have_is_found_before_weights_are_copied(folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update(_class_name="DiTPipeline"))
    with pytest.raises(RecipeError, match=r"has no ModelMixin DiTPipeline, .* _class_name: install the version"):
        resolved(folder)


def test_diffusers_is_not_imported_to_know_its_models(folder: Path) -> None:
    lines = (
        "import sys; from pathlib import Path",
        "from intaglio.pipeline.model.checkpoint import Checkpoint",
        "from intaglio.pipeline.model.ref import ModelRef",
        f"Checkpoint.resolve(ModelRef(path={str(folder.parent)!r}), Path())",
        "print('diffusers' in sys.modules)",
    )
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=here, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(RecipeError, match=r"is a pointer of Git LFS, .*: run `git lfs pull`"):
        resolved(folder)
