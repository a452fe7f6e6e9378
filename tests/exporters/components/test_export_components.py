"""Whole pipelines draw with compiled models what they draw with their own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import tiny_pipelines
import torch
from harness import Artifacts, run_pass
from numpy.typing import NDArray
from pydantic import ValidationError
from quantizing import with_plan

import intaglio
from intaglio import Recipe
from intaglio.exporters.components.build_engines import BuildComponents
from intaglio.exporters.components.calls import record_calls
from intaglio.exporters.components.export_components import ExportComponents, _round_weights
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.pipeline.artifacts.components import Components
from intaglio.pipeline.artifacts.graph import Engine
from intaglio.pipeline.artifacts.keys import COMPONENT_ENGINES, COMPONENTS, GRAPH, MODEL, PIPELINE, TARGET
from intaglio.pipeline.errors import CallError, RecipeError, StepFailed
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN, W8A16
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.pipeline_folder import PipelineFolder
from intaglio.pipeline.model.recording import record
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.runner import plan

STEPS = 2
PROMPT = ["a boat", "the sea"]


def start(make: Callable[[], Any], folder: Path) -> tuple[Any, Artifacts]:
    """A pipeline, and what the step reads of its folder: a stored copy, so that nothing else is read."""
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    call = tiny_pipelines.CALLS[make] | {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent"}
    record(pipe, call | {"guidance_scale": 1.0}).save(folder / "conditions.safetensors")
    ref = ModelRef(path="model", sampling_steps=STEPS, conditions="conditions.safetensors")
    model = Checkpoint.resolve(ref, folder)
    (folder / "stored").mkdir()
    PipelineFolder.around(model).save(folder / "stored")
    return pipe, {MODEL: model, PIPELINE: PipelineFolder(folder / "stored"), TARGET: load_target("onnxruntime-cpu")}


def compiled(make: Callable[[], Any], artifacts: Artifacts, folder: Path, **options: Any) -> Path:
    """The folder that the step's artifact is published to."""
    step = ExportComponents(**{"call": tiny_pipelines.CALLS[make]} | options)
    made = run_pass(step, artifacts, folder / "scratch")[COMPONENTS]
    (folder / "out").mkdir()
    made.save(folder / "out")
    return folder / "out"


def drawn(pipe: Any, make: Callable[[], Any], **call: Any) -> NDArray[np.float32]:
    pipe.set_progress_bar_config(disable=True)
    usual = tiny_pipelines.CALLS[make] | {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "np"}
    return pipe(**usual | call, generator=torch.Generator().manual_seed(0)).images


