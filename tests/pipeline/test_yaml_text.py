"""Recipes by anyone: what they say is read as plain values, what they attempt is one clear error, at once."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.pipeline import Recipe
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.yaml_text import read_yaml

DOUBLED = "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"x0: &x0 [a]\n{DOUBLED}steps: [{{calibrate: *x39}}]", "more than 100000 values, counted as often as aliases"),
        ("[" * 100_000, "nested in each other more than 50 deep"),
        ("{a: " * 20_000, "nested in each other more than 50 deep"),
        ("steps: &a [*a]", "&a has itself in it"),
        ("a: " + "b" * 1_100_000, "1100003 characters, at most 1048576 are read"),
        ("a: " + "9" * 10_000, "not YAML: Exceeds the limit"),
        ("a: 2026-13-45", "not YAML: month must be in"),
        ("model: \0", "not YAML: unacceptable character #x0000"),
        ("a: !!binary abc", r"not YAML: failed to decode base64 data: Incorrect padding \(line 1, column 4\)"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML: could not determine a constructor for the tag"),
        ("? [a]\n: b", "not YAML: found unhashable key"),
        ("a: *nowhere", "not YAML: found undefined alias"),
    ],
    ids=lambda text: text[:12],
)
def test_an_attempt_is_one_error(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"evil.yaml: .*{message}"):
        Recipe.parse(text, source="evil.yaml")


def test_aliases_are_read_where_they_stay_small() -> None:
    assert read_yaml("a: &few {b: [1, 2]}\nc: [*few, *few]", "s") == {"a": {"b": [1, 2]}, "c": [{"b": [1, 2]}] * 2}


# A recipe with anything in the place of one of its fields.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
FINE = {"model": {"path": "m", "guidance": 1.5}, "targets": ["onnxruntime-cpu"], "seed": 1, "steps": ["calibrate"]}


def parsed(text: str) -> Recipe | None:
    """None where the text is refused; any other error fails the test."""
    try:
        return Recipe.parse(text)
    except RecipeError:
        return None


@settings(deadline=None)
@given(st.sampled_from([*FINE, "more"]), ANYTHING)
def test_anything_in_a_field_is_refused_or_reads_back(field: str, written: object) -> None:
    recipe = parsed(yaml.safe_dump(FINE | {field: written}))
    assert recipe is None or Recipe.parse(recipe.to_yaml()) == recipe
    assert parsed(yaml.safe_dump(FINE)) is not None


@settings(deadline=None)
@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    assert parsed(text) is None
