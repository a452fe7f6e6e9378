"""Every benchmark can be imported: the names that it takes from intaglio are there. Some of their own arithmetic."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "samples/benchmarks").glob("*.py") if path.stem[0] != "_"
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    assert callable(getattr(import_module(name), "main", None)) or name == "tiny_families"  # factories


def test_the_denoiser_classes_of_diffusers_are_listed_with_their_tiny_models() -> None:
    families = import_module("families")
    classes = families.denoiser_classes()
    assert {"UNet2DConditionModel", "FluxTransformer2DModel", "WanTransformer3DModel"} <= classes.keys()
    assert not {"AutoencoderKL", "ControlNetModel", "T2IAdapter"} & classes.keys()
    model = families.OTHERS["stable_audio"]()
    assert type(model.module).__name__ in classes


def test_samples_are_compared_in_their_own_range_without_clamping() -> None:
    quality = import_module("real_networks").quality
    reference = torch.tensor([[0.0, 10.0], [6.0, 8.0]])
    found = quality(reference + torch.tensor([[0.1], [1.0]]), reference, peak=10.0)
    assert found["psnr_db"] == pytest.approx((40 + 20) / 2, abs=1e-3)
    assert found["psnr_min_db"] == pytest.approx(20, abs=1e-3)
    assert found["sqnr_db"] == pytest.approx((36.99 + 16.99) / 2, abs=1e-2)  # mean squares 50, errors 0.01 and 1
