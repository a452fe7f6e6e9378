"""Properties that hold for any numbers: zeros, denormals, constants and large ones among them."""

import numpy as np
import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from torch import nn

from intaglio.pipeline.formats.schemes import W8A8_TOKEN, LayerScheme, w4a4_token, w4a8_token
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.packing import pack_int4, unpack_int4
from intaglio.pipeline.simulation.layer import QuantizedLayer

NUMBERS = st.sampled_from([0.0, 1e-45, -1e-39, 1e-7, 1.0, -1.0, 0.5, 1e6, -1e6]) | st.floats(-1e6, 1e6, width=32)
few = settings(deadline=None, max_examples=40)


@few
@given(arrays(np.int8, array_shapes(min_side=0), elements=st.integers(-8, 7)))
def test_any_four_bit_codes_come_back(codes: NDArray[np.int8]) -> None:
    packed = pack_int4(codes)
    assert packed.nbytes == -(-codes.size // 2)
    assert np.array_equal(unpack_int4(packed, codes.shape), codes)


@few
@given(
    arrays(np.float32, (3, 32), elements=NUMBERS),
    arrays(np.float32, (4, 32), elements=NUMBERS),
    st.sampled_from([W8A8_TOKEN, w4a8_token(16), w4a4_token(16)]),
)
def test_a_layer_of_any_numbers_equals_the_oracle(
    w: NDArray[np.float32], x: NDArray[np.float32], scheme: LayerScheme
) -> None:
    base = nn.Linear(32, 3).requires_grad_(False)
    base.weight.data = torch.from_numpy(w.copy())
    layer = QuantizedLayer(base, scheme, StepClock((1.0,)))
    scale, codes = layer.weight_rounding.scale.detach().numpy()[:, 0], layer.weight_codes().numpy()
    if layer.weight_rounding.group is not None:
        group = layer.weight_rounding.group.detach().numpy()
        four, codes = oracle.two_level_codes(w, scale, group, 16)
        assert np.array_equal(layer.weight_codes().numpy(), four)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    high = 7 if scheme.input_bits == 4 else 127
    x_codes, y, *_ = oracle.layer(x, codes, scale, base.bias.numpy(), high=high)
    assert np.array_equal(layer.input_codes(torch.from_numpy(x))[0].numpy(), x_codes)
    magnitude = np.abs(x).max(-1, keepdims=True) * (np.abs(codes) * 1.0).sum(1) * scale  # of a row's largest sum
    assert (np.abs(layer(torch.from_numpy(x)).numpy() - y) <= 1e-5 * magnitude + 1e-6).all()
