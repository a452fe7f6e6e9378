"""Denoisers that NVIDIA's Model Optimizer quantized, against what it computes itself, as simulated and as exported."""

import copy
import hashlib
import os
import re
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import Artifacts, run_pass
from modelopt_states import changed, linear, quantize, take
from pydantic import ValidationError
from quantizing import rel_l2

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.passes.imports.modelopt import ImportModelopt, read_modelopt
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.schemes import IntInput
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.numerics import rounding as affine
from intaglio.pipeline.simulation.model import simulate

CHANNEL, TENSOR = {"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}
TOKEN = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
BLOCKS = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
STEP = 2
PARTS = ("weight", "input")
LAYER = "transformer_blocks.0.attn1.to_q"


def shipped(name):
    """A configuration of Model Optimizer, without the inputs of normalizations."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, name))
    config["quant_cfg"].append({"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False})
    return config


CONFIGS = {
    "INT8 default": (lambda: shipped("INT8_DEFAULT_CFG"), "w8a8_step"),
    "INT8 SmoothQuant": (lambda: shipped("INT8_SMOOTHQUANT_CFG"), "w8a8_step"),
    "INT8, inputs by token": (lambda: linear(CHANNEL, TOKEN), "w8a8_token"),
    "INT8 tensors": (lambda: linear(TENSOR, TENSOR), "w8a8_step"),
    "INT8 weights": (lambda: linear(CHANNEL), "w8a16"),
    "INT4 blocks": (lambda: linear(BLOCKS), "w4a16"),
    "INT4 AWQ": (lambda: linear(BLOCKS, algorithm="awq_lite"), "w4a16"),
    "INT4 channels, INT8 inputs": (lambda: linear({"num_bits": 4, "axis": 0}, TENSOR), "w4a8_step"),
}


def check(start: Artifacts, config, folder: Path) -> Artifacts:
    """Codes of weights to the bit; layers, the whole simulation and the graph against Model Optimizer's own output."""
    theirs = quantize(start, config, folder / "saved.pt")
    ours = take(start, folder / "saved.pt")
    for module in theirs.module.modules():
        if isinstance(module, torch.nn.Embedding):  # as graphs keep tables
            module.weight.data = module.weight.half().float()
    seen = {}

    def note(_, args, y, name):
        seen[name] = args[0], y

    for name in ours[QUANTIZED].layers:
        theirs.module.get_submodule(name).register_forward_hook(partial(note, name=name))
    model, call = ours[MODEL].open(), start[TRAJECTORY].call(STEP)
    clock = simulate(model.module, ours[QUANTIZED])
    graph = run_pass(ExportQdq(), ours | {TARGET: load_target("onnxruntime-cpu")}, folder / "qdq")[GRAPH]
    with torch.no_grad(), clock.at(0):
        whole = denoise_with(theirs.module, theirs)(call)
        for name, data in ours[QUANTIZED].layers.items():
            layer = theirs.module.get_submodule(name)
            rounded = layer.weight_quantizer(theirs.module.state_dict()[f"{name}.weight"]).flatten(1)
            scale = affine.product_scale(data.scale_NG, data.group_NG)
            scale = scale.repeat_interleave(rounded.shape[1] // scale.shape[1], 1)
            assert (rounded / scale).round().equal(data.codes.float()), name
            torch.testing.assert_close(data.codes * scale, rounded, rtol=3e-7, atol=0)  # three roundings in float32
            x, y = seen[name]
            own = model.module.get_submodule(name)
            other = 0
            if isinstance(data.scheme.input, IntInput):
                q, _, amax, _ = own.input_codes(x)
                apart = (layer.input_quantizer(x) / amax * affine.INPUT_HIGH[data.scheme.input.bits] - q).abs().round()
                other = int(apart.count_nonzero())
                assert apart.max() <= 1, name
                assert other <= max(1, 1e-4 * q.numel()), name  # ties, which x / (amax / 127) can round otherwise
            assert rel_l2(own(x), y) < (2e-6 if other == 0 else 2e-3), name
        simulated = denoise_with(model.module, model)(call)
    rounding = rel_l2(whole, start[TRAJECTORY].outputs[STEP])
    # 4e-7 of each other, where no such tie moves what comes after it
    assert rel_l2(simulated, whole) < 0.5 * rounding
    assert rel_l2(graph_denoise(graph, OnnxRuntime())(call), whole) < 0.5 * rounding
    return ours


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_model_optimizer_does(name, dit, tmp_path):
    config, scheme = CONFIGS[name]
    plan = check(dit, config(), tmp_path)[PLAN]
    linear = {layer.name for layer in plan.layers if layer.op == "linear"}
    assert {plan.schemes[name].name for name in linear} == {scheme}
    smooth = name in ("INT8 SmoothQuant", "INT4 AWQ")
    assert plan.balances.keys() == (linear if smooth else set())


@pytest.fixture(scope="module")
def saved(dit, tmp_path_factory):
    """The content of a file of `mto.save`, in INT8 with one scale for each input."""
    file = tmp_path_factory.mktemp("modelopt") / "saved.pt"
    quantize(dit, linear(CHANNEL, TENSOR), file)
    return torch.load(file, weights_only=True)


def setting(part: str, **facts) -> Callable:
    return lambda quantizers, _, name: quantizers[f"{name}.{part}_quantizer"].update(facts)


def in_blocks(size: int, **more) -> Callable:
    def change(quantizers, tensors, name):
        facts = {
            "_num_bits": 4,
            "_block_sizes": {-1: size, "type": "static", **more},
            "_axis": (0,),
            "_disabled": False,
        }
        setting("weight", **facts)(quantizers, tensors, name)
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight_quantizer._amax"] = weight.reshape(-1, size).abs().amax(1, keepdim=True)

    return change


def buffer(part: str, value: torch.Tensor) -> Callable:
    return lambda _, tensors, name: tensors.update({f"{name}.{part}": value})


REFUSED = {
    "input in 8 bits beside a floating-point weight": setting("weight", _num_bits=(4, 3)),
    "input in E2M1": setting("input", _num_bits=(2, 1)),
    "weight in 6 bits": setting("weight", _num_bits=6),
    "several quantizers in a row for its weight": setting("weight", is_sequential_quantizer=True),
    "a rounded input in front of a float weight": setting("weight", _disabled=True),
    "8-bit weights with a 4-bit input": setting("input", _num_bits=4),
    "integers for the groups": in_blocks(32),
    "weight blocks with .*scale_bits": in_blocks(32, scale_bits=(4, 3)),
    "blocks of 48 weights do not divide": setting("weight", _num_bits=4, _block_sizes={-1: 48}),
    "weight scales .* along axis 1": setting("weight", _axis=1),
    "static input scales along axis -1": setting("input", _axis=-1),
    "dynamic input scales along axis None": setting("input", _dynamic=True),
    "an input with narrow_range": setting("input", _narrow_range=True),
    "more than round: fake_quant is False": setting("weight", _fake_quant=False),
    "never calibrated": buffer("input_quantizer._amax", torch.tensor(torch.nan)),
    "a pre_quant_scale .* in front of a linear": buffer("input_quantizer._pre_quant_scale", torch.ones(2)),
}
IMPOSSIBLE = {
    "weight scales up to 1e.30 for weights up to .*: all of them are rounded to 0": buffer(
        "weight_quantizer._amax", torch.full((64, 1), 1e30)
    ),
    "one code stands for 7.87e.27, so all of it is rounded to 0": buffer("input_quantizer._amax", torch.tensor(1e30)),
    "its channel scales 3e.38: the product is more than float32": buffer(
        "input_quantizer._pre_quant_scale", torch.full((64,), 3e38)
    ),
    "_enable_pre_quant_scale is 'no': True or False": setting("input", _enable_pre_quant_scale="no"),
}


def test_ranges_that_leave_nothing_of_a_layer_are_refused_by_name(saved, dit, tmp_path):
    layers = [n.name for n in dit[MODEL].layers() if n.op == "linear" and n.shape == (64, 64)]
    expected = list(zip(layers, IMPOSSIBLE, strict=False))
    every = [(IMPOSSIBLE[why], name) for name, why in expected]
    with pytest.raises(RecipeError, match=r"\d problems:") as raised:
        take(dit, changed(saved, lambda *parts: [one(*parts, name) for one, name in every], tmp_path / "saved.pt"))
    said = raised.value.problems
    assert len(said) == len(IMPOSSIBLE), said
    assert [n for n, why in expected if not any(re.search(f"saved.pt: {n}: .*{why}", each) for each in said)] == []


LEFT_OVER = {
    "output_quantizer: neither weight nor input": setting("output", _disabled=False),
    "input_quantizer: its rotation is not carried over": setting("input", _rotate=True),
    "weight_quantizer: _svdquant_lora_c: intaglio does not use it": buffer(
        "weight_quantizer._svdquant_lora_c", torch.ones(1)
    ),
    "bias: different from the recipe's model": lambda _, tensors, name: tensors[f"{name}.bias"].add_(1),
}


def test_what_has_no_exact_form_is_refused_all_at_once(saved, dit, tmp_path):
    layers = [layer.name for layer in dit[MODEL].layers() if layer.op == "linear"]
    expected = [("pos_embed.proj", r"blocks {-1: 2} of a weight \(64, 3, 2, 2\)")]
    expected += [*zip(layers, REFUSED, strict=False), *zip(layers, LEFT_OVER, strict=False)]
    assert len(expected) == 1 + len(REFUSED) + len(LEFT_OVER)

    def change(quantizers, tensors):
        in_blocks(2)(quantizers, tensors, "pos_embed.proj")
        for name, why in expected[1:]:
            (REFUSED | LEFT_OVER)[why](quantizers, tensors, name)

    with pytest.raises(RecipeError, match=rf"{len(expected)} problems:") as raised:
        take(dit, changed(saved, change, tmp_path / "saved.pt"))
    said = raised.value.problems
    missing = [(n, why) for n, why in expected if not any(re.search(f"{re.escape(n)}.*{why}", each) for each in said)]
    assert missing == []


def fact(part: str, key: str, value: object) -> Callable:
    return lambda quantizers, _, name: quantizers[f"{name}.{part}_quantizer"].update({key: value})


def weight_of(dtype: torch.dtype) -> Callable:
    def change(_, tensors, name):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(dtype)

    return change


NO_NUMBERS = {
    "a weight with NaN or Inf": lambda _, tensors, name: tensors[f"{name}.weight"][0].fill_(torch.nan),
    "a weight in int8: only float16": weight_of(torch.int8),
    "a weight in bool": weight_of(torch.bool),
    "a weight in float8_e4m3fn": weight_of(torch.float8_e4m3fn),
    "a weight in complex64": weight_of(torch.complex64),
    r"the file has a weight \(2, 2\), but the model has one of \(\d+, \d+\)": buffer("weight", torch.ones(2, 2)),
    "weight scales with NaN or Inf": buffer("weight_quantizer._amax", torch.full((64, 1), torch.inf)),
    "weight scales below 0": buffer("weight_quantizer._amax", torch.full((64, 1), -1.0)),
    "weight scales of 0 for weights that are not 0": buffer("weight_quantizer._amax", torch.zeros(64, 1)),
    "weight scales in int32": buffer("weight_quantizer._amax", torch.ones(64, 1, dtype=torch.int32)),
    r"weight scales \(3, 1\) along axis 0": buffer("weight_quantizer._amax", torch.ones(3, 1)),
    "an input scale of 0: ": buffer("input_quantizer._amax", torch.tensor(0.0)),
    "an input scale of -1: ": buffer("input_quantizer._amax", torch.tensor(-1.0)),
    r"attributes that Model Optimizer does not write: _num_bits is '8'": fact("weight", "_num_bits", "8"),
    "does not write: _num_bits is None": fact("weight", "_num_bits", None),
    "weight in -1 bits": fact("weight", "_num_bits", -1),
    "does not write: _num_bits is 8.0": fact("input", "_num_bits", 8.0),
    "does not write: _axis is a Tensor": fact("weight", "_axis", torch.ones(2)),
    "blocks of 0 weights": fact("weight", "_block_sizes", {-1: 0}),
    "blocks of -4 weights": fact("weight", "_block_sizes", {-1: -4}),
    "blocks of '32' weights": fact("weight", "_block_sizes", {-1: "32"}),
    r"blocks {3: 32} of a weight": fact("weight", "_block_sizes", {3: 32}),
    "holds NaN or Inf": lambda _, tensors, name: tensors[f"{name}.bias"].fill_(torch.nan),
    r"\(3,\) where the recipe's model has": buffer("bias", torch.ones(3)),
    "in int64 where the recipe's model has float32": buffer("bias", torch.ones(64, dtype=torch.int64)),
}


def test_what_is_no_number_or_not_of_the_layers_type_and_shape_is_refused_by_name(saved, dit, tmp_path):
    layers = [n.name for n in dit[MODEL].layers() if n.op == "linear" and n.shape[0] == 64]
    for first in range(0, len(NO_NUMBERS), len(layers)):
        expected = dict(zip(layers, list(NO_NUMBERS)[first:], strict=False))

        def change(quantizers, tensors, expected=expected):
            for name, why in expected.items():
                NO_NUMBERS[why](quantizers, tensors, name)

        with pytest.raises(RecipeError, match=f"{len(expected)} problems:") as raised:
            take(dit, changed(saved, change, tmp_path / "saved.pt"))
        said = raised.value.problems
        missing = [
            why for n, why in expected.items() if not any(re.search(f"{n}[^:]*: .*{why}", each) for each in said)
        ]
        assert missing == [], said


def test_no_more_than_24_problems_are_listed(saved, dit, tmp_path):
    def change(quantizers, tensors):
        for number, name in enumerate(quantizers):
            quantizers[name] |= {"_num_bits": -number, "_disabled": False}
        for number, name in enumerate(name for name in tensors if name.endswith(".bias")):
            tensors[name] = torch.ones(1000 + number)

    with pytest.raises(RecipeError, match=r"and \d+ more problems") as raised:
        take(dit, changed(saved, change, tmp_path / "saved.pt"))
    assert len(raised.value.problems) == 25


def test_layers_in_float_are_named_with_the_reason(saved, dit, tmp_path, caplog):
    caplog.set_level("INFO")
    take(dit, changed(saved, lambda q, _: [setting(p, _disabled=True)(q, _, LAYER) for p in PARTS], tmp_path / "s.pt"))
    assert f"2 layers stay in float, its weight quantizer is off: pos_embed.proj, {LAYER}" in caplog.text


def repacked(content: dict, pickle: bytes, file: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with another pickle."""
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, held in entries.items():
            archive.writestr(name, pickle if name.endswith("data.pkl") else held)
    return file


PICKLES = {
    "more than 3[0-9]* operations": b"\x80\x02" + b"]" * 1_000_000 + b".",
    "nested more than 500 deep": b"\x80\x02}(" + b")" + b"\x85" * 200_000 + b"K\x01u.",
    "it names __builtin__ bytearray": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R.",
    "takes values that are not there": b"\x80\x020.",
    "it names posix system, which is neither": b"cposix\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("why", PICKLES)
def test_a_pickle_that_would_take_time_memory_or_more_is_not_loaded(why, tmp_path):
    file = repacked({"a": torch.ones(2)}, PICKLES[why], tmp_path / "saved.pt")
    started = time.process_time()
    with pytest.raises(RecipeError, match=f"saved.pt: cannot be read as tensors and plain values alone: .*{why}"):
        read_modelopt(file)
    assert time.process_time() - started < 2


def test_damaged_packed_and_foreign_files_are_refused_in_one_line(saved, tmp_path):
    file = tmp_path / "saved.pt"
    torch.save(saved, file)
    whole = file.read_bytes()
    middle = whole.index(saved["model_state_dict"][f"{LAYER}.weight"].numpy().tobytes())
    for content, why in {
        whole[:-100]: "no zip file of torch.save, or its end is missing",
        b"": "no zip file of torch.save",
        b"\0" * 1000: "no zip file of torch.save",
        whole[:middle] + b"x" + whole[middle + 1 :]: "is damaged: other bytes than were written",
    }.items():
        file.write_bytes(content)
        with pytest.raises(RecipeError, match=why) as raised:
            read_modelopt(file)
        assert "\n" not in str(raised.value)
    repacked({"a": torch.zeros(1000)}, b"\x80\x02N.", file, zipfile.ZIP_DEFLATED)
    with pytest.raises(RecipeError, match="its entries are compressed"):
        read_modelopt(file)


def test_a_pipe_a_folder_and_a_sparse_file_are_no_files_of_weights(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)
    for name, why in (
        ("fifo", "is not a regular file"),
        ("folder", "is a folder, not a file"),
        ("sparse", "is no zip file of torch.save"),
    ):
        with pytest.raises(ValidationError, match=f"{name}: .*{why}"):
            ImportModelopt.model_validate({"path": name}, context={"base": tmp_path})


def test_a_file_of_another_model(saved, dit, tmp_path):
    file = changed(saved, lambda _, tensors: tensors.pop("proj_out_2.bias"), tmp_path / "saved.pt")
    with pytest.raises(RecipeError, match=r"belongs to another model: it has no proj_out_2\.bias"):
        take(dit, file)


def test_layers_that_are_off_stay_in_float(saved, dit, tmp_path):
    def off(quantizers, _):
        for part in ("weight", "input"):
            quantizers[f"{LAYER}.{part}_quantizer"]["_disabled"] = True

    schemes = take(dit, changed(saved, off, tmp_path / "saved.pt"))[PLAN].schemes
    assert schemes[LAYER].name == "float"
    assert schemes[LAYER.replace("to_q", "to_k")].name == "w8a8_step"


def test_ignored_quantizers_are_left_out(saved, dit, tmp_path):
    def on(quantizers, _):
        quantizers["norm_out.input_quantizer"]["_disabled"] = False

    file = changed(saved, on, tmp_path / "saved.pt")
    with pytest.raises(RecipeError, match=r"norm_out.input_quantizer: neither .* in `ignore`"):
        take(dit, file)
    assert take(dit, file, ignore=("norm*.input_quantizer",))[QUANTIZED].layers.keys() >= {LAYER}
    with pytest.raises(RecipeError, match=r"ignore: 'norm_on' fits none of its 41 enabled quantizers"):
        take(dit, file, ignore=("norm_on", "norm_out*"))


def test_a_file_is_read_without_running_it(dit, tmp_path):
    file = tmp_path / "saved.pt"
    torch.save({"modelopt_state": Path("anything"), "model_state_dict": {}}, file)
    with pytest.raises(RecipeError, match="cannot be read as tensors and plain values alone"):
        take(dit, file)
    torch.save({"weight": torch.ones(1)}, file)
    with pytest.raises(RecipeError, match="holds no quantized model: write it with modelopt"):
        take(dit, file)


def test_the_file_is_beside_the_recipe_and_part_of_the_key(tmp_path):
    torch.save(1, tmp_path / "saved.pt")
    step = ImportModelopt.model_validate({"path": "saved.pt"}, context={"base": tmp_path})
    assert step.sha256 == hashlib.sha256((tmp_path / "saved.pt").read_bytes()).hexdigest()
    torch.save(2, tmp_path / "saved.pt")
    with pytest.raises(ValidationError, match=rf"its sha256 is .*, not {step.sha256}"):
        ImportModelopt.model_validate(step.model_dump(), context={"base": tmp_path})
    with pytest.raises(ValidationError, match=r"absent.pt: cannot be read: No such file"):
        ImportModelopt(path="absent.pt")
