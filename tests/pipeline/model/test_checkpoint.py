import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import FACTORY, save_folder, tiny_dit, tiny_unet

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler


@pytest.mark.parametrize(("build", "layers"), [(tiny_dit, 21), (tiny_unet, 51)])
def test_folder_is_found_copied_and_opened(build, layers, tmp_path):
    module = build()
    folder = save_folder(module, tmp_path / "given")
    checkpoint = Checkpoint.resolve(ModelRef(path="given", sampling_steps=3), tmp_path)
    (tmp_path / "stored").mkdir()
    checkpoint.save(tmp_path / "stored")
    for file in folder.rglob("*.safetensors"):
        file.unlink()  # the copy stands alone
    loaded = Checkpoint.load(tmp_path / "stored")
    made = loaded.open()
    assert loaded.ref.sampling_steps == 3
    assert made.sample_shape == (3, 8, 8)
    assert made.classes == 4
    assert loaded.layers() == layer_table(made.module)
    assert len(loaded.layers()) == layers
    assert all(torch.equal(a, b) for a, b in zip(made.module.parameters(), module.parameters(), strict=True))


def test_layers_of_a_folder_are_known_without_its_weights(tmp_path):
    folder = save_folder(tiny_unet(), tmp_path / "given")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert Checkpoint.resolve(ModelRef(path="given"), tmp_path).layers() == layer_table(tiny_unet())


def test_equal_content_has_equal_bytes_wherever_it_lies(tmp_path):
    for place in ("a", "b/c"):
        save_folder(tiny_dit(), tmp_path / place)
        (tmp_path / place / "out").mkdir()
        Checkpoint.resolve(ModelRef(path=place), tmp_path).save(tmp_path / place / "out")
    texts = [(tmp_path / place / "out" / "checkpoint.json").read_bytes() for place in ("a", "b/c")]
    assert texts[0] == texts[1]


def test_plain_module_from_a_factory_draws_samples(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    checkpoint = Checkpoint.resolve(ModelRef(path="./net.py:make", sampling_steps=2), tmp_path)
    (tmp_path / "stored").mkdir()
    checkpoint.save(tmp_path / "stored")
    loaded = Checkpoint.load(tmp_path / "stored")
    model = loaded.open()
    assert loaded.layers() == layer_table(model.module)
    sampler = Sampler(model, 2, 1.0)
    samples = sampler.sample(denoise_with(model.module, model), sampler.start(2, torch.Generator().manual_seed(0)))
    assert samples.shape == (2, 3, 8, 8)
    assert samples.isfinite().all()


def test_weights_beside_a_factory_are_copied_with_it(tmp_path):
    (tmp_path / "given").mkdir()
    needs = "import pathlib\nassert pathlib.Path(__file__).with_suffix('.safetensors').is_file()\n"
    (tmp_path / "given" / "net.py").write_text(needs + FACTORY)
    save_file({"weight": torch.ones(2)}, tmp_path / "given" / "net.safetensors")
    checkpoint = Checkpoint.resolve(ModelRef(path="./given/net.py:make"), tmp_path)
    (tmp_path / "stored").mkdir()
    checkpoint.save(tmp_path / "stored")
    shutil.rmtree(tmp_path / "given")  # the copy stands alone
    Checkpoint.load(tmp_path / "stored").open()


def test_a_factory_that_misses_other_files_beside_its_copy_is_told_how_to_name_them(tmp_path):
    text = "import pathlib\n\ndef make():\n    return open(pathlib.Path(__file__).parent / 'other.txt')\n"
    (tmp_path / "given").mkdir()
    (tmp_path / "given/net.py").write_text(text)
    found = Checkpoint.resolve(ModelRef(path="given/net.py:make"), tmp_path)
    (tmp_path / "stored").mkdir()
    found.save(tmp_path / "stored")
    with pytest.raises(RecipeError, match=r"beside which only net\.safetensors is copied: .* by absolute paths"):
        Checkpoint.load(tmp_path / "stored").open()


def test_a_factory_leaves_no_compiled_file_in_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "net.py").write_text(FACTORY)
    (tmp_path / "stored").mkdir()
    Checkpoint.resolve(ModelRef(path="./net.py:make"), tmp_path).save(tmp_path / "stored")
    before = sorted(tmp_path.rglob("*"))
    Checkpoint.load(tmp_path / "stored").open()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no folder nowhere beside the recipe"),
        ("empty", "empty holds no denoiser"),
        ("./gone.py:make", "no file ./gone.py beside the recipe"),
    ],
)
def test_what_is_no_model_is_one_clear_error(path: str, message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=message):
        Checkpoint.resolve(ModelRef(path=path), tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hub:nobody/nothing", "raised LocalEntryNotFoundError: .* outgoing traffic has been disabled"),
        ("hub:../../etc", "raised HFValidationError"),
    ],
)
def test_a_hub_id_is_asked_for_by_name_and_offline_it_is_one_clear_error(path, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match=message):
        Checkpoint.resolve(ModelRef(path=path), tmp_path)


