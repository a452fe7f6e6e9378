import pytest
from _four_bits_peers import PEERS
from efficientdm import ROUNDED
from four_bits import BRANCHED_DISTILLED, DISTILLED, derived

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.nvfp4 import NVFP4_STEP
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN

LAYERS = (
    Layer(name="four", op="linear", shape=(64, 64), bias=True),
    Layer(name="eight", op="linear", shape=(64, 64), bias=True),
    Layer(name="conv", op="conv", shape=(8, 8, 3, 3), bias=True),
    Layer(name="off", op="linear", shape=(64, 64), bias=True),
)
SCHEMES = {"four": NVFP4_STEP, "eight": W8A8_TOKEN, "conv": W8A8_STEP, "off": FLOAT}


def test_a_peer_has_its_formats_where_our_plan_has_them() -> None:
    config = PEERS["NVFP4"]["NVFP4 SVDQuant, rank 8"].config(QuantPlan(LAYERS, SCHEMES))
    first, *entries = config["quant_cfg"]
    assert first == {"quantizer_name": "*", "enable": False}
    bits = {entry["quantizer_name"]: entry["cfg"]["num_bits"] for entry in entries}
    assert bits == {
        "four.weight_quantizer": (2, 1),
        "four.input_quantizer": (2, 1),
        **{f"{layer}.{part}_quantizer": 8 for layer in ("eight", "conv") for part in ("weight", "input")},
    }
    assert config["algorithm"] == {"method": "svdquant", "lowrank": 8, "skip_layers": ["eight", "conv"]}


def row(psnr_db: float, mse: float = 1.0, size: int = 10, *, narrow: bool = True) -> list[dict[str, object]]:
    return [{"psnr_db": psnr_db, "output_mse": mse, "bytes": size, "narrow": narrow}]


def test_ours_is_compared_with_the_best_peer_that_is_not_smaller_and_has_inputs_of_four_bits() -> None:
    rows = {
        "W8A8": {ROUNDED: row(40.0, 0.1)},
        "FP8": {ROUNDED: row(39.5, 0.2)},
        "NVFP4": {
            ROUNDED: row(25.0, 1.0),
            DISTILLED: row(31.0, 0.28),
            BRANCHED_DISTILLED: row(32.0, 0.2, 15),
        },
    }
    peers = {
        "FP8": {"default": row(39.0), "by token": row(39.2)},
        "NVFP4": {"plain": row(29.0), "larger": row(28.0, size=20), "float inputs": row(33.0, narrow=False)},
    }
    found = derived(rows, peers)
    assert (found["nvfp4_best_peer"], found["nvfp4_branch_best_peer"]) == ("plain", "larger")
    assert found["nvfp4_gain_over_best_peer_db"] == pytest.approx(2)
    assert found["nvfp4_branch_gain_over_best_peer_db"] == pytest.approx(4)
    assert found["nvfp4_recovered"] == pytest.approx(0.9)
    assert found["fp8_gain_over_w8a8_db"] == pytest.approx(-0.5)
    assert found["fp8_gain_over_best_peer_db"] == pytest.approx(0.3)
