"""LoRA files that do not fit the model, or are none: each is one clear error."""

import builtins
import json
import math
import os
from pathlib import Path

import pytest
import torch
from loras import with_loras, written
from safetensors.torch import load_file, save_file
from tiny import tiny_dit

from intaglio.pipeline.errors import MissingExtra, RecipeError, StepFailed
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.lora import fuse_lora_
from intaglio.pipeline.model.ref import LoraRef, ModelRef


def rewrite(file: Path, change) -> None:
    save_file(change(load_file(file)), file)


def first_a(tensors):
    return next(key for key in sorted(tensors) if "lora_A" in key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {key.replace("transformer_blocks", "blocks"): v for key, v in t.items()},
            r"model\.loras\[0\]: 16 of 16 keys fit no layer of the DiTTransformer2DModel: blocks\.0\.attn1"
            r"\.to_k\.lora_A.*; its layers are pos_embed\.proj, .*save_lora_adapter",
        ),
        (lambda t: t | {"nowhere.alpha": torch.ones(1)}, r"1 of 17 keys fit no layer .*: nowhere\.alpha; its"),
        (
            lambda t: t | {first_a(t): torch.ones(4, 48)},
            r"A \(4, 48\) and B \(64, 4\) do not fit transformer_blocks\.0\.attn1\.to_k, whose weight is \(64, 64\)",
        ),
        (
            lambda t: {key: v for key, v in t.items() if key != first_a(t)},
            r"transformer_blocks\.0\.attn1\.to_k has no A",
        ),
        (
            lambda t: t | {"transformer_blocks.0.attn1.to_k.lora_magnitude_vector": torch.ones(3)},
            r"3 magnitudes do not fit transformer_blocks\.0\.attn1\.to_k, whose weight is \(64, 64\)",
        ),
        (lambda t: t | {first_a(t): t[first_a(t)] * math.nan}, r"to_k: A\.weight has NaN or Inf: the file is damaged"),
        (lambda t: {key: v * 0 for key, v in t.items()}, r"changes none of 8 weights"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(change, message, dit):
    rewrite(dit / "lora.safetensors", change)
    checkpoint = with_loras(dit, ("lora.safetensors", 1.0))
    with pytest.raises(RecipeError, match=message):
        checkpoint.open()


def test_a_lora_beside_other_weights_is_refused(dit):
    file = dit / "lora.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "init_lora_weights": "pissa"})}
    save_file(load_file(file), file, metadata)
    with pytest.raises(RecipeError, match=r"init_lora_weights='pissa' also changes the base weights"):
        with_loras(dit, ("lora.safetensors", 1.0)).open()


def test_a_module_that_takes_no_lora_is_one_clear_error(tmp_path):
    source = "import torch\nfrom intaglio import DenoiserModel\nfrom diffusers import DDIMScheduler\n"
    source += "def make():\n    return DenoiserModel(torch.nn.GroupNorm(1, 3), DDIMScheduler(), (3, 8, 8))\n"
    (tmp_path / "net.py").write_text(source)
    written(tiny_dit(), tmp_path)
    ref = ModelRef(path="./net.py:make", loras=(LoraRef(path="lora.safetensors"),))
    with pytest.raises(
        RecipeError, match=r"16 of 16 keys fit no layer of the GroupNorm: .*; it has no layer that takes a LoRA"
    ):
        Checkpoint.resolve(ref, tmp_path).open()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.safetensors", r"no gone\.safetensors beside the recipe"),
        ("empty", r"empty holds 0 safetensors files: name one"),
        ("two", r"two holds 2 safetensors files \(a\.safetensors, b\.safetensors\): name one"),
        ("pickle.bin", r"pickle\.bin: is not a safetensors file.*\(no other kind is read\)"),
        (
            "text.safetensors",
            r"none of 1 keys in text\.safetensors belongs to a denoiser: text_encoder_2\.q\.lora_A\.weight",
        ),
    ],
)
def test_files_that_are_no_lora_are_one_clear_error(path, message, dit):
    for folder in ("empty", "two"):
        (dit / folder).mkdir()
    for name in ("two/a", "two/b"):
        (dit / f"{name}.safetensors").write_bytes((dit / "lora.safetensors").read_bytes())
    torch.save({"a": torch.ones(1)}, dit / "pickle.bin")
    save_file({"text_encoder_2.q.lora_A.weight": torch.ones(1)}, dit / "text.safetensors")
    with pytest.raises(RecipeError, match=message):
        Checkpoint.resolve(ModelRef(path="model", loras=(LoraRef(path=path),)), dit)


