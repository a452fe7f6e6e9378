"""A compiled folder as a run leaves it, of one linear layer that has a scale for each denoising step."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from intaglio.pipeline.artifacts.graph import Graph, Interface, TensorSpec
from intaglio.pipeline.runs.manifest import MANIFEST, DeliveredFile, Manifest
from intaglio.pipeline.runs.store import file_digest, files_below

STEP_LINEAR = """
<ir_version: 10, opset_import: ["": 21]>
denoiser (float[batch, 16, 64] x, float[batch] timestep, int64 step) => (float[batch, 16, 64] y)
<float unit = {0.007874016}, int8 zero = {0}, float s0 = {0.002}, float[3] inverse = {0.5, 0.4, 0.3},
 float[3] amax = {2.0, 2.5, 3.333}, int64[2] last = {1, 2}, float milli = {0.001}>
{
    r = Gather (inverse, step)
    a = Gather (amax, step)
    x1 = Mul (x, r)
    code = QuantizeLinear (x1, unit, zero)
    x2 = DequantizeLinear (code, unit, zero)
    w = DequantizeLinear (codes, s0)
    y1 = MatMul (x2, w)
    y2 = Mul (y1, a)
    t1 = Unsqueeze (timestep, last)
    t2 = Mul (t1, milli)
    y = Add (y2, t2)
}
"""

RECIPE = """
model: model
targets: [tensorrt-10.3-orin, tensorrt-rtx, onnxruntime-cpu]
steps: [{tensorrt: {workspace_mib: 512, dynamic: {batch: [1, 2, 4]}}}]
"""


CALL = Interface(arguments=("x", "timestep"), sample="x")


def compiled(folder: Path) -> Path:
    model = onnx.parser.parse_model(STEP_LINEAR)
    codes = np.random.default_rng(7).integers(-127, 128, (64, 64)).astype(np.int8)
    model.graph.initializer.append(numpy_helper.from_array(codes, "codes"))
    folder.mkdir(parents=True)
    onnx.save(model, folder / "given.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    (folder / "given.onnx").rename(folder / "model.onnx")
    inputs = {
        "x": TensorSpec("float32", ("batch", 16, 64)),
        "timestep": TensorSpec("float32", ("batch",)),
        "step": TensorSpec("int64", ()),
    }
    outputs = {"y": TensorSpec("float32", ("batch", 16, 64))}
    graph = Graph(folder / "model.onnx", inputs, outputs, timesteps=(900.0, 600.0, 300.0), interface=CALL)
    (folder / "graph").mkdir()
    graph.save(folder / "graph")
    (folder / "graph/graph.json").rename(folder / "graph.json")
    shutil.rmtree(folder / "graph")
    (folder / "recipe.yaml").write_text(RECIPE)
    return delivered(folder)


def delivered(folder: Path) -> Path:
    """The folder with a manifest of all that is in it now."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {
        path.relative_to(folder).as_posix(): DeliveredFile(sha256=file_digest(path), size_bytes=path.stat().st_size)
        for path in files_below(folder)
    }
    Manifest(files=files, seed=0, start={}, steps=(), versions={}).write(folder)
    return folder


def unpacked(archive: Path) -> Path:
    """The kit's folder, in the test's own."""
    with tarfile.open(archive) as packed:
        packed.extractall(filter="data")
    return next(path for path in Path.cwd().iterdir() if (path / "SHA256SUMS").is_file())
