"""Pack two 4-bit codes into each byte, low nibble first: the layout of ONNX INT4."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack codes in [-8, 7] of any shape into bytes ((size + 1) // 2,); an odd tail is padded with zero.

    >>> pack_int4(np.array([1, -1, 7], np.int8)).tolist() == [0xF1, 0x07]
    True
    """
    flat = codes.reshape(-1)
    if flat.size and (flat.min() < -8 or flat.max() > 7):
        raise ValueError(f"4-bit codes are in [-8, 7], got [{flat.min()}, {flat.max()}]")
    nibbles = np.zeros(flat.size + flat.size % 2, np.uint8)
    nibbles[: flat.size] = flat.astype(np.uint8) & np.uint8(0x0F)
    return nibbles[0::2] | (nibbles[1::2] << np.uint8(4))


def unpack_int4(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Return the codes, of this shape, that `pack_int4` packed.

    >>> unpack_int4(np.array([0xF1, 0x07], np.uint8), (3,))
    array([ 1, -1,  7], dtype=int8)
    """
    size = int(np.prod(shape))
    if packed.size != (size + 1) // 2:
        raise ValueError(f"{packed.size} bytes cannot hold {size} 4-bit codes of shape {shape}")
    nibbles = np.empty(packed.size * 2, np.uint8)
    nibbles[0::2], nibbles[1::2] = packed & 0x0F, packed >> 4
    return ((nibbles[:size] ^ 8).astype(np.int8) - 8).reshape(shape)
