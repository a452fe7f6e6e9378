"""Weights that compressed-tensors quantized compute what the library does; those without an exact form are refused."""

import copy
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Artifacts, run_pass
from pydantic import ValidationError
from quantized_files import LAYER, WEIGHTS, take
from quantizing import rel_l2
from safetensors.torch import load_file, save_file

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.passes.imports.weights import ImportWeights
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.numerics import rounding as affine
from intaglio.pipeline.simulation.model import simulate

CHANNEL8 = {"num_bits": 8, "strategy": "channel"}
CHANNEL4 = {"num_bits": 4, "strategy": "channel"}
BLOCKS4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "strategy": "tensor"}
GROUPS = {
    "w8a8_token": ("re:.*attn1.*", CHANNEL8, TOKEN),
    "w4a16": ("re:.*ff.net.0.proj", BLOCKS4, None),
    "w8a8_step": ("re:.*ff.net.2", CHANNEL8, TENSOR),
    "w8a16": ("re:.*emb.timestep_embedder.linear_2", CHANNEL8, None),
    "w4a8_step": ("re:.*norm1.linear", CHANNEL4, TENSOR),
}
STEP = 2


def compressed(start: Artifacts, groups, folder: Path):
    """Save a model with compressed-tensors; return the files, and the model as it computes before it is saved."""
    ct = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    schemes = {
        name: ct.QuantizationScheme(
            targets=[target],
            weights=ct.QuantizationArgs(**weights),
            input_activations=None if entering is None else ct.QuantizationArgs(**entering),
        )
        for name, (target, weights, entering) in groups.items()
    }
    model = start[MODEL].open()
    ct.apply_quantization_config(model.module, ct.QuantizationConfig(config_groups=schemes))
    quantized = {n: m for n, m in model.module.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    for name, module in quantized.items():
        args, w = module.quantization_scheme.weights, module.weight.data
        blocks = w.unflatten(1, (-1, args.group_size)) if args.group_size else w
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape)
        entering = module.quantization_scheme.input_activations
        if entering is not None and not entering.dynamic:
            module.input_scale.data = (start[TRAJECTORY].amax[name].amax() / 127.5).reshape(1)
        module.quantization_status = ct.QuantizationStatus.FROZEN
    theirs = copy.deepcopy(model)
    compressor = ModelCompressor.from_pretrained_model(model.module)
    compressor.compress_model(model.module)
    model.module.save_pretrained(folder)
    compressor.update_config(folder)
    return theirs, quantized


def test_it_computes_what_compressed_tensors_does(dit, tmp_path):
    theirs, quantized = compressed(dit, GROUPS, tmp_path / "saved")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    ours = take(dit, tmp_path / "saved")
    schemes = {name: scheme.name for name, scheme in ours[PLAN].schemes.items() if scheme.name != "float"}
    expected = {n: next(name for name, (target, *_) in GROUPS.items() if re.match(target[3:], n)) for n in quantized}
    assert schemes == expected
    assert set(expected.values()) == GROUPS.keys()
    seen = {}
    for name in quantized:
        theirs.module.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: (args[0], y)})
        )
    model, call = ours[MODEL].open(), dit[TRAJECTORY].call(STEP)
    clock = simulate(model.module, ours[QUANTIZED])
    with torch.no_grad(), clock.at(0):
        whole = denoise_with(theirs.module, theirs)(call)
        for name, data in ours[QUANTIZED].layers.items():
            layer, own, (x, y) = theirs.module.get_submodule(name), model.module.get_submodule(name), seen[name]
            args = layer.quantization_scheme.weights
            rounded = fake_quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, args)
            scale = affine.product_scale(data.scale_NG, data.group_NG)
            assert data.scheme.weight.dequantize(data.codes, scale).equal(rounded), name
            # one code of a token, its largest, may be rounded otherwise
            assert rel_l2(own(x), y) < (2e-3 if schemes[name] == "w8a8_token" else 2e-6), name
        simulated = denoise_with(model.module, model)(call)
    assert any(data.codes.amin() == -128 for data in ours[QUANTIZED].layers.values())  # scales are max|w| / 127.5
    rounding = rel_l2(whole, dit[TRAJECTORY].outputs[STEP])
    assert rel_l2(simulated, whole) < 0.2 * rounding
    graph = run_pass(ExportQdq(), ours | {TARGET: load_target("onnxruntime-cpu")}, tmp_path / "qdq")[GRAPH]
    assert rel_l2(graph_denoise(graph, OnnxRuntime())(call), simulated) < 0.1 * rounding


