"""The targets that come with intaglio."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from intaglio import Target
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.known import scheme_names
from intaglio.pipeline.formats.target import _over, load_target, target_names


@pytest.mark.parametrize("name", target_names())
def test_a_target_names_schemes_that_exist_and_its_sources(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert set(target.formats) == {"linear", "conv"}
    for schemes in target.formats.values():
        assert "float" in schemes
        assert set(schemes) <= set(scheme_names())
    assert all(fact.fact and fact.source for fact in target.facts)
    assert target.activation_dtype == ("uint8" if target.runtime == "onnxruntime" else "int8")


@pytest.mark.parametrize("name", target_names())
def test_a_target_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    load_target(name).save(tmp_path)
    assert Target.load(tmp_path) == load_target(name)


def test_a_target_stands_on_what_it_extends() -> None:
    ten, orin, thor = (load_target(f"tensorrt-{version}") for version in ("10", "10.16-orin", "10.16-thor"))
    assert "DynamicQuantizeLinear" in orin.limits.unsupported  # of _tensorrt, two files below
    assert orin.limits.code_types == ("INT8", "INT4") != ten.limits.code_types  # takes the place of ten's
    assert orin.facts[: len(ten.facts)] == ten.facts == thor.facts[: len(ten.facts)]
    assert len(orin.facts) > len(ten.facts)
    assert thor.limits == ten.limits.model_copy(update={"domains": ("trt",)})
    assert not [name for name in target_names() if name.startswith("_")]


def test_changes_add_only_where_they_say_so() -> None:
    base = {"a": [1], "b": [1], "c": {"d": [1], "e": 2}}
    changes = {"a+": [2], "b": [2], "c": {"d+": [3]}, "f": 4}
    assert _over(base, changes) == {"a": [1, 2], "b": [2], "c": {"d": [1, 3], "e": 2}, "f": 4}
    assert base == {"a": [1], "b": [1], "c": {"d": [1], "e": 2}}


@pytest.mark.parametrize("name", target_names())
def test_a_gpu_has_figures_of_its_generation(name: str) -> None:
    """8-bit codes multiply twice as fast as float16, or four times where float16 is added in float32."""
    target = load_target(name)
    assert bool(target.devices) == (target.runtime != "onnxruntime" or target.provider != "CPUExecutionProvider")
    for device in target.devices:
        assert 1.9 < device.int8_tops / device.fp16_tflops < 4.1
        assert 50 < device.fp16_tflops * 1e3 / device.bandwidth_gb_s < 1000
        assert device.source
    if name.endswith(("-orin", "-thor")):
        capability = {"orin": "8.7", "thor": "11.0"}[name.rpartition("-")[2]]
        assert {device.compute_capability for device in target.devices} == {capability}


def test_each_runtime_has_a_target() -> None:
    assert {load_target(name).runtime for name in target_names()} == {"onnxruntime", "tensorrt", "tensorrt-rtx"}


def test_a_target_of_a_runtime_that_is_not_installed_is_refused() -> None:
    content = load_target("tensorrt-10").model_dump() | {"runtime": "tensort"}
    with pytest.raises(ValidationError, match="no runtime 'tensort' is installed: did you mean 'tensorrt'"):
        Target.model_validate(content)


def test_an_unknown_target_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="no target 'onnxruntime-cpi': did you mean 'onnxruntime-cpu'"):
        load_target("onnxruntime-cpi")
