"""GGUF files, written here as their documentation says, and one that the library gguf 0.19 wrote."""

import base64
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import originals
import pytest
import torch
from harness import Artifacts, run_pass
from pydantic import ValidationError
from quantizing import rel_l2

from intaglio.exporters.lint.lint import Lint
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.passes.imports.gguf_file import check_gguf, read_gguf_file
from intaglio.passes.imports.weights import ImportWeights, read_weights
from intaglio.pipeline.artifacts.keys import GRAPH, MODEL, PLAN, QUANTIZED, TARGET, TRAJECTORY
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.simulation.model import simulate

F32, F16, Q4_0, Q8_0, Q4_K = 0, 1, 2, 8, 12
LAYER = "transformer_blocks.0.attn1.to_q"
STEP = 1
WRITTEN = (  # w = sin(0 ... 127) * linspace(0.1, 2, 128) of shape (2, 64) as Q4_0 (a) and Q8_0 (b), biases 1 and 2
    "eNpzdw91Y2ZgYGBhgAAmKC0CpdNT81KLEnP0EouSMzJLUpNLSotSOZDUp+WUVrBD2RV6eYm5qcWcQCYHklGMULoAxijkgDIS9cpTM9MzSkAq"
    "HdAcAKNBgA2uPikzsZgRTTYBSsNMTcJjKkhNA5qpSVhNVWBkIAaE61RYes24dq1dS7vy2ZdlVrzRV/StdbOvfd7qxeuz/fPlDF69mSsM5WxX"
    "fH5ULivX9fnjVBn+nKcnjfWqnnxaas0fc+3jYU9+ux2fcNvQYI/kDwwQL8MgLsP65OYXBWPxB4fuynoYvtywnzc08P+K+R/DCxXXNp5+LK/p"
    "q3V33UmpMJePKzcwhcbwrpv52LtAb1/HQbPawJuNc8W3KIYH/F297EtAsvSOqVftC6zO9mxTLY181TuTNb+Eb2bj/dibyslqR2eeNshyvjtt"
    "g2hGzO+5M7/GFMis7bzkUWN/rHGjdj257gcAQTSCjw=="
)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def half(scale: np.ndarray) -> np.ndarray:
    return scale.astype("<f2")[:, None].view(np.uint8)


def blocks(w: torch.Tensor, kind: int) -> bytes:
    """A weight in blocks of 32 with one scale in float16, as ggml's reference rounds it."""
    rows = w.float().numpy().reshape(-1, 32)
    if kind == Q8_0:
        scale = np.abs(rows).max(1) / 127
        codes = np.round(rows / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8).view(np.uint8)
        return np.concatenate([half(scale), codes], 1).tobytes()
    scale = rows[np.arange(len(rows)), np.abs(rows).argmax(1)] / -8
    codes = np.clip(np.trunc(rows / np.where(scale == 0, np.inf, scale)[:, None] + 8.5), 0, 15).astype(np.uint8)
    return np.concatenate([half(scale), codes[:, :16] | codes[:, 16:] << 4], 1).tobytes()


def gguf(tensors: dict[str, tuple[int, tuple[int, ...], bytes]], pairs: bytes = b"", count: int = 0) -> bytes:
    listed, held = b"", b""
    for name, (kind, shape, content) in tensors.items():
        held += bytes(-len(held) % 32)
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        listed += text(name) + axes + struct.pack("<IQ", kind, len(held))
        held += content
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + pairs + listed
    return header + bytes(-len(header) % 32) + held


def stored(tensors: dict[str, torch.Tensor], kinds: dict[str, int], **raw: tuple) -> bytes:
    """Tensors in float32, except those of `kinds`."""
    found = {}
    for name, value in tensors.items():
        kind = kinds.get(name, F32)
        content = value.float().numpy().astype("<f4").tobytes() if kind == F32 else blocks(value, kind)
        found[name] = kind, tuple(value.shape), content
    return gguf(found | raw)