@pytest.fixture(scope="module")
def saved(dit, tmp_path_factory) -> Path:
    """All linear layers in 8 bits, with inputs by token."""
    folder = tmp_path_factory.mktemp("compressed") / "saved"
    compressed(dit, {"w8a8": ("Linear", CHANNEL8, TOKEN)}, folder)
    return folder


def setting(part: str, **facts) -> Callable:
    """The group of a layer by its own name, which is nearer than its class."""

    def change(config, tensors, name):
        group = copy.deepcopy(config["config_groups"]["group_0"])
        group["targets"] = [name]
        group[part] = facts if group[part] is None else group[part] | facts
        config["config_groups"][name] = group

    return change


def tensor(part: str, value: torch.Tensor) -> Callable:
    return lambda _, tensors, name: tensors.update({f"{name}.{part}": value})


def in_blocks(config, tensors, name):
    setting("weights", num_bits=4, strategy="group")(config, tensors, name)
    config["config_groups"][name]["input_activations"] = None
    scale = tensors[f"{name}.weight_scale"]
    tensors[f"{name}.weight_scale"] = scale.expand(-1, 4).contiguous()
    tensors[f"{name}.weight"].clamp_(-8, 7)


def unscaled(config, tensors, name):
    del tensors[f"{name}.weight_scale"]
    tensors[f"{name}.weight_packed"] = torch.zeros(1, 1, dtype=torch.int32)


def nothing(config, tensors, name):
    setting("weights")(config, tensors, name)
    config["config_groups"][name]["weights"] = None


def ignored(config, tensors, name):
    config["ignore"] = [*config.get("ignore", []), name]


def in_float(config, tensors, name):
    """The weight is in float, though its group rounds it."""
    for key in [key for key in tensors if key.startswith(f"{name}.weight_")]:
        del tensors[key]
    tensors[f"{name}.weight"] = torch.ones(tensors[f"{name}.weight"].shape)


def rounded_input_alone(config, tensors, name):
    nothing(config, tensors, name)
    in_float(config, tensors, name)


def test_groups_scales_and_ignore_have_to_agree(saved, dit, tmp_path):
    cases = {
        "or `ignore` names it": ignored,
        "config_groups rounds its weight, and the file has no weight_scale of it": in_float,
        "config_groups rounds its input, but not its weight": rounded_input_alone,
        "scales are found when it is called": setting("weights", dynamic=True),
    }
    config, tensors = json.loads((saved / "config.json").read_text()), load_file(saved / WEIGHTS)
    layers = [n.name for n in dit[MODEL].layers() if n.op == "linear" and n.shape == (64, 64)]
    config["quantization_config"]["sparsity_config"] = {"format": "sparse-24-bitmask"}
    expected = {"sparsity_config": "'sparse-24-bitmask' leaves out weights"}
    for name, (why, change) in zip(layers, cases.items(), strict=False):
        change(config["quantization_config"], tensors, name)
        expected[name] = why
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(RecipeError) as raised:
        take(dit, tmp_path)
    said = raised.value.problems
    assert len(expected) == 1 + len(cases)
    assert [(n, why) for n, why in expected.items() if not any(f"{n}: " in each and why in each for each in said)] == []


REFUSED = {
    "weights in float8 by channel: only integers of 4 or 8 bits": setting("weights", type="float"),
    "weights in int6 by channel: only integers": setting("weights", num_bits=6),
    "weights in int8 by block: only with scales by": setting("weights", strategy="block"),
    "weights in int8 by channel with zero points": setting("weights", symmetric=False),
    "weights with zero points": tensor("weight_zero_point", torch.ones(1, dtype=torch.int8)),
    "weight_g_idx: with actorder the features": tensor("weight_g_idx", torch.zeros(64, dtype=torch.int32)),
    "blocks of 16 of 64 in features: groups here have 32, 64 or 128": in_blocks,
    "8-bit weights with a 4-bit input": setting("input_activations", num_bits=4),
    "inputs of 6 bits": setting("input_activations", num_bits=6),
    "inputs in float8 by token": setting("input_activations", type="float"),
    "inputs in int8 by token with zero points": setting("input_activations", symmetric=False),
    "dynamic inputs in int8 by tensor": setting("input_activations", strategy="tensor"),
    "static input scales None": setting("input_activations", strategy="tensor", dynamic=False),
    "outputs in int8 by tensor": setting("output_activations", num_bits=8, strategy="tensor"),
    "no group of config_groups rounds its weight": nothing,
    "no weight_scale": unscaled,
    r"scales \(3, 1\) for a weight": tensor("weight_scale", torch.ones(3, 1)),
    "not above zero": tensor("weight_scale", torch.zeros(1)),
}


