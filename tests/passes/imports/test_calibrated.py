"""The output of the pass `modelopt`, compared with Model Optimizer itself, calibrated on the same calls."""

import contextlib
import io
import sys
from functools import partial

import pytest
import torch
from harness import Artifacts, run_pass
from pydantic import ValidationError
from quantizing import rel_l2

from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.passes.imports.calibrated import CONFIGS, QuantizeWithModelopt
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.errors import MissingExtra, RecipeError
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.numerics.rounding import product_scale
from intaglio.pipeline.simulation.model import simulate

INTEGERS = [name for name in CONFIGS if name.startswith("INT")]
SCHEMES = dict(zip(INTEGERS, ("w8a8_step", "w8a8_step", "w8a16", "w4a16", "w4a16"), strict=True))
STEP = 1


def compiled(start: Artifacts, folder, **options) -> Artifacts:
    return start | run_pass(QuantizeWithModelopt(**options), start, folder / "modelopt")


def theirs(start: Artifacts, name: str):
    """The denoiser as Model Optimizer's own user gets it: with its configuration, in blocks of 32."""
    import modelopt.torch.quantization as mtq

    model, trajectory = start[MODEL].open(), start[TRAJECTORY]

    def calibrate(module):
        for step in range(len(trajectory.timesteps)):
            denoise_with(module, model)(trajectory.call(step))

    shipped = getattr(mtq, name)
    rows = [
        row | {"cfg": {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}} if "4" in str(row.get("cfg")) else row
        for row in shipped["quant_cfg"]
    ]
    others = [{"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False}]
    others += [{"quantizer_name": "*", "parent_class": "nn.Conv2d", "enable": False}] * name.startswith("INT4")
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model.module, shipped | {"quant_cfg": rows + others}, calibrate)
    return model


@pytest.mark.parametrize("name", INTEGERS)
def test_codes_are_those_of_model_optimizer_and_the_graph_computes_what_it_does(name, dit, tmp_path):
    ours, model = compiled(dit, tmp_path, config=name, block=32), theirs(dit, name)
    for module in model.module.modules():
        if isinstance(module, torch.nn.Embedding):  # as graphs keep tables
            module.weight.data = module.weight.half().float()
    layers = ours[QUANTIZED].layers
    enabled = {n.removesuffix(".weight_quantizer") for n, q in model.module.named_modules() if _rounds_weight(n, q)}
    assert layers.keys() == enabled
    assert {ours[PLAN].schemes[layer].name for layer in layers} == {SCHEMES[name]}
    seen, call = {}, dit[TRAJECTORY].call(STEP)
    for layer in layers:
        model.module.get_submodule(layer).register_forward_hook(partial(_note, seen, layer))
    with torch.no_grad():
        whole = denoise_with(model.module, model)(call)
    simulated = ours[MODEL].open()
    clock = simulate(simulated.module, ours[QUANTIZED])
    for layer, data in layers.items():
        own = model.module.get_submodule(layer)
        scale = product_scale(data.scale_NG, data.group_NG)
        rounded = own.weight_quantizer(model.module.state_dict()[f"{layer}.weight"]).flatten(1)
        scale = scale.repeat_interleave(rounded.shape[1] // scale.shape[1], 1)
        assert (rounded / scale).round().equal(data.codes.float()), layer
        x, y = seen[layer]
        with torch.no_grad(), clock.at(0):
            assert rel_l2(simulated.module.get_submodule(layer)(x), y) < 2e-3, layer
    rounding = rel_l2(whole, dit[TRAJECTORY].outputs[STEP])
    graph = run_pass(ExportQdq(), ours | {TARGET: load_target("onnxruntime-cpu")}, tmp_path / "qdq")[GRAPH]
    assert rounding > 1e-4
    assert rel_l2(graph_denoise(graph, OnnxRuntime())(call), whole) < 0.5 * rounding


def _rounds_weight(name, module) -> bool:
    return name.endswith("weight_quantizer") and module.is_enabled


def _note(seen, name, module, args, y):
    seen[name] = args[0], y


def test_convolutions_of_a_unet_are_rounded_too_and_stay_in_float_in_blocks(unet, tmp_path, caplog):
    caplog.set_level("INFO")
    eight = compiled(unet, tmp_path)
    convolutions = {layer.name for layer in eight[PLAN].layers if layer.op == "conv"}
    assert convolutions
    assert convolutions <= eight[QUANTIZED].layers.keys()
    four = compiled(unet, tmp_path, config="INT4_AWQ_CFG", block=32)
    assert not convolutions & four[QUANTIZED].layers.keys()
    assert "only of a linear layer, along its input" in caplog.text


def test_a_layer_that_blocks_do_not_divide_stays_in_float_and_the_log_says_so(dit, tmp_path, caplog):
    caplog.set_level("INFO")
    ours = compiled(dit, tmp_path, config="INT4_AWQ_CFG")
    assert {layer.k % 128 for layer in ours[PLAN].layers if layer.name in ours[QUANTIZED].layers} == {0}
    assert "blocks of 128 weights do not divide the 64 input features" in caplog.text


def test_ignored_layers_stay_in_float_and_a_pattern_that_fits_none_is_an_error(dit, tmp_path):
    ours = compiled(dit, tmp_path, ignore=("*attn1.to_q*",))
    schemes = ours[PLAN].schemes
    assert schemes["transformer_blocks.0.attn1.to_q"].name == "float"
    assert schemes["transformer_blocks.0.attn1.to_k"].name == "w8a8_step"
    with pytest.raises(RecipeError, match=r"ignore: 'nothing\*' fits none of the \d+ quantizers"):
        compiled(dit, tmp_path, ignore=("nothing*",))


@pytest.mark.parametrize(
    "name", ["NVFP4_SVDQUANT_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "MXINT8_DEFAULT_CFG", "W4A8_AWQ_BETA_CFG", "x\ny"]
)
def test_other_configurations_are_refused_in_one_line_when_the_recipe_is_read(name):
    with pytest.raises(
        ValidationError, match=r"cannot be run here: only INT8_DEFAULT_CFG, .*import-modelopt"
    ) as raised:
        QuantizeWithModelopt(config=name)
    assert "\n" not in raised.value.errors()[0]["msg"]


def test_without_model_optimizer_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(MissingExtra, match=r"the step modelopt needs the extra 'modelopt'"):
        QuantizeWithModelopt().check(load_target("onnxruntime-cpu"))


def test_two_runs_give_the_same_integers(dit, tmp_path):
    first, second = (compiled(dit, tmp_path, config="INT4_AWQ_CFG", block=32)[QUANTIZED].layers for _ in "ab")
    assert first.keys() == second.keys()
    for name, data in first.items():
        assert data.codes.equal(second[name].codes)
        assert data.scale_NG.equal(second[name].scale_NG)
