"""ComfyUI's INT8 checkpoints, written here as their documentation says, with literal codes of comfy-kitchen 0.2.40."""

import json
from pathlib import Path

import numpy as np
import originals
import pytest
import torch
from harness import Artifacts, run_pass
from quantizing import rel_l2
from safetensors.torch import save_file

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.passes.imports.names import Stored, in_names_of
from intaglio.passes.imports.weights import ImportWeights, read_weights
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.simulation.model import simulate

FOUR = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
LAYER = "transformer_blocks.0.attn1.to_q"
STEP = 1


def regular(block: int) -> torch.Tensor:
    """The normalized regular Hadamard matrix of the documentation: the Kronecker power of H4 / 2."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron(matrix, FOUR / 2)
    return torch.from_numpy(matrix)


def rotated(w: torch.Tensor, block: int) -> torch.Tensor:
    return (w.double().unflatten(-1, (-1, block)) @ regular(block)).flatten(-2) if block > 1 else w.double()


def rounded(w: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and row scales of a weight, as the documentation of the format defines them."""
    turned = rotated(w, block)
    scale = turned.abs().amax(1, keepdim=True) / 127
    return (turned / scale).round().clamp(-127, 127).to(torch.int8), scale.float()


def marked(name: str, codes: torch.Tensor, scale: torch.Tensor, **form: object) -> dict[str, torch.Tensor]:
    text = json.dumps({"format": "int8_tensorwise", **form}).encode()
    return {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
    }


def checkpoint(tensors: dict[str, torch.Tensor], names: list[str], block: int, **more: object) -> dict:
    """A state dict whose layers of these names are rounded."""
    form = {"convrot": True, "convrot_groupsize": block} if block > 1 else {}
    found = dict(tensors)
    for name in names:
        found |= marked(name, *rounded(tensors[f"{name}.weight"], block), **form, **more)
    return found


def take(start: Artifacts, tensors: dict, folder: Path, **metadata: str) -> Artifacts:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "c.safetensors", metadata or None)
    return start | run_pass(ImportWeights(path=str(folder / "c.safetensors")), start, folder / "import")


def linear(start: Artifacts) -> list[str]:
    return [layer.name for layer in start[MODEL].layers() if layer.op == "linear"]


