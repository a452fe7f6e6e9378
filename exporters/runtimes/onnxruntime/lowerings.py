"""Writes each scheme so that ONNX Runtime multiplies integers where it can."""

from intaglio.exporters.qdq.lowering import (
    Lowering,
    blocks,
    per_channel,
    two_level_cast,
    with_shifts,
)

_TWO_LEVEL = ("w4a8_token", "w4a8_step", "w4a4_token", "w4a4_step")

LOWERINGS = with_shifts(
    (
        Lowering(
            "linear",
            "w8a8_token",
            per_channel,
            True,
            "becomes MatMulIntegerToFloat; the token's magnitude is behind it",
        ),
        Lowering(
            "linear",
            "w8a8_step",
            per_channel,
            True,
            "becomes MatMulIntegerToFloat; a bias in a Gemm would keep it in float",
        ),
        Lowering("conv", "w8a8_step", per_channel, False, "exact, but in float: see w8a8o8_step"),
        Lowering("conv", "w8a8o8_step", per_channel, True, "becomes QLinearConv"),
        *(
            Lowering("conv", scheme, two_level_cast, True, "folded when it loads; becomes QLinearConv")
            for scheme in ("w4a8o8_step", "w4a4o8_step")
        ),
        Lowering("linear", "w8a16", per_channel, False, "becomes MatMulNBits: stays 8 bit in memory"),
        Lowering("conv", "w8a16", per_channel, False, "exact; the weight is unpacked when it runs"),
        Lowering("linear", "w4a16", blocks, False, "becomes MatMulNBits: stays 4 bit in memory"),
        Lowering("conv", "w4a16", blocks, False, "exact; the weight is unpacked when it runs"),
        *(
            Lowering("linear", scheme, two_level_cast, True, "folded when it loads: executed as w8a8")
            for scheme in _TWO_LEVEL
        ),
        *(
            Lowering("conv", scheme, two_level_cast, False, "exact, but in float, as w8a8_step")
            for scheme in ("w4a8_step", "w4a4_step")
        ),
    )
)
