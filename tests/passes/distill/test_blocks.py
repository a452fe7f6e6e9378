"""Calls of blocks that are repeated from recorded outputs are those of the whole model."""

import pytest
import torch
from harness import Artifacts, run_pass
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio.passes.calibrate import Calibrate
from intaglio.passes.distill.blocks import BlockChain
from intaglio.passes.distill.distill import Distill
from intaglio.passes.distill.objective import tensors
from intaglio.passes.distill.start import begin
from intaglio.passes.uniform import UniformPlan
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TARGET, TRAJECTORY
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.hooks import after_calls, before_calls
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.simulation.model import full_precision


def planned(module: torch.nn.Module, folder) -> Artifacts:
    save_folder(module, folder)
    ref = ModelRef(path="model", sampling_steps=2)
    start = {MODEL: Checkpoint.resolve(ref, folder.parent), TARGET: load_target("onnxruntime-cpu")}
    start |= run_pass(Calibrate(samples=3), start, folder.parent / "a")
    return start | run_pass(UniformPlan(schemes=("w4a8_token", "w4a16")), start, folder.parent / "b")


DIT = {"transformer_blocks.0": "transformer_blocks.1", "transformer_blocks.1": "transformer_blocks.1"}
UNET = {
    "down_blocks.0": "up_blocks.1",
    "down_blocks.1": "up_blocks.0",
    "mid_block.resnets.0": "mid_block.attentions.0",
    "mid_block.attentions.0": "mid_block.resnets.1",
    "mid_block.resnets.1": "up_blocks.0",
    "up_blocks.0": "up_blocks.1",
    "up_blocks.1": "up_blocks.1",
}


@pytest.mark.parametrize(("make", "readers"), [(tiny_dit, DIT), (tiny_unet, UNET)])
def test_calls_of_blocks_are_those_of_the_whole_model(make, readers, tmp_path):
    artifacts = planned(make(), tmp_path / "model")
    options = Distill(updates=1, scope="block", samples=1)
    task, _ = begin(options, artifacts[MODEL], artifacts[PLAN], artifacts[TRAJECTORY], Context(tmp_path, 0))
    chain = BlockChain(task)
    assert chain.order == list(readers)
    assert chain.last_reader == readers
    for name in chain.order:
        calls = chain.calls(name)
        for runs, of_step in zip(chain.runs, calls, strict=True):
            for run, call in zip(runs, of_step, strict=True):
                given, expected = whole(task, name, run)
                assert all(torch.equal(x, y) for x, y in zip(tensors((call.args, call.kwargs)), given, strict=True))
                assert all(torch.equal(x, y) for x, y in zip(call.expected, expected, strict=True))
        chain.finish(name, calls)
    kept = [x for runs in chain.runs for run in runs for x in tensors((run.teacher, run.student))]
    assert {x.untyped_storage().nbytes() for x in kept} == {4}  # one float: every block was read by its last reader


def whole(task, name, run):
    """Return the block's input in the quantized model, and its output in full precision, without any recording."""
    given, expected = [], []
    block, inputs = {name: task.blocks[name]}, task.trajectory.call(run.step, run.rows)
    with task.clock.at(run.step), torch.no_grad():
        with before_calls(block, lambda _, args: given.extend(tensors(args))):
            task.denoise(inputs)
        with full_precision(task.layers.values()), after_calls(block, lambda _, __, y: expected.extend(tensors(y))):
            task.denoise(inputs)
    return given, expected