def test_literal_codes_of_comfy_kitchen(tmp_path):
    """The codes are those of quantize_int8_convrot_weight(w, 16), for w of sin(0), sin(1), ..."""
    codes = [
        [11, 13, -16, -50, -50, -39, 46, 127, 119, 25, -12, 41, -41, -7, 2, -23],
        [3, -9, 13, 47, 13, 29, -38, -127, -126, -35, 24, -3, 46, 11, -7, 9],
    ]
    w = torch.arange(32.0).reshape(2, 16).sin()
    scale = torch.tensor([[0.013358707539737225], [0.013828219845890999]])
    module = torch.nn.Sequential(torch.nn.Linear(16, 2))
    tensors = marked("0", torch.tensor(codes, dtype=torch.int8), scale, convrot=True, convrot_groupsize=16)
    save_file(tensors | {"0.bias": torch.zeros(2)}, tmp_path / "c.safetensors")
    saved = read_weights([tmp_path / "c.safetensors"], module)
    weight = saved.weights["0"](Layer(name="0", op="linear", shape=(2, 16), bias=True))
    balance = weight.balance
    assert balance.block == 16
    expected = (balance.weight(w) / scale).round()
    assert weight.codes.equal(expected.to(torch.int8))
    assert sorted(map(abs, codes[0])) == sorted(weight.codes[0].abs().tolist())
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    theirs = rotated(x, 16) @ (torch.tensor(codes) * scale.double()).T
    ours = balance.input(x, -1).double() @ (weight.codes * scale.double()).T
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_it_computes_what_the_format_says(block, dit, tmp_path):
    start = dit
    names = linear(start)
    model = start[MODEL].open()
    ours = take(start, checkpoint(model.module.state_dict(), names, block), tmp_path)
    assert {ours[PLAN].schemes[name].name for name in names} == {"w8a8_token"}
    assert ours[PLAN].balances.keys() == (set(names) if block > 1 else set())
    simulated, call = ours[MODEL].open(), start[TRAJECTORY].call(STEP)
    clock, seen = simulate(simulated.module, ours[QUANTIZED]), {}
    for name in names:
        simulated.module.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: (args[0], y)})
        )
    with torch.no_grad(), clock.at(0):
        whole = denoise_with(simulated.module, simulated)(call)
    for name in names:
        x, y = seen[name]
        layer = model.module.get_submodule(name)
        codes, scale = rounded(layer.weight.detach(), block)
        turned = rotated(x, block)
        token = (turned.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        expected = ((turned / token).round() @ codes.double().T) * token * scale.double().T + layer.bias.detach()
        assert rel_l2(y.double(), expected) < 1e-3, name  # an input between two codes
        dequantized = ours[QUANTIZED].layers[name]
        assert dequantized.scale_NG.equal(scale), name
        assert dequantized.codes.abs().sort(1).values.equal(codes.abs().sort(1).values), name
    graph = run_pass(ExportQdq(), ours | {TARGET: load_target("onnxruntime-cpu")}, tmp_path / "qdq")[GRAPH]
    rounding = rel_l2(whole, start[TRAJECTORY].outputs[STEP])
    assert 0 < rounding < 0.1
    assert rel_l2(graph_denoise(graph, OnnxRuntime())(call), whole) < 0.3 * rounding


def test_forms_in_the_metadata_a_prefix_and_products_in_float(dit, tmp_path):
    model = dit[MODEL].open().module
    tensors = checkpoint(model.state_dict(), [LAYER], 16)
    mark = tensors.pop(f"{LAYER}.comfy_quant")
    form = json.loads(bytes(mark.tolist())) | {"full_precision_matrix_mult": True}
    tensors = {f"model.diffusion_model.{name}": value for name, value in tensors.items()} | {"vae.x": torch.ones(1)}
    written = json.dumps({"format_version": "1.0", "layers": {f"model.diffusion_model.{LAYER}": form}})
    ours = take(dit, tensors, tmp_path, _quantization_metadata=written)
    assert ours[PLAN].schemes[LAYER].name == "w8a16"
    assert ours[PLAN].balances[LAYER].balance.block == 16


def test_names_of_the_original_layout_are_converted_with_their_rows(tmp_path):
    original, module = originals.sd3()
    names = [name.removesuffix(".weight") for name, value in original.items() if value.dim() == 2]
    fused = [name for name in names if "qkv" in name or "adaLN" in name or "fc" in name]
    save_file(checkpoint(original, fused, 16), tmp_path / "c.safetensors")
    saved = read_weights([tmp_path / "c.safetensors"], module)
    layers = {layer.name: layer for layer in layer_table(module) if layer.name in saved.weights}
    assert {"transformer_blocks.0.attn.to_k", "norm_out.linear", "transformer_blocks.1.norm1_context.linear"} < set(
        layers
    )
    assert len(layers) == len(saved.weights) == 3 * 4 + 5 + 6
    for name, layer in layers.items():
        weight = saved.weights[name](layer)
        w = module.get_submodule(name).weight.detach()
        codes = (weight.balance.weight(w.double()) / weight.scale_NG.double()).round()
        assert weight.codes.equal(codes.to(torch.int8)), name
        assert weight.scale_NG.equal(rounded(w, 16)[1]), name
    ours = {name: value for name, value in module.state_dict().items() if name.removesuffix(".weight") not in layers}
    assert saved.rest.keys() == ours.keys()
    assert all(saved.rest[name].equal(value) for name, value in ours.items())


def test_rows_of_flux_go_where_diffusers_brings_them():
    original, converted, module = originals.flux()
    weights = {n.removesuffix(".weight"): Stored({"w": w}) for n, w in original.items() if n.endswith(".weight")}
    found, rest = in_names_of(module, weights, {n: v for n, v in original.items() if not n.endswith(".weight")})
    assert {f"{name}.weight" for name in found} | rest.keys() == converted.keys() == module.state_dict().keys()
    assert all(stored.rows["w"].equal(converted[f"{name}.weight"]) for name, stored in found.items())
    assert all(value.equal(converted[name]) for name, value in rest.items())


def with_form(**form: object):
    def change(tensors):
        text = json.dumps({"format": "int8_tensorwise", **form}).encode()
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)

    return change


def with_part(part: str, value: torch.Tensor | None):
    def change(tensors):
        tensors.pop(f"{LAYER}.{part}", None)
        if value is not None:
            tensors[f"{LAYER}.{part}"] = value

    return change


