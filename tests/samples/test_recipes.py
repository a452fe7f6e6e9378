"""Every recipe among the samples has known steps with valid options, and schemes that its targets execute."""

from pathlib import Path

import pytest
import yaml

from intaglio import Recipe
from intaglio.pipeline.contract.recipe import Step
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.runs.registry import find_pass

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.parametrize("file", sorted(SAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_is_valid_for_its_targets(file: Path) -> None:
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    recipe = Recipe.model_validate(found)
    for each in found["steps"]:
        step = Step.model_validate(each)
        configured = find_pass(step.uses, SAMPLES).pass_class.model_validate(step.options)
        for name in recipe.targets:
            target = load_target(name)
            if type(configured).applies(target):
                configured.check(target)
