import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler
from tiny import tiny_unet

from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.formats.schemes import W8A8_STEP, with_shift
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.numerics.quality import SampleRange
from intaglio.pipeline.numerics.step_tables import largest_of_repeated, refine, resample_linear, resample_magnitude

KNOWN = (900.0, 500.0, 100.0)


def test_magnitudes_are_interpolated_in_their_logarithm():
    table = torch.tensor([8.0, 2.0, 0.5])
    found = resample_magnitude(table, KNOWN, (900.0, 700.0, 500.0, 300.0, 200.0, 100.0))
    assert found.tolist() == pytest.approx([8.0, 4.0, 2.0, 1.0, 2**-0.5, 0.5], rel=1e-6)


def test_middles_are_interpolated_as_they_are():
    table = torch.tensor([-3.0, 1.0, 0.0])
    found = resample_linear(table, KNOWN, (900.0, 700.0, 400.0, 100.0))
    assert found.tolist() == pytest.approx([-3.0, -1.0, 0.75, 0.0])


@pytest.mark.parametrize("resample", [resample_magnitude, resample_linear])
def test_beyond_what_was_measured_the_end_holds(resample):
    assert resample(torch.tensor([8.0, 2.0, 0.5]), KNOWN, (999.0, 901.0, 99.0, 0.0)).tolist() == [8.0, 8.0, 0.5, 0.5]


def test_measured_entries_stay_to_the_bit():
    table = torch.rand(3, generator=torch.Generator().manual_seed(0))
    for resample in (resample_magnitude, resample_linear):
        assert torch.equal(resample(table, KNOWN, KNOWN), table)
        assert torch.equal(resample(table, KNOWN, refine(KNOWN, 3))[::4], table)


def test_interpolation_is_monotone_where_the_table_is():
    found = resample_magnitude(torch.tensor([8.0, 2.0, 0.5]), KNOWN, refine(KNOWN, 20))
    assert (found.diff() < 0).all()


def test_a_magnitude_of_zero_is_near_zero_beside_it_too():
    found = resample_magnitude(torch.tensor([0.0, 1.0]), (900.0, 500.0), (900.0, 899.9, 500.0))
    assert found[0] == 0
    assert 0 < found[1] < 2e-7
    assert found[2] == 1


def test_finer_timesteps():
    assert refine((900.0, 500.0, 400.0), 0) == (900.0, 500.0, 400.0)
    assert refine((900.0, 500.0, 400.0), 3) == (900.0, 800.0, 700.0, 600.0, 500.0, 475.0, 450.0, 425.0, 400.0)
    assert refine((900.0, 500.0, 500.0, 400.0), 1) == (900.0, 700.0, 500.0, 500.0, 450.0, 400.0)
    assert refine((7.0,), 5) == (7.0,)


def test_calls_at_one_timestep_share_the_largest():
    assert largest_of_repeated(torch.tensor([4.0, 1.0, 3.0, 2.0]), (9.0, 5.0, 5.0, 1.0)).tolist() == [
        4.0,
        3.0,
        3.0,
        2.0,
    ]


def trajectory(timesteps: tuple[float, ...], low: list[float], high: list[float]) -> Trajectory:
    ends = torch.tensor(low), torch.tensor(high)
    amax = torch.maximum(-ends[0], ends[1])
    outputs = torch.stack([amax * 2, amax], 1)  # two channels, the second with half the range
    tables = {"a": amax}, {"a": outputs}, {"a": ends[0]}, {"a": ends[1]}
    return Trajectory(timesteps, {}, torch.zeros(len(low)), *tables, samples=SampleRange(-1.0, 1.0, 0.25))


def test_ranges_at_other_timesteps():
    recorded = trajectory(KNOWN, [-8.0, -1.0, 0.0], [0.0, 2.0, 0.5])
    plain = recorded.tables({"a": W8A8_STEP}, timesteps=(700.0, 300.0, 0.0))["a"]
    assert plain.amax_T.tolist() == pytest.approx([4.0, 1.0, 0.5])
    assert plain.output_amax_T.tolist() == pytest.approx([8.0, 2.0, 1.0])
    assert plain.output_share_N.tolist() == [1.0, 0.5]
    assert plain.shift_T is None
    shifted = recorded.tables({"a": with_shift(W8A8_STEP)}, timesteps=(900.0, 700.0, 500.0, 100.0))["a"]
    assert shifted.amax_T.tolist() == pytest.approx([4.0, 6**0.5, 1.5, 0.25])  # (4 * 1.5) ** 0.5
    assert shifted.shift_T.tolist() == pytest.approx([-4.0, -1.75, 0.5, 0.25])


def test_ranges_of_a_timestep_that_is_called_twice_hold_both_calls():
    recorded = trajectory((900.0, 500.0, 500.0), [-8.0, -1.0, -3.0], [0.0, 2.0, 1.0])
    assert recorded.tables({"a": W8A8_STEP})["a"].amax_T.tolist() == [8.0, 3.0, 3.0]
    shifted = recorded.tables({"a": with_shift(W8A8_STEP)})["a"]
    assert shifted.amax_T.tolist() == [4.0, 2.5, 2.5]
    assert shifted.shift_T.tolist() == [-4.0, -0.5, -0.5]


class Entries:
    """The timesteps of the entries that a sampler's calls pick from a table."""

    def __init__(self, table: tuple[float, ...]) -> None:
        self.clock, self.picked, self.called = StepClock(table), [], []

    def run(self, scheduler, steps: int) -> None:
        model = DenoiserModel(tiny_unet(), scheduler, (3, 8, 8), 4)
        sampler = Sampler(model, steps, 1.0)
        denoise = denoise_with(model.module, model)

        def noted(inputs):
            timestep = float(inputs["timestep"][0])
            self.called.append(timestep)
            self.picked.append(self.clock.timesteps[self.clock.index(timestep)])
            return denoise(inputs)

        sampler.sample(noted, sampler.start(1, torch.Generator().manual_seed(0)))


def test_second_order_and_other_step_counts_pick_the_nearest_entries():
    calibrated = (999.0, 749.0, 499.0, 249.0)
    picks = {
        "heun": Entries(calibrated),
        "dpm++ 2m": Entries(calibrated),
        "kdpm2, finer": Entries(refine(calibrated, 4)),
    }
    picks["heun"].run(HeunDiscreteScheduler(timestep_spacing="trailing"), 4)
    assert picks["heun"].called == [999, 749, 749, 499, 499, 249, 249]
    assert picks["heun"].picked == picks["heun"].called
    picks["dpm++ 2m"].run(DPMSolverMultistepScheduler(timestep_spacing="trailing"), 8)
    assert picks["dpm++ 2m"].called == [999, 874, 749, 624, 499, 374, 249, 124]
    assert picks["dpm++ 2m"].picked == [999, 999, 749, 749, 499, 499, 249, 249]  # halfway: the earlier entry
    picks["kdpm2, finer"].run(KDPM2DiscreteScheduler(timestep_spacing="trailing"), 4)
    assert picks["kdpm2, finer"].called == pytest.approx([999, 881.6, 749, 630.7, 499, 371.3, 249], abs=0.1)
    assert picks["kdpm2, finer"].picked == [999, 899, 749, 649, 499, 349, 249]
