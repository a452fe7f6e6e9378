"""The first recipe for a model: what it says is so, and it runs as it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from tiny import FACTORY, save_folder, tiny_dit
from typer.testing import CliRunner, Result

from intaglio import Recipe, bind
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.model.recording import Recording

UNFIT = """

def plain():
    return DenoiserModel(torch.nn.ReLU(), DDIMScheduler(), (3, 8, 8))


def broken():
    import no_such_module
"""

SHORT = """

class Short(DDIMScheduler):
    def set_timesteps(self, count, **_):
        super().set_timesteps(min(count, 3))
"""


def init(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["init", *arguments])


def options(recipe: Recipe, name: str) -> Mapping[str, Any]:
    (found,) = (step.options for step in recipe.steps if step.name == name)
    return found


def test_a_folder_without_its_weights_is_described_and_planned(tmp_path: Path) -> None:
    module = tiny_dit()
    save_folder(module, tmp_path / "models/dit")
    (weights,) = (tmp_path / "models/dit").rglob("*.safetensors")
    weights.rename(tmp_path / "aside")
    (tmp_path / "recipes").mkdir()
    result = init("models/dit", "--target", "onnxruntime-cpu", "--out", "recipes/dit.yaml")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "recipes/dit.yaml").read_text()
    parameters = sum(p.numel() for p in module.parameters())
    assert (
        f"# DiTTransformer2DModel: {parameters / 1e6:.1f} M parameters, {4 * parameters / 1e6:.1f} MB in float32."
        in text
    )
    assert "1 conv, 20 linear" in text
    assert "class_labels, of 4 classes" in text
    recipe = Recipe.read(tmp_path / "recipes/dit.yaml")
    assert (recipe.model.path, recipe.targets) == ("../models/dit", ("onnxruntime-cpu",))
    assert [step.name for step in recipe.steps] == [
        *(
            "calibrate",
            "time-layers",
            "sensitivity",
            "assign",
            "distill",
            "merge",
            "export-float",
            "export-qdq",
            "lint",
        ),
        *("onnxruntime", "verify", "benchmark", "report"),
    ]
    assert bind(recipe, base=tmp_path / "recipes")
    weights.parent.joinpath(weights.name).write_bytes((tmp_path / "aside").read_bytes())
    planned = CliRunner().invoke(app, ["plan", "recipes/dit.yaml"])
    assert planned.exit_code == 0, planned.stderr
    assert "calibrate" in planned.stdout


def test_the_budget_is_what_eight_bits_take(tmp_path: Path) -> None:
    from intaglio.exporters.starter.starter import look_at
    from intaglio.pipeline.artifacts.plan import QuantPlan
    from intaglio.pipeline.formats.layer import illegal
    from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN
    from intaglio.pipeline.formats.target import load_target

    save_folder(tiny_dit(), tmp_path / "dit")
    found = look_at("dit", ("tensorrt-rtx",), tmp_path)
    target = load_target("tensorrt-rtx")
    eight = {layer.name: W8A8_STEP if layer.op == "conv" else W8A8_TOKEN for layer in found.layers}
    schemes = {n.name: FLOAT if illegal(n, eight[n.name], target) else eight[n.name] for n in found.layers}
    plan = QuantPlan(found.layers, schemes)
    relative = plan.size_bytes / plan.replace(dict.fromkeys(schemes, FLOAT)).size_bytes
    assert relative <= found.size < relative + 0.01
    assert found.least < found.size


def test_a_model_that_takes_more_is_told_how_it_is_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=1, cross_attention_dim=64, sample_size=8,
        caption_channels=64, use_additional_conditions=False,
    )  # fmt: skip
    save_folder(module, tmp_path / "pixart")
    result = init("pixart", "--json", "--target", "onnxruntime-cpu")
    found = json.loads(result.stdout)
    assert "PixArtTransformer2DModel requires encoder_hidden_states" in found["lacks"]
    text = (tmp_path / "recipe.yaml").read_text()
    assert "from intaglio import record" in text
    timed = init("pixart", "--minutes", "5", "--force", "--target", "onnxruntime-cpu")
    assert "2. run `intaglio init` again with --force: it then chooses steps for 5 minutes" in timed.stdout
    refused = CliRunner().invoke(app, ["plan", "recipe.yaml"])
    assert "no file conditions.safetensors beside the recipe" in refused.stderr
    rows = {"encoder_hidden_states": torch.zeros(2, 3, 64)}
    Recording((4, 8, 8), conditions=rows).save(tmp_path / "conditions.safetensors")
    again = init("pixart", "--json", "--force", "--target", "onnxruntime-cpu")
    found = json.loads(again.stdout)
    assert (found["lacks"], found["conditions"]) == (None, "conditions.safetensors")
    assert found["takes"] == "encoder_hidden_states, of 2 rows"
    assert CliRunner().invoke(app, ["plan", "recipe.yaml"]).exit_code == 0


def test_a_whole_pipeline_lends_its_steps_guidance_and_components(tmp_path: Path) -> None:
    from tiny_pipelines import sd_unet

    sd_unet().save_pretrained(tmp_path / "sd/unet")
    DDIMScheduler().save_pretrained(tmp_path / "sd/scheduler")
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / "sd" / name).mkdir()
    for name in ("vae", "text_encoder"):
        (tmp_path / "sd" / name / "model.safetensors").touch()
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    assert init("sd", "--target", "onnxruntime-cpu").exit_code == 0
    text = (tmp_path / "recipe.yaml").read_text()
    recipe = Recipe.parse(text)
    assert (recipe.model.sampling_steps, recipe.model.guidance) == (50, 7.5)
    assert "vae (AutoencoderKL), text_encoder (CLIPTextModel)" in text
    uncommented = text.replace("  # - components", "  - components")
    assert "components" in [step.name for step in Recipe.parse(uncommented).steps]
    assert "DiffusionPipeline.from_pretrained('sd')" in text


def test_a_factory_is_named_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY + UNFIT)
    assert init("net.py:make", "--target", "onnxruntime-cpu").exit_code == 0
    recipe = Recipe.read(tmp_path / "recipe.yaml")
    assert recipe.model.path == "./net.py:make"
    planned = CliRunner().invoke(app, ["plan", "recipe.yaml"])
    assert planned.exit_code == 0, planned.stderr


def test_a_recipe_for_a_target_that_runs_fewer_schemes_can_be_run_as_it_is(tmp_path: Path) -> None:
    save_folder(tiny_dit(), tmp_path / "dit")
    for arguments in (["--target", "tensorrt-10.3-orin"], ["--target", "onnxruntime-vnni", "--target", "tensorrt-11"]):
        result = init("dit", *arguments, "--out", "recipe.yaml", "--force")
        assert result.exit_code == 0, result.stderr
        recipe = Recipe.read(tmp_path / "recipe.yaml")
        linear, conv = ["w8a8_token", "w8a8s_token", "w4a16", "float"], ["w8a8_step", "w8a8s_step", "float"]
        assert options(recipe, "assign")["schemes"] == {"linear": linear, "conv": conv}
        assert bind(recipe, base=tmp_path)


def test_a_first_recipe_asks_for_quality_and_for_codes_where_convolutions_need_them(tmp_path: Path) -> None:
    save_folder(tiny_dit(), tmp_path / "dit")
    assert init("dit", "--target", "onnxruntime-vnni").exit_code == 0
    recipe = Recipe.read(tmp_path / "recipe.yaml")
    sensitivity, assign = (options(recipe, name) for name in ("sensitivity", "assign"))
    assert assign["budget"] == {"psnr": 40}
    assert assign["conv_output"] == "target"
    assert assign["schemes"]["conv"] == ["w8a8_step", "w8a8s_step", "w8a16", "w4a16", "float"]
    assert sensitivity["schemes"]["conv"] == [*assign["schemes"]["conv"], "w8a8o8_step", "w8a8so8_step"]
    assert init("dit", "--target", "onnxruntime-cpu", "--force").exit_code == 0  # this machine's kind: layers are timed
    here = Recipe.read(tmp_path / "recipe.yaml")
    assert options(here, "time-layers")["schemes"] == options(here, "sensitivity")["schemes"]
    assert init("dit", "--target", "tensorrt-rtx", "--force").exit_code == 0
    for_gpu = Recipe.read(tmp_path / "recipe.yaml")
    assert "conv_output" not in options(for_gpu, "assign")
    assert "time-layers" not in [step.name for step in for_gpu.steps]


@pytest.mark.parametrize(
    ("targets", "linear"),
    [
        (["onnxruntime-avx2"], ["w7a8_token", "w7a8s_token", "w8a16", "w4a16"]),
        (
            ["onnxruntime-avx2", "tensorrt-rtx"],
            ["w8a8_token", "w7a8_token", "w8a8s_token", "w7a8s_token", "w8a16", "w4a16"],
        ),
    ],
)
def test_a_first_recipe_has_the_widths_of_weights_that_its_targets_multiply_fast(targets, linear, tmp_path):
    save_folder(tiny_dit(), tmp_path / "dit")
    assert init("dit", *(part for name in targets for part in ("--target", name))).exit_code == 0
    recipe = Recipe.read(tmp_path / "recipe.yaml")
    assert options(recipe, "assign")["schemes"]["linear"] == linear
    assert bind(recipe, base=tmp_path)


def test_a_scheduler_with_fewer_steps_is_sampled_in_these(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY.replace("DDIMScheduler()", "Short()") + SHORT)
    assert init("net.py:make", "--target", "onnxruntime-cpu").exit_code == 0
    assert Recipe.read(tmp_path / "recipe.yaml").model.sampling_steps == 3
    assert "# default of Short" in (tmp_path / "recipe.yaml").read_text()


def test_a_factory_needs_no_recording_that_lies_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FACTORY)
    Recording((3, 8, 8), conditions={"encoder_hidden_states": torch.zeros(2, 4, 8)}).save(
        tmp_path / "conditions.safetensors"
    )
    assert init("./model.py:make").exit_code == 0
    assert Recipe.read(tmp_path / "recipe.yaml").model.conditions is None


def test_the_line_for_editors_is_there_where_the_schema_is(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY + UNFIT)
    (tmp_path / "recipe.schema.json").touch()
    init("net.py:make", "--target", "onnxruntime-cpu")
    assert (tmp_path / "recipe.yaml").read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no folder nowhere: give a diffusers folder"),
        (("owner/name",), "or `hub:owner/name` to download it"),
        (("net.py:mak",), "net.py has no function mak: did you mean 'make'"),
        (("net.py:plain",), "net.py:plain has neither Linear nor ConvNd layers"),
        (("net.py:broken",), "net.py:broken raised ModuleNotFoundError: No module named 'no_such_module'"),
        (("net.py:make", "--target", "onnxruntime-cup"), "did you mean 'onnxruntime-cpu'"),
        (("net.py:make", "--out", "there.yaml"), "there.yaml: already exists: choose another --out, or pass --force"),
        (("net.py:make", "--out", "no/recipe.yaml"), "no/recipe.yaml: the folder no does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_message(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY + UNFIT)
    (tmp_path / "there.yaml").write_text("mine")
    result = init(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "there.yaml").read_text() == "mine"
    assert not (tmp_path / "recipe.yaml").exists()


def test_pickled_weights_end_init_before_anything_is_run(tmp_path: Path) -> None:
    save_folder(tiny_dit(), tmp_path / "dit")
    (weights,) = (tmp_path / "dit").rglob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    result = init("dit", "--target", "onnxruntime-cpu")
    assert (result.exit_code, (tmp_path / "recipe.yaml").exists()) == (2, False)
    assert "no safetensors in" in result.stderr


def test_without_weights_the_first_thing_to_do_is_to_put_them_there(tmp_path: Path) -> None:
    save_folder(tiny_dit(), tmp_path / "dit")
    next((tmp_path / "dit").rglob("*.safetensors")).unlink()
    result = init("dit", "--target", "onnxruntime-cpu")
    assert "1. put the weights in safetensors into dit: a run needs them" in result.stdout
    refused = CliRunner().invoke(app, ["plan", "recipe.yaml"])
    assert refused.exit_code == 2
    assert "no safetensors in" in refused.stderr


def test_without_transformers_steps_and_guidance_are_not_invented(tmp_path: Path, monkeypatch) -> None:
    import diffusers

    class Dummy:
        """As diffusers has it in the place of a pipeline that needs more."""

        _backends = ("torch", "no_such_package")

    monkeypatch.setattr(diffusers, "StableDiffusionPipeline", Dummy)
    save_folder(tiny_dit(), tmp_path / "dit")
    index = {"_class_name": "StableDiffusionPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (tmp_path / "dit/model_index.json").write_text(json.dumps(index))
    assert init("dit", "--target", "onnxruntime-cpu").exit_code == 0
    text = (tmp_path / "recipe.yaml").read_text()
    assert "# unknown, set the value you sample with: Dummy cannot be inspected without no_such_package" in text
    assert "# default of" not in text


def test_inputs_that_do_not_fit_end_init_and_plan_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        FACTORY + "\n\ndef wide():\n    net = make()\n    return DenoiserModel(net.module, net.scheduler, (5, 8, 8))\n"
    )
    found = init("net.py:wide", "--target", "onnxruntime-cpu")
    recipe = "model: {path: './net.py:wide'}\ntargets: [onnxruntime-cpu]\nsteps: [calibrate]\n"
    (tmp_path / "r.yaml").write_text(recipe)
    planned = CliRunner().invoke(app, ["plan", "r.yaml"])
    for result in (found, planned):
        assert result.exit_code == 2, result.output
        assert "Net cannot be called with sample (1, 5, 8, 8), timestep (1,): it ended in RuntimeError" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