def exact(w: torch.Tensor, kind: int) -> torch.Tensor:
    """Return the weights of the blocks by ggml's definition: the scale times the code."""
    found = np.frombuffer(blocks(w, kind), np.uint8).reshape(-1, 34 if kind == Q8_0 else 18)
    scale, packed = found[:, :2].copy().view("<f2").astype(np.float32), found[:, 2:]
    codes = packed.view(np.int8) if kind == Q8_0 else np.concatenate([packed & 15, packed >> 4], 1).astype(np.int8) - 8
    return torch.from_numpy(scale * codes).reshape(w.shape)


def take(start: Artifacts, content: bytes, folder: Path, **options) -> Artifacts:
    (folder / "c.gguf").write_bytes(content)
    return start | run_pass(ImportWeights(path=str(folder / "c.gguf"), **options), start, folder / "import")


def test_codes_and_scales_are_those_that_the_library_wrote(tmp_path):
    (tmp_path / "c.gguf").write_bytes(zlib.decompress(base64.b64decode(WRITTEN)))
    module = torch.nn.ModuleDict({name: torch.nn.Linear(64, 2) for name in "ab"})
    saved = read_weights([tmp_path / "c.gguf"], module)
    a, b = (saved.weights[layer.name](layer) for layer in layer_table(module))
    w = (np.sin(np.arange(128, dtype=np.float32)) * np.linspace(0.1, 2, 128, dtype=np.float32)).reshape(2, 64)
    assert (a.bits, a.scale_NG.shape, b.bits, b.scale_NG.shape) == (4, (2, 2), 8, (2, 2))
    assert a.scale_NG.tolist() == [[0.06781005859375, 0.122314453125], [0.1767578125, 0.2432861328125]]
    assert a.codes[0, :8].tolist() == [0, 1, 2, 0, -2, -2, -1, 2]
    assert (a.codes.reshape(2, 2, 32) * a.scale_NG[..., None]).flatten(1).equal(exact(torch.from_numpy(w), Q4_0))
    assert b.scale_NG.tolist() == [
        [0.004268646240234375, 0.007701873779296875],
        [0.011138916015625, 0.01532745361328125],
    ]
    assert b.codes[0, :8].tolist() == [0, 23, 28, 5, -28, -39, -12, 32]
    assert (b.codes.reshape(2, 2, 32) * b.scale_NG[..., None]).flatten(1).equal(exact(torch.from_numpy(w), Q8_0))
    assert saved.rest["a.bias"].tolist() == saved.rest["b.bias"].tolist() == [1, 2]


@pytest.mark.parametrize(("kind", "scheme"), [(Q4_0, "w4a16"), (Q8_0, "w8ga16")])
def test_codes_in_blocks_are_taken_over_exactly_and_the_graph_computes_them(kind, scheme, dit, tmp_path):
    state = dit[MODEL].open().module.state_dict()
    names = [layer.name for layer in dit[MODEL].layers() if layer.op == "linear"]
    state[f"{LAYER}.weight"][0, :32] = 0  # a block without a scale
    ours = take(dit, stored(state, {f"{name}.weight": kind for name in names}), tmp_path)
    assert {ours[PLAN].schemes[name].name for name in names} == {scheme}
    for name, data in ours[QUANTIZED].layers.items():
        scale = data.scale_NG.repeat_interleave(32, 1)
        assert (data.codes * scale).equal(exact(state[f"{name}.weight"], kind)), name
    assert any((data.scale_NG < 0).any() for data in ours[QUANTIZED].layers.values()) == (kind == Q4_0)
    model, call = dit[MODEL].open(), dit[TRAJECTORY].call(STEP)
    clock = simulate(model.module, ours[QUANTIZED])
    with torch.no_grad(), clock.at(0):
        simulated = denoise_with(model.module, model)(call)
    target = {TARGET: load_target("onnxruntime-cpu")}
    graph = ours | run_pass(ExportQdq(), ours | target, tmp_path / "qdq") | target
    run_pass(Lint(), graph, tmp_path / "lint")
    assert rel_l2(graph_denoise(graph[GRAPH], OnnxRuntime())(call), simulated) < 2e-3


