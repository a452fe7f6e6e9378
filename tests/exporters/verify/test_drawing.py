"""Samples are drawn until the difference of two implementations is known, those of full precision once for all."""

from dataclasses import replace

import pytest
import torch
from harness import Artifacts, run_pass
from quantizing import with_plan

from intaglio import Store
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.verify.verify import Verify
from intaglio.pipeline.artifacts.keys import TARGET, VERIFICATION
from intaglio.pipeline.artifacts.verification import Verification
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.schemes import W8A8_STEP, W8A8_TOKEN
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.runs.kept import StoreKeep


@pytest.fixture(scope="module")
def compiled(dit: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny transformer in W8A8 for ONNX Runtime."""
    made = with_plan(dit, lambda layer: W8A8_TOKEN if layer.op == "linear" else W8A8_STEP)
    made |= {TARGET: load_target("onnxruntime-cpu")}
    return made | run_pass(ExportQdq(), made, tmp_path_factory.mktemp("qdq"))


def verified(compiled: Artifacts, context: Context, **options: object) -> Verification:
    step = Verify(rows=2, gap_db_tolerance=60, **options)
    wanted = step.requires | (step.wants & compiled.keys())
    state = State({key: compiled[key] for key in wanted}, reader="verify")
    found = step.run(state, context)[VERIFICATION]
    assert isinstance(found, Verification)
    return found


def test_verify_stops_when_the_gap_is_known_and_says_how_many_were_drawn(compiled, tmp_path, caplog):
    caplog.set_level("INFO")
    eight = verified(compiled, Context(tmp_path), samples=20, gap_error_db=100)
    assert eight.figures.samples_drawn == len(eight.samples["deployed"]) == 8
    assert "8 samples: PSNR" in caplog.text
    every = verified(compiled, Context(tmp_path), samples=20, gap_error_db=0)
    assert every.figures.samples_drawn == 20
    for name, samples in eight.samples.items():  # more samples begin with the fewer
        assert torch.equal(every.samples[name][:8], samples), name
    deviation = every.figures.fidelity_gap_error_db * 20**0.5
    limit = deviation / 14**0.5  # of this spread, between 8 and 16 samples are needed: the question is asked every 8
    assert verified(compiled, Context(tmp_path), samples=20, gap_error_db=limit).figures.samples_drawn in (8, 16)


def test_fewer_samples_than_a_round_are_all_drawn(compiled, tmp_path):
    assert verified(compiled, Context(tmp_path), samples=1).figures.samples_drawn == 1
    assert verified(compiled, Context(tmp_path), samples=6, gap_error_db=100).figures.samples_drawn == 6


def test_full_precision_is_drawn_once_for_all_plans_and_targets(compiled, tmp_path, monkeypatch):
    drawn: list[object] = []
    sample = Sampler.sample

    def counted(self, denoise, start):
        drawn.append(denoise)
        return sample(self, denoise, start)

    monkeypatch.setattr(Sampler, "sample", counted)
    context = Context(tmp_path, keep=StoreKeep(Store(tmp_path / "store"), "0" * 64))
    first = verified(compiled, context, samples=16, gap_error_db=0)
    assert len(drawn) == 3 * 4  # three implementations, parts of four
    drawn.clear()
    again = verified(compiled, context, samples=16, gap_error_db=0)
    assert len(drawn) == 2 * 4  # the simulation and the graph
    assert torch.equal(again.samples["full_precision"], first.samples["full_precision"])
    drawn.clear()
    other = Context(tmp_path, seed=1, keep=context.keep)
    assert not torch.equal(
        verified(compiled, other, samples=4).samples["full_precision"], first.samples["deployed"][:4]
    )
    assert len(drawn) == 3


def test_a_second_round_draws_what_the_unquantized_model_draws(compiled, tmp_path):
    """The simulation has taken the model's place by then, so the model is opened once more."""
    found = verified(compiled, Context(tmp_path), samples=12, gap_error_db=0).samples["full_precision"]
    kept = Context(tmp_path, keep=StoreKeep(Store(tmp_path / "store"), "0" * 64))
    assert torch.equal(verified(compiled, kept, samples=8).samples["full_precision"], found[:8])
    shifted = replace(kept, seed=0)
    assert torch.equal(verified(compiled, shifted, samples=12, gap_error_db=0).samples["full_precision"], found)
