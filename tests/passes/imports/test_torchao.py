"""Weights that torchao quantized keep their codes and scales; those without an exact form are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from harness import Artifacts
from quantized_files import LAYER, WEIGHTS, take
from safetensors.torch import save_file

from intaglio.pipeline.artifacts.keys import MODEL, PLAN, QUANTIZED
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.simulation.model import simulate


def test_a_token_is_rounded_in_the_steps_of_its_largest_magnitude(dit, tmp_path):
    """As the scale max|x| / 127.5 has it; only at the largest itself, 127.5 codes, may either side be taken."""
    folder = torchao(dit, {LAYER: int8()}, tmp_path)
    ours = take(dit, folder)
    module = ours[MODEL].open().module
    clock = simulate(module, ours[QUANTIZED])
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(1))
    with clock.at(0):
        q, _, amax, _ = module.get_submodule(LAYER).input_codes(x)
    largest = x.abs().amax(-1, keepdim=True)
    expected = (x.double() / (largest.double() / 127.5)).round().clamp(-128, 127)
    off = q != expected
    assert not (off & (x.abs() != largest)).any()
    assert (q - expected).abs().max() <= 1
    torch.testing.assert_close(amax, largest * (127 / 127.5))


DTYPE = {"_type": "torch.dtype", "_data": "float32"}


def int8(granularity="PerRow", mapping="SYMMETRIC", reduce_range=False, dynamic=True, **parts):
    """As torchao 0.18 writes an Int8Tensor: facts, and the parts of a weight (64, 64)."""
    kwargs = {
        "_type": "QuantizeTensorToInt8Kwargs",
        "_data": {
            "granularity": {"_type": granularity, "_data": {"dim": -1}},
            "mapping_type": {"_type": "MappingType", "_data": mapping},
            "reduce_range": reduce_range,
        },
    }
    data = {"act_quant_kwargs": kwargs if dynamic else None, "reduce_range": reduce_range, "block_size": [1, 64]}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "qdata": torch.randint(-128, 128, (64, 64), generator=generator).to(torch.int8),
        "scale": torch.rand(64, 1, generator=generator) + 0.1,
        "zero_point": torch.zeros(64, 1, dtype=torch.int8),
    }
    return {"_type": "Int8Tensor", "_data": data | {"dtype": DTYPE}}, tensors | parts


def intx(bits=4, blocks=2, activation=None, kind="IntxUnpackedToInt8Tensor", **parts):
    """As it writes an IntxUnpackedToInt8Tensor."""
    data = {
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
        "block_size": [1, 64 // blocks],
        "dtype": DTYPE,
        "activation_quantization": activation,
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "qdata": torch.randint(-8, 8, (64, 64), generator=generator).to(torch.int8),
        "scale": torch.rand(64, blocks, generator=generator) + 0.1,
        "zero_point": torch.zeros(64, blocks, dtype=torch.int8),
    }
    return {"_type": kind, "_data": data}, tensors | parts


def torchao(start: Artifacts, weights, folder: Path) -> Path:
    """The model with these weights in the place of its own, as torchao's `flatten_tensor_state_dict` names parts."""
    tensors, metadata, names = {}, {}, []
    for name, value in start[MODEL].open().module.state_dict().items():
        names.append(name)
        module = name.removesuffix(".weight")
        if module in weights and module != name:
            facts, parts = weights[module]
            metadata[name] = json.dumps(facts | {"_tensor_data_names": [*parts]})
            tensors |= {f"{module}._weight_{part}": part_value for part, part_value in parts.items()}
        else:
            metadata[name] = json.dumps({"_type": "Tensor"})
            tensors[name] = value.contiguous()
    folder = folder / "saved"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={**metadata, "tensor_names": json.dumps(names)})
    return folder