def test_q8_0_is_rounded_again_if_the_recipe_says_so(dit, tmp_path, caplog):
    state = dit[MODEL].open().module.state_dict()
    content = stored(state, {f"{LAYER}.weight": Q8_0})
    data = take(dit, content, tmp_path, requantize=True)[QUANTIZED].layers
    assert "codes of 1 layers in Q8_0 are rounded again" in caplog.text
    assert data.keys() == {LAYER}
    theirs = exact(state[f"{LAYER}.weight"], Q8_0)
    scale = theirs.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(data[LAYER].scale_NG, scale)
    assert ((data[LAYER].codes * scale - theirs).abs() <= scale * 0.5001).all()


def test_names_of_the_original_layout_are_converted_with_their_rows(tmp_path):
    original, module = originals.sd3()
    kinds = {name: Q4_0 for name, value in original.items() if value.dim() == 2 and "final_layer.linear" not in name}
    content = stored(original, kinds)
    (tmp_path / "c.gguf").write_bytes(content)
    saved = read_weights([tmp_path / "c.gguf"], module)
    layers = {layer.name: layer for layer in layer_table(module) if layer.op == "linear" and layer.name != "proj_out"}
    assert saved.weights.keys() == layers.keys()
    for name, layer in layers.items():
        weight = saved.weights[name](layer)
        dequantized = weight.codes * weight.scale_NG.repeat_interleave(32, 1)
        assert dequantized.equal(exact(module.get_submodule(name).weight.detach(), Q4_0)), name
    state = module.state_dict()
    assert saved.rest.keys() == state.keys() - {f"{name}.weight" for name in layers}
    assert all(value.equal(state[name]) for name, value in saved.rest.items())


def pair(key: str, kind: int, value: bytes) -> tuple[bytes, int]:
    return text(key) + struct.pack("<I", kind) + value, 1


ONE = {"a": (F32, (2,), bytes(8))}
DAMAGED = {
    "does not begin with GGUF": b"GGML" + bytes(100),
    "it ends before its tensors": b"GGUF" + struct.pack("<IQ", 3, 1),
    "its version is 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "its version is 50331648": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "it lists 9223372036854775808 tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0),
    "and 4294967296 metadata values": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 32),
    "a name of 1099511627776 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1 << 40),
    "it lists the tensor a twice": gguf(ONE)[:8] + struct.pack("<QQ", 2, 0) + gguf(ONE)[24:57] * 2 + bytes(100),
    "more bytes than the": gguf(ONE)[:-1],
    "which is larger than the file": gguf({"a": (F32, (1 << 40,), bytes(8))}),
    "rows have to be whole blocks of 32": gguf({"a.weight": (Q4_0, (2, 33), bytes(36))}),
    r"shape \(0,\)": gguf({"a": (F32, (0,), b"")}),
    "has 5 axes": gguf({"a": (F32, (1, 1, 1, 1, 1), bytes(4))}),
    "a value of the type 99": gguf(ONE, *pair("x", 99, bytes(8))),
    "a value of the type 9 in a list": gguf(ONE, *pair("x", 9, struct.pack("<IQIQ", 9, 1, 0, 1))),
    "more than 16777216 bytes before the tensors": gguf(ONE, *pair("x", 9, struct.pack("<IQ", 0, 1 << 62))),
    "its alignment is 0": gguf(ONE, *pair("general.alignment", 4, struct.pack("<I", 0))),
    "general.alignment has the type 5: 4, a UINT32": gguf(ONE, *pair("general.alignment", 5, struct.pack("<i", 32))),
    "its alignment is 33": gguf(ONE, *pair("general.alignment", 4, struct.pack("<I", 33))),
    "comfy.gguf.orig_shape.a: tensors that are stored in another": gguf(
        ONE, *pair("comfy.gguf.orig_shape.a", 9, struct.pack("<IQI", 4, 1, 2))
    ),
    "its metadata has x twice": gguf(ONE, pair("x", 4, bytes(4))[0] * 2, 2),
    "b is at byte 0, which is within another tensor": gguf(
        {"a": (F32, (8,), bytes(32)), "b": (F32, (8,), bytes(32))}
    ).replace(struct.pack("<IQ", F32, 32), struct.pack("<IQ", F32, 0)),
    "a is at byte 4, .* or no multiple of 32": gguf(ONE).replace(
        struct.pack("<QIQ", 2, F32, 0), struct.pack("<QIQ", 2, F32, 4)
    )
    + bytes(8),
    "can't decode byte": gguf(ONE).replace(text("a"), struct.pack("<Q", 1) + b"\xff"),
}


