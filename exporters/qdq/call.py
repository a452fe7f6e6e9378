"""Describe one call of a quantized layer: its place in the graph, and its integers in the form that graphs have.

Shapes: N out features, K in features, G = K // size groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from intaglio.exporters.float_graph.sites import Site
from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
from intaglio.pipeline.errors import TargetError
from intaglio.pipeline.formats.schemes import Float, RoundedInput, RoundedWeight
from intaglio.pipeline.formats.target import OpKind
from intaglio.pipeline.numerics.rounding import eight_bit_codes, shift_codes

Attributes: TypeAlias = Mapping[str, int | float | ir.Attr]
InputKey: TypeAlias = tuple[str, RoundedInput, bytes]


@dataclass(frozen=True)
class Call:
    """One call of a layer, with the layer's integers. Names of the nodes written for the call begin with `prefix`."""

    site: Site
    data: QuantizedLayerData
    prefix: str

    @property
    def op(self) -> OpKind:
        """Kind of the layer."""
        return "conv" if self.site.product.op_type == "Conv" else "linear"

    @property
    def spatial_axes(self) -> int:
        """Number of spatial axes of a convolution; 0 for a linear layer."""
        return 0 if self.op == "linear" else len(self.site.weight_shape) - 2

    def of_channels(self, values_N: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return one value for each channel in the shape that broadcasts: (N,), or (1, N, 1, ...) for a convolution."""
        return values_N if self.op == "linear" else values_N.reshape(1, -1, *[1] * self.spatial_axes)

    @property
    def input_key(self) -> InputKey | None:
        """Key that is equal for calls that can share a rounded input; None if the input stays in float."""
        form = self.data.scheme.input
        if isinstance(form, Float):
            return None
        tables = self.data.tables
        parts = [part for part in (tables.amax_T, tables.shift_T, tables.factor_T) if part is not None]
        x, basis = self.basis
        form_of_shift = np.array([self.subtracted, *self.zeros], np.int64)
        return x, form, b"".join([basis, form_of_shift.tobytes(), *(part.numpy().tobytes() for part in parts)])

    @property
    def zeros(self) -> tuple[int, ...]:
        """Zeros to add around the input before it is shifted, in the order of ONNX's `pads`.

        () if there are none, or if the product adds them. Raises TargetError for a convolution whose padding depends on
        the size of its input.
        """
        attributes = self.site.product.attributes
        if not self.subtracted or self.op == "linear":
            return ()
        if (auto := attributes.get_string("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
            raise TargetError(f"{self.site.layer}: auto_pad {auto} has no fixed padding, which a shifted input needs")
        zeros = tuple(attributes.get_ints("pads", ()) or ())
        return zeros if any(zeros) else ()

    @property
    def subtracted(self) -> bool:
        """Return True if the shift of each step is subtracted from the input in the graph.

        A rounded product has a zero point instead.
        """
        return self.data.tables.shift_T is not None and isinstance(self.data.scheme.output, Float)

    @property
    def zero_point(self) -> int:
        """Code that stands for zero at every step, where the input is shifted by a zero point; else 0."""
        amax_T, shift_T = self.data.tables.amax_T, self.data.tables.shift_T
        if amax_T is None or shift_T is None or self.subtracted:
            return 0
        return -int(shift_codes(amax_T, shift_T, self.data.scheme.input_bits)[0])

    @property
    def window(self) -> Attributes:
        """Attributes of a convolution, without the padding where zeros are added before the input is shifted."""
        attributes = self.site.product.attributes
        return {key: value for key, value in attributes.items() if not (self.zeros and key == "pads")}

    @property
    def basis(self) -> tuple[str, bytes]:
        """Key that is equal for calls with the same input in the same basis."""
        balance = self.data.balance
        return str(self.site.x.name), b"" if balance is None else balance.key

    @property
    def form(self) -> RoundedWeight:
        """Format of the weight."""
        assert isinstance(self.data.scheme.weight, RoundedWeight)  # only rounded weights have calls
        return self.data.scheme.weight

    @property
    def codes_NK(self) -> NDArray[np.generic]:
        """Codes of the weight, (N, K), in the type in which graphs have them."""
        return self.form.elements(self.data.codes)

    @property
    def shape_NK(self) -> tuple[int, int]:
        """Out features N and in features K, without reading the codes."""
        n, k = self.data.codes.shape
        return n, k

    @property
    def code_type(self) -> np.dtype[np.generic]:
        """Type in which graphs have the codes, without reading the codes."""
        return self.form.elements(torch.zeros(1, 1, dtype=torch.int8)).dtype

    @property
    def scale_NG(self) -> NDArray[np.float32]:
        """Scales of the weight, (N, G)."""
        scale: NDArray[np.float32] = self.data.scale_NG.numpy()
        return scale

    @property
    def product_scale_N(self) -> NDArray[np.float32]:
        """Scale of each channel of the weight, (N,).

        If the product is rounded, it is divided by the channel's share, by which the rounded product is multiplied
        later.
        """
        scale_N, share_N = self.scale_NG.reshape(-1), self.data.tables.output_share_N
        return scale_N if share_N is None else scale_N / share_N.numpy()

    @property
    def group_NG(self) -> NDArray[np.int8]:
        """Integers of the groups of a two-level weight, (N, G)."""
        assert self.data.group_NG is not None  # only rows for such weights read it
        group: NDArray[np.int8] = self.data.group_NG.numpy()
        return group

    @property
    def eight_bit_codes_NK(self) -> NDArray[np.int8]:
        """Codes that the product multiplies, (N, K); for two levels, codes times the integers of their groups."""
        own, group = self.data.codes, self.data.group_NG
        codes: NDArray[np.int8] = (own if group is None else eight_bit_codes(own, group, self.form.grid)).numpy()
        return codes

    @property
    def group_size(self) -> int:
        """Number of input features that share a scale. Raises TargetError if it does not divide K."""
        size, k = self.data.scheme.weight.group_size, self.shape_NK[1]
        assert size is not None  # only rows for such weights read it
        if k % size:  # TensorRT-RTX would use K / G as the group size, and give wrong results without a message
            raise TargetError(f"{self.site.layer}: K = {k} is not a multiple of the group size {size}")
        return size


def carrier_scale(calls: Sequence[Call]) -> np.float32:
    """Return one scale for weights on the same input: the power of two nearest the scales' geometric mean.

    Dividing the channels' scales by a power of two is exact.
    """
    logs = np.log2(np.concatenate([call.scale_NG.ravel() for call in calls]).astype(np.float64))
    return np.float32(2.0 ** np.rint(logs.mean()))