def packed(value: torch.Tensor) -> Callable:
    def change(_, tensors, name):
        del tensors[f"{name}.weight"]
        tensors[f"{name}.weight_packed"] = value

    return change


def static_scale(value: torch.Tensor) -> Callable:
    def change(config, tensors, name):
        setting("input_activations", strategy="tensor", dynamic=False)(config, tensors, name)
        tensors[f"{name}.input_scale"] = value

    return change


def plain(dtype: torch.dtype) -> Callable:
    def change(_, tensors, name):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(dtype)

    return change


NO_NUMBERS = {
    "codes in uint8: only int8": plain(torch.uint8),
    "codes in bool: only int8": plain(torch.bool),
    "codes in float8_e4m3fn: only int8": plain(torch.float8_e4m3fn),
    "codes in complex64: only int8": plain(torch.complex64),
    "scales with NaN or Inf": tensor("weight_scale", torch.full((64, 1), torch.nan)),
    "scales that are not above zero": tensor("weight_scale", torch.full((64, 1), -1.0)),
    "scales of 1e.38: 128 times it is more than float32 holds": tensor("weight_scale", torch.full((64, 1), 1e38)),
    "scales in int8: only float16": tensor("weight_scale", torch.ones(64, 1, dtype=torch.int8)),
    r"zero points \(3,\) of its weights": tensor("weight_zero_point", torch.zeros(3, dtype=torch.int8)),
    r"weight_shape \[64, 32\] for a weight": tensor("weight_shape", torch.tensor([64, 32])),
    "there twice, as weight and as weight_packed": tensor("weight_packed", torch.zeros(64, 16, dtype=torch.int32)),
    r"weight_packed \(64, 16\) in int64 .*: 8-bit codes take \(64, 16\) in int32": packed(
        torch.zeros(64, 16, dtype=torch.int64)
    ),
    r"weight_packed \(64, 3\) in int32": packed(torch.zeros(64, 3, dtype=torch.int32)),
    "weight_global_scale: intaglio does not use": tensor("weight_global_scale", torch.ones(1)),
    "output_scale: intaglio does not use": tensor("output_scale", torch.ones(1)),
    "an input scale with NaN or Inf": static_scale(torch.tensor([torch.inf])),
    "an input scale of 0: it has to be above zero": static_scale(torch.zeros(1)),
    "an input scale of 3e.38: 127 times it is more than float32 holds": static_scale(torch.tensor([3e38])),
    r"static input scales \(2,\): only one": static_scale(torch.ones(2)),
    "codes from -1?[0-9]+ to 1?[0-9]+, which are not of 4 bits": setting("weights", num_bits=4),
    r"but blocks of 32": setting("weights", strategy="group", group_size=32),
}


