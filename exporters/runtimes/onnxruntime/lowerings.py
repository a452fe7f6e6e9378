"""Write each scheme so that ONNX Runtime multiplies integers where it can."""

from intaglio.exporters.qdq.lowering import (
    TWO_LEVEL,
    TWO_LEVEL_STEP,
    W4A16,
    Lowering,
    blocks,
    per_channel,
    two_level_cast,
    with_shifts,
)
from intaglio.pipeline.formats.schemes import (
    W8A8_STEP,
    W8A8_TOKEN,
    W8A16,
    with_output,
)

LOWERINGS = with_shifts(
    (
        Lowering(
            "linear",
            W8A8_TOKEN,
            per_channel,
            True,
            "becomes MatMulIntegerToFloat; the token's magnitude is behind it",
        ),
        Lowering(
            "linear",
            W8A8_STEP,
            per_channel,
            True,
            "becomes MatMulIntegerToFloat; a bias in a Gemm would keep it in float",
        ),
        Lowering("conv", W8A8_STEP, per_channel, False, "exact, but in float: see w8a8o8_step"),
        Lowering("conv", with_output(W8A8_STEP), per_channel, True, "becomes QLinearConv"),
        *(
            Lowering("conv", scheme, two_level_cast, True, "folded when it loads; becomes QLinearConv")
            for scheme in map(with_output, TWO_LEVEL_STEP)
        ),
        Lowering("linear", W8A16, per_channel, False, "becomes MatMulNBits: stays 8 bit in memory"),
        Lowering("conv", W8A16, per_channel, False, "exact; the weight is unpacked when it runs"),
        Lowering("linear", W4A16, blocks, False, "becomes MatMulNBits: stays 4 bit in memory"),
        Lowering("conv", W4A16, blocks, False, "exact; the weight is unpacked when it runs"),
        *(
            Lowering("linear", scheme, two_level_cast, True, "folded when it loads: executed as w8a8")
            for scheme in TWO_LEVEL
        ),
        *(
            Lowering("conv", scheme, two_level_cast, False, "exact, but in float, as w8a8_step")
            for scheme in TWO_LEVEL_STEP
        ),
    )
)
