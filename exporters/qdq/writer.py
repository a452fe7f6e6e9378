"""Write operators into a graph: the rounding of inputs, and everything around a layer's product.

Shapes: N out features, K in features, G = K // size groups, T denoising steps, C input channels, kh kw kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from intaglio.exporters.float_graph.sites import BASIS, BRANCH, LAYER_KEY
from intaglio.exporters.qdq.call import Attributes, Call, InputKey
from intaglio.exporters.qdq.folding import ChannelScale
from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.numerics.basis import hadamard
from intaglio.pipeline.numerics.low_rank import Branch
from intaglio.pipeline.numerics.packing import pack_int4
from intaglio.pipeline.numerics.rounding import TOKEN_EPS, output_scale


@dataclass(frozen=True)
class Rounded:
    """Rounded input of a product: its value, and its magnitude and shift, each None if it has none."""

    x: ir.Value
    amax: ir.Value | None = None
    shift: ir.Value | None = None


@dataclass
class Writer:
    """Writes the nodes of all quantized calls of a graph.

    The nodes of a call stand before the product that they replace.
    """

    graph: ir.Graph
    step: ir.Value
    input_zero: np.uint8 | np.int8
    """Zero point of 8-bit inputs: 128 if the runtime reads unsigned codes, else 0."""
    carriers: Mapping[InputKey, np.float32]
    """Carrier scale of all weights that multiply the same input, by input key."""
    scales: list[ChannelScale] = field(default_factory=list)
    """Multiplications by channel scales, in front of balanced layers, that were written so far."""
    _inputs: dict[InputKey, Rounded] = field(default_factory=dict)
    _balanced: dict[tuple[str, bytes], ir.Value] = field(default_factory=dict)

    def op(self, call: Call, role: str, inputs: Sequence[ir.Value], attributes: Attributes | None = None) -> ir.Value:
        """Write the node `prefix/role` and return its only output. The last part of `role` names the operator."""
        return self.node(call, role, inputs, attributes)[0]

    def node(
        self,
        call: Call,
        role: str,
        inputs: Sequence[ir.Value],
        attributes: Attributes | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Write the node `prefix/role` and return its outputs. The last part of `role` names the operator."""
        name, known = f"{call.prefix}/{role}", {LAYER_KEY: call.site.layer}
        node = ir.node(
            role.rpartition("/")[2],
            inputs,
            attributes,
            domain=domain,
            num_outputs=outputs,
            name=name,
            metadata_props=known,
        )
        for place, value in enumerate(node.outputs):
            value.name = f"{name}:{place}"
        self.graph.insert_before(call.site.product, node)
        return node.outputs

    def codes(
        self,
        name: str,
        call: Call,
        arranged: Callable[[NDArray[np.generic]], NDArray[np.generic]],
        shape: Sequence[int],
        *,
        packed: bool = False,
    ) -> ir.Value:
        """Return the constant of a weight's codes, as `arranged` makes them of codes (N, K); `packed`: as INT4.

        They are read when the file is written, so that the codes of one weight are in memory at a time.
        """
        dtype = ir.DataType.INT4 if packed else ir.DataType.from_numpy(call.code_type)

        def read() -> ir.TensorProtocol:
            array = arranged(call.codes_NK)
            if not packed:
                return ir.Tensor(array, name=name)
            return ir.PackedTensor(pack_int4(np.ascontiguousarray(array)), dtype, shape=array.shape, name=name)

        return self.constant(name, ir.LazyTensor(read, dtype, ir.Shape(shape), name=name))

    def constant(self, name: str, array: NDArray[np.generic] | np.generic | ir.LazyTensor) -> ir.Value:
        """Return the constant of this name, added on first use: a name always stands for the same content."""
        if name not in self.graph.initializers:
            # scalars keep the shape (): with a scale of shape (1,) TensorRT-RTX convolves in float without a message
            tensor = array if isinstance(array, ir.LazyTensor) else ir.Tensor(np.asarray(array))
            tensor.name = name
            self.graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
            )
        return self.graph.initializers[name]

    def owner(self, call: Call, *, in_blocks: bool = False) -> str:
        """Return the prefix of a weight's name: the layer, or the call if the runtime cannot share a weight.

        ONNX Runtime makes weights unsigned if their input is unsigned, and fails on a weight that it changed before.
        TensorRT-RTX 1.7.1 crashes where two float products read one 4-bit weight `in_blocks`.
        """
        unsigned = self.input_zero.dtype == np.uint8
        return call.prefix if unsigned != in_blocks else call.site.layer

    def write(self, call: Call, product: Product, entering: Entering) -> ir.Value:
        """Write y = product(x) * amax + branch(x) + (shift * rowsum(w) + b), in this order, without absent terms.

        The bias of a rounded product is added before the branch.
        """
        rounded = self._rounded_input(call, entering)
        y = product(self, call, rounded.x)
        bias = None if call.site.bias is None else self._bias(call, call.site.bias)
        if not isinstance(call.data.scheme.output, Float):
            y = self._rounded_output(call, y)
            if call.data.tables.output_share_N is not None:
                y, bias = self._shared_out(call, y, call.data.tables.output_share_N.numpy()), None
        elif rounded.amax is not None:
            y = self.op(call, "amax/Mul", [y, rounded.amax])
        if call.data.branch is not None:
            y = self.op(call, "sum/Add", [y, self._branch(call, call.data.branch)])
        if rounded.shift is not None:
            bias = self._shifted_bias(call, rounded.shift, bias)
        return y if bias is None else self.op(call, "bias/Add", [y, bias])

    def _branch(self, call: Call, branch: Branch) -> ir.Value:
        """Write (x down^T) up^T in float; x is the layer's input in its basis."""
        layer, x = call.site.layer, self._input(call)
        down, up = branch.down_RK.numpy(), branch.up_NR.numpy()
        if call.op == "linear":
            low = self.op(call, f"{BRANCH}/down/MatMul", [x, self.constant(f"{layer}/{BRANCH}/down", down.T)])
            return self.op(call, f"{BRANCH}/up/MatMul", [low, self.constant(f"{layer}/{BRANCH}/up", up.T)])
        down = down.reshape(-1, *call.site.weight_shape[1:])
        window = dict(call.site.product.attributes)
        low = self.op(call, f"{BRANCH}/down/Conv", [x, self.constant(f"{layer}/{BRANCH}/down", down)], window)
        up = up.reshape(*up.shape, *[1] * call.spatial_axes)
        return self.op(call, f"{BRANCH}/up/Conv", [low, self.constant(f"{layer}/{BRANCH}/up", up)])

    def _rounded_input(self, call: Call, entering: Entering) -> Rounded:
        """Write the rounding of (x - shift) / amax, once for all layers that read the input."""
        key, x = call.input_key, self._input(call)
        if key is None:
            return Rounded(x)
        if key not in self._inputs:
            x = self._padded(call, x)
            unit, amax, shift = (
                self._by_token(call, x, key[1].shifted)
                if call.data.tables.amax_T is None
                else self._by_step(call, x, call.data.tables.amax_T.numpy())
            )
            shape = (x if call.zeros else call.site.x).shape
            self._inputs[key] = Rounded(entering(self, call, unit, shape), amax, shift)
        return self._inputs[key]

    def _input(self, call: Call) -> ir.Value:
        """Return the layer's input, (x * d) H where it is balanced, shared by all layers that read it in this basis."""
        balance = call.data.balance
        if balance is None:
            return call.site.x
        if call.basis not in self._balanced:
            channels, scale = len(balance.scale_C), call.of_channels(balance.scale_C.numpy())
            y = self.op(call, f"{BASIS}/Mul", [call.site.x, self.constant(f"{call.site.layer}/balance", scale)])
            self.scales.append(ChannelScale(call.site.layer, y, scale))
            self._balanced[call.basis] = y if balance.block == 1 else self._rotated(call, y, channels, balance.block)
        return self._balanced[call.basis]

    def _padded(self, call: Call, x: ir.Value) -> ir.Value:
        """Return x with the convolution's zeros around it if x is shifted, so that they are shifted and rounded too."""
        if not call.zeros:
            return x
        half = len(call.zeros) // 2
        before, after = ([0, 0, *call.zeros[:half]], [0, 0, *call.zeros[half:]])
        pads = self.constant(f"input/pads/{'x'.join(map(str, call.zeros))}", np.array([*before, *after]))
        y = self.op(call, "input/Pad", [x, pads])
        if (shape := call.site.x.shape) is not None:
            y.type = ir.TensorType(ir.DataType.FLOAT)
            sizes = zip(shape, before, after, strict=True)
            y.shape = ir.Shape([n + a + b if isinstance(n, int) else (None if a + b else n) for n, a, b in sizes])
        return y

    def _rotated(self, call: Call, x: ir.Value, channels: int, block: int) -> ir.Value:
        """Write x H: a product of blocks of the last axis, or a convolution of 1 x 1 by groups of channels."""
        groups, h = channels // block, hadamard(block).numpy()
        if call.op == "conv":
            kernel = np.tile(h, (groups, 1)).reshape(channels, block, *[1] * call.spatial_axes)
            constant = self.constant(f"balance/hadamard/{'x'.join(map(str, kernel.shape))}", kernel)
            return self.op(call, f"{BASIS}/Conv", [x, constant], {"group": groups})
        assert call.site.x.shape is not None  # the exporter knows at least the number of axes of a linear layer's input
        kept = [0] * (len(call.site.x.shape) - 1)  # 0 keeps the axis's size
        shapes = {"blocks": [*kept, groups, block], "channels": [*kept, channels]}
        split, join = (self.constant(f"balance/{n}/{'x'.join(map(str, s))}", np.array(s)) for n, s in shapes.items())
        x = self.op(call, f"{BASIS}/blocks/Reshape", [x, split])
        x = self.op(call, f"{BASIS}/MatMul", [x, self.constant(f"balance/hadamard/{block}", h)])
        return self.op(call, f"{BASIS}/channels/Reshape", [x, join])

    def _by_token(self, call: Call, x: ir.Value, shifted: bool) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Write (x - c) / a; a is half the width, at least 1e-7, and c the middle of the range over the last axis.

        Without a shift: x / a, a = max(max|x|, 1e-7).
        """
        shift = None
        axes, keep = self.constant("token/axes", np.array([-1])), {"keepdims": 1}
        if shifted:
            high, low = (self.op(call, reduction, [x, axes], keep) for reduction in ("ReduceMax", "ReduceMin"))
            half = self.constant("token/half", np.float32(0.5))
            shift = self.op(call, "middle/Mul", [self.op(call, "middle/Add", [high, low]), half])
            largest = self.op(call, "width/Mul", [self.op(call, "width/Sub", [high, low]), half])
            x = self.op(call, "shift/Sub", [x, shift])
        else:
            largest = self.op(call, "ReduceMax", [self.op(call, "Abs", [x]), axes], keep)
        # Max, not an addition: optimizers remove an addition of 1e-8 or less
        amax = self.op(call, "Max", [largest, self.constant("token/eps", np.float32(TOKEN_EPS))])
        if call.data.tables.factor_T is not None:
            table = self.constant(f"{call.site.layer}/factor", call.data.tables.factor_T.numpy())
            amax = self.op(call, "factor/Mul", [amax, self.op(call, "factor/Gather", [table, self.step])])
        return self.op(call, "Div", [x, amax]), amax, shift

    def _by_step(
        self, call: Call, x: ir.Value, amax_T: NDArray[np.float32]
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Write (x - c_t) * r_t and return it with a_t and c_t; r_t = float32(1 / a_t).

        If there is one magnitude for all steps, a and r are constants, and no step is read.
        """
        shift = None
        amax_T = np.maximum(amax_T, np.float32(TOKEN_EPS))
        inverse = self.constant(f"{call.site.layer}/inverse", np.float32(1) / amax_T)
        table = self.constant(f"{call.site.layer}/amax", amax_T)
        if call.data.tables.shift_T is not None and call.subtracted:
            middle = self.constant(f"{call.site.layer}/shift", call.data.tables.shift_T.numpy())
            shift = self.op(call, "shift/Gather", [middle, self.step])
            x = self.op(call, "shift/Sub", [x, shift])
        if not amax_T.ndim:
            return self.op(call, "Mul", [x, inverse]), table, shift
        r = self.op(call, "inverse/Gather", [inverse, self.step])
        return self.op(call, "Mul", [x, r]), self.op(call, "amax/Gather", [table, self.step]), shift

    def _rounded_output(self, call: Call, y: ir.Value) -> ir.Value:
        """Write DQ(Q(y, s_t), s_t * a_t) directly after the product, which then reads and writes codes."""
        amax_T, output_amax_T = call.data.tables.amax_T, call.data.tables.output_amax_T
        assert amax_T is not None  # a scheme rounds its output only where its input has one scale for each step
        assert output_amax_T is not None
        scale_T = output_scale(output_amax_T, amax_T).numpy()
        magnitude_T = np.maximum(amax_T.numpy(), np.float32(TOKEN_EPS))
        tables = {"": scale_T, "amax/": scale_T * magnitude_T}
        scale, product = (
            self.op(call, f"output/{n}Gather", [self.constant(f"{call.site.layer}/output/{n}scale", t), self.step])
            for n, t in tables.items()
        )
        zero = self.constant("input/zero", self.input_zero)
        codes = self.op(call, "output/QuantizeLinear", [y, scale, zero])
        return self.op(call, "output/DequantizeLinear", [codes, product, zero])

    def _shared_out(self, call: Call, y: ir.Value, share_N: NDArray[np.float32]) -> ir.Value:
        """Write y * share + b of a rounded product, for each channel, in one pass.

        The operator is a BatchNormalization with mean 0 and variance 1: ONNX Runtime takes half as long as with Mul and
        Add.
        """
        n = len(share_N)
        share = self.constant(f"{call.site.layer}/output/share", share_N)
        zeros, ones = (self.constant(f"output/{v}/{n}", np.full(n, v, np.float32)) for v in (0, 1))
        bias = zeros if call.site.bias is None else call.site.bias
        return self.op(call, "output/BatchNormalization", [y, share, bias, zeros, ones], {"epsilon": 0.0})

    def _bias(self, call: Call, bias: ir.Value) -> ir.Value:
        """Return the bias, (N,), or (1, N, 1, ...) for a convolution: it is added after the multiplication by amax."""
        if call.op == "linear" or bias.const_value is None:
            return bias
        return self.constant(f"{call.site.layer}/bias", call.of_channels(bias.const_value.numpy()))

    def _shifted_bias(self, call: Call, shift: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Write c * rowsum(w_hat) + b: the part of the product that the shift of the input removed, and the bias."""
        rowsum = (call.eight_bit_codes_NK.sum(1, dtype=np.int64) * call.scale_NG[:, 0]).astype(np.float32)
        table = self.constant(f"{call.site.layer}/rowsum", call.of_channels(rowsum))
        taken = self.op(call, "shift/Mul", [shift, table])
        return taken if bias is None else self.op(call, "shift/Add", [taken, bias])


Product: TypeAlias = Callable[[Writer, Call, ir.Value], ir.Value]
"""Function that writes the product of a call and its rounded input."""
Entering: TypeAlias = Callable[[Writer, Call, ir.Value, ir.Shape | None], ir.Value]
"""Function that writes the rounding of a call's input, which was divided by its magnitude and has this shape."""
