"""The roofline, with figures that can be worked out on paper."""

import pytest

from intaglio.pipeline.formats.cost import bit_operations, latency_s
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, LayerScheme, w4a8_token, w4a16, with_output
from intaglio.pipeline.formats.target import Device

DEVICE = Device(
    name="paper",
    description="100 GB/s, 10 TFLOPS, 20 TOPS",
    compute_capability="8.7",
    memory_gb=8,
    bandwidth_gb_s=100,
    fp16_tflops=10,
    int8_tops=20,
    source="this test",
)
LINEAR = Layer(name="linear", op="linear", shape=(2000, 1000), bias=False)
CONV = Layer(name="conv", op="conv", shape=(100, 50, 3, 3), bias=True)


@pytest.mark.parametrize(
    ("layer", "scheme", "rows", "expected_s"),
    [
        # memory: (2 * 2e6 weights + 1 * (1000 * 2 + 2000 * 2)) bytes / 100e9
        (LINEAR, FLOAT, 1, 4.006e-5),
        # (2e6 codes + 4 * 2000 scales + 1000 * 1 + 2000 * 2) bytes / 100e9
        (LINEAR, W8A8_TOKEN, 1, 2.013e-5),
        # (2e6 * 4.5 bits + 4 * 2000 + 1000 * 2 + 2000 * 2) bytes / 100e9; the scales of groups are in the 4.5 bits
        (LINEAR, w4a16(64), 1, 1.139e-5),
        # compute: 2 * 10000 * 2e6 operations / 10e12, and / 20e12 on integers
        (LINEAR, FLOAT, 10_000, 4e-3),
        (LINEAR, w4a16(64), 10_000, 4e-3),
        (LINEAR, W8A8_TOKEN, 10_000, 2e-3),
        # compute: 2 * 4096 pixels * 100 * 450 / 20e12; the input is 4096 * 50 bytes, not 9 times as many
        (CONV, W8A8_STEP, 4096, 1.8432e-5),
        # memory: (45000 codes + 4 * 100 scales + 4 * 100 biases + 4 * 50 + 4 * 100 * 2) bytes / 100e9
        (CONV, W8A8_STEP, 4, 4.68e-7),
        # the output in codes: 4 * 100 bytes less
        (CONV, with_output(W8A8_STEP), 4, 4.64e-7),
    ],
)
def test_a_layer_takes_what_its_bytes_or_its_operations_take(
    layer: Layer, scheme: LayerScheme, rows: int, expected_s: float
) -> None:
    assert latency_s(layer, scheme, rows, DEVICE) == pytest.approx(expected_s, rel=1e-12)


@pytest.mark.parametrize(("scheme", "bits"), [(FLOAT, 256), (W8A8_TOKEN, 64), (w4a16(64), 64), (w4a8_token(64), 32)])
def test_bit_operations_are_products_times_bits_of_both_operands(scheme: LayerScheme, bits: int) -> None:
    assert bit_operations(LINEAR, scheme, 10) == 10 * 2000 * 1000 * bits
    assert bit_operations(CONV, scheme, 10) == 10 * 100 * 50 * 9 * bits
