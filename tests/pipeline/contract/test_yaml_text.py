"""Recipes by anyone: what they say is read as plain values, what they attempt is one clear error, at once."""

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio import Recipe
from intaglio.pipeline.contract.yaml_text import MOST_CHARACTERS, read_yaml
from intaglio.pipeline.errors import RecipeError

GOOD = "model: m\ntargets: [onnxruntime-cpu]\nsteps: [calibrate]\n"
DOUBLED = "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"x0: &x0 [a]\n{DOUBLED}steps: [{{calibrate: *x39}}]", "more than 30000 values, counted as often as aliases"),
        ("[" * 100_000, "nested in each other more than 50 deep"),
        ("{a: " * 20_000, "nested in each other more than 50 deep"),
        ("steps: &a [*a]", "&a contains itself"),
        ("a: " + "b" * 300_000, "300003 characters: at most 262144 are read"),
        ("a: " + "9" * 10_000, r"a: a number of 10000 characters: at most 100 are read \(line 1, column 4\)"),
        ("seed: 0x" + "f" * 5000, "seed: a number of 5002 characters"),
        (GOOD + "seed: 0o" + "7" * 5000, "seed: Input should be a valid integer"),  # text in YAML 1.1
        ("seed: 0b" + "1" * 5000, "seed: a number of 5002 characters"),
        ("seed: 0" + "7" * 5000, "seed: a number of 5001 characters"),
        ("seed: 1" + ":1" * 100_000, "seed: a number of 200001 characters"),
        ("seed: 1" + ":1" * 200 + ".5", "seed: a number of 403 characters"),
        ("model: {guidance: 1.0e+" + "9" * 200 + "}", "model.guidance: a number of 205 characters"),
        ("seed: 0x" + "f" * 16, "seed: the number 0xffffffffffffffff does not fit in 64 bits"),
        ("seed: -9223372036854775809", "seed: the number -9223372036854775809 does not fit in 64 bits"),
        ("seed: .nan", "seed: .nan is no finite number"),
        ("seed: -.inf", "seed: -.inf is no finite number"),
        ("seed: 1.0e+400", "seed: 1.0e.400 is no finite number"),
        ("seed: 0x_", "seed: 0x_ is no int"),
        ("seed: !!int ''", "seed:  is no int"),
        ("seed: !!bool maybe", "seed: maybe is no bool"),
        ("seed: 2026-01-01", "seed: a date instead of text: put it in quotes"),
        ("steps: [{calibrate: {samples: 2026-13-45}}]", "steps.0.calibrate.samples: a date"),
        ("model: \0", "not YAML: (control characters are not allowed|unacceptable character #x0000)"),
        ('model: "a\\0"', "model: a NUL character or half of a surrogate pair"),
        ("a: !!binary abc", r"a: the tag tag:yaml.org,2002:binary is not read: .* \(line 1, column 4\)"),
        ("a: !!set {b, c}", "a: the tag tag:yaml.org,2002:set is not read"),
        ("a: !!python/object/apply:os.system ['true']", "a: the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !x b", "a: the tag !x is not read"),
        ("? [a]\n: b", "this key is no name"),
        ("steps: [{1: {}}]", "steps.0: 1 is no name: put names"),
        ("{" + ", ".join(f"{n * (2**61 - 1)}: a" for n in range(9_000)) + "}", "0 is no name"),  # all of one hash
        ("seed: 1\nseed: 2", r"seed: is given twice \(line 2, column 1\)"),
        ("<<: 1", "<< takes a mapping"),
        (
            'model: m\ntargets: [a]\nsteps: ["a\\eb"]',
            "steps.0.name: a name is not empty, and has no control characters",
        ),
        ("a: *nowhere", "not YAML: found undefined alias"),
    ],
    ids=lambda text: text[:12],
)
def test_an_attempt_is_one_error(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"evil.yaml: .*{message}"):
        Recipe.parse(text, source="evil.yaml")


def test_merged_mappings_are_read_under_what_is_beside_them() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a}\nc: {<<: [{x: 5}, *a]}"
    assert read_yaml(text, "s") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 5, "y": 2}}


def test_numbers_are_those_of_yaml() -> None:
    found = read_yaml("[0x1F, 0, -0, 0_, 0b11, 1_000, 1.5e+3, 0.5, yes, ~, 1e3, '5', '010', '1:30']", "s")
    assert found == [31, 0, 0, 0, 3, 1000, 1500.0, 0.5, True, None, "1e3", "5", "010", "1:30"]


@pytest.mark.parametrize(
    ("written", "value", "base"),
    [("010", "8", 8), ("-0_17", "-15", 8), ("00", "0", 8), ("1:30", "90", 60), ("-1:30.5", "-90.5", 60)],
)
def test_a_number_that_looks_like_another_one_is_refused(written: str, value: str, base: int) -> None:
    message = (
        rf"seed: {written} is the number {value} to base {base} in YAML: write {value}, or .* \(line 1, column 7\)"
    )
    with pytest.raises(RecipeError, match=message):
        read_yaml(f"seed: {written}", "s")


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"%TAG !a{n}! a\n" for n in range(40_000))[:MOST_CHARACTERS],
        "---\n" * (MOST_CHARACTERS // 4),
        "[" + "a, " * 29_990 + "a]",
        "{" + ", ".join(f"a{n}: {{b: 1}}" for n in range(9_000)) + "}",
        '"' + "\\x41" * (MOST_CHARACTERS // 4 - 1) + '"',
        "steps: [" + "calibrate, " * 20_000 + "]",
        "targets: [" + "onnxruntime-cpu, " * 15_000 + "]",
        "targets: [" + ", ".join(f"t{n}" for n in range(25_000)) + "]",
        "seed: " + "[" * 45 + "a" * 200_000 + "]" * 45,
        "\n".join(f"x{n}: 1" for n in range(14_000)),
    ],
    ids=lambda text: text[:12],
)
def test_any_text_is_refused_within_two_seconds(text: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(text)
    assert time.process_time() - began < 2
    assert len(str(raised.value)) < 10_000


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
