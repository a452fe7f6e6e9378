"""Write each scheme so that ONNX Runtime multiplies integers where it can."""

from intaglio.exporters.qdq.lowering import (
    TWO_LEVEL,
    TWO_LEVEL_STEP,
    W4A16,
    W8GA16,
    Lowering,
    blocks,
    per_channel,
    two_level_cast,
    with_shifts,
)
from intaglio.pipeline.formats.schemes import (
    W7A8_STEP,
    W7A8_TOKEN,
    W8A8_STEP,
    W8A8_TOKEN,
    W8A16,
    with_output,
)

BY_TOKEN, BY_STEP = (W8A8_TOKEN, W7A8_TOKEN), (W8A8_STEP, W7A8_STEP)

LOWERINGS = with_shifts(
    (
        *(
            Lowering(
                "linear",
                scheme,
                per_channel,
                True,
                "becomes MatMulIntegerToFloat; the multiplication by the token's magnitude comes after it",
            )
            for scheme in BY_TOKEN
        ),
        *(
            Lowering(
                "linear",
                scheme,
                per_channel,
                True,
                "becomes MatMulIntegerToFloat; a bias in a Gemm would keep it in float",
            )
            for scheme in BY_STEP
        ),
        *(
            Lowering("conv", scheme, per_channel, False, "exact, but in float: integers need a rounded output")
            for scheme in BY_STEP
        ),
        *(Lowering("conv", with_output(scheme), per_channel, True, "becomes QLinearConv") for scheme in BY_STEP),
        *(
            Lowering("conv", scheme, two_level_cast, True, "folded when it loads; becomes QLinearConv")
            for scheme in map(with_output, TWO_LEVEL_STEP)
        ),
        Lowering("linear", W8A16, per_channel, False, "becomes MatMulNBits: stays 8 bit in memory"),
        Lowering("conv", W8A16, per_channel, False, "exact; the weight is unpacked when it runs"),
        Lowering("linear", W4A16, blocks, False, "becomes MatMulNBits: stays 4 bit in memory"),
        Lowering("linear", W8GA16, blocks, False, "becomes MatMulNBits: stays 8 bit in memory"),
        Lowering("conv", W4A16, blocks, False, "exact; the weight is unpacked when it runs"),
        Lowering("conv", W8GA16, blocks, False, "exact; the weight is unpacked when it runs"),
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
