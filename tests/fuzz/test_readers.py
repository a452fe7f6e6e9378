"""Ten seconds of fuzzing each reader of files by anyone; `readers.py` fuzzes for as long as it is told."""

import hashlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save

SECONDS = 10
"""For each reader."""


def _modelopt() -> bytes:
    quantizer = {"_num_bits": 8, "_axis": 0, "_pytorch_state_metadata": {}}
    metadata = {"quantizer_state": {"to_q.weight_quantizer": quantizer, "to_q.input_quantizer": quantizer}}
    state = {"modelopt_state_dict": [("quantize", {"config": {}, "metadata": metadata})], "modelopt_version": "0.40"}
    tensors = {"to_q.weight": torch.ones(2, 2), "to_q.weight_quantizer._amax": torch.ones(2, 1)}
    file = io.BytesIO()
    torch.save({"modelopt_state": state, "model_state_dict": tensors}, file)
    return file.getvalue()


def _comfy() -> bytes:
    form = torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 4}'))
    tensors = {"to_q.weight": torch.ones(4, 64, dtype=torch.int8), "to_q.weight_scale": torch.ones(4, 1)}
    return save(tensors | {"to_q.comfy_quant": form.to(torch.uint8)})


def _gguf() -> bytes:
    """One weight (4, 64) as Q4_0."""
    named = struct.pack("<Q", 11) + b"to_q.weight" + struct.pack("<IQQIQ", 2, 64, 4, 2, 0)
    value = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQQ", 9, 8, 1, 1) + b"y"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + value + named
    return header + bytes(-len(header) % 32) + b"\0\x3c" * 9 * 8


SEEDS = {
    "recipe": b"model: {path: m}\ntargets: [onnxruntime-cpu]\nsteps: [calibrate, {assign: {budget: &b [*b]}}]\n",
    "manifest": b'{"files": {"model.onnx": {"sha256": "%s", "size_bytes": 1}}, "seed": 0, "start": {"model": "%s"},'
    b' "steps": [{"step": "a", "pass": "b", "key": "%s", "outputs": {"graph": "%s"}}], "versions": {"torch": "2"}}'
    % ((b"00" * 32,) * 4),
    "record": b'{"step": "a", "origin": "b", "key": "%s", "ingredients": "{}", "outputs": {"M": "%s"}, "seconds": 1.5}'
    % (hashlib.sha256(b"{}").hexdigest().encode(), b"00" * 32),
    "lora": save(
        {"transformer.to_q.lora_A.weight": torch.ones(2, 4), "transformer.to_q.lora_B.weight": torch.ones(4, 2)}
    ),
    "modelopt": _modelopt(),
    "weights": _comfy(),
    "weights gguf": _gguf(),
    "folder": b'\x01{"layers": [{"name": "a", "op": "linear", "shape": [4, 4], "bias": true, "padded": false, "scheme":'
    b' "float", "weight": {"kind": "float"}, "input": {"kind": "float"}, "output": {"kind": "float"}}]}',
    "lint": onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[8,8] x, float s, int8[8,8] w) => (float[8,8] y)'
        "{ q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) v = DequantizeLinear (w, s) y = MatMul (d, v) }"
    ).SerializeToString(),
}


@pytest.mark.long
@pytest.mark.parametrize("reader", SEEDS)
def test_no_file_raises_anything_but_the_clear_error(reader: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/seed").write_bytes(SEEDS[reader])
    program = Path(__file__).with_name("readers.py")
    command = [sys.executable, program, reader.split()[0], tmp_path / "corpus", f"-max_total_time={SECONDS}", "-seed=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:] + said[-2000:]
    assert "Done" in said
    assert not list(tmp_path.glob("crash*"))
