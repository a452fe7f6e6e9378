"""The targets that come with intaglio."""

from pathlib import Path

import pytest

from intaglio.pipeline import Target
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.plan import SCHEME_NAMES
from intaglio.pipeline.target import load_target, target_names


@pytest.mark.parametrize("name", target_names())
def test_a_target_names_schemes_that_exist_and_its_sources(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert set(target.formats) == {"linear", "conv"}
    for schemes in target.formats.values():
        assert "float" in schemes
        assert set(schemes) <= set(SCHEME_NAMES)
    assert all(fact.fact and fact.source for fact in target.facts)
    assert target.activation_dtype == ("uint8" if target.runtime == "onnxruntime" else "int8")


@pytest.mark.parametrize("name", target_names())
def test_a_target_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    load_target(name).save(tmp_path)
    assert Target.load(tmp_path) == load_target(name)


def test_each_runtime_has_a_target() -> None:
    assert {load_target(name).runtime for name in target_names()} == {"onnxruntime", "tensorrt", "tensorrt-rtx"}


def test_an_unknown_target_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="no target 'onnxruntime-cpi': did you mean 'onnxruntime-cpu'"):
        load_target("onnxruntime-cpi")