def redrawn(pipe: Any, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Image to image, by the class that diffusers has for it."""
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "image": pictures, "strength": 1.0, "num_inference_steps": STEPS, "output_type": "np"}
    return other(**call, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifacts, Path]:
    """Stable Diffusion, what it is compiled from, and its folder, all components in float."""
    folder = tmp_path_factory.mktemp("sd")
    pipe, artifacts = start(tiny_pipelines.sd, folder)
    return pipe, artifacts, compiled(tiny_pipelines.sd, artifacts, folder, image_to_image=True)


def test_a_folder_is_a_pipeline_that_draws_the_same(sd):
    pipe, _, out = sd
    expected = drawn(pipe, tiny_pipelines.sd)
    made = intaglio.load_pipeline(out, threads=1, unet=pipe.unet)
    assert type(made) is diffusers.StableDiffusionPipeline
    assert [each.numel() for part in (made.vae, made.text_encoder) for each in part.parameters()] == [0, 0]
    found = drawn(made, tiny_pipelines.sd)
    np.testing.assert_allclose(found, expected, atol=1e-4)  # some times the order of float32 sums
    assert expected.std() > 0.1
    np.testing.assert_allclose(redrawn(made, expected), redrawn(pipe, expected), atol=1e-4)
    one = {"prompt": "a", "guidance_scale": 1.0}  # another number of rows
    np.testing.assert_allclose(drawn(made, tiny_pipelines.sd, **one), drawn(pipe, tiny_pipelines.sd, **one), atol=1e-4)


def test_a_folder_with_a_quantized_denoiser_stands_alone(dit, tmp_path):
    model = dit[MODEL].open()
    pipe = diffusers.DiTPipeline(model.module, tiny_pipelines.small_vae(3), model.scheduler)
    pipe.save_pretrained(tmp_path / "model")
    folder = PipelineFolder.around(Checkpoint.resolve(ModelRef(path="model"), tmp_path))
    artifacts = dit | {PIPELINE: folder, TARGET: load_target("tensorrt-rtx")}
    with pytest.raises(RecipeError, match="call: DiTPipeline requires class_labels: give it here"):
        run_pass(ExportComponents(), artifacts, tmp_path / "scratch")
    call = {"class_labels": [1, 2], "guidance_scale": 1.0}
    made = run_pass(ExportComponents(call=call), artifacts, tmp_path / "scratch")[COMPONENTS]
    quantized = with_plan(artifacts, lambda layer: W8A8_TOKEN if layer.op == "linear" else FLOAT)
    graph = run_pass(ExportQdq(), quantized, tmp_path / "qdq")[GRAPH]
    (tmp_path / "out").mkdir()
    for artifact in (made, graph):
        artifact.save(tmp_path / "out")
    loaded = intaglio.load_pipeline(tmp_path / "out", threads=1)
    found, expected = (
        each(**call, num_inference_steps=STEPS, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for each in (loaded, pipe)
    )
    assert 30 < -10 * np.log10(np.square(found - expected).mean()) < 80  # dB, and not the graph in float
    latents = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample
    found = loaded.vae.decode(latents).sample
    assert found.dtype == torch.float32
    assert 1e-5 < float((found - expected).norm() / expected.norm()) < 5e-3  # float16
    with pytest.raises(RecipeError, match=r"decode: no engine.plan in it: build it on the device"):
        intaglio.load_pipeline(tmp_path / "out", backend="tensorrt-rtx", transformer=pipe.transformer)
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    engines = run_pass(BuildComponents(), {COMPONENTS: made, TARGET: artifacts[TARGET]}, tmp_path / "engines")
    engines[COMPONENT_ENGINES].save(tmp_path / "engines")
    engine = Engine.load(tmp_path / "engines/pipeline/vae/decode")
    assert engine.plan is not None
    assert (engine.runtime, engine.low_precision_products) == ("tensorrt-rtx", 0)
    assert engine.float_products == sum(isinstance(m, torch.nn.Conv2d) for m in pipe.vae.decoder.modules())


def test_a_component_can_have_a_target_of_its_own(sd, tmp_path):
    """A component for ONNX Runtime stays in float32, has no engine, and runs there beside engines."""
    pipe, artifacts, _ = sd
    artifacts = artifacts | {TARGET: load_target("tensorrt-rtx")}
    out = compiled(tiny_pipelines.sd, artifacts, tmp_path, targets={"text_encoder": "onnxruntime-cpu"})
    made = Components(out / "pipeline")
    assert {n: one.target for n, one in made.compiled.items()} == {
        "text_encoder": "onnxruntime-cpu",
        "vae": "tensorrt-rtx",
    }
    halves = {
        path.parts[-3]: sum(node.op_type == "Cast" for node in onnx.load(path, load_external_data=False).graph.node)
        for path in out.glob("pipeline/*/*/model.onnx")
    }
    assert halves["vae"] > halves["text_encoder"]
    tokens = torch.arange(8)[None]
    encoder = intaglio.load_pipeline(out, threads=1, unet=pipe.unet, vae=pipe.vae).text_encoder
    with torch.no_grad():
        expected = pipe.text_encoder(tokens).last_hidden_state
    torch.testing.assert_close(encoder(tokens).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    beside = intaglio.load_pipeline(out, backend="tensorrt-rtx", unet=pipe.unet, vae=pipe.vae).text_encoder
    assert (encoder.device.type, beside.device.type) == ("cpu", "cuda")  # its outputs go where the engines are
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    engines = run_pass(BuildComponents(), {COMPONENTS: made, TARGET: artifacts[TARGET]}, tmp_path / "engines")
    engines[COMPONENT_ENGINES].save(tmp_path / "engines")
    assert [p.parts[-3] for p in (tmp_path / "engines").glob("pipeline/*/*/engine.plan")] == ["vae"]


def test_what_was_not_compiled_is_refused(sd):
    pipe = intaglio.load_pipeline(sd[2], threads=1, unet=sd[0].unet)
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "height": 8, "width": 8}
    with pytest.raises(
        CallError, match=r"text_encoder.forward was called with output_hidden_states = True, but compiled"
    ):
        pipe(**call, clip_skip=1)
    with pytest.raises(CallError, match=r"vae.decode: z has 16 at axis 3, but the graph accepts 8"):
        pipe.vae.decode(torch.zeros(1, 4, 8, 16))
    with pytest.raises(CallError, match=r"text_encoder.final_layer_norm was not compiled: this folder has only for"):
        pipe.text_encoder.final_layer_norm(torch.zeros(1, 8, 64))
    with pytest.raises(CallError, match=r"vae.forward was not compiled: this folder has only decode, encode of vae"):
        pipe.vae(torch.zeros(1, 3, 8, 8))
    with pytest.raises(CallError, match=r"vae.decode was called without z"):
        pipe.vae.decode()


def test_a_component_that_the_pipeline_does_not_have_is_refused_by_name(sd):
    with pytest.raises(RecipeError, match=r"StableDiffusionPipeline has no component 'vea': did you mean 'vae'\?"):
        intaglio.load_pipeline(sd[2], threads=1, unet=sd[0].unet, vea=sd[0].vae)


def test_a_compiled_component_refuses_what_it_would_not_compute(sd, tmp_path):
    pipe = intaglio.load_pipeline(sd[2], threads=1, unet=sd[0].unet)
    pipe.to("cpu").enable_attention_slicing()
    pipe.vae.enable_slicing()
    ids = torch.arange(8)[None]
    for message, change in {
        "vae.use_tiling cannot be set in a compiled model": lambda: pipe.vae.enable_tiling(),
        "encoder.to: it computes in the formats that it was compiled with": lambda: pipe.to(torch.float16),
        "text_encoder.add_adapter would have no effect .*model.loras": lambda: pipe.text_encoder.add_adapter(None),
        "text_encoder.final_layer_norm.weight can neither be read nor changed .mul_": lambda: (
            pipe.text_encoder.final_layer_norm.weight.mul_(2)
        ),
        "text_encoder.encoder.layers.0.mlp cannot be changed": lambda: pipe.text_encoder.encoder.layers[
            0
        ].mlp.register_forward_hook(print),
        "weights of a compiled pipeline are in its compiled folder": lambda: pipe.save_pretrained(tmp_path / "saved"),
        "text_encoder.forward: input_ids has the index 514, but the table has the indices 0 to 513": lambda: (
            pipe.text_encoder(ids + 507)
        ),
        "text_encoder.forward: input_ids has 0.5, which torch.int64 cannot hold": lambda: pipe.text_encoder(ids + 0.5),
        "vae.decode: z has NaN or Inf": lambda: pipe.vae.decode(torch.full((1, 4, 8, 8), float("nan"))),
        "vae.decode: z is a numpy.ndarray: give a tensor": lambda: pipe.vae.decode(np.zeros((1, 4, 8, 8), np.float32)),
    }.items():
        with pytest.raises(CallError, match=message):
            change()
    assert not (tmp_path / "saved").exists()


def test_attributes_and_outputs_are_the_originals(sd):
    pipe, _, out = sd
    made = intaglio.load_pipeline(out, threads=1, unet=pipe.unet)
    assert made.vae.config.scaling_factor == pipe.vae.config.scaling_factor
    assert (made.vae.dtype, made.vae.device) == (torch.float32, torch.device("cpu"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = pipe.text_encoder(ids)
    found = made.text_encoder(ids)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    assert isinstance(made.text_encoder(ids, return_dict=False), tuple)


def test_hidden_states_of_several_text_encoders_are_there(tmp_path):
    make = tiny_pipelines.sdxl
    pipe, artifacts = start(make, tmp_path)
    latent = {"height": 64, "width": 64, "output_type": "latent"}  # without its own, it takes an autoencoder by 8
    out = compiled(make, artifacts, tmp_path, precision={"vae": "none"}, call=latent)
    made = intaglio.load_pipeline(out, threads=1, unet=pipe.unet, vae=pipe.vae)
    np.testing.assert_allclose(drawn(made, make), drawn(pipe, make), atol=1e-4)


def test_weights_have_four_bits_on_request_at_any_number_of_tokens(tmp_path):
    make = tiny_pipelines.pixart
    pipe, artifacts = start(make, tmp_path)
    call = tiny_pipelines.CALLS[make] | {"height": 64, "width": 64, "output_type": "latent"}
    precision = {"text_encoder": "w4a16", "vae": "none"}
    out = compiled(make, artifacts, tmp_path, precision=precision, call=call, other_call={"max_sequence_length": 6})
    graph = onnx.load(out / "pipeline/text_encoder/forward/model.onnx")
    assert onnx.TensorProto.INT4 in {tensor.data_type for tensor in graph.graph.initializer}
    made = intaglio.load_pipeline(out, threads=1, transformer=pipe.transformer)
    assert made.vae is None
    for tokens in (8, 5):
        inputs = {"input_ids": torch.arange(3, 3 + 2 * tokens).reshape(2, tokens)}
        inputs["attention_mask"] = torch.ones(2, tokens)
        with torch.no_grad():
            (expected,) = pipe.text_encoder(**inputs).values()
        (found,) = made.text_encoder(**inputs).values()
        assert 0.01 < float((found - expected).norm() / expected.norm()) < 0.3  # of random weights


def test_eight_bits_are_rounded_to_a_scale_for_each_channel():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Linear(16, 4)).requires_grad_(False)
    before = [layer.weight.clone() for layer in module]
    rounded = _round_weights(module, "w8a16", load_target("onnxruntime-cpu"), (32,))
    assert {data.scheme for data in rounded.values()} == {W8A16}
    for layer, weight, data in zip(module, before, rounded.values(), strict=True):
        codes = layer.weight.flatten(1) / data.scale_NG
        torch.testing.assert_close(codes, data.codes.float())
        assert codes.abs().amax(1).tolist() == pytest.approx([127] * len(codes))
        assert 0 < float((layer.weight - weight).abs().max()) <= 0.51 * float(data.scale_NG.max())


def test_what_cannot_be_compiled_is_said_before_it_is(sd, tmp_path):
    make, artifacts = tiny_pipelines.sd, sd[1]

    call = tiny_pipelines.CALLS[make]

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            run_pass(ExportComponents(**{"call": call} | options), artifacts, tmp_path / "scratch")

    refused("text_encoders: the pipeline has no such component: did you mean", precision={"text_encoders": "float"})
    refused("targets.text_encoders: the pipeline has no such", targets={"text_encoders": "onnxruntime-cpu"})
    refused(
        "targets.unet: the recipe sets the target of the denoiser: remove this entry",
        targets={"unet": "onnxruntime-cpu"},
    )
    refused(
        "precision.unet: the plan sets the precision of the denoiser: remove this entry", precision={"unet": "float"}
    )
    refused("vae is never called: change `call` to use it, or", call=call | {"output_type": "latent"})


def test_a_precision_is_a_scheme_that_rounds_weights_only():
    with pytest.raises(
        ValidationError, match="no precision 'w8a8_token': components have float, w8a16, w4a16, w8ga16, nvfp4a16, none"
    ):
        ExportComponents(precision={"vae": "w8a8_token"})


def test_a_component_that_is_left_out_takes_part_in_the_call_where_it_is_needed(sd, tmp_path, caplog):
    pipe, artifacts, _ = sd
    caplog.set_level("INFO")
    out = compiled(tiny_pipelines.sd, artifacts, tmp_path, precision={"text_encoder": "none"})
    assert {*Components(out / "pipeline").compiled} == {"vae"}
    assert "the pipeline needs text_encoder, opened here but not compiled (AttributeError" in caplog.text
    made = intaglio.load_pipeline(out, threads=1, unet=pipe.unet)
    assert made.text_encoder is None
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(made.vae.decode(latents).sample, pipe.vae.decode(latents).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": {"vae": "none", "text_encoder": "none"}}, "leaves out every component with weights"),
        (
            {"precision": {"vae": "none"}, "targets": {"vae": "tensorrt-rtx"}},
            "targets.vae: precision.vae leaves it out",
        ),
        ({"precision": {"tokenizer": "w8a16"}}, "precision.tokenizer: it has no weights: known are text_encoder, vae"),
        ({"targets": {"vea": "tensorrt-rtx"}}, "targets.vea: the pipeline has no such component: did you mean 'vae'"),
        ({"call": {"prompt": 5}}, "call: StableDiffusionPipeline raised ValueError: .* give what it needs in `call`"),
    ],
)
def test_options_that_fit_no_component_are_refused_by_name(options, message, sd, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run_pass(ExportComponents(**options), sd[1], tmp_path / "scratch")


def test_a_pipeline_that_needs_a_picture_gets_one(sd, tmp_path):
    pipe, artifacts, _ = sd
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.save_pretrained(tmp_path / "model")
    own = artifacts | {PIPELINE: PipelineFolder(tmp_path / "model")}
    made = run_pass(ExportComponents(), own, tmp_path / "scratch")[COMPONENTS]
    assert {*made.compiled["vae"].returns} == {"encode", "decode"}
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    loaded = intaglio.load_pipeline(tmp_path / "out", threads=1, unet=pipe.unet)
    pictures = drawn(pipe, tiny_pipelines.sd)
    call = {"prompt": PROMPT, "image": pictures, "strength": 1.0, "num_inference_steps": STEPS, "output_type": "np"}
    found, expected = (each(**call, generator=torch.Generator().manual_seed(0)).images for each in (loaded, other))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_black_picture_is_refused(sd, tmp_path):
    make, artifacts = tiny_pipelines.sd, sd[1]
    shutil.copytree(artifacts[PIPELINE].root, tmp_path / "stored")
    artifacts = artifacts | {PIPELINE: PipelineFolder(tmp_path / "stored")}
    vae = tiny_pipelines.vae()
    for value, message in ((0.0, "sample that is 0 everywhere"), (float("nan"), "sample with NaN or Inf")):
        with torch.no_grad():
            vae.decoder.conv_out.weight.zero_()
            vae.decoder.conv_out.bias.fill_(value)
        vae.save_pretrained(tmp_path / "stored/vae")
        with pytest.raises(StepFailed, match=f"vae.decode at 1 row: torch itself returns {message}"):
            run_pass(ExportComponents(call=tiny_pipelines.CALLS[make]), artifacts, tmp_path / "scratch")


class Part(torch.nn.Module):
    """A component that takes anything."""

    def forward(self, x, y=None):
        return x


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([{"x": torch.ones(1), "y": 1}, {"x": torch.ones(1)}], "part.forward is called in 2 ways, but one can be comp"),
        ([{"x": torch.ones(1), "y": np.ones(1)}], "y of part.forward is a ndarray: only numbers, texts and their list"),
    ],
)
def test_a_component_is_called_in_one_way_with_what_a_graph_can_take(calls, message):
    part = Part()
    with pytest.raises((RecipeError, StepFailed), match=message):
        record_calls(lambda: [part(**call) for call in calls], {"part": part}, {})
    assert "forward" not in part.__dict__  # as it was


def test_a_recipe_reads_what_is_around_the_model_only_where_a_step_does(sd, store):
    folder = sd[1][MODEL].root.parent
    recipe = Recipe(
        model=sd[1][MODEL].ref,
        targets=("onnxruntime-cpu",),
        steps=("intaglio.exporters.components.export_components:ExportComponents",),
    )
    (planned,) = plan(recipe, store, base=folder)["onnxruntime-cpu"]
    assert planned.status == "runs"
    stored = {path.name for path in (store.root / "objects").glob("*/*")}
    assert {"model_index.json", "text_encoder", "tokenizer", "vae"} <= stored
    assert "unet" not in stored  # it is in the model


def test_only_a_whole_pipeline_has_components(tmp_path):
    tiny_pipelines.vae().save_pretrained(tmp_path / "model/unet")
    with pytest.raises(RecipeError, match=r"model: model has no model_index.json: only a whole pipeline"):
        PipelineFolder.around(Checkpoint.resolve(ModelRef(path="model"), tmp_path))
    with pytest.raises(RecipeError, match=r"no pipeline/model_index.json: compile a whole pipeline with the step"):
        intaglio.load_pipeline(tmp_path)
