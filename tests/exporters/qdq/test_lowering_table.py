"""Every row of the table, on layers of many shapes: the same codes everywhere, and products of codes.

Simulation, numpy oracle, ONNX Runtime as written and ONNX Runtime optimized; TensorRT-RTX builds the graph.
"""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from harness import run_pass
from layers import RANGES, SCHEMES, make, target_of
from quantizing import HALF_TOLERANCE

from intaglio.exporters.lint.lint import lint
from intaglio.exporters.qdq.lowering import Lowering, table
from intaglio.exporters.runtimes.onnxruntime.build import BuildOnnxRuntime
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.runtimes.tensorrt.build import BuildTensorRT
from intaglio.exporters.runtimes.tensorrt.runtime import TensorRT
from intaglio.exporters.verify.layer_run import run_layer
from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import ENGINE, GRAPH, TARGET
from intaglio.pipeline.entry_points import named_runtimes
from intaglio.pipeline.formats.fp8 import Fp8Input, Fp8Weight
from intaglio.pipeline.formats.nvfp4 import Nvfp4Weight
from intaglio.pipeline.formats.schemes import Float, IntInput, PerStep, PerToken
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.numerics.basis import Balance
from intaglio.pipeline.numerics.low_rank import Branch
from intaglio.pipeline.numerics.rounding import group_integers
from intaglio.pipeline.simulation.layer import QuantizedLayer

TOLERANCE = 1e-5
"""Relative L2 error of float32 sums of 576 products, and of what is multiplied behind; the reference is in float64."""


@dataclass(frozen=True)
class Case:
    """A layer (K, N), or (C, N, kernel, stride, padding), and its input, whose ranges are `magnitude` times RANGES.

    A convolution goes along as many axes as the input has behind B and C.

    A padding of "same" is one zero before and two behind with a kernel of 4, as the stride is 1.
    """

    sizes: tuple[int | str, ...]
    shape: tuple[int, ...]
    step: int = 0
    magnitude: float = 1.0
    bias: bool = True
    dilation: int = 1
    zeros: bool = False
    ones: bool = False
    balance: Balance | None = None
    rank: int = 0

    def layer(self) -> torch.nn.Module:
        match self.sizes:
            case (k, n):
                return torch.nn.Linear(k, n, self.bias)
            case (c, n, kernel, stride, padding):
                kinds = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}
                return kinds[len(self.shape)](c, n, kernel, stride, padding, self.dilation, bias=self.bias)


def eighths(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(-2, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)) / 8


