import pytest
import torch
from harness import killed_at_save, run_pass
from quantizing import output_error

from intaglio.passes.calibrate import Calibrate
from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.objective import Split, tensors
from intaglio.passes.merge import MergeAdapters
from intaglio.passes.uniform import UniformPlan
from intaglio.pipeline.artifacts.keys import ADAPTER, MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.schemes import w4a16
from intaglio.pipeline.model.calls import clocked, denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.simulation.model import simulate


@pytest.fixture(scope="module")
def planned(measured, tmp_path_factory):
    step = UniformPlan(schemes=("w4a16", "w8a8_step"))
    return measured | run_pass(step, measured, tmp_path_factory.mktemp("scratch"))


def healed_error(artifacts, folder) -> float:
    """Return the error of the merged model on the recorded calls."""
    return output_error(artifacts | run_pass(MergeAdapters(), artifacts, folder))


def test_every_eighth_sample_is_held_out_and_a_single_one_is_both():
    assert Split.of(16) == Split(tuple(i for i in range(16) if i not in (7, 15)), (7, 15))
    assert Split.of(1) == Split((0,), (0,))


def test_tensors_are_found_in_whatever_a_module_returns():
    x, y = torch.ones(1), torch.zeros(2)
    assert tensors((x, [y, torch.tensor([1])], None)) == [x, y]
    assert tensors({"sample": x}) == [x]


def test_blocks_are_healed_one_after_the_other(planned, tmp_path):
    step = Distill(updates=40, samples=2, rank=4, scope="block", drawn=16)  # four samples of random weights do not tell
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "a")
    healed = planned | run_pass(step, planned, tmp_path / "b")
    assert healed_error(healed, tmp_path / "c") < 0.95 * healed_error(rounded, tmp_path / "d")
    adapters = healed[ADAPTER].layers
    assert len(healed[ADAPTER].loss) == 2 * 40  # the two blocks
    assert {n for n, layer in adapters.items() if layer.a is not None} == {
        n for n in adapters if n.startswith("transformer_blocks.")
    }


def test_killed_between_blocks_it_goes_on(planned, tmp_path):
    step = Distill(updates=20, samples=2, rank=2, scope="block")
    whole = run_pass(step, planned, tmp_path / "whole")[ADAPTER]
    with killed_at_save(2):  # in the second block
        run_pass(step, planned, tmp_path / "killed")
    assert run_pass(step, planned, tmp_path / "killed")[ADAPTER].loss == whole.loss


def test_a_model_without_blocks_cannot_be_healed_by_blocks(tmp_path):
    (tmp_path / "plain.py").write_text(
        "import torch\n"
        "from intaglio.pipeline.model.checkpoint import DenoiserModel\n"
        "from intaglio.pipeline.model.sampler import OneCall\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(64, 64)\n"
        "    def forward(self, sample):\n"
        "        return self.layer(sample)\n"
        "def plain():\n"
        "    torch.manual_seed(0)\n"
        "    return DenoiserModel(Net(), OneCall(), (64,))\n"
    )
    start = {MODEL: Checkpoint.resolve(ModelRef(path="plain.py:plain", sampling_steps=1), tmp_path)}
    start |= run_pass(Calibrate(samples=8), start, tmp_path / "a")
    from intaglio.pipeline.model.layers import layer_table

    layers = layer_table(start[MODEL].open().module)
    start[PLAN] = QuantPlan(layers, {layer.name: w4a16(32) for layer in layers})
    with pytest.raises(RecipeError, match="no lists of blocks"):
        run_pass(Distill(updates=1, scope="block"), start, tmp_path / "b")


def test_features_of_blocks_enter_the_loss_and_the_output_is_still_healed(planned, tmp_path):
    plain = Distill(updates=20, samples=2, rank=4)
    losses = [
        run_pass(plain.model_copy(update={"features": f}), planned, tmp_path / str(f))[ADAPTER].loss for f in (0.0, 0.5)
    ]
    assert losses[1][0] > losses[0][0]
    featured = planned | run_pass(plain.model_copy(update={"features": 0.5, "updates": 40}), planned, tmp_path / "c")
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "d")
    assert healed_error(featured, tmp_path / "e") < 0.95 * healed_error(rounded, tmp_path / "f")


def test_recomputed_activations_train_to_the_same_bits(planned, tmp_path):
    plain, again = (
        run_pass(Distill(updates=5, samples=2, rank=2, recompute=recompute), planned, tmp_path / str(recompute))
        for recompute in (False, True)
    )
    assert plain[ADAPTER].loss == again[ADAPTER].loss
    assert all(torch.equal(plain[ADAPTER].layers[n].b, layer.b) for n, layer in again[ADAPTER].layers.items())


def test_products_in_bfloat16_train_too(planned, tmp_path):
    step = Distill(updates=40, samples=4, rank=4, precision="bfloat16")
    rounded = planned | run_pass(Distill(updates=0), planned, tmp_path / "a")
    trained = planned | run_pass(step, planned, tmp_path / "b")
    assert all(layer.scale_NG.dtype == torch.float32 for layer in trained[ADAPTER].layers.values())
    assert healed_error(trained, tmp_path / "c") < 0.95 * healed_error(rounded, tmp_path / "d")


def test_split_guidance_and_a_late_start_compute_what_whole_calls_do(planned, tmp_path):
    """The step is found from the timestep: neither two calls a step nor a trajectory that begins late move it."""
    artifacts = planned | run_pass(Distill(updates=0), planned, tmp_path / "a")
    model, trajectory = artifacts[MODEL].open(), artifacts[TRAJECTORY]
    clock = simulate(model.module, run_pass(MergeAdapters(), artifacts, tmp_path / "b")[QUANTIZED])
    denoise = denoise_with(model.module, model)
    at_its_step = clocked(denoise, clock, "timestep")
    count = trajectory.outputs.shape[1]
    with torch.no_grad():
        for step in (2, 3):  # as image to image begins
            halves = [at_its_step(trajectory.call(step, rows)) for rows in (slice(count // 2), slice(count // 2, None))]
            with clock.at(step):
                whole = denoise(trajectory.call(step))
            torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-4, atol=1e-5)


def test_the_first_loss_is_weighted_by_what_samples_feel_of_its_step(planned, tmp_path):
    """A relative error e of an output y counts as the squared error that it makes of the samples: |i|^2 |y|^2 e."""
    alike, felt = (
        run_pass(Distill(updates=1, samples=2, rank=2, weighting=weighting), planned, tmp_path / weighting)[ADAPTER]
        for weighting in ("output", "samples")
    )
    trajectory = planned[TRAJECTORY]
    sampler = Sampler(planned[MODEL].open(), 4, 2.0)
    guided = [null + 2 * (given - null) for given, null in (output.chunk(2) for output in trajectory.outputs)]
    influence = sampler.influence(trajectory.inputs["hidden_states"][0][:8], guided)
    felt_of = [i**2 * float(y.square().mean()) for i, y in zip(influence, guided, strict=True)]
    step = int(Context(scratch=tmp_path, seed=0).rng("update", 0).integers(4))
    weight = 4 * felt_of[step] / sum(felt_of)  # 1 on average over the steps
    assert felt.loss[0] == pytest.approx(weight * alike.loss[0], rel=1e-5)  # float32
    assert abs(weight - 1) > 0.1
