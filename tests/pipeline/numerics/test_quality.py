"""Distances of hand-made samples."""

import math

import pytest
import torch

from intaglio.pipeline.numerics.quality import (
    SampleRange,
    cosine_similarity,
    decibels,
    largest_error,
    mean_squared_error,
    psnr_db,
    sqnr_db,
)


def test_the_peak_is_the_range_of_the_samples():
    samples = SampleRange.of(torch.tensor([[-3.0, 1.0], [0.0, 0.0]]))
    assert samples == SampleRange(-3.0, 1.0, 2.5)
    assert samples.peak == 4.0
    assert samples.psnr_db(0.16) == pytest.approx(20.0, abs=1e-12)  # 10 log10(4^2 / 0.4^2)
    assert samples.sqnr_db(0.25) == pytest.approx(10.0, abs=1e-12)  # 10 log10(2.5 / 0.25)
    assert (samples.psnr_db(0.0), samples.sqnr_db(0.0)) == (math.inf, math.inf)
    assert psnr_db(torch.tensor([0.16, 0.0016]), 4.0).tolist() == pytest.approx([20.0, 40.0], abs=1e-5)  # float32
    assert decibels(1000.0) == pytest.approx(30.0, abs=1e-12)


def test_a_range_of_parts_is_that_of_the_whole():
    whole = torch.tensor([[2.0], [-1.0], [4.0]])
    parts = [SampleRange.of(whole[:2]), SampleRange.of(whole[2:])]
    joined = SampleRange.joined(parts, (2, 1))
    assert (joined.low, joined.high, joined.energy) == (-1.0, 4.0, pytest.approx(7.0))  # (4 + 1 + 16) / 3


def test_constant_samples_have_finite_decibels():
    grey, black = (SampleRange.of(torch.full((2, 1, 2, 2), level)) for level in (0.5, 0.0))
    assert (grey.peak, black.peak) == (1.0, 1.0)
    assert (grey.psnr_db(0.01), black.psnr_db(0.01)) == (pytest.approx(20.0), pytest.approx(20.0))
    assert (grey.sqnr_db(0.0025), black.sqnr_db(0.01)) == (pytest.approx(20.0), pytest.approx(20.0))
    zeros = torch.zeros(1, 1, 2, 2)
    assert sqnr_db(mean_squared_error(zeros, zeros), zeros).tolist() == pytest.approx([200.0], abs=1e-3)


@pytest.mark.parametrize(
    "numbers", [(1.0, -1.0, 0.5), (-1.0, math.inf, 1.0), (math.nan, 1.0, 1.0), (-1.0, 1.0, -0.5), (-1.0, 1.0, math.nan)]
)
def test_numbers_that_no_samples_have_are_refused(numbers):
    with pytest.raises(ValueError, match="no samples range from"):
        SampleRange(*numbers)


def test_each_sample_has_its_own_error_and_equal_samples_have_206_db():
    reference = torch.full((2, 1, 2, 2), 0.5)
    samples = torch.stack([reference[0], reference[1] + 0.05])
    mse = mean_squared_error(samples, reference)
    assert mse.tolist() == pytest.approx([1e-20, 0.0025], rel=1e-5)
    assert psnr_db(mse, 2.0).tolist() == pytest.approx([206.02, 32.04], abs=0.01)  # 10 log10(4 / 0.0025) = 32.04
    assert sqnr_db(mse, reference)[1].item() == pytest.approx(20.0, abs=1e-4)  # 10 log10(0.25 / 0.0025)


def test_errors_outside_of_minus_one_to_one_count():
    reference = torch.tensor([[40.0, -60.0]])
    mse = mean_squared_error(reference + 10.0, reference)
    assert psnr_db(mse, 100.0).tolist() == pytest.approx([20.0], abs=1e-4)
    assert sqnr_db(mse, reference).tolist() == pytest.approx([14.15], abs=0.01)  # 10 log10(2600 / 100)


def test_the_cosine_is_that_of_all_values_of_a_sample():
    reference = torch.tensor([[[3.0], [4.0]], [[1.0], [0.0]], [[0.0], [0.0]], [[0.0], [0.0]]])
    samples = torch.tensor([[[4.0], [3.0]], [[-2.0], [0.0]], [[0.0], [0.0]], [[1.0], [0.0]]])
    found = cosine_similarity(samples, reference)
    assert found.tolist() == pytest.approx([0.96, -1.0, 1.0, 0.0], abs=1e-12)  # 24 / 25; opposite; zeros; one of zeros
    assert largest_error(samples, reference).tolist() == [1.0, 3.0, 0.0, 1.0]


def test_a_cosine_that_float32_would_round_to_one_is_below_one():
    reference = torch.tensor([[1.0, 0.0]])
    (cosine,) = cosine_similarity(reference + torch.tensor([[0.0, 1e-4]]), reference).tolist()
    assert 1 - cosine == pytest.approx(5e-9, rel=1e-3)  # 1 - 1 / sqrt(1 + 1e-8)