CONFIG = "transformer/config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


class Attack:
    def __reduce__(self) -> object:
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (WEIGHTS, None, "no safetensors in .*transformer, and no other weights are read"),
        (WEIGHTS, b"", "model.safetensors: is not a safetensors file: .*header too small"),
        (WEIGHTS, b"\xff" * 100, "model.safetensors: is not .*: its header would have 18446744073709551615 bytes"),
        (WEIGHTS, (1 << 60).to_bytes(8, "little") + b"{}", "would have 1152921504606846976 bytes: at most"),
        (WEIGHTS, (2).to_bytes(8, "little") + b"{}", r"\d+ weights of DiTTransformer2DModel are not in .*, such as"),
        (CONFIG, b"", "config.json: is not JSON: Expecting value"),
        (CONFIG, b"[" * 100_000, "config.json: lists and objects are nested too deep"),
        (CONFIG, b"\xff\xfe", "config.json: is not text in UTF-8"),
        (CONFIG, b'{"_class_name": ["os", "system"]}', r"has no ModelMixin \['os', 'system'\]"),
        (CONFIG, b'{"_class_name": "DDIMScheduler"}', "has no ModelMixin DDIMScheduler"),
        (CONFIG, b'{"_class_name": "DiTTransformer2DModel", "num_layers": "x"}', "transformer raised TypeError"),
        (SCHEDULER, b"{}", "the scheduler of .* raised KeyError: '_class_name'"),
        (SCHEDULER, b'{"_class_name": "DiTTransformer2DModel"}', "has no SchedulerMixin DiTTransformer2DModel"),
    ],
)
def test_a_folder_that_is_damaged_or_hostile_is_one_clear_error(file, content, message, tmp_path):
    """Nothing in it is run, and no weight is left as it was made up."""
    save_folder(tiny_dit(), tmp_path)
    torch.save(Attack(), tmp_path / "transformer/diffusion_pytorch_model.bin")
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Checkpoint.resolve(ModelRef(path=str(tmp_path)), Path()).open()


def test_factory_that_is_not_there_is_one_clear_error(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    with pytest.raises(RecipeError, match=r"net.py has no function mak"):
        Checkpoint.resolve(ModelRef(path="./net.py:mak"), tmp_path).open()


def test_convolutions_that_add_zeros_are_known():
    padded = {layer.name: layer.padded for layer in layer_table(tiny_unet()) if layer.op == "conv"}
    assert padded["conv_in"]
    assert not padded["up_blocks.0.resnets.0.conv_shortcut"]
    same = torch.nn.ModuleDict({"c": torch.nn.Conv2d(3, 3, 3, padding="same")})
    assert layer_table(same)[0].padded


def test_a_folder_that_is_the_denoiser_itself_survives_the_store(tmp_path):
    save_folder(tiny_dit(), tmp_path)
    checkpoint = Checkpoint.resolve(ModelRef(path="transformer"), tmp_path)
    (tmp_path / "stored").mkdir()
    checkpoint.save(tmp_path / "stored")
    loaded = Checkpoint.load(tmp_path / "stored")
    assert loaded.name == "DiTTransformer2DModel"
    assert torch.equal(loaded.open().module.proj_out_2.weight, checkpoint.open().module.proj_out_2.weight)
