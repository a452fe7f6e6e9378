"""Decibels of hand-made samples."""

import math

import pytest
import torch

from intaglio.pipeline.numerics.quality import decibels, mean_squared_error, psnr_db, sqnr_db


def test_psnr_is_of_samples_whose_range_is_2():
    assert psnr_db(0.04) == pytest.approx(20.0, abs=1e-12)  # 10 log10(2^2 / 0.2^2)
    assert psnr_db(0.0) == math.inf
    assert psnr_db(torch.tensor([0.04, 0.0004])).tolist() == pytest.approx([20.0, 40.0], abs=1e-5)  # float32
    assert decibels(1000.0) == pytest.approx(30.0, abs=1e-12)


def test_each_sample_has_its_own_error_and_equal_samples_have_206_db():
    reference = torch.full((2, 1, 2, 2), 0.5)
    samples = torch.stack([reference[0], reference[1] + 0.05])
    mse = mean_squared_error(samples, reference)
    assert mse.tolist() == pytest.approx([1e-20, 0.0025], rel=1e-5)
    assert psnr_db(mse).tolist() == pytest.approx([206.02, 32.04], abs=0.01)  # 10 log10(4 / 0.0025) = 32.04
    assert sqnr_db(mse, reference)[1].item() == pytest.approx(20.0, abs=1e-4)  # 10 log10(0.25 / 0.0025)