def powers_of_two(channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    signs = torch.randint(2, (channels,), generator=generator) * 2.0 - 1
    return signs * 2.0 ** torch.randint(-3, 4, (channels,), generator=generator)


LINEAR = {
    "tokens": Case((64, 96), (2, 5, 64)),
    "rows": Case((64, 32), (3, 64), step=1),
    "windows": Case((128, 48), (2, 3, 4, 128), step=2, bias=False),
    "large": Case((192, 8), (2, 7, 192), magnitude=2e4, zeros=True),
    "same-sign": Case((96, 16), (2, 3, 96), ones=True),
    "scaled": Case((64, 96), (2, 5, 64), balance=Balance(powers_of_two(64))),
    "rotated": Case((192, 32), (2, 5, 192), step=1, balance=Balance(powers_of_two(192), 64)),
    "rotated-rows": Case((64, 32), (4, 64), balance=Balance(powers_of_two(64), 16)),
    "branch": Case((96, 64), (2, 3, 96), rank=8),
    "branch-rotated": Case((64, 32), (2, 5, 64), balance=Balance(powers_of_two(64), 16), rank=4),
}
CONV = {
    "stride-2": Case((64, 32, 3, 2, 1), (2, 64, 6, 6)),
    "pointwise": Case((64, 16, 1, 1, 0), (2, 64, 5, 5), step=1, zeros=True),
    "unpadded": Case((32, 48, 3, 1, 0), (1, 32, 6, 4), step=2, magnitude=2e4, bias=False),
    "same-sign": Case((64, 16, 3, 1, 1), (1, 64, 4, 4), ones=True),
    "scaled": Case((64, 32, 3, 1, 1), (2, 64, 4, 4), balance=Balance(powers_of_two(64))),
    "rotated": Case((64, 32, 3, 2, 1), (2, 64, 6, 6), balance=Balance(powers_of_two(64), 16)),
    "rotated-pointwise": Case((128, 32, 1, 1, 0), (2, 128, 3, 3), step=1, balance=Balance(powers_of_two(128), 64)),
    "branch": Case((32, 48, 3, 2, 1), (2, 32, 6, 6), balance=Balance(powers_of_two(32)), rank=16),
    "same": Case((32, 16, 4, 1, "same"), (2, 32, 5, 4), step=1),
    "dilated": Case((32, 16, 3, 1, 2), (2, 32, 6, 5), step=2, bias=False, dilation=2),
    "line": Case((64, 32, 5, 2, 2), (2, 64, 9), rank=4),
    "line-rotated": Case((64, 16, 3, 1, 1), (2, 64, 7), step=1, balance=Balance(powers_of_two(64), 16)),
    "volume": Case((32, 16, 3, 1, 1), (1, 32, 3, 4, 5), step=2),
    "volume-same": Case((32, 48, 2, 1, "same"), (2, 32, 2, 3, 4), balance=Balance(powers_of_two(32)), rank=8),
}


@dataclass(frozen=True)
class Written:
    """The graph of a row on one runtime with a layer for each case, its simulation, and the layers' inputs."""

    row: Lowering
    runtime: str
    graph: Graph
    made: dict[str, QuantizedLayer]
    cases: dict[str, Case]
    x: dict[str, torch.Tensor]


def write(row: Lowering, runtime: str, folder: Path) -> Written:
    scheme, cases = SCHEMES[row.scheme.name], CONV if row.op == "conv" else LINEAR
    torch.manual_seed(1)
    layers = {name: case.layer() for name, case in cases.items()}
    x = {}
    for seed, (name, case) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(seed)
        weight = layers[name].weight.data
        x[name] = torch.randn(case.shape, generator=generator) * case.magnitude
        if case.balance is not None or case.rank:  # sums of such values are exact in any order, and so are codes
            weight.copy_(torch.randint(-128, 129, weight.shape, generator=generator) / 512)
            x[name] = torch.round(x[name] * 32) / 32
        if case.zeros:
            x[name][0, 0], x[name][-1] = 0, x[name][-1].abs()
            x[name][0, 1:3] *= torch.tensor([1e-9, 1e-13]).reshape(2, *[1] * (len(case.shape) - 2))  # about the eps
            weight[0] = 0
        if case.ones:
            weight.fill_(0.5)
            x[name] = x[name].abs() + 1
    amax = {n: RANGES.amax_T * c.magnitude * (16 if c.balance is not None else 1) for n, c in cases.items()}
    shift = {n: RANGES.shift_T * c.magnitude for n, c in cases.items()}
    shapes = {name: case.shape for name, case in cases.items()}
    balances = {name: case.balance for name, case in cases.items() if case.balance is not None}
    branches = {}
    for name, case in cases.items():
        if case.rank:
            n, k = layers[name].weight.flatten(1).shape
            branches[name] = Branch(eighths(case.rank, k, 5), eighths(n, case.rank, 6))
    schemes = dict.fromkeys(cases, scheme)
    with torch.no_grad():
        seen = {
            f"{n}.{end}": float(v.abs().max()) for n, m in layers.items() for end, v in (("x", x[n]), ("y", m(x[n])))
        }
    graph, made = make(folder, layers, shapes, schemes, runtime, amax, balances, shift, seen, branches)
    return Written(row, runtime, graph, made, cases, x)


def expected(layer, case: Case, x: torch.Tensor) -> tuple[np.ndarray, oracle.Computed]:
    """The weight's codes and what the layer computes, from its float weight and its scales alone."""
    form, window = layer.scheme.weight, {}
    if not isinstance(layer.layer, torch.nn.Linear):
        zeros = layer.layer._reversed_padding_repeated_twice
        pads = tuple(zip(zeros[-2::-2], zeros[::-2], strict=True))
        window = {"stride": layer.layer.stride[0], "dilation": layer.layer.dilation[0], "pads": pads}
    x, w = x.numpy(), layer.layer.weight.detach().numpy()
    shape = w.shape
    if case.balance is not None:
        d, block = case.balance.scale_C.numpy(), case.balance.block
        x = oracle.balanced(x, d, block, 1 if window else -1)
        w = oracle.balanced(w, 1 / d, block, 1) / block
    w, k = w.reshape(len(w), -1), w[0].size
    beside = 0
    if layer.branch is not None:
        down, up = (part.numpy() for part in (layer.branch.down_RK, layer.branch.up_NR))
        w = w - up @ down
        low = oracle.product(x, down.reshape(-1, *shape[1:]), **window)
        beside = oracle.product(low, up.reshape(*up.shape, *[1] * (len(shape) - 2)))
    bias = 0 if layer.layer.bias is None else layer.layer.bias.detach().numpy()
    scale = layer.weight_rounding.scale.detach().numpy()
    if (group := layer.weight_rounding.group) is not None and not isinstance(form, Nvfp4Weight):
        four, eight = oracle.two_level_codes(w, scale[:, 0], group_integers(group).numpy(), 32)
    elif not isinstance(form, Fp8Weight | Nvfp4Weight):
        four = eight = oracle.weight_codes(w, scale, form.low, form.high, form.group_size or k)
    if isinstance(form, Nvfp4Weight):
        group = form.stored_groups(layer.weight_rounding.group).float().numpy()
        numbers, worth = oracle.nvfp4_weight(w, scale.item(), group)
        x_numbers, x_worth = np.zeros(0), 1
        if layer.input_rounding is not None:
            amax = layer.tables.amax_T
            x_numbers, x_worth = oracle.nvfp4_input(x, (amax[case.step] if amax.ndim else amax).item())
            x = x_numbers
        y = oracle.product(x.astype(np.float64) * x_worth, numbers.astype(np.float64) * worth) + bias
        return oracle.places(numbers, ml_dtypes.float4_e2m1fn), oracle.Computed(x_numbers, y + beside)
    match layer.scheme.input:
        case Fp8Input(granularity=granularity):
            numbers = oracle.nearest(w / scale, ml_dtypes.float8_e4m3fn)
            tables = layer.tables
            amax = None
            if not isinstance(granularity, PerToken):
                amax = tables.amax_T[case.step] if isinstance(granularity, PerStep) else tables.amax_T
                amax = amax.item()
            computed = oracle.fp8_layer(x, numbers.reshape(shape), scale[:, 0], bias, amax=amax, **window)
            codes = oracle.places(numbers, ml_dtypes.float8_e4m3fn)
            return codes, computed._replace(y=computed.y + beside)
        case Float():
            spread = np.repeat(scale, form.group_size or k, axis=1)
            y = oracle.weight_only(x, eight.reshape(shape), spread, bias, **window)
            return four, oracle.Computed(np.zeros(0), y + beside)
        case IntInput(bits=bits, granularity=granularity, shifted=shifted):
            step, tables, ranges = case.step, layer.tables, None
            if isinstance(granularity, PerStep):
                ranges = (tables.amax_T[step].item(), tables.shift_T[step].item() if shifted else 0.0)
            computed = oracle.layer(
                x,
                eight.reshape(shape),
                scale[:, 0],
                bias,
                high=127 if bits == 8 else 7,
                ranges=ranges,
                shifted=shifted,
                output=None
                if isinstance(layer.scheme.output, Float)
                else (tables.output_amax_T[step].item(), tables.output_share_N.numpy()),
                **window,
            )
            return four, computed._replace(y=computed.y + beside)


BUILT_FOR = {"8.9": ("SM89", "SM120"), "10.0": ("SM120",)}
"""Generations of GPUs for which engines are built, by the least compute capability of a row's codes."""
TABLES = {name: table(name) for name in named_runtimes()}
RUNTIMES = {row: [name for name in TABLES if row in TABLES[name]] for rows in TABLES.values() for row in rows}
"""Runtimes that have each row."""
ROWS = [pytest.param(row, id=f"{row.op}-{row.scheme.name}-{RUNTIMES[row][-1]}") for row in RUNTIMES]


@pytest.fixture(scope="module", params=ROWS)
def written(request, tmp_path_factory) -> Written:
    return write(request.param, RUNTIMES[request.param][-1], tmp_path_factory.mktemp("row"))


def test_codes_are_the_same_everywhere(written):
    for name, case in written.cases.items():
        layer, x = written.made[name], written.x[name]
        codes, computed = expected(layer, case, x)
        assert np.array_equal(layer.weight_codes().numpy(), codes), name
        rounds_input = not isinstance(layer.scheme.input, Float)
        with torch.no_grad(), layer.clock.at(case.step):
            assert rel_l2(layer(x).numpy(), computed.y) < TOLERANCE, name
            assert not rounds_input or np.array_equal(layer.input_codes(x)[0].numpy(), computed.x_codes), name
        # when ONNX Runtime 1.31 optimizes FP8 codes, it makes integer products of them, and then cannot load the graph
        for optimize in (False, True) if layer.scheme.weight.compute_capability is None else (False,):
            runtime = TensorRT() if isinstance(layer.scheme.weight, Nvfp4Weight) else OnnxRuntime(optimize)
            y, x_codes = run_layer(written.graph, name, x.numpy(), runtime, case.step)
            if not optimize and computed.unrounded is not None:
                y = without_ties(y, computed)
            tolerance = TOLERANCE
            if written.runtime != "onnxruntime" and (case.rank or not rounds_input):  # about integers all is float32
                tolerance = HALF_TOLERANCE * (1 if case.balance is None else 3)  # a scale and a rotation in float16 too
            assert rel_l2(y, computed.y) < tolerance, (name, optimize)
            if rounds_input:
                zero = 128 if x_codes.dtype == np.uint8 else 0
                x_codes = (x_codes.astype(float) - zero).reshape(computed.x_codes.shape)
                assert np.array_equal(x_codes, computed.x_codes), (name, optimize)


def without_ties(y: np.ndarray, computed: oracle.Computed) -> np.ndarray:
    """y, where its codes lie the other way beside a half: sums of integers that are made in float32 may do that."""
    apart = np.rint((y - computed.y) / computed.worth)
    from_half = np.abs(computed.unrounded - np.floor(computed.unrounded) - 0.5)
    assert np.abs(apart).max() <= 1
    assert not np.any(from_half[apart != 0] > 1e-4)
    return y - apart * computed.worth


def test_all_runtimes_of_a_row_get_the_same_graph(written, tmp_path):
    for runtime in RUNTIMES[written.row][:-1]:
        other = write(written.row, runtime, tmp_path / runtime)
        for name in ("model.onnx", "model.onnx.data"):
            assert (other.graph.path.parent / name).read_bytes() == (written.graph.path.parent / name).read_bytes()


def test_products_run_on_integers_where_the_row_says_so(written, tmp_path):
    """Engines of TensorRT are built on a GPU; what TensorRT-RTX makes of the same graph stands for them."""
    target = target_of(written.runtime)
    build = BuildOnnxRuntime() if target.runtime == "onnxruntime" else BuildTensorRT()
    if target.runtime != "onnxruntime":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if (least := written.row.scheme.weight.compute_capability) is not None:
        target = target.model_copy(update={"generations": BUILT_FOR[least]})
    engine = run_pass(build, {GRAPH: written.graph, TARGET: target}, tmp_path)[ENGINE]
    rotations = sum(c.balance is not None and c.balance.block > 1 for c in written.cases.values())
    beside = rotations + sum(2 for c in written.cases.values() if c.rank)
    products = len(written.cases)
    assert (engine.low_precision_products, engine.float_products) == (
        (products, beside) if written.row.integer else (0, products + beside)
    )
    if target.runtime == "tensorrt-rtx":
        few = "Int4" if least is None else "FP4E2M1"
        assert any(few in layer for layer in engine.layers) == (written.row.scheme.weight_bits == 4)


def test_no_row_is_what_lint_refuses(written):
    own = written.row.scheme.weight.compute_capability
    target = target_of(written.runtime) if own is None else load_target("tensorrt-rtx-blackwell")
    assert not [f for f in lint(written.graph.path, target) if f.level == "error"]


def rel_l2(y: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
