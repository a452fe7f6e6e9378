from importlib.metadata import EntryPoint

import pytest
import torch

from intaglio.passes.sensitivity.metrics import ConditionSwap, Edges, RelativeError, Structure, Temporal
from intaglio.pipeline.contract.metric import MetricContext
from intaglio.pipeline.entry_points import METRICS
from intaglio.pipeline.errors import ContractError, RecipeError
from intaglio.pipeline.runs.registry import find_metric, named_metrics

PAIRS = MetricContext(partner=torch.tensor([1, 0]))


@pytest.fixture
def _points(monkeypatch):
    """Two metrics, as a distribution would bring them."""
    points = [
        EntryPoint("edges", "intaglio.passes.sensitivity.metrics:Edges", METRICS),
        EntryPoint("none", "intaglio.pipeline.contract.metric:MetricContext", METRICS),
    ]
    monkeypatch.setattr("intaglio.pipeline.entry_points.entry_points", lambda group: points if group == METRICS else [])
    named_metrics.cache_clear()
    yield
    named_metrics.cache_clear()


def ramp(*shape):
    return torch.arange(float(torch.tensor(shape).prod())).reshape(shape)


@pytest.mark.parametrize("metric", [RelativeError(), Edges(), ConditionSwap(), Temporal(), Structure()])
def test_equal_outputs_have_no_error_and_noise_has(metric):
    video = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert metric.applies(video, PAIRS)
    assert metric.compare(video, video, PAIRS).abs().max() < 1e-6
    noise = 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    small, large = (metric.compare(video + size * noise, video, PAIRS) for size in (1, 3))
    assert small.shape == (2,)
    assert (small > 0).all()
    assert (2 * small < large).all()


def test_relative_error_is_per_row_of_the_mean_energy():
    reference, off = torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    assert RelativeError().compare(reference + off, reference, PAIRS).tolist() == [1.0, 0.0]


def test_edges_see_no_constant_and_the_condition_swap_no_common_change():
    picture = ramp(2, 1, 4, 4)
    assert Edges().compare(picture + 5, picture, PAIRS).tolist() == [0, 0]
    assert ConditionSwap().compare(picture + ramp(4, 4), picture, PAIRS).tolist() == [0, 0]
    # the response halves: (0.5 d)^2 / d^2
    halved = torch.stack([picture[0], (picture[0] + picture[1]) / 2])
    assert ConditionSwap().compare(halved, picture, PAIRS).tolist() == [0.25, 0.25]


def test_temporal_error_sees_frames_that_jump_and_none_that_move_together():
    video = ramp(1, 2, 3, 2, 2)
    together, jumping = video + 7, video.clone()
    jumping[:, :, 1] += 7
    assert Temporal().compare(together, video, PAIRS).item() == 0
    # differences of frames are 4, one of two is off by 7 and the other by -7
    assert Temporal().compare(jumping, video, PAIRS).item() == pytest.approx(49 / 16)
    by_channel = MetricContext(frame_axis=1)
    assert Temporal().compare(together.transpose(1, 2), video.transpose(1, 2), by_channel).item() == 0


def test_structure_is_lost_where_a_picture_turns_into_its_negative():
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    assert Structure().compare(-picture, picture, PAIRS).item() > 1
    assert Structure().compare(picture + 0.05, picture, PAIRS).item() < 0.1


def test_what_a_metric_does_not_apply_to():
    tokens, picture = torch.randn(2, 5, 8), torch.randn(2, 3, 8, 8)
    assert not Edges().applies(tokens, PAIRS)
    assert not Structure().applies(tokens, PAIRS)
    assert not Temporal().applies(picture, PAIRS)
    assert not ConditionSwap().applies(picture, MetricContext())
    assert not ConditionSwap().applies(picture[:1].expand(2, -1, -1, -1), PAIRS)  # it does not respond


@pytest.mark.usefixtures("_points")
def test_metrics_are_found_by_name():
    assert isinstance(find_metric("edges"), Edges)
    with pytest.raises(RecipeError, match="no metric 'edge': did you mean 'edges'"):
        find_metric("edge")
    with pytest.raises(ContractError, match="MetricContext does not define applies, compare"):
        find_metric("none")


def test_our_own_metrics_are_found_by_name():
    assert {"mse", "structure", "edges", "condition-swap", "temporal"} <= set(named_metrics())
