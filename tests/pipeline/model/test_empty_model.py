"""A configuration cannot ask for more than its weights are: it is refused in moments, before memory is taken."""

import resource
import time

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from tiny import tiny_dit, tiny_unet
from tiny_families import flux, sd3

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.empty_model import ANY_MODEL, empty_model
from intaglio.pipeline.model.model_files import ModelSize


def size_of(module: torch.nn.Module) -> ModelSize:
    tensors = list(module.state_dict().values())
    return ModelSize(len(tensors), sum(each.numel() for each in tensors))


@pytest.mark.parametrize("build", [tiny_dit, tiny_unet, lambda: flux().module, lambda: sd3().module])
@pytest.mark.parametrize("bound", [True, False])
def test_a_model_as_large_as_its_weights_is_made_without_them(build, bound):
    module = build()
    made = empty_model(type(module), module.config, size_of(module) if bound else ANY_MODEL, "it")
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
    assert all(each.is_meta for each in made.parameters())
    for name, buffer in module.named_buffers():
        assert torch.equal(made.get_buffer(name), buffer)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 10**6}, {"num_layers": 10**7}, {"num_layers": 10**30}, {"attention_head_dim": 10**12},
        {"sample_size": 10_000}, {"sample_size": 10**6}, {"num_embeds_ada_norm": 10**9}, {"patch_size": 10**5},
        {"in_channels": 10**9},
    ],
)  # fmt: skip
def test_a_configuration_far_larger_than_the_weights_is_refused(change):
    module = tiny_dit()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RecipeError, match=r"model: it: its configuration makes a model much larger than its weights"):
        empty_model(DiTTransformer2DModel, dict(module.config) | change, size_of(module), "it")
    assert time.process_time() - began < 4  # twice what it may take
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_deep_block_is_refused_in_another_class():
    config = {"layers_per_block": 10**7, "block_out_channels": (32,), "norm_num_groups": 8,
              "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}  # fmt: skip
    with pytest.raises(RecipeError, match="which have 60 tensors"):
        empty_model(UNet2DConditionModel, config, ModelSize(60, 10**9), "it")


def test_what_the_class_does_not_take_is_one_line():
    with pytest.raises(RecipeError, match="model: it raised TypeError: 'str' object"):
        empty_model(DiTTransformer2DModel, dict(tiny_dit().config) | {"num_layers": "x"}, ANY_MODEL, "it")
