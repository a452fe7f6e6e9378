"""Every family compiles: half of the matrix that families.py measures for samples/benchmarks/README.md."""

from pathlib import Path

import families
import pytest
from families import ORT, RTX
from tiny_families import FAMILIES

from intaglio import Store

KINDS = ("unet", "policy_unet", "pixart", "ltx")
"""A family of each kind: convolutions in two and in one dimensions, a transformer for pictures, and one for clips."""


def marked() -> list[object]:
    """Name every family; those that are not in KINDS are long tests."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]


@pytest.mark.parametrize("family", marked())
def test_family(family: str, tmp_path: Path):
    """The passes themselves raise where a layer leaves its simulation by more than 1e-4, or codes by more than ties."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: no engine can be built")
    row = families.measure(family, Store(tmp_path), {"w8a8": [ORT], "w4a8": [RTX]})
    assert row.float_error < 1e-5  # the order of float32 sums
    assert row.dynamic.keys() or FAMILIES[family]().other is None
    for plan in row.plans.values():
        assert plan.layers > 0
        assert plan.whole < 0.1  # as far as rounding itself goes: one tie that rounds otherwise moves all that follows
    assert row.plans["w4a8"].int8 == row.plans["w4a8"].layers
    assert row.plans["w4a8"].four_bit > row.plans["w4a8"].layers // 2
