"""FP8, NVFP4 and SVDQuant of Model Optimizer against the numbers that it packs, simulates and computes itself."""

import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from _four_bits_peers import NVFP4, nvfp4_on_cpu
from harness import Artifacts, run_pass
from modelopt_states import changed, linear, quantize, take
from quantizing import HALF_TOLERANCE, rel_l2

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.tensorrt.runtime import TensorRTRTX
from intaglio.exporters.verify.parity import Comparison
from intaglio.passes.imports.calibrated import QuantizeWithModelopt
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.artifacts.quantized import Quantized
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.simulation.model import simulate

E4M3 = (4, 3)
FP8_CHANNEL, FP8_TENSOR = {"num_bits": E4M3, "axis": 0}, {"num_bits": E4M3, "axis": None}
FP8_TOKEN = {"num_bits": E4M3, "type": "dynamic", "block_sizes": {-1: None}}
SVDQUANT = {"method": "svdquant", "lowrank": 4}
CONFIGS = {
    "FP8 tensors": (linear(FP8_TENSOR, FP8_TENSOR), "fp8_static"),
    "FP8 channels, inputs by token": (linear(FP8_CHANNEL, FP8_TOKEN), "fp8_token"),
    "NVFP4": (linear(NVFP4, NVFP4), "nvfp4_static"),
    "NVFP4, inputs in float": (linear(NVFP4), "nvfp4a16"),
    "NVFP4 SVDQuant": (linear(NVFP4, NVFP4, SVDQUANT), "nvfp4_static"),
}
STEP = 2


def blocks(size: int, scale_bits: tuple[int, int] = E4M3) -> dict:
    return {-1: size, "type": "dynamic", "scale_bits": scale_bits}


LAYER = "transformer_blocks.0.attn1.to_q"


