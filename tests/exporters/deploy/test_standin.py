"""A compiled denoiser is read like the model that it replaces, and refuses every change that would have no effect."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import sd_unet
from torch import nn

from intaglio.exporters.deploy.denoiser import CompiledDenoiser
from intaglio.exporters.deploy.standin import Standin
from intaglio.pipeline.artifacts.graph import Graph, Interface, TensorSpec
from intaglio.pipeline.errors import CallError

COPY = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[batch, 4, 8, 8] sample, int64[batch] timestep) => (float[batch, 4, 8, 8] y) { y = Identity (sample) }
"""


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> CompiledDenoiser:
    """In the place of a UNet; what is computed does not matter here."""
    path: Path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(onnx.parser.parse_model(COPY), path)
    config = {name: value for name, value in sd_unet("CrossAttnUpBlock2D").config.items() if name[0] != "_"}
    inputs = {"sample": TensorSpec("float32", ("batch", 4, 8, 8)), "timestep": TensorSpec("int64", ("batch",))}
    interface = Interface("UNet2DConditionModel", config, ("sample", "timestep"), "sample")
    graph = Graph(path, inputs, {"y": inputs["sample"]}, interface=interface)
    return CompiledDenoiser(graph, lambda given: {"y": given["sample"] * 2})


def attention(unet: Any) -> Any:
    return unet.up_blocks[0].attentions[0].transformer_blocks[0].attn1


def every_weight(unet: Any) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(2)


def cached(unet: Any) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    settings = {"cross_attention_block_skip_range": 2, "cross_attention_timestep_skip_range": (-1, 2000)}
    config = PyramidAttentionBroadcastConfig(**settings, current_timestep_callback=lambda: 1)
    apply_pyramid_attention_broadcast(unet, config)


def with_adapters(unet: Any) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"], r=1), unet)


