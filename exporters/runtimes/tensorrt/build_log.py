"""Read a TensorRT builder's log: the executed layers of the engine, and known faults in them.

The DETAILED layer list is the only account of an engine that needs no GPU; both builders write it as one message.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

# these read 8-bit operands, but compute in floating point
_FLOATING_KINDS = frozenset({"kgen", "runtime_fusion"})
_CODES = ("Int8", "FP8", "FP4E2M1")
"""Types of codes that kernels multiply."""

_TENSORS = r"\[(?P<{0}>| .*?\}})\]"
_LAYER = re.compile(
    rf"^Name: .*?, LayerType: (?P<kind>\w+), Inputs: {_TENSORS.format('inputs')}, "
    rf"(?:Constants: {_TENSORS.format('constants')}, )?Outputs: {_TENSORS.format('outputs')}, (?P<rest>.*)$",
    re.MULTILINE,
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), .*?Dimensions: \[(?P<shape>[-\d, ]*)\].*?Datatype: (?P<dtype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Tensor:
    """Operand of an executed layer; -1 stands for a dynamic axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}".replace(" ", "")


@dataclass(frozen=True)
class Layer:
    """Executed kernel and its ONNX nodes: several if they were merged or fused."""

    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        inputs, constants, outputs = (" ".join(map(str, end)) for end in (self.inputs, self.constants, self.outputs))
        return f"{self.kind} {inputs} | {constants} -> {outputs}: {', '.join(self.nodes)}"

    @property
    def multiplies_codes(self) -> bool:
        """True if the layer multiplies two operands in INT8, FP8 or FP4."""
        operands = [tensor.dtype for tensor in (*self.inputs, *self.constants)]
        return self.kind not in _FLOATING_KINDS and any(operands.count(dtype) >= 2 for dtype in _CODES)


def read_layers(log: str) -> tuple[Layer, ...]:
    """Return the executed layers, in order."""
    return tuple(
        Layer(
            kind=found["kind"],
            inputs=_tensors(found["inputs"]),
            constants=_tensors(found["constants"] or ""),
            outputs=_tensors(found["outputs"]),
            nodes=tuple(_NODE.findall(found["rest"])),
        )
        for found in _LAYER.finditer(log)
    )


def count_products(layers: Sequence[Layer], products: Collection[str]) -> tuple[int, int]:
    """Count how many of these ONNX nodes multiply codes, in INT8, FP8 or FP4, and how many compute in float.

    A node counts once, however the builder split or merged it; a node that was folded away does not count.
    """
    executed = {node for layer in layers for node in layer.nodes} & set(products)
    on_codes = {node for layer in layers if layer.multiplies_codes for node in layer.nodes} & executed
    return len(on_codes), len(executed - on_codes)


def find_hazards(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Return integer products that TensorRT-RTX builds without a warning and computes wrongly.

    It sometimes applies the scales after the product (constant `folded_matmul`). The sum is then written without
    scales, and overflows in FP16 beyond 65504. If the constant is narrower than the product, the scales of all blocks
    except one are lost.
    """
    sums = {out.name: layer for layer in layers if layer.multiplies_codes for out in layer.outputs}
    problems = []
    for layer in layers:
        scales = [c for c in layer.constants if "folded_matmul" in c.name]
        unscaled = [tensor for tensor in layer.inputs if tensor.name in sums]
        if not scales or not unscaled:
            continue
        where = ", ".join(dict.fromkeys(node for tensor in unscaled for node in sums[tensor.name].nodes))
        # a width may be spread over several axes, but never includes the first: that one counts rows
        widths = {1} | {prod(tensor.shape[axis:]) for tensor in unscaled for axis in range(1, len(tensor.shape))}
        problems += [
            f"{where}: {prod(scale.shape)} weight scales on a product {unscaled[0].shape[-1]} wide: scales in groups "
            f"cannot be combined with an 8-bit input, give the weight one scale or leave the input in float"
            for scale in scales
            if prod(scale.shape) not in widths
        ]
        if any(tensor.dtype == "Half" for tensor in unscaled):
            problems.append(
                f"{where}: the sum of 8-bit products is written to FP16 before it is scaled, and overflows: use one "
                f"weight scale and multiply by the others after the product, or compute in float32"
            )
    return tuple(problems)


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(found["name"], tuple(int(size) for size in found["shape"].split(",") if size.strip()), found["dtype"])
        for found in _TENSOR.finditer(text)
    )