ROT = {"convrot": True}
BROKEN = {
    f"{LAYER}: weights in nvfp4: only int8_tensorwise": with_form(format="nvfp4"),
    f"{LAYER}: weights in convrot_w4a4: only int8_tensorwise": with_form(format="convrot_w4a4"),
    f"{LAYER}: convrot_groupsize 12 for a weight": with_form(**ROT, convrot_groupsize=12),
    f"{LAYER}: convrot_groupsize 8 for a weight": with_form(**ROT, convrot_groupsize=8),
    f"{LAYER}: convrot_groupsize 256 for a weight": with_form(**ROT),
    f"{LAYER}: convrot_groupsize -4 for a weight": with_form(**ROT, convrot_groupsize=-4),
    f"{LAYER}.comfy_quant: convrot: Input should be a valid boolean": with_form(convrot="yes"),
    f"{LAYER}.comfy_quant: format: Input should be a valid string": with_form(format=[1]),
    f"{LAYER}.comfy_quant: is not JSON": with_part("comfy_quant", torch.full((9,), 123, dtype=torch.uint8)),
    "nested too deep": with_part("comfy_quant", torch.full((60000,), 91, dtype=torch.uint8)),
    "70000 values in uint8, but 1 to 65536 bytes": with_part("comfy_quant", torch.zeros(70000, dtype=torch.uint8)),
    "4 values in float32, but 1 to 65536 bytes": with_part("comfy_quant", torch.zeros(4)),
    f"{LAYER}: no weight_scale": with_part("weight_scale", None),
    f"{LAYER}: no weight": with_part("weight", None),
    f"{LAYER}: a weight \\(64, 64\\) in float32": with_part("weight", torch.ones(64, 64)),
    f"{LAYER}: codes \\(3, 64\\) for a weight \\(64, 64\\)": with_part("weight", torch.ones(3, 64, dtype=torch.int8)),
    f"{LAYER}: weight_scale \\(5,\\) for a weight": with_part("weight_scale", torch.ones(5)),
    f"{LAYER}: scales with NaN or Inf": with_part("weight_scale", torch.full((64, 1), torch.nan)),
    f"{LAYER}: scales that are not above zero": with_part("weight_scale", torch.zeros(64, 1)),
    f"{LAYER}: scales in int32": with_part("weight_scale", torch.ones(64, 1, dtype=torch.int32)),
    f"{LAYER}: codes of -128": with_part("weight", torch.full((64, 64), -128, dtype=torch.int8)),
    f"{LAYER}: an input_scale, which int8_tensorwise does not have": with_part("input_scale", torch.ones(1)),
}


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_not_the_format_is_refused_in_one_line_that_names_it(why, dit, tmp_path):
    tensors = checkpoint(dit[MODEL].open().module.state_dict(), [LAYER], 16)
    BROKEN[why](tensors)
    if why.endswith("for a weight \\(64, 64\\)"):
        tensors[f"{LAYER}.weight_scale"] = torch.ones(3, 1)
    with pytest.raises(RecipeError, match=why) as raised:
        take(dit, tensors, tmp_path)
    assert "\n" not in str(raised.value)


def test_names_that_diffusers_cannot_convert_are_an_error(dit, tmp_path):
    tensors = {f"blocks.{n}": v for n, v in checkpoint(dit[MODEL].open().module.state_dict(), [LAYER], 16).items()}
    with pytest.raises(RecipeError, match="diffusers has no conversion of single files for it"):
        take(dit, tensors, tmp_path)
    original, module = originals.sd3()
    name = "joint_blocks.0.x_block.attn.qkv"
    tensors = checkpoint({n: v for n, v in original.items() if "final_layer" not in n}, [name], 16)
    save_file(tensors, tmp_path / "d.safetensors")
    for changed, why in {
        "joint_blocks.0.x_block.attn.qkv.bias": (torch.ones(5, dtype=torch.int64), r"qkv\.bias: in int64, which"),
        "joint_blocks.123456789.x": (torch.ones(1), r"joint_blocks\.123456789\.x: has a number of five digits"),
        f"{name}.weight": (torch.ones(0, 64, dtype=torch.int8), r"qkv: a weight \(0, 64\) in int8: codes have to be"),
        f"{name}.weight_scale": (torch.ones(7), r"qkv: weight_scale \(7,\) for a weight \(192, 64\)"),
    }.items():
        save_file(tensors | {changed: why[0]}, tmp_path / "e.safetensors")
        with pytest.raises(RecipeError, match=why[1]):
            read_weights([tmp_path / "e.safetensors"], module)
    with pytest.raises(RecipeError, match=r"names are not those of the SD3Transformer2DModel, .* 'final_layer"):
        read_weights([tmp_path / "d.safetensors"], module)


def test_two_descriptions_of_a_layer_have_to_be_the_same(dit, tmp_path):
    tensors = checkpoint(dit[MODEL].open().module.state_dict(), [LAYER], 1)
    same, other = ({"layers": {LAYER: {"format": "int8_tensorwise", **more}}} for more in ({}, {"convrot": True}))
    assert LAYER in take(dit, tensors, tmp_path, _quantization_metadata=json.dumps(same))[QUANTIZED].layers
    with pytest.raises(RecipeError, match=rf"c\.safetensors: {LAYER}\.comfy_quant: describes another format than _qu"):
        take(dit, tensors, tmp_path, _quantization_metadata=json.dumps(other))


def test_a_format_that_cannot_be_read_is_named_with_its_file(dit, tmp_path):
    tensors = checkpoint(dit[MODEL].open().module.state_dict(), [LAYER], 1)
    tensors.pop(f"{LAYER}.weight_scale")
    with pytest.raises(RecipeError, match=rf"/c\.safetensors: {LAYER}: no weight_scale"):
        take(dit, tensors, tmp_path)
