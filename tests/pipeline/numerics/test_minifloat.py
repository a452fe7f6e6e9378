"""FP8 and FP4 numbers against ml_dtypes, bit by bit."""

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch

from intaglio.pipeline.formats.fp8 import Fp8Weight
from intaglio.pipeline.numerics.minifloat import E2M1, E4M3
from intaglio.pipeline.numerics.rounding import fit_clipped, rounds_to

FORMATS = pytest.mark.parametrize(
    ("own", "dtype"), [(E4M3, ml_dtypes.float8_e4m3fn), (E2M1, ml_dtypes.float4_e2m1fn)], ids=["E4M3", "E2M1"]
)


@FORMATS
def test_all_numbers_are_those_of_ml_dtypes_in_the_order_of_their_codes(own, dtype):
    numbers = np.arange(own.high + 1, dtype=np.uint8).view(dtype).astype(np.float32)
    assert np.array_equal(own.numbers.numpy(), numbers)
    codes = torch.arange(-own.high, own.high + 1, dtype=torch.int8)
    decoded = own.decode(codes)
    assert np.array_equal(oracle.places(decoded.numpy(), dtype), codes.numpy())
    assert torch.equal(own.encode(decoded), codes)


@FORMATS
def test_rounding_is_to_the_nearest_ties_to_even_and_saturates(own, dtype):
    ties = (own.numbers[1:] + own.numbers[:-1]) / 2
    random = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.0, own.largest * 1.02, 1e30, torch.inf])
    x = torch.cat([ties, ties * (1 + 2.0**-20), ties * (1 - 2.0**-20), ends, *(random * s for s in (1e-3, 0.1, 1, 99))])
    x = torch.cat([x, -x])
    nearest = own.nearest(x)
    assert np.array_equal(nearest.numpy(), oracle.nearest(x.numpy(), dtype))
    assert np.array_equal(own.encode(nearest).numpy(), oracle.places(nearest.numpy(), dtype))


def test_some_codes_as_they_are_written_by_hand():
    x = torch.tensor([448.0, 449.0, -1.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 0.1, -17.0])
    assert Fp8Weight().elements(E4M3.encode(E4M3.nearest(x))).view(np.uint8).tolist() == [
        *(0x7E, 0x7E, 0xB8, 0x01, 0x00, 0x02, 0x1D, 0xD8),
    ]
    assert E2M1.encode(E2M1.nearest(torch.tensor([5.0, 5.01, 0.25, 0.75, 1.75, -2.5]))).tolist() == [6, 7, 0, 2, 4, -4]


def test_the_gradient_is_one_inside_the_range_and_zero_outside():
    x = torch.tensor([0.3, -447.0, 449.0, -1e5], requires_grad=True)
    E4M3.nearest(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_an_fp8_weight_has_the_codes_of_the_oracle_and_is_stored_as_float8():
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 1, 24).unsqueeze(1)
    form = Fp8Weight()
    scale, group = form.fit(w)
    assert group is None
    assert torch.equal(scale[:, 0], w.abs().amax(1) / 448)
    codes = form.quantize(w, scale)
    expected = oracle.nearest(w.numpy() / scale.numpy(), ml_dtypes.float8_e4m3fn)
    assert np.array_equal(codes.numpy(), oracle.places(expected, ml_dtypes.float8_e4m3fn))
    assert codes.abs().amax(1).tolist() == [126] * 24
    stored = form.pack(codes)
    assert (stored.dtype, stored.nbytes) == (torch.float8_e4m3fn, 24 * 40)
    assert torch.equal(form.unpack(stored, (24, 40)), codes)
    assert torch.equal(form.fake_quantize(w, scale), form.dequantize(codes, scale))
    assert np.array_equal(form.dequantize(codes, scale).numpy(), expected * scale.numpy())


def test_a_stored_fp8_weight_with_nan_is_refused():
    with pytest.raises(ValueError, match="an FP8 weight has NaN"):
        Fp8Weight().unpack(torch.full((2, 3), torch.nan).to(torch.float8_e4m3fn), (2, 3))


def test_scales_are_searched_and_starts_are_taken_on_the_grid_of_the_numbers():
    form, w = Fp8Weight(), torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    largest = form.fit(w)[0]

    def error(scale):
        return (form.fake_quantize(w, scale) - w).square().sum(1)

    assert (error(fit_clipped(w, form.grid)) <= error(largest)).all()
    codes = form.quantize(w, largest)
    assert torch.equal(rounds_to(codes, w, largest, form.grid, 0.0), form.dequantize(codes, largest))
    near = rounds_to(codes, w, largest, form.grid, 1e-3)
    assert torch.equal(form.quantize(near, largest), codes)
