"""A model with LoRAs is the one that is computed by hand, or by diffusers; it has a key and outputs of its own."""

import json
import logging
import math

import pytest
import torch
from _family_pieces import ROWS
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from loras import ATTENTION, adapted, with_loras, written
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import save_folder, tiny_dit
from tiny_families import sd3, sd15

from intaglio import Recipe, compile
from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY
from intaglio.pipeline.model import stored_weights
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.recording import Recording
from intaglio.pipeline.model.ref import LoraRef, ModelRef
from intaglio.pipeline.stored_tensors import StoredTensor


def by_hand(module: torch.nn.Module, tensors: dict[str, torch.Tensor], strength: float) -> dict[str, torch.Tensor]:
    """W + strength * B A for every module of the tensors, the other weights as they are."""
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    names = {key.split(".lora_")[0] for key in tensors}
    assert names
    for name in names:
        a, b = tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double()
        delta = torch.einsum("nr,rkhw->nkhw", b[:, :, 0, 0], a) if a.ndim == 4 else torch.einsum("nr,rk->nk", b, a)
        weights[f"{name}.weight"] = (weights[f"{name}.weight"].double() + strength * delta).float()
    return weights


def assert_same(found: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    weights = found.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # two float32 roundings beside a product of a few terms
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_a_transformer_from_save_lora_adapter_is_the_one_by_hand(tmp_path):
    plain = sd3().module
    plain.save_pretrained(tmp_path / "model/transformer")
    module, _ = adapted(sd3().module, use_rslora=True)
    module.save_lora_adapter(tmp_path / "style")
    tensors = load_file(tmp_path / "style/pytorch_lora_weights.safetensors")
    conditions = {"encoder_hidden_states": torch.zeros(ROWS, 5, 64), "pooled_projections": torch.zeros(ROWS, 64)}
    Recording((16, 8, 8), conditions=conditions).save(tmp_path / "c.safetensors")
    fused = with_loras(tmp_path, ("style", 0.8), conditions="c.safetensors").open().module
    assert isinstance(fused, SD3Transformer2DModel)
    assert_same(fused, by_hand(plain, tensors, 0.8 * 8 / math.sqrt(4)))
    assert not any(isinstance(each, LoraLayer) for each in fused.modules())
    assert layer_table(fused) == layer_table(plain)
    assert all(parameter.requires_grad for parameter in fused.parameters())
    assert not hasattr(fused, "peft_config")


@pytest.mark.parametrize("spelling", ["lora_A", "lora.down"])
def test_a_unet_from_save_lora_weights_is_the_one_by_hand_without_its_text_encoder(spelling, tmp_path, caplog):
    plain = sd15().module
    plain.save_pretrained(tmp_path / "model/unet")
    module, config = adapted(sd15().module, target_modules=[*ATTENTION, "conv1", "conv_shortcut"])
    tensors = get_peft_model_state_dict(module)
    assert {tensor.ndim for tensor in tensors.values()} == {2, 4}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "style",
        unet_lora_layers=convert_state_dict_to_diffusers(tensors) if spelling == "lora.down" else tensors,
        text_encoder_lora_layers={"text_model.q_proj.lora_A.weight": torch.ones(4, 8)},
        unet_lora_adapter_metadata=config.to_dict(),
    )
    keys = load_file(tmp_path / "style/pytorch_lora_weights.safetensors")
    assert any(spelling in key for key in keys)
    Recording((4, 8, 8), conditions={"encoder_hidden_states": torch.zeros(ROWS, 5, 64)}).save(
        tmp_path / "c.safetensors"
    )
    with caplog.at_level(logging.WARNING):
        fused = with_loras(tmp_path, ("style", -0.5), conditions="c.safetensors").open().module
    assert f"style: 1 of {len(keys)} keys belong to text encoders" in caplog.text
    assert isinstance(fused, UNet2DConditionModel)
    assert_same(fused, by_hand(plain, tensors, -0.5 * 8 / 4))
    assert {name: type(each) for name, each in fused.named_modules()} == {
        name: type(each) for name, each in plain.named_modules()
    }


def test_without_metadata_alpha_is_the_rank_of_each_layer(tmp_path):
    module, _ = adapted(sd3().module, rank_pattern={"to_q": 2})
    tensors = get_peft_model_state_dict(module)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=tensors)
    made = sd3()
    made.module.save_pretrained(tmp_path / "model/transformer")
    Recording((16, 8, 8), conditions=made.conditions).save(tmp_path / "c.safetensors")
    lora = ("pytorch_lora_weights.safetensors", 1.0)
    assert_same(
        with_loras(tmp_path, lora, conditions="c.safetensors").open().module, by_hand(made.module, tensors, 1.0)
    )


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"alpha_pattern": {"to_q": 3, "ff.net.2": 1}, "rank_pattern": {"to_k": 2}}]
)
def test_ranks_alphas_and_magnitudes_are_fused_as_diffusers_does(options, tmp_path):
    targets = [*ATTENTION, "proj", "ff.net.2"]
    module, _ = adapted(sd3().module, target_modules=targets, **options)
    module.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    expected = sd3().module
    expected.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix=None, use_safetensors=True)
    expected.fuse_lora(0.7)
    expected.unload_lora()
    made = sd3()
    made.module.save_pretrained(tmp_path / "model/transformer")
    Recording((16, 8, 8), conditions=made.conditions).save(tmp_path / "c.safetensors")
    fused = with_loras(tmp_path, ("lora.safetensors", 0.7), conditions="c.safetensors").open().module
    assert_same(fused, expected.state_dict())