def test_weights_of_torchao_keep_their_codes_and_scales(dit, tmp_path):
    other = LAYER.replace("to_q", "to_k")
    static = int8("PerTensor", act_quant_scale=torch.tensor([[0.02]]))
    beside = LAYER.replace("to_q", "to_out.0")
    weights = {LAYER: int8(), beside: int8(dynamic=False), other: intx()}
    weights |= {LAYER.replace("blocks.0", "blocks.1"): intx(bits=8), LAYER.replace("to_q", "to_v"): static}
    ours = take(dit, torchao(dit, weights, tmp_path) / WEIGHTS)
    schemes = ("w8a8_token", "w8a16", "w4a16", "w8ga16", "w8a8_step")
    for (name, (_, parts)), scheme in zip(weights.items(), schemes, strict=True):
        data = ours[QUANTIZED].layers[name]
        assert data.scheme.name == ours[PLAN].schemes[name].name == scheme
        assert data.codes.equal(parts["qdata"])
        assert data.scale_NG.equal(parts["scale"])
    torch.testing.assert_close(data.tables.amax_T, torch.tensor([0.02 * 127]))
    assert ours[QUANTIZED].layers.keys() == weights.keys()


def test_the_library_itself_writes_such_files(dit, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    def save(config, layers):
        module = dit[MODEL].open().module
        quantization.quantize_(module, config, filter_fn=lambda _, name: name in layers)
        state = {n: v.data if type(v) is torch.nn.Parameter else v for n, v in module.state_dict().items()}
        tensors, metadata = flatten_tensor_state_dict(state)
        save_file(tensors, tmp_path / WEIGHTS, metadata=metadata)
        return module

    four = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    module = save(four, {LAYER})
    data = take(dit, tmp_path)[QUANTIZED].layers[LAYER]
    weight = module.get_submodule(LAYER).weight.dequantize()
    assert data.scheme.weight.dequantize(data.codes, data.scale_NG).equal(weight)
    module = save(quantization.Int8DynamicActivationInt8WeightConfig(), {LAYER})
    data = take(dit, tmp_path)[QUANTIZED].layers[LAYER]
    assert data.codes.equal(module.get_submodule(LAYER).weight.qdata)


REFUSED_OF_TORCHAO = {
    "inputs mapped ASYMMETRIC": int8(mapping="ASYMMETRIC"),
    "inputs of 7 bits": int8(reduce_range=True),
    "dynamic inputs PerTensor": int8("PerTensor"),
    "static inputs PerRow": int8(act_quant_scale=torch.ones(1, 1)),
    "act_pre_scale": int8(act_pre_scale=torch.ones(64)),
    "weights with zero points": intx(zero_point=torch.ones(64, 2, dtype=torch.int8)),
    "inputs by token with zero points": intx(activation="INT8_ASYM_PER_TOKEN"),
    "6-bit weights with a float input": intx(bits=6),
    "blocks of 16 of 64 in features": intx(blocks=4),
    "a Int4Tensor: only Int8Tensor and": intx(kind="Int4Tensor"),
    "codes from -128 to 127, which are not of 4 bits": intx(qdata=int8()[1]["qdata"]),
    r"but blocks of 16": intx(blocks=4, scale=torch.ones(64, 2), zero_point=torch.zeros(1)),
    "facts that torchao does not write": (intx()[0] | {"_data": {"target_dtype": 4}}, intx()[1]),
    r"codes \(64, 32\) for a weight \(64, 64\)": intx(qdata=torch.zeros(64, 32, dtype=torch.int8)),
}


def test_what_torchao_has_and_is_not_carried_over(dit, tmp_path):
    layers = [n.name for n in dit[MODEL].layers() if n.op == "linear" and n.shape == (64, 64)]
    assert len(layers) >= 8
    names = list(REFUSED_OF_TORCHAO)
    for start in range(0, len(names), len(layers)):
        expected = dict(zip(layers, names[start:], strict=False))
        weights = {name: REFUSED_OF_TORCHAO[why] for name, why in expected.items()}
        with pytest.raises(RecipeError, match=f"{len(expected)} problems:") as raised:
            take(dit, torchao(dit, weights, tmp_path))
        said = raised.value.problems
        found = [any(re.search(f"{re.escape(n)}: .*{why}", each) for each in said) for n, why in expected.items()]
        assert all(found), said
