"""Pipelines that join, repeat or list what they give their denoiser draw the same with the graph in its place."""

import diffusers
import joined_pipelines as joined
import pytest
import torch
from harness import run_pass
from joined_pipelines import GUIDED, call_of, null_of, save_denoiser
from quantizing import with_plan

import intaglio
from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, MODEL, TARGET, TRAJECTORY
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, LayerScheme
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.recording import record
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.numerics import quality

STEPS = 2
LEARNED_VARIANCE = (joined.hunyuan_dit, joined.kandinsky_decoder)


@pytest.mark.parametrize("make", GUIDED, ids=lambda make: make.__name__)
def test_a_pipeline_draws_the_same_with_the_graph_in_its_denoisers_place(make, tmp_path):
    pipe, given = make()
    pipe.set_progress_bar_config(disable=True)
    place = save_denoiser(pipe, tmp_path / "model")
    record(pipe, call_of(given, STEPS), call_of(null_of(given), STEPS)).save(tmp_path / "c.safetensors")
    ref = ModelRef(path="model", conditions="c.safetensors", sampling_steps=STEPS, guidance=2.0)
    start = {MODEL: Checkpoint.resolve(ref, tmp_path), TARGET: load_target("onnxruntime-cpu")}
    start |= run_pass(Calibrate(samples=2), start, tmp_path / "calibrate")
    if make is joined.controlnet:
        first, second = start[TRAJECTORY].inputs["mid_block_additional_residual"]
        assert not torch.equal(first, second)
    (tmp_path / "float").mkdir()
    graph = run_pass(ExportFloat(), start, tmp_path / "export")
    graph[FLOAT_GRAPH].save(tmp_path / "float")

    def drawn() -> torch.Tensor:
        found = pipe(**(call_of(given, STEPS) | GUIDED[make]))
        return found.frames if hasattr(found, "frames") else found.images

    expected = drawn()
    setattr(pipe, place, intaglio.load(tmp_path / "float", threads=1))
    torch.testing.assert_close(drawn(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    if make in LEARNED_VARIANCE:

        def called(layer: Layer) -> LayerScheme:
            return W8A8_STEP if layer.name in start[TRAJECTORY].amax else FLOAT

        made = run_pass(ExportQdq(), with_plan(start | graph, called), tmp_path / "qdq")
        (tmp_path / "w8a8").mkdir()
        made[GRAPH].save(tmp_path / "w8a8")
        setattr(pipe, place, intaglio.load(tmp_path / "w8a8", threads=1))
        error = quality.mean_squared_error(drawn(), expected)
        assert quality.psnr_db(error, float(expected.max() - expected.min())).min() > 35


def test_an_output_has_the_name_that_the_original_gives_it(tmp_path):
    module = diffusers.PriorTransformer(
        num_layers=1,
        embedding_dim=32,
        num_embeddings=5,
        additional_embeddings=4,
        num_attention_heads=2,
        attention_head_dim=32,
    )
    joined.seeded(lambda: module).save_pretrained(tmp_path / "model/transformer")
    scheduler = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    source = f"""
import diffusers, torch
from intaglio import DenoiserModel

def make():
    module = diffusers.PriorTransformer.from_pretrained({str(tmp_path / "model/transformer")!r})
    given = {{"proj_embedding": torch.ones(2, 32), "encoder_hidden_states": torch.ones(2, 5, 32)}}
    scheduler = diffusers.UnCLIPScheduler.from_config({dict(scheduler.config)!r})
    return DenoiserModel(module, scheduler, (32,), conditions=given)
"""
    (tmp_path / "prior.py").write_text(source)
    ref = ModelRef(path="./prior.py:make", sampling_steps=STEPS)
    start = {MODEL: Checkpoint.resolve(ref, tmp_path), TARGET: load_target("onnxruntime-cpu")}
    start |= run_pass(Calibrate(samples=1), start, tmp_path / "calibrate")
    (tmp_path / "float").mkdir()
    run_pass(ExportFloat(), start, tmp_path / "export")[FLOAT_GRAPH].save(tmp_path / "float")
    x, text = torch.randn(2, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = module.eval()(x, 7, text[:, 0], text).predicted_image_embedding
    found = intaglio.load(tmp_path / "float", threads=1)(x, 7, text[:, 0], text)
    torch.testing.assert_close(found.predicted_image_embedding, expected, rtol=1e-4, atol=1e-4)