def test_without_peft_the_error_names_the_extra(dit, monkeypatch):
    checkpoint = with_loras(dit, ("lora.safetensors", 1.0))
    there = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r"fusing model\.loras needs the extra 'lora'"):
        checkpoint.open()


@pytest.mark.parametrize("broken", [lambda self, **_: None, lambda self, **_: self.base_layer.weight.data.mul_(1.01)])
def test_a_merge_that_did_something_else_is_noticed(broken, dit, monkeypatch):
    checkpoint = with_loras(dit, ("lora.safetensors", 1.0))
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", broken)
    with pytest.raises(
        StepFailed, match=r"to_k: peft's fused weight differs by .* from W \+ 2 B A, whose largest value is"
    ):
        checkpoint.open()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1]", "lora_adapter_metadata is a list, not a JSON object"),
        ("{", "lora_adapter_metadata: is not JSON"),
        ("[" * 100_000, "lists and objects are nested too deep"),
        ('{"lora_alpha": NaN}', "the alpha of .* is nan, not a number"),
        ('{"lora_alpha": "x"}', "the alpha of .* is x, not a number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern is a list, not a JSON object"),
        ('{"alpha_pattern": {"(a+)+": 1}}', r"alpha_pattern has '\(a\+\)\+', and only names of layers are read"),
    ],
)
def test_settings_of_an_adapter_that_are_none_are_one_clear_error(settings, message, dit):
    file = dit / "lora.safetensors"
    save_file(load_file(file), file, {"lora_adapter_metadata": settings})
    with pytest.raises(RecipeError, match=message):
        fuse_lora_(tiny_dit(), file, 1.0, "model.loras[0]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {key: v.to(torch.int8) for key, v in t.items()}, r"to_k has tensors of the type I8: only F16, BF16"),
        (
            lambda t: t | {"transformer_blocks.0.attn1.to_k.alpha": torch.ones(2)},
            r"2 alphas for transformer_blocks\.0\.attn1\.to_k, which has one",
        ),
        (lambda t: t | {first_a(t): torch.ones(4)}, r"A \(4,\) and B \(64, 4\) do not fit"),
        (lambda t: {f"x\x1b[31m{'y' * 500}": torch.ones(1)}, r"1 of 1 keys fit no layer .*: x\\x1b\[31my+\.\.\.; its"),
    ],
)
def test_tensors_are_held_against_the_layers_before_they_are_read(change, message, dit, monkeypatch):
    rewrite(dit / "lora.safetensors", change)
    monkeypatch.setattr("intaglio.pipeline.model.lora._update", pytest.fail)
    with pytest.raises(RecipeError, match=message):
        fuse_lora_(tiny_dit(), dit / "lora.safetensors", 1.0, "model.loras[0]")


def test_a_folder_of_many_files_and_what_is_no_file_are_one_short_line(dit):
    (dit / "many").mkdir()
    for number in range(2000):
        (dit / f"many/{number:04}.safetensors").touch()
    os.mkfifo(dit / "waits.safetensors")
    (dit / "large.safetensors").write_bytes((1 << 40).to_bytes(8, "little"))
    for path, message in {
        "many": r"many holds 2000 safetensors files \(0000\.safetensors, .*, 0002\.safetensors, \.\.\.\)",
        "waits.safetensors": r"waits\.safetensors: is not a regular file",
        "large.safetensors": "its header would have 1099511627776 bytes",
    }.items():
        with pytest.raises(RecipeError, match=message):
            Checkpoint.resolve(ModelRef(path="model", loras=(LoraRef(path=path),)), dit)