def packed_by_modelopt(layer: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """The tensors into which Model Optimizer packs the weight of a layer: numbers, then scales."""
    from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    w, amax = layer.weight.detach(), layer.weight_quantizer.amax
    if layer.weight_quantizer.num_bits == E4M3:
        made, scale = FP8QTensor.quantize(w, scales=amax / 448.0)
        return made._quantized_data, scale
    made, scale, double = NVFP4QTensor.quantize(w, 16, weights_scaling_factor_2=amax / 2688)
    return made._quantized_data, scale, double


def without_negative_zeros(packed: torch.Tensor) -> torch.Tensor:
    """Pairs of E2M1 numbers in which the sign of zeros is dropped, as our codes have one zero."""
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_equal_to_the_bit_and_layers_compute_the_same(name: str, dit: Artifacts, tmp_path: Path) -> None:
    config, scheme = CONFIGS[name]
    theirs = quantize(dit, config, tmp_path / "saved.pt")
    ours = take(dit, tmp_path / "saved.pt")
    plan = ours[PLAN]
    assert {plan.schemes[n.name].name for n in plan.layers if n.op == "linear"} == {scheme}
    seen = {}

    def note(_, args, y, layer):
        seen[layer] = args[0], y

    model, call = ours[MODEL].open(), dit[TRAJECTORY].call(STEP)
    clock = simulate(model.module, ours[QUANTIZED])
    for layer in ours[QUANTIZED].layers:
        theirs.module.get_submodule(layer).register_forward_hook(partial(note, layer=layer))
    with torch.no_grad(), clock.at(0), nvfp4_on_cpu():
        denoise_with(theirs.module, theirs)(call)
        for layer, data in ours[QUANTIZED].layers.items():
            module = theirs.module.get_submodule(layer)
            numbers = data.scheme.weight.pack(data.codes)
            if data.group_NG is None:
                rounded, scale = module.weight_quantizer(module.weight), data.scale_NG
                assert (rounded / scale).to(torch.float8_e4m3fn).float().equal(numbers.float()), layer
                torch.testing.assert_close(numbers.float() * scale, rounded, rtol=3e-7, atol=0)
            else:
                packed, scale, double = packed_by_modelopt(module)
                assert numbers.equal(without_negative_zeros(packed).reshape(numbers.shape)), layer
                assert data.group_NG.view(torch.uint8).equal(scale.view(torch.uint8)), layer
                assert data.scale_NG.equal(double.reshape(1, 1)), layer
            x, y = seen[layer]
            own, other = model.module.get_submodule(layer), 0
            if own.input_rounding is not None:
                rounded = module.input_quantizer(x)
                apart = (own.rounded_input(own.balanced(x)) - rounded).abs() > 1e-6 * rounded.abs()
                other = int(apart.count_nonzero())
                assert other <= max(16, 1e-4 * x.numel()), layer  # numbers, or a block's scale, that lie in the middle
            exact = 5e-4 if data.branch else 2e-6
            assert rel_l2(own(x), y) < (exact if other == 0 else 2e-2), layer
    if "SVDQuant" in name:
        factor = theirs.module.get_submodule(LAYER).weight_quantizer.svdquant_lora_a
        assert ours[QUANTIZED].layers[LAYER].branch.down_RK.equal(factor.half().float())
        assert plan.branches.keys() == plan.balances.keys() == ours[QUANTIZED].layers.keys()


@pytest.mark.parametrize("name", ["FP8 channels, inputs by token", "NVFP4"])
def test_packed_weights_are_taken_as_they_are(name: str, dit: Artifacts, tmp_path: Path) -> None:
    config, scheme = CONFIGS[name]
    quantize(dit, config, tmp_path / "saved.pt", packed=True)
    saved = torch.load(tmp_path / "saved.pt", weights_only=False)["model_state_dict"]
    ours = take(dit, tmp_path / "saved.pt")
    assert ours[PLAN].schemes[LAYER].name == scheme
    ours[QUANTIZED].save(tmp_path)
    for layer, data in Quantized.load(tmp_path).layers.items():
        numbers, packed = data.scheme.weight.pack(data.codes[:]), saved[f"{layer}.weight"]
        scale = saved[f"{layer}.weight_quantizer._scale"]
        if data.group_NG is None:
            assert numbers.view(torch.uint8).equal(packed.view(torch.uint8)), layer
            assert data.scale_NG.equal(scale), layer
        else:
            assert numbers.equal(without_negative_zeros(packed).reshape(numbers.shape)), layer
            assert data.group_NG.view(torch.uint8).equal(scale.view(torch.uint8)), layer
            assert data.scale_NG.item() == saved[f"{layer}.weight_quantizer._double_scale"].item()


def test_a_graph_for_blackwell_computes_what_was_imported(dit: Artifacts, tmp_path: Path) -> None:
    quantize(dit, CONFIGS["NVFP4 SVDQuant"][0], tmp_path / "saved.pt")
    ours = take(dit, tmp_path / "saved.pt")
    graph = run_pass(ExportQdq(), ours | {TARGET: load_target("tensorrt-rtx-blackwell")}, tmp_path / "qdq")[GRAPH]
    both = Comparison.of(ours[MODEL].open(), ours[QUANTIZED], graph, TensorRTRTX())
    parity = both.layer_parity(
        dit[TRAJECTORY].call(STEP), Context(scratch=tmp_path, seed=0, log=logging.getLogger("test"))
    )
    assert parity.keys() == ours[QUANTIZED].layers.keys()
    assert max(each.rel_l2 for each in parity.values()) < HALF_TOLERANCE
    assert not any(each.codes_differing for each in parity.values())


@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_the_step_modelopt_gives_what_a_file_of_it_gives(config: str, dit: Artifacts, tmp_path: Path) -> None:
    name, pattern = {"F": ("FP8 tensors", "fp8_static"), "N": ("NVFP4", "nvfp4_static")}[config[0]]
    quantize(dit, CONFIGS[name][0], tmp_path / "saved.pt")
    read = take(dit, tmp_path / "saved.pt")[QUANTIZED].layers
    made = run_pass(QuantizeWithModelopt(config=config, block=32, ignore=("pos_embed.proj*",)), dit, tmp_path / "made")
    assert made[PLAN].schemes[LAYER].name == pattern
    assert made[QUANTIZED].layers[LAYER].codes.equal(read[LAYER].codes)
    assert made[QUANTIZED].layers[LAYER].tables.amax_T == read[LAYER].tables.amax_T


REFUSED = {
    "weight in E5M2: of the floating-point formats only FP8": ("weight", {"_num_bits": (5, 2)}),
    "input in E5M2 beside a floating-point weight": ("input", {"_num_bits": (5, 2)}),
    "input in 8 bits beside a floating-point weight": ("input", {"_num_bits": 8}),
    "FP8 weights multiply FP8 inputs only": ("input", {"_disabled": True}),
    "NVFP4 weights multiply float or NVFP4 inputs only": ("weight", {"_num_bits": (2, 1)}),
    "FP8 weights with scales for blocks": ("weight", {"_block_sizes": {-1: 16}}),
    "weight scales .* along axis 1": ("weight", {"_axis": 1}),
    "static input scales along axis -1": ("input", {"_axis": -1}),
    "packed FP8 weights in float32": ("weight", {"_fake_quant": False}),
    "of its input does more than round: fake_quant is False": ("input", {"_fake_quant": False}),
    "of its weight does more than round: unsigned is True": ("weight", {"_unsigned": True}),
}
REFUSED_FOUR = {
    "weight in E2M1 with blocks {-1: 32": ("weight", {"_block_sizes": blocks(32)}),
    "input in E2M1 with blocks {-1: 16": ("input", {"_block_sizes": blocks(16, (8, 0))}),
    "weight in E2M1 with blocks None": ("weight", {"_block_sizes": None}),
    "weight in E2M1 with blocks .*four_over_six": ("weight", {"_block_sizes": blocks(16) | {"four_over_six": True}}),
    r"the file has a weight \(\d+, \d+\), where \(\d+, \d+\) is expected": ("weight", {"_fake_quant": False}),
}
BUFFERS = {
    "NVFP4 weight scales": ("weight_quantizer._amax", torch.tensor(0.0)),
    "an input scale of 0": ("input_quantizer._amax", torch.tensor(0.0)),
    "factors .* of SVDQuant": ("weight_quantizer._svdquant_lora_a", torch.ones(2, 3)),
    r"factors \(\) and .* of SVDQuant": ("weight_quantizer._svdquant_lora_a", torch.ones(())),
}


@pytest.mark.parametrize(("name", "cases"), [("FP8 tensors", REFUSED), ("NVFP4", REFUSED_FOUR | BUFFERS)])
def test_what_has_no_exact_form_is_refused_by_name(name: str, cases: dict, dit: Artifacts, tmp_path: Path) -> None:
    quantize(dit, CONFIGS[name][0], tmp_path / "saved.pt")
    layers = [n.name for n in dit[MODEL].layers() if n.op == "linear"]
    assert len(cases) <= len(layers)

    def change(quantizers, tensors):
        for layer, (part, value) in zip(layers, cases.values(), strict=False):
            if isinstance(value, torch.Tensor):
                tensors[f"{layer}.{part}"] = value
            else:
                quantizers[f"{layer}.{part}_quantizer"].update(value)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    with pytest.raises(RecipeError) as raised:
        take(dit, changed(saved, change, tmp_path / "changed.pt"))
    said = raised.value.problems
    expected = dict(zip(layers, cases, strict=False))
    missing = [why for layer, why in expected.items() if not any(re.search(f"{layer}.*: .*{why}", s) for s in said)]
    assert missing == [], said