@pytest.mark.parametrize("why", DAMAGED)
def test_damaged_files_are_refused_in_one_line_before_anything_is_read(why, tmp_path):
    (tmp_path / "c.gguf").write_bytes(DAMAGED[why])
    started = time.process_time()
    with pytest.raises(RecipeError, match=f"c.gguf: cannot be read as GGUF: .*{why}") as raised:
        check_gguf(tmp_path / "c.gguf")
    assert "\n" not in str(raised.value)
    assert time.process_time() - started < 2
    with pytest.raises(ValidationError, match="cannot be read as GGUF"):
        ImportWeights.model_validate({"path": "c.gguf"}, context={"base": tmp_path})


def test_the_end_of_the_name_may_be_in_capitals(tmp_path):
    (tmp_path / "c.GGUF").write_bytes(gguf(ONE))
    assert ImportWeights.files(tmp_path / "c.GGUF") == [tmp_path / "c.GGUF"]


def test_a_pipe_and_a_folder_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for name, why in (("pipe.gguf", "is not a regular file"), ("folder.gguf", "is a folder, not a file")):
        with pytest.raises(ValidationError, match=f"{name}: {why}"):
            ImportWeights.model_validate({"path": name}, context={"base": tmp_path})


def test_a_long_list_of_texts_takes_seconds_at_most(tmp_path):
    lists = text("x") + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(8 << 21)
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + lists)
    started = time.process_time()
    with pytest.raises(RecipeError, match="more than 16777216 bytes before the tensors"):
        read_gguf_file(tmp_path / "c.gguf")
    assert time.process_time() - started < 20


def test_other_types_and_layers_that_are_not_the_models_are_refused_by_name(dit, tmp_path):
    state = dit[MODEL].open().module.state_dict()
    for changed, why in {
        (f"{LAYER}.weight", (Q4_K, (64, 64), bytes(8))): rf"{LAYER}.weight: Q4_K: only F32, F16, BF16, Q4_0, Q8_0",
        (f"{LAYER}.weight", (77, (64, 64), bytes(8))): rf"{LAYER}.weight: type 77: only",
        (f"{LAYER}.bias", (Q4_0, (64,), bytes(36))): rf"{LAYER}.bias: Q4_0 in the shape \(64,\): only weights",
        (f"{LAYER}.weight", (Q4_0, (32, 64), bytes(64 * 18))): rf"{LAYER}: a weight \(32, 64\) in Q4_0, .* \(64, 64\)",
        (f"{LAYER}.weight", (Q4_0, (64, 64), b"\0\x7e" * 64 * 18)): rf"{LAYER}: scales with NaN or Inf",
        (f"{LAYER}.weight", (F16, (64, 64), bytes(64 * 128))): rf"{LAYER}.weight: different from the recipe's model",
        ("other.weight", (F16, (4,), bytes(8))): r"belongs to another model: it has other\.weight",
    }.items():
        name, raw = changed
        with pytest.raises(RecipeError, match=why) as raised:
            take(dit, stored(state, {}, **{name: raw}), tmp_path)
        assert "\n" not in str(raised.value)