CHANGES = {
    "adapters of peft": (with_adapters, r"attn1\.to_q cannot be set in a compiled model"),
    "pickle": (pickle.dumps, "a compiled model is not pickled: call intaglio.load with its folder in each process"),
    "torch.save": (lambda n: torch.save(n, io.BytesIO()), "a compiled model is not pickled"),
    "a part": (lambda n: pickle.dumps(n.up_blocks[0]), r"up_blocks\.0: a part of a compiled model is not pickled"),
    "attention processors": (lambda n: n.set_attn_processor(object()), "attn1.processor cannot be set"),
    "default processors": (lambda n: n.set_default_attn_processor(), "attn1.processor cannot be set"),
    "processors that are read": (lambda n: n.attn_processors, "attention of a compiled model cannot be changed"),
    "one processor": (lambda n: attention(n).set_processor(object()), "attn1.processor cannot be set"),
    "freeu": (lambda n: n.enable_freeu(s1=0.1, s2=0.1, b1=2.0, b2=2.0), "up_blocks.0.s1 cannot be set"),
    "an adapter": (lambda n: n.add_adapter(None), "add_adapter would have no effect .* model.loras"),
    "a LoRA": (lambda n: n.load_lora_adapter({}), "load_lora_adapter would have no effect .* model.loras"),
    "a fused LoRA": (lambda n: n.fuse_lora(), "fuse_lora would have no effect .* model.loras"),
    "an unfused LoRA": (lambda n: n.unfuse_lora(), "unfuse_lora would have no effect .* model.loras"),
    "chosen adapters": (lambda n: n.set_adapters("style"), "set_adapters would have no effect"),
    "old LoRAs": (lambda n: n.load_attn_procs({}), "load_attn_procs would have no effect"),
    "an IP-Adapter": (lambda n: n._load_ip_adapter_weights([]), "_load_ip_adapter_weights would have no effect"),
    "its projection": (lambda n: setattr(n, "encoder_hid_proj", nn.Identity()), "encoder_hid_proj cannot be set"),
    "fused projections": (lambda n: n.fuse_qkv_projections(), "cannot be set in a compiled model"),
    "a cache": (cached, "_diffusers_hook cannot be set"),
    "casts": (lambda n: n.enable_layerwise_casting(torch.float8_e4m3fn), "_diffusers_hook cannot be set"),
    "weights": (lambda n: n.load_state_dict({}, strict=False), "no weights can be put into a compiled model"),
    "one weight": (lambda n: n.conv_in.weight.mul_(2), r"conv_in.weight can neither be read nor changed \(mul_\)"),
    "data of a weight": (lambda n: n.conv_in.weight.data, "conv_in.weight can neither be read"),
    "every weight": (every_weight, "conv_in.weight can neither be read"),
    "another weight": (lambda n: setattr(n.conv_in, "weight", None), "conv_in.weight cannot be set"),
    "an initialization": (lambda n: nn.init.zeros_(n.conv_out.bias), "conv_out.bias can neither be read"),
    "a function for all": (lambda n: n.apply(lambda m: setattr(m, "eps", 1.0)), "eps cannot be set"),
    "a module": (lambda n: setattr(n, "conv_in", nn.Identity()), "conv_in cannot be set on a compiled model"),
    "an item": (lambda n: n.up_blocks.__setitem__(0, nn.Identity()), "up_blocks.0 cannot be set"),
    "one more": (lambda n: n.down_blocks.append(nn.Identity()), "down_blocks cannot be changed"),
    "one more of its own": (lambda n: n.register_buffer("more", torch.zeros(1)), "cannot be changed"),
    "one less": (lambda n: delattr(n, "conv_in"), "conv_in cannot be deleted"),
    "forward": (lambda n: setattr(n, "forward", None), "forward cannot be set"),
    "forward inside": (lambda n: setattr(n.conv_in, "forward", None), "conv_in.forward cannot be set"),
    "a hook inside": (lambda n: n.conv_in.register_forward_hook(print), "conv_in cannot be changed"),
    "a hook before": (lambda n: n.conv_in.register_forward_pre_hook(print), "conv_in cannot be changed"),
    "gradients": (lambda n: n.requires_grad_(), "a compiled model cannot be trained"),
    "training": (lambda n: n.train(), "a compiled model cannot be trained"),
    "half precision": (lambda n: n.half(), "cannot be converted or moved"),
    "bfloat16": (lambda n: n.to(torch.bfloat16), "its inputs and outputs are torch.float32: do not convert it"),
    "half inside": (lambda n: n.conv_in.half(), "conv_in has no weights to convert"),
    "another device": (lambda n: n.to("cuda"), "it runs on cpu, not on cuda: choose the backend"),
    "a file": (lambda n: n.save_pretrained("saved"), "its weights are in the compiled folder alone: copy that"),
    "a table of weights": (lambda n: n.state_dict(), "its weights are in the compiled folder alone"),
    "a call inside": (
        lambda n: n.conv_in(torch.zeros(1, 4, 8, 8)),
        "conv_in was not compiled: this folder has only the whole denoiser",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_would_have_no_effect_is_refused(unet, what):
    change, message = CHANGES[what]
    with pytest.raises(CallError, match=message), torch.no_grad():
        change(unet)
    assert not Path("saved").exists()


def test_what_leaves_the_computation_as_it_is_has_no_effect(unet):
    unet.set_attention_slice("auto")
    unet.enable_gradient_checkpointing()
    unet.enable_xformers_memory_efficient_attention()
    unet.set_attention_backend("native")
    unet.disable_freeu()
    unet.compile()
    assert unet.eval().to("cpu").to(torch.float32).to(memory_format=torch.channels_last).cpu().float() is unet
    assert unet.requires_grad_(False) is unet
    with unet.cache_context("cond"):
        assert torch.equal(unet(torch.ones(1, 4, 8, 8), 3).sample, torch.full((1, 4, 8, 8), 2.0))
    assert copy.deepcopy(unet) is unet


def test_a_hook_on_the_whole_has_its_effect(unet):
    hook = unet.register_forward_hook(lambda _, args, output: output._replace(sample=-output.sample))
    try:
        assert float(unet(torch.ones(1, 4, 8, 8), 3).sample[0, 0, 0, 0]) == -2.0
    finally:
        hook.remove()


def test_it_is_read_as_the_original(unet):
    original = sd_unet("CrossAttnUpBlock2D")
    assert [n for n, _ in unet.named_modules()] == [n for n, _ in original.named_modules()]
    assert type(unet.conv_in).__name__ == "Conv2d"
    assert isinstance(unet.get_submodule("conv_in"), nn.Conv2d)
    weight = unet.conv_in.weight
    assert (weight.shape, weight.dtype, weight.numel()) == ((32, 4, 3, 3), torch.float32, 1152)
    assert isinstance(weight, nn.Parameter)
    assert unet.config.cross_attention_dim == original.config.cross_attention_dim == 64
    assert not hasattr(unet, "no_such_attribute")
    assert hasattr(unet, "add_adapter")
    assert [each.numel() for each in unet.parameters()] == [0]


def test_a_table_of_positions_that_is_changed_in_place_is_an_error_of_the_next_call():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.register_buffer("table", torch.ones(3), persistent=False)

    original = Positions()
    standin = Standin(original)
    standin.check_unchanged()
    assert original.inner.table.tolist() == [1.0, 1.0, 1.0]
    original.inner.table.zero_()
    with pytest.raises(
        CallError, match=r"inner\.table was changed after loading, without effect on the compiled model"
    ):
        standin.check_unchanged()


def test_the_type_and_the_device_are_read_from_the_first_parameter(unet: CompiledDenoiser) -> None:
    first = next(unet.parameters())
    assert (first.dtype, first.device, first.numel()) == (torch.float32, unet.device, 0)
    with pytest.raises(CallError, match="parameters can neither be read nor changed"):
        first.add_(1)
    assert copy.copy(unet) is unet
