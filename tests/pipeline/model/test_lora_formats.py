"""LoRA files in the layouts of other trainers, against diffusers' own loading and fusing; adapters of other kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_pipeline import (
    FluxLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_dit
from tiny_families import flux, sd15, sdxl

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.lora import find_lora, fuse_lora_

RANK, SCALE, LABEL = 6, 0.7, "model.loras[0]"
WIDTH = 64
"""Channels of the tiny Flux."""
TEXT = {
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 8),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(8, 4),
}


def layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}


def kohya_sd(module: torch.nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The names of diffusers with underscores, as for Stable Diffusion 1.5."""
    for name, layer in layers(module).items():
        yield name, name.replace(".", "_"), tuple(layer.weight.shape)


def kohya_sdxl(module: torch.nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The names of Stability's own UNet, as for SDXL."""
    every = module.config.layers_per_block + 1
    middle = {"resnets0": "0", "attentions0": "1", "resnets1": "2"}
    parts = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "conv_shortcut": "skip_connection",
        "time_emb_proj": "emb_layers_1",
    }
    plain = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
    for name, layer in layers(module).items():
        match name.split("."):
            case [one] if one in plain:
                theirs = plain[one]
            case ["down_blocks", block, "resnets" | "attentions" as kind, number, *rest]:
                theirs = f"input_blocks_{1 + int(block) * every + int(number)}_{int(kind == 'attentions')}"
            case ["mid_block", kind, number, *rest]:
                theirs = f"middle_block_{middle[kind + number]}"
            case ["up_blocks", block, "resnets" | "attentions" as kind, number, *rest]:
                theirs = f"output_blocks_{int(block) * every + int(number)}_{int(kind == 'attentions')}"
            case _:
                continue
        if name not in plain:
            theirs += "_" + (parts[rest[0]] if "resnets" in name else "_".join(rest))
        yield name, theirs, tuple(layer.weight.shape)