def test_what_is_no_number_or_not_of_the_layers_type_and_shape_is_refused_by_name(saved, dit, tmp_path):
    layers = [n.name for n in dit[MODEL].layers() if n.op == "linear" and n.shape == (64, 64)]
    for first in range(0, len(NO_NUMBERS), len(layers)):
        config, tensors = json.loads((saved / "config.json").read_text()), load_file(saved / WEIGHTS)
        expected = dict(zip(layers, list(NO_NUMBERS)[first:], strict=False))
        for name, why in expected.items():
            NO_NUMBERS[why](config["quantization_config"], tensors, name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(RecipeError) as raised:
            take(dit, tmp_path)
        patterns = [f"{name}: .*{why}" for name, why in expected.items()]
        said = raised.value.problems
        assert len(said) == len(expected), said
        assert [each for each in patterns if not any(re.search(each, one) for one in said)] == [], said


CONFIGS = {
    "takes too long to be matched": {"config_groups": {"a": {"targets": ["re:(?:[a-z_0-9.]|[a-z_][a-z_])+(?:X|Y)"]}}},
    "repeats more than is read": {"config_groups": {"a": {"targets": ["re:((a{99}){99}){99}"]}}},
    "is no pattern: missing [)]": {"config_groups": {"a": {"targets": ["re:("]}}},
    "weights.num_bits: Input should be a valid int": {
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": "8"}}}
    },
    "config_groups: Input should be a valid dictionary": {"config_groups": []},
    "format: 'marlin-24' packs codes in another way": {"config_groups": {}, "format": "marlin-24"},
}


@pytest.mark.parametrize("why", CONFIGS)
def test_a_config_that_is_not_the_librarys_is_refused_in_bounded_time(why, saved, dit, tmp_path):
    shutil.copy(saved / WEIGHTS, tmp_path)
    written = {"quant_method": "compressed-tensors"} | CONFIGS[why]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": written}))
    started = time.process_time()
    with pytest.raises(RecipeError, match=why):
        take(dit, tmp_path)
    assert time.process_time() - started < 3


def test_a_tensor_in_two_files_is_refused_by_name(saved, dit, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    save_file({f"{LAYER}.weight_scale": torch.ones(64, 1)}, tmp_path / "saved/other.safetensors")
    with pytest.raises(RecipeError, match=rf"other\.safetensors: {LAYER}\.weight_scale is in another file"):
        take(dit, tmp_path / "saved")


def test_pipes_and_headers_that_lie_are_refused_before_they_are_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "saved/config.json").unlink()
    os.mkfifo(tmp_path / "saved/config.json")
    with pytest.raises(ValidationError, match=r"config\.json: is not a regular file"):
        ImportWeights.model_validate({"path": "saved"}, context={"base": tmp_path})
    header = json.dumps({"a": {"dtype": "I8", "shape": [1 << 35], "data_offsets": [0, 1 << 35]}}).encode()
    with (tmp_path / "sparse.safetensors").open("wb") as sparse:
        sparse.write(len(header).to_bytes(8, "little") + header)
        sparse.truncate(8 + len(header) + (1 << 35))
    with pytest.raises(ValidationError, match=r"sparse.safetensors: is a sparse file: \d+ of its 34359738\d+ bytes"):
        ImportWeights.model_validate({"path": "sparse.safetensors"}, context={"base": tmp_path})
    (tmp_path / "a.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValidationError, match="its header would have 1099511627776 bytes"):
        ImportWeights.model_validate({"path": "a.safetensors"}, context={"base": tmp_path})


def test_what_has_no_exact_form_is_refused_all_at_once(saved, dit, tmp_path):
    config, tensors = json.loads((saved / "config.json").read_text()), load_file(saved / WEIGHTS)
    quantized = config["quantization_config"]
    layers = [n.name for n in dit[MODEL].layers() if n.op == "linear" and n.k == 64]
    layers += [n.name for n in dit[MODEL].layers() if n.op == "linear" and n.k != 64]
    names = list(REFUSED)
    expected = list(zip(sorted(names, key=lambda why: "blocks" not in why), layers, strict=False))
    assert len(expected) == len(REFUSED)
    quantized["transform_config"] = {"config_groups": {"u": {}}}
    quantized["kv_cache_scheme"] = {"num_bits": 8}
    for why, name in expected:
        REFUSED[why](quantized, tensors, name)
    tensors["pos_embed.proj.weight_scale"] = torch.ones(64, 1)
    tensors["proj_out_9.weight_packed"] = torch.zeros(1, 1, dtype=torch.int32)
    tensors[f"{layers[-1]}.bias"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    expected += [
        ("its rotations are not carried over", "transform_config"),
        ("attention stays in float", "kv_cache_scheme"),
        ("the weight of a conv: only those of linear layers", "pos_embed.proj"),
        ("no layer of the model that can be quantized", "proj_out_9"),
        ("different from the recipe's model", f"{layers[-1]}.bias"),
    ]
    with pytest.raises(RecipeError, match=r"\d+ problems:") as raised:
        take(dit, tmp_path)
    said = raised.value.problems
    missing = [(n, why) for why, n in expected if not any(re.search(f"{re.escape(n)}.*{why}", each) for each in said)]
    assert missing == []
    assert len(said) == len(expected)
