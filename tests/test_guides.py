"""Every command and example of the README and the guides runs, on tiny models in a temporary folder.

The folder looks to the reader's commands as theirs does. What is smaller in it is declared here: MODELS are tiny and
have random weights, QUICK changes options of recipes before they run, and SHORTER replaces text of examples.
"""

import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from diffusers import DDIMScheduler, DiTTransformer2DModel
from documents import GUIDES, README, ROOT, Block, blocks
from PIL import Image
from typer.testing import CliRunner

from intaglio import Recipe, Step
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.runs.registry import find_pass

QUICK: Mapping[str, Mapping[str, object]] = {
    "calibrate": {"samples": 2},
    "sensitivity": {"buckets": 1, "rows": 2, "samples": 2, "probes": 1, "direct": 0, "drift_below_db": 0},
    "distill": {"updates": 0},
    "verify": {"samples": 2, "rows": 2, "gap_db_tolerance": 60},
    "benchmark": {"rounds": 1, "rows": 2},
}
"""Options that make a step take a moment."""
STEPS = 2
"""Denoising steps."""
TARGETS = {"tensorrt-rtx": "its engine takes a minute, and has tests of its own"}
"""Targets that are left out of recipes, and why."""
SHORTER = {'"height": 768, "width": 512': '"height": 16, "width": 8'}


def dit(folder: Path) -> None:
    """Save a class-conditional transformer with the sample shape of emoji-dit."""
    import torch

    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 32, "patch_size": 8}
    model = DiTTransformer2DModel(**shape, in_channels=3, out_channels=3, num_embeds_ada_norm=48)
    model.save_pretrained(folder / "transformer")
    DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing").save_pretrained(folder / "scheduler")


def text_to_image(folder: Path) -> None:
    """Save a Stable Diffusion pipeline with its text encoder and autoencoder."""
    from tiny_pipelines import sd

    sd().save_pretrained(folder)


def policy(folder: Path) -> None:
    """Copy the sample policy, which is small enough to be compiled as it is."""
    shutil.copytree(ROOT / "samples/models/policy", folder)


MODELS: Mapping[str, Callable[[Path], None]] = {
    "samples/models/emoji-dit": dit,
    "samples/models/policy": policy,
    "path/to/model": dit,
    "path/to/pipeline": text_to_image,
}


PICTURES = ("room.png", "window.png")
"""Pictures of the reader that guides name; here each has one colour."""
RECIPES = ("samples/emoji-dit.yaml", "samples/demo.yaml")
"""Recipes of the model of samples."""


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and one store for all documents: what one has compiled, the next takes from there."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / ".intaglio").mkdir()
    return folder


@pytest.fixture
def place(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the reader works: a copy of the repository's samples."""
    (tmp_path / "samples").mkdir()
    for file in ROOT.glob("samples/*.*"):
        if file.suffix in (".py", ".yaml"):
            shutil.copy(file, tmp_path / "samples" / file.name)
    for picture in PICTURES:
        Image.new("RGB", (16, 16), "gray").save(tmp_path / picture)
    (tmp_path / ".intaglio").symlink_to(kept / ".intaglio", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put_models(text: str, kept: Path, place: Path) -> None:
    """Put the models into the folder that a document mentions."""
    for name, save in MODELS.items():
        if name in text or (name.startswith("samples") and any(recipe in text for recipe in RECIPES)):
            if not (kept / name).exists():
                save(kept / name)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to(kept / name, target_is_directory=True)


def quicken(recipe: Path) -> None:
    """Change a recipe so that it takes seconds."""
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    found["model"]["sampling_steps"] = STEPS
    found["targets"] = [target for target in found["targets"] if target not in TARGETS]
    steps = [(step, {}) if isinstance(step, str) else next(iter(step.items())) for step in found["steps"]]
    found["steps"] = [{name: {**options, **QUICK.get(name, {})}} for name, options in steps]
    recipe.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")


def run_command(words: list[str], where: str) -> None:
    """Run one command in this process, as the script `intaglio` does."""
    assert words[0] == "intaglio", f"{where}: only intaglio is run; mark {words[0]} as console, with the reason"
    for word in words:
        if word.endswith(".yaml") and Path(word).is_file() and words[1] in ("run", "plan"):
            quicken(Path(word))
    result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "200"})
    assert result.exit_code == 0, f"{where}: {' '.join(words)}\n{result.output}"


def check_steps(steps: list[object], where: str) -> None:
    """Validate the options of every step against its pass."""
    for each in steps:
        step = Step.model_validate(each)
        found = find_pass(step.uses, ROOT / "samples").pass_class
        assert step.options.keys() <= found.model_fields.keys(), where
        if "path" not in step.options:  # names a file of the reader's
            found.model_validate(step.options)


def check_yaml(block: Block) -> None:
    """Read a recipe, or a part of one: its steps, or its model."""
    found = yaml.safe_load(block.text)
    whole = {"steps": found} if isinstance(found, list) else found
    check_steps(whole.get("steps", []), block.place)
    if whole is found:
        Recipe.model_validate({"targets": ["onnxruntime-cpu"], "steps": ["merge"], **found})


def write_file(block: Block, name: str, place: Path) -> None:
    """Write the file that a document shows. A file of the repository has to be the one that is shown."""
    kept = ROOT / name
    if not kept.is_file():
        (place / name).write_text(block.text, encoding="utf-8")
    elif block.language == "yaml":
        assert Recipe.parse(block.text) == Recipe.read(kept), f"{block.place}: is not {name}"
    else:
        assert block.text in kept.read_text(encoding="utf-8"), f"{block.place}: is not in {name}"


def run_block(block: Block, names: dict[str, Any], place: Path) -> None:
    """Do what a reader does with one block."""
    text = block.text
    for longer, shorter in SHORTER.items():
        text = text.replace(longer, shorter)
    if block.file is not None:
        write_file(block, block.file, place)
    match block.language:
        case "sh":
            for words in block.commands():
                run_command(words, block.place)
        case "python":
            code = compile(text, block.place, "exec")
            if block.is_run and block.file is None:
                exec(code, names)
        case "yaml":
            check_yaml(block)
        case "toml":
            tomllib.loads(text)


@pytest.mark.parametrize("document", [README, *GUIDES], ids=lambda document: document.stem)
def test_everything_that_a_document_tells_to_do_works(document: Path, kept: Path, place: Path) -> None:
    put_models(document.read_text(encoding="utf-8"), kept, place)
    names: dict[str, Any] = {"pipe": SimpleNamespace()}
    for block in blocks(document):
        run_block(block, names, place)
