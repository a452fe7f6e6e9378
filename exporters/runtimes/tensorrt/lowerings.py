"""Write each scheme so that TensorRT and TensorRT-RTX multiply integers where they can."""

from intaglio.exporters.qdq.lowering import (
    TWO_LEVEL,
    TWO_LEVEL_STEP,
    W4A16,
    Lowering,
    blocks,
    carrier,
    fp8_input,
    nvfp4_blocks,
    nvfp4_input,
    per_channel,
    two_level_carrier,
    two_level_channels,
    with_shifts,
)
from intaglio.pipeline.formats.fp8 import FP8_STATIC, FP8_STEP, FP8_TOKEN
from intaglio.pipeline.formats.nvfp4 import NVFP4_STATIC, NVFP4_STEP, NVFP4A16
from intaglio.pipeline.formats.schemes import (
    W7A8_STEP,
    W7A8_TOKEN,
    W8A8_STEP,
    W8A8_TOKEN,
    W8A16,
)

INTEGER = with_shifts(
    (
        *(
            Lowering(
                "linear", scheme, two_level_carrier, True, "an INT8 product; a kernel unpacks the weight in each run"
            )
            for scheme in TWO_LEVEL
        ),
        *(
            Lowering(
                "conv", scheme, two_level_channels, True, "an INT8 convolution; the weight is unpacked in each run"
            )
            for scheme in TWO_LEVEL_STEP
        ),
        *(
            Lowering(
                "linear",
                scheme,
                carrier,
                True,
                "one INT8 product for all layers on one input; scales of channels inside are unsafe in half precision",
            )
            for scheme in (W8A8_TOKEN, W7A8_TOKEN)
        ),
        *(
            Lowering(
                "linear",
                scheme,
                carrier,
                True,
                "as for w8a8_token; both table look-ups are fused into the neighbouring kernels",
            )
            for scheme in (W8A8_STEP, W7A8_STEP)
        ),
        *(
            Lowering(
                "conv",
                scheme,
                per_channel,
                True,
                "becomes an INT8 convolution; scales for each channel are safe there",
            )
            for scheme in (W8A8_STEP, W7A8_STEP)
        ),
        Lowering("linear", W8A16, per_channel, False, "a float product; the weight stays 8 bit in the engine"),
        Lowering("conv", W8A16, per_channel, False, "as for a linear layer"),
        Lowering("linear", W4A16, blocks, False, "one kernel that reads 4 bit; only with a group smaller than K"),
        Lowering(
            "conv",
            W4A16,
            blocks,
            False,
            "in 2-D, as blocks have to lie along the last axis or the one before it; then Reshape",
        ),
    )
)

FLOATS = (
    *(
        Lowering(
            "linear",
            scheme,
            carrier,
            True,
            "an FP8 product on GPUs from Ada on, in the form of w8a8_token; the kernel of the input makes its codes",
            fp8_input,
        )
        for scheme in (FP8_TOKEN, FP8_STEP, FP8_STATIC)
    ),
    *(
        Lowering("conv", scheme, per_channel, True, "an FP8 convolution on GPUs from Ada on", fp8_input)
        for scheme in (FP8_STEP, FP8_STATIC)
    ),
    *(
        Lowering(
            "linear",
            scheme,
            nvfp4_blocks,
            True,
            "an FP4 product on GPUs from Blackwell on; the scales of the input's blocks are measured at run time",
            nvfp4_input,
        )
        for scheme in (NVFP4_STEP, NVFP4_STATIC)
    ),
    Lowering("linear", NVFP4A16, nvfp4_blocks, False, "stays 4 bit in the engine; a kernel unpacks it in each run"),
)
LOWERINGS = (*INTEGER, *FLOATS)
