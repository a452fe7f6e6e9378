"""Pipelines of diffusers draw with the compiled denoiser what they draw with their own."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from harness import Artifacts, run_pass
from quantizing import with_plan
from tiny_pipelines import pixart_transformer, sd_unet

import intaglio
from intaglio.exporters.deploy.denoiser import CompiledDenoiser
from intaglio.exporters.float_graph.export_float import ExportFloat
from intaglio.exporters.qdq.export_qdq import ExportQdq
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.passes.calibrate import Calibrate
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, GRAPH, MODEL, TARGET
from intaglio.pipeline.errors import CallError, RecipeError
from intaglio.pipeline.formats.schemes import W8A8_STEP
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.recording import record
from intaglio.pipeline.model.ref import ModelRef

STEPS = 3
QUIET = {"num_inference_steps": STEPS, "output_type": "latent"}


def dit() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,  # as it learns a variance
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler())
    return pipe, {"class_labels": [1, 2], "num_inference_steps": STEPS, "output_type": "np"}


def sd15() -> tuple[Any, dict[str, Any]]:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = diffusers.StableDiffusionPipeline(
        unet=sd_unet("CrossAttnUpBlock2D"), scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **parts
    )
    return pipe, texts() | {"height": 8, "width": 8} | QUIET


def pixart() -> tuple[Any, dict[str, Any]]:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = diffusers.PixArtAlphaPipeline(transformer=pixart_transformer(), scheduler=scheduler, **parts)
    mask = {"prompt_attention_mask": torch.ones(2, 5), "negative_prompt_attention_mask": torch.ones(2, 5)}
    call = {"height": 64, "width": 64, "use_resolution_binning": False, "negative_prompt": None}
    return pipe, texts() | mask | call | QUIET


def texts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(2, 5, 64, generator=generator) for n in ("prompt_embeds", "negative_prompt_embeds")}


def place_of(pipe: Any) -> str:
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def drawn(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(0)).images)


def exported(pipe: Any, call: dict[str, Any], folder: Path) -> Artifacts:
    """The float graph of a pipeline's denoiser, from what a run of it gives the denoiser."""
    pipe.set_progress_bar_config(disable=True)
    getattr(pipe, place_of(pipe)).save_pretrained(folder / "model" / place_of(pipe))
    pipe.scheduler.save_pretrained(folder / "model/scheduler")
    ref = ModelRef(path="model", sampling_steps=STEPS)
    if isinstance(pipe, diffusers.DiTPipeline):
        ref = ref.model_copy(update={"guidance": 4.0})
    else:
        record(pipe, call | {"guidance_scale": 1.0}).save(folder / "conditions.safetensors")
        ref = ref.model_copy(update={"conditions": "conditions.safetensors"})
    start: Artifacts = {MODEL: Checkpoint.resolve(ref, folder), TARGET: load_target("onnxruntime-cpu")}
    start |= run_pass(Calibrate(samples=2), start, folder / "calibrate")
    return start | run_pass(ExportFloat(), start, folder / "export")


def loaded(artifacts: Artifacts, key: Any, folder: Path) -> CompiledDenoiser:
    folder.mkdir()
    artifacts[key].save(folder)
    return intaglio.load(folder, threads=1)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], Artifacts]:
    """Return a function that exports the model of a factory once for all tests: the factory always makes the same."""
    return cache(lambda make: exported(*make(), tmp_path_factory.mktemp(make.__name__)))


@pytest.mark.parametrize("make", [dit, sd15, pixart])
def test_a_pipeline_draws_the_same_with_the_graph_in_its_denoisers_place(make, export, tmp_path):
    pipe, call = make()
    artifacts = export(make)
    expected = drawn(pipe, call)
    setattr(pipe, place_of(pipe), loaded(artifacts, FLOAT_GRAPH, tmp_path / "float"))
    # some times the order of float32 sums, as every step builds on the one before
    torch.testing.assert_close(drawn(pipe, call), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def by_step(export, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], CompiledDenoiser]:
    """A pipeline and its denoiser with a scale for each denoising step."""
    folder = tmp_path_factory.mktemp("by_step")
    pipe, call = dit()
    artifacts = with_plan(export(dit), lambda _: W8A8_STEP)
    return pipe, call, loaded(run_pass(ExportQdq(), artifacts, folder / "qdq"), GRAPH, folder / "graph")


def test_scales_of_steps_are_found_from_the_timestep(by_step):
    pipe, call, denoiser = by_step
    graph = denoiser.graph
    assert graph.timesteps == (666.0, 333.0, 0.0)
    deployed = graph_denoise(graph, OnnxRuntime(), threads=1)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for near, timestep in ((700, 666), (340, 333), (1, 0)):  # other step counts meet other timesteps
        inputs = {"hidden_states": x, "timestep": torch.full((2,), near), "class_labels": torch.tensor([1, 2])}
        assert torch.equal(denoiser(**inputs).sample, deployed(inputs)), timestep
    expected, original = drawn(pipe, call), pipe.transformer
    pipe.transformer = denoiser
    try:
        error = (drawn(pipe, call) - expected).square().mean() / expected.var()
    finally:
        pipe.transformer = original
    assert 1e-4 < error < 0.05  # random weights: what rounding does to their pictures, guided 4 times, is not little