def kohya_flux(module: torch.nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The names of Black Forest Labs; queries, keys and values are one layer of several names."""
    d = WIDTH
    for part, attention, norm, ff, out in (
        ("img", ("to_q", "to_k", "to_v"), "norm1", "ff", "to_out.0"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm1_context", "ff_context", "to_add_out"),
    ):
        ours, theirs = "transformer_blocks.0", f"double_blocks_0_{part}"
        yield f"{ours}.{norm}.linear", f"{theirs}_mod_lin", (6 * d, d)
        yield " ".join(f"{ours}.attn.{each}" for each in attention), f"{theirs}_attn_qkv", (3 * d, d)
        yield f"{ours}.attn.{out}", f"{theirs}_attn_proj", (d, d)
        yield f"{ours}.{ff}.net.0.proj", f"{theirs}_mlp_0", (4 * d, d)
        yield f"{ours}.{ff}.net.2", f"{theirs}_mlp_2", (d, 4 * d)
    yield "single_transformer_blocks.0.proj_out", "single_blocks_0_linear2", (d, 5 * d)
    yield "single_transformer_blocks.0.norm.linear", "single_blocks_0_modulation_lin", (3 * d, d)


LAYOUTS = {
    "sd15": (sd15, kohya_sd, StableDiffusionLoraLoaderMixin),
    "sdxl": (sdxl, kohya_sdxl, StableDiffusionXLLoraLoaderMixin),
    "flux": (flux, kohya_flux, FluxLoraLoaderMixin),
}


def saved(named, module, file: Path, alphas: tuple[float, ...], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Write the file, and return the update of each weight, without the scale, by the name that diffusers has."""
    draw, tensors, added = torch.Generator().manual_seed(0), dict(TEXT), {}
    for number, (ours, theirs, shape) in enumerate(named(module)):
        down = torch.randn(RANK, *shape[1:], generator=draw).to(dtype)
        up = (torch.randn(shape[0], RANK, generator=draw) * 0.1).to(dtype)
        alpha = alphas[number % len(alphas)]
        tensors[f"lora_unet_{theirs}.lora_down.weight"] = down
        tensors[f"lora_unet_{theirs}.lora_up.weight"] = up.reshape(shape[0], RANK, *(1 for _ in shape[2:]))
        tensors[f"lora_unet_{theirs}.alpha"] = torch.tensor(alpha)
        delta = (alpha / RANK * up.double() @ down.double().flatten(1)).reshape(shape)
        added |= dict(zip(ours.split(), delta.chunk(len(ours.split())), strict=True))
    save_file(tensors, file)
    return added


def fused_by_diffusers(make, loader, file: Path) -> dict[str, torch.Tensor]:
    module, tensors = make().module, {name: value.float() for name, value in load_file(file).items()}
    if loader is FluxLoraLoaderMixin:
        state, alphas = loader.lora_state_dict(tensors, return_alphas=True)
        loader.load_lora_into_transformer(state, alphas, module)
    else:
        state, alphas, *_ = loader.lora_state_dict(tensors, unet_config=module.config)
        loader.load_lora_into_unet(state, alphas, module)
    module.fuse_lora(SCALE)
    module.unload_lora()
    return module.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kohyas_files_are_fused_as_diffusers_does_to_the_bit(layout, dtype, tmp_path):
    make, named, loader = LAYOUTS[layout]
    module = make().module
    added = saved(named, module, tmp_path / "k.safetensors", (3.0,), dtype)
    fuse_lora_(module, tmp_path / "k.safetensors", SCALE, LABEL)
    expected = fused_by_diffusers(make, loader, tmp_path / "k.safetensors")
    found, plain = module.state_dict(), make().module.state_dict()
    assert {name for name, value in found.items() if not value.equal(plain[name])} == {f"{n}.weight" for n in added}
    assert [name for name, value in found.items() if not value.equal(expected[name])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_has_its_own_alpha(layout, tmp_path):
    make, named, _ = LAYOUTS[layout]
    module, plain = make().module, make().module.state_dict()
    added = saved(named, module, tmp_path / "k.safetensors", (3.0, 4.0, 1.5))
    fuse_lora_(module, tmp_path / "k.safetensors", SCALE, LABEL)
    found = module.state_dict()
    for name, delta in added.items():
        expected = (plain[f"{name}.weight"].double() + SCALE * delta).float()
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)


def test_names_that_no_loader_knows_are_one_error_and_nothing_else_is_printed(tmp_path, capfd):
    tensors = {"lora_unet_double_blocks_0_\x1b[31m.lora_down.weight": torch.ones(4, 64)}
    save_file(
        tensors | {"lora_unet_double_blocks_99999_a.lora_up.weight": torch.ones(64, 4)}, tmp_path / "a.safetensors"
    )
    save_file(tensors, tmp_path / "b.safetensors")
    for name in "ab":
        with pytest.raises(
            RecipeError, match=r"keys fit no layer of the FluxTransformer2DModel: lora_unet_double"
        ) as raised:
            fuse_lora_(flux().module, tmp_path / f"{name}.safetensors", 1.0, LABEL)
        assert "\x1b" not in str(raised.value)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("lost", ["lora_up.weight", "lora_down.weight", None])
@pytest.mark.parametrize("layout", ["sdxl", "flux"])
def test_a_layer_that_a_conversion_would_lose_is_an_error(layout, lost, tmp_path):
    make, named, _ = LAYOUTS[layout]
    module = make().module
    saved(named, module, tmp_path / "k.safetensors", (3.0,))
    tensors = load_file(tmp_path / "k.safetensors")
    last = [key for key in tensors if key.endswith("lora_up.weight")][-1].removesuffix("lora_up.weight")
    if lost is None:
        tensors["lora_unet_nowhere.alpha"] = torch.tensor(1.0)
    else:
        del tensors[f"{last}{lost}"]
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(RecipeError, match=r"model\.loras\[0\]: \d+ of \d+ keys fit no layer of the") as raised:
        fuse_lora_(module, tmp_path / "k.safetensors", 1.0, LABEL)
    assert "\n" not in str(raised.value)


KINDS = {
    "LoHa (hada_w1_a)": {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 64)},
    "LoKr (lokr_w1)": {"lokr_w1": (8, 8), "lokr_w2": (8, 8)},
    "LoKr (lokr_w1_a)": {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2": (8, 8)},
    "IA3 (on_input)": {"weight": (64,), "on_input": ()},
    "OFT (oft_blocks)": {"oft_blocks": (4, 16, 16)},
    "full differences of weights (diff)": {"diff": (64, 64)},
    "GLoRA (a1.weight)": {"a1.weight": (4, 64), "a2.weight": (64, 4), "b1.weight": (4, 64), "b2.weight": (64, 4)},
    "LoCon with a core tensor (Tucker or CP) (lora_mid.weight)": {"lora_mid.weight": (4, 4, 3, 3)},
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds_are_refused_by_name_with_what_to_do(kind, prefix, tmp_path):
    layer = "transformer_blocks.0.attn1.to_q"
    name = prefix + (layer if prefix.endswith(".") else layer.replace(".", "_"))
    parts = KINDS[kind] | {"alpha": ()}
    save_file({f"{name}.{part}": torch.ones(shape) for part, shape in parts.items()}, tmp_path / "k.safetensors")
    with pytest.raises(RecipeError) as raised:
        fuse_lora_(tiny_dit(), tmp_path / "k.safetensors", 1.0, LABEL)
    said = str(raised.value)
    assert f"keys belong to {kind}, and only LoRA is fused here: merge the adapter into the model" in said
    assert said.endswith("name that folder as model.path")
    assert "\n" not in said
    with pytest.raises(RecipeError, match=r"model\.loras: k\.safetensors: \d of \d keys belong to"):
        find_lora("k.safetensors", tmp_path)