def test_several_are_fused_one_after_the_other(dit):
    first = load_file(dit / "lora.safetensors")
    written(tiny_dit(), dit / "other", seed=1, r=2, lora_alpha=1).rename(dit / "other.safetensors")
    second = load_file(dit / "other.safetensors")
    fused = with_loras(dit, ("lora.safetensors", 1.0), ("other.safetensors", 0.5)).open().module
    once = tiny_dit()
    once.load_state_dict(by_hand(once, first, 2.0))
    assert_same(fused, by_hand(once, second, 0.5 / 2))


def test_weights_that_stay_in_their_files_are_fused_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_weights, "LEAST_BYTES", 0)
    save_folder(tiny_dit(), tmp_path / "model")
    for seed in (1, 2):
        written(tiny_dit(), tmp_path / f"lora{seed}", seed, use_dora=seed == 2)
    checkpoint = with_loras(tmp_path, ("lora1", 0.5), ("lora2", 1.0))
    stored, expected = checkpoint.open(stored=True).module, checkpoint.open().module.state_dict()
    assert isinstance(stored.transformer_blocks[0].attn1.to_q.weight, StoredTensor)
    found = stored.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_module_from_a_factory_is_fused(tmp_path):
    source = "from tiny import tiny_dit\nfrom diffusers import DDIMScheduler\n"
    source += "from intaglio import DenoiserModel\n"
    source += "def make():\n    return DenoiserModel(tiny_dit(), DDIMScheduler(), (3, 8, 8), classes=4)\n"
    (tmp_path / "net.py").write_text(source)
    tensors = load_file(written(tiny_dit(), tmp_path))
    ref = ModelRef(path="./net.py:make", loras=(LoraRef(path="lora.safetensors"),))
    assert_same(Checkpoint.resolve(ref, tmp_path).open().module, by_hand(tiny_dit(), tensors, 2.0))


def test_opening_draws_nothing_from_the_global_generator(dit):
    checkpoint = with_loras(dit, ("lora.safetensors", 1.0))
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    checkpoint.open()
    assert torch.equal(torch.rand(1), expected)


def test_a_recipe_with_a_lora_compiles_to_other_outputs_under_another_key(dit, store):
    text = "model: {path: model, sampling_steps: 2%s}\ntargets: [onnxruntime-cpu]\nsteps: [{calibrate: {samples: 2}}]\n"
    loras = {
        "none": "",
        "whole": ", loras: [{path: lora.safetensors}]",
        "half": ", loras: [{path: lora.safetensors, scale: 0.5}]",
    }
    made = {
        name: compile(Recipe.parse(text % lora), store, base=dit)["onnxruntime-cpu"] for name, lora in loras.items()
    }
    assert len({each.outputs[MODEL] for each in made.values()}) == 3
    assert len({each.runs[0].key for each in made.values()}) == 3
    for a, b in (("none", "whole"), ("none", "half"), ("whole", "half")):
        assert not torch.allclose(made[a][TRAJECTORY].outputs, made[b][TRAJECTORY].outputs, rtol=1e-3)
    with_it = made["whole"][MODEL].open().module
    trajectory = made["whole"][TRAJECTORY]
    with torch.no_grad():
        assert torch.equal(with_it(**trajectory.call(1)).sample, trajectory.outputs[1])


def test_without_loras_the_files_say_nothing_of_them(dit):
    root = with_loras(dit).root.parent
    assert "loras" not in json.loads((root / "checkpoint.json").read_text())["ref"]


def test_equal_loras_have_equal_bytes_whatever_their_names(dit):
    texts = []
    for name in ("lora.safetensors", "same/renamed.safetensors"):
        (dit / "same").mkdir(exist_ok=True)
        (dit / "same/renamed.safetensors").write_bytes((dit / "lora.safetensors").read_bytes())
        out = dit / f"out{len(texts)}"
        out.mkdir()
        Checkpoint.resolve(ModelRef(path="model", loras=(LoraRef(path=name),)), dit).save(out)
        texts.append({file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()})
    assert texts[0] == texts[1]


def test_the_names_and_alphas_of_kohyas_trainer_are_read(dit):
    tensors, parts = load_file(dit / "lora.safetensors"), {"lora_A": "lora_down", "lora_B": "lora_up"}
    kohya = {}
    for key, tensor in tensors.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        kohya[f"lora_unet_{name.replace('.', '_')}.{parts[part]}.weight"] = tensor
        kohya[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(6.0)
    kohya["lora_te_text_model_q.lora_down.weight"] = torch.ones(1)
    save_file(kohya, dit / "kohya.safetensors")
    fused = with_loras(dit, ("kohya.safetensors", 0.5)).open().module
    assert_same(fused, by_hand(tiny_dit(), tensors, 0.5 * 6 / 4))
