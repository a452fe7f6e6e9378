"""A minute of fuzzing all that reads files by anyone; `readers.py` fuzzes for as long as it is told."""

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

SECONDS = 20
"""For each reader."""
SEEDS = {
    "recipe": b"model: {path: m}\ntargets: [onnxruntime-cpu]\nsteps: [calibrate, {assign: {budget: &b [*b]}}]\n",
    "manifest": b'{"files": {"model.onnx": {"sha256": "%s", "size_bytes": 1}}, "seed": 0, "start": {"model": "%s"},'
    b' "steps": [{"step": "a", "pass": "b", "key": "%s", "outputs": {"graph": "%s"}}], "versions": {"torch": "2"}}'
    % ((b"00" * 32,) * 4),
    "lint": onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[8,8] x, float s, int8[8,8] w) => (float[8,8] y)'
        "{ q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) v = DequantizeLinear (w, s) y = MatMul (d, v) }"
    ).SerializeToString(),
}


@pytest.mark.parametrize("reader", SEEDS)
def test_no_file_raises_anything_but_the_clear_error(reader: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/seed").write_bytes(SEEDS[reader])
    program = Path(__file__).with_name("readers.py")
    command = [sys.executable, program, reader, tmp_path / "corpus", f"-max_total_time={SECONDS}", "-seed=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said[-2000:]
    assert "Done" in said
    assert not list(tmp_path.glob("crash*"))
