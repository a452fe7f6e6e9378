import numpy as np
import pytest

from intaglio.pipeline.numerics.packing import pack_int4, unpack_int4


def test_low_nibble_comes_first():
    assert pack_int4(np.array([1, -1, -8, 7, 3], np.int8)).tolist() == [0xF1, 0x78, 0x03]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 6), (0,)])
def test_round_trip(shape: tuple[int, ...]):
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    assert np.array_equal(unpack_int4(pack_int4(codes), shape), codes)


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"4-bit codes are in \[-8, 7\], got \[-9, 8\]"):
        pack_int4(np.array([-9, 8], np.int8))


def test_wrong_byte_count_is_refused():
    with pytest.raises(ValueError, match="2 bytes cannot hold 6 4-bit codes"):
        unpack_int4(np.zeros(2, np.uint8), (2, 3))