@pytest.fixture(scope="module")
def compiled_sd15(
    export, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Any], dict[str, CompiledDenoiser]]:
    """A pipeline, and its UNet as a float graph and with a scale for each of three steps at whole timesteps."""
    folder = tmp_path_factory.mktemp("sd15")
    pipe, call = sd15()
    made = export(sd15)
    made = made | {GRAPH: run_pass(ExportQdq(), with_plan(made, lambda _: W8A8_STEP), folder / "qdq")[GRAPH]}
    return pipe, call, {key.name: loaded(made, key, folder / key.name) for key in (FLOAT_GRAPH, GRAPH)}


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (diffusers.DDIMScheduler, {"timestep_spacing": "trailing"}, 7),
        (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, 6),
        (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, 6),
        (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"}, 6),
        (diffusers.UniPCMultistepScheduler, {}, 5),
        (diffusers.HeunDiscreteScheduler, {"timestep_spacing": "linspace"}, 4),
        (diffusers.LCMScheduler, {}, 4),
    ],
)
def test_another_scheduler_with_other_timesteps_may_be_swapped_in(compiled_sd15, kind, options, steps):
    pipe, call, denoisers = compiled_sd15
    swapped = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "scheduler": kind.from_config(pipe.scheduler.config, **options)},
        requires_safety_checker=False,
    )
    call = {**call, "num_inference_steps": steps}
    expected = drawn(swapped, call)
    swapped.unet = denoisers["FLOAT_GRAPH"]
    torch.testing.assert_close(drawn(swapped, call), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    swapped.unet = denoisers["GRAPH"]
    error = (drawn(swapped, call) - expected).square().mean() / expected.var()
    assert (
        1e-6 < error < 0.03
    )  # 0.003 to 0.02: as with the scheduler that it was compiled for, up to solvers of second order


def called(denoiser: CompiledDenoiser, **changes: Any) -> Any:
    usual = {
        "hidden_states": torch.zeros(2, 4, 8, 8),
        "timestep": torch.tensor([999, 999]),
        "class_labels": torch.tensor([1, 2]),
    }
    return denoiser(**{n: v for n, v in (usual | changes).items() if v is not None})


def test_outputs_are_as_the_original_returns_them(by_step):
    pipe, _, denoiser = by_step
    x, labels = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    (first,) = denoiser(x, torch.tensor(666), labels, return_dict=False)
    assert torch.equal(denoiser(x, 666, class_labels=labels).sample, first)
    assert denoiser(x.double(), 666, labels).sample.dtype == torch.float64
    assert (denoiser.dtype, denoiser.device, denoiser.training) == (torch.float32, torch.device("cpu"), False)
    assert denoiser.config.sample_size == pipe.transformer.config.sample_size == 8
    assert denoiser.config.out_channels == first.shape[1] == 8  # a variance too
    assert denoiser.patch_size == 2  # of the original, as everything that it does not have itself
    assert [each.numel() for each in denoiser.parameters()] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_labels": None}, "called without class_labels, which it was compiled with"),
        ({"hidden_states": torch.zeros(2, 4, 8, 16)}, "hidden_states has 16 at axis 3, but the graph accepts 8"),
        ({"hidden_states": torch.zeros(4, 8, 8)}, r"shape \(4, 8, 8\), but the graph accepts \(batch, 4, 8, 8\)"),
        ({"class_labels": torch.tensor([1])}, "class_labels has 1 at axis 0, but the graph accepts 2"),
        ({"timestep": 5000}, "timestep 5000: the graph has scales for 3 steps from 666 to 0"),
        ({"timestep": torch.tensor([666, 333])}, "rows at different timesteps"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "compiled with None"),
        (
            {"class_labels": torch.tensor([0, -1])},
            "class_labels has the index -1, but the table has the indices 0 to 1000",
        ),
        (
            {"class_labels": torch.tensor([0, 1001])},
            "class_labels has the index 1001, but the table has the indices 0 to 1000",
        ),
        ({"hidden_states": torch.full((2, 4, 8, 8), float("nan"))}, "hidden_states has NaN or Inf"),
    ],
)
def test_a_call_that_it_was_not_compiled_for_is_refused(by_step, changes, message):
    with pytest.raises(CallError, match=message):
        called(by_step[2], **{"timestep": torch.tensor(666)} | changes)


def test_a_folder_without_a_graph_is_told_so(tmp_path):
    with pytest.raises(RecipeError, match=r"no graph.json and model.onnx: give the folder of a target"):
        intaglio.load(tmp_path)
