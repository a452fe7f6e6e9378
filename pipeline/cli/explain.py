"""Explain a name: a pass, a target, a scheme, a lint rule, a metric or an artifact."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, assert_never, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from intaglio.pipeline.contract.artifact import AnyKey, Key
from intaglio.pipeline.contract.pass_base import Rule
from intaglio.pipeline.errors import RecipeError, did_you_mean
from intaglio.pipeline.formats.known import USUAL_SCHEMES, known_schemes, scheme_names
from intaglio.pipeline.formats.layer import Layer, admitted_schemes
from intaglio.pipeline.formats.schemes import Float, LayerScheme, RoundedInput, RoundedWeight
from intaglio.pipeline.formats.target import OpKind, load_target, target_names
from intaglio.pipeline.runs.registry import (
    find_metric,
    find_pass,
    named_metrics,
    named_passes,
    pass_classes,
)
from intaglio.pipeline.runs.runner import installed_version

Facts: TypeAlias = dict[str, Any]
"""Facts that JSON can hold."""


@dataclass(frozen=True)
class Explanation:
    """Meaning of a name, in words and then as facts."""

    kind: str
    name: str
    doc: str
    facts: Facts

    def to_json(self) -> Facts:
        """Return the explanation as JSON."""
        return asdict(self)

    def option_lines(self) -> Iterator[str]:
        """Yield a line for each option of a pass: `name: type = default  description`."""
        yield from (f"{name}: {_in_a_line(option)}" for name, option in self.facts["options"].items())

    def lines(self) -> Iterator[str]:
        """Yield the explanation as text: short facts beside their heading, facts with names of their own below it."""
        yield f"{self.name}: {self.kind}"
        yield ""
        yield from self.doc.splitlines()
        short = {heading: fact for heading, fact in self.facts.items() if not isinstance(fact, dict)}
        if short:
            yield ""
        for heading, fact in short.items():
            text = ", ".join(map(str, fact)) if isinstance(fact, list) else str(fact)
            yield f"{heading:<12} {text or '-'}"
        for heading, fact in self.facts.items():
            if isinstance(fact, dict) and fact:
                yield from ("", f"{heading}:")
                yield from (f"    {name}: {_in_a_line(inner)}" for name, inner in fact.items())


def explain(name: str) -> tuple[Explanation, ...]:
    """Return an explanation for each kind of thing with this name. Raises RecipeError if there is none."""
    if ":" in name:  # a pass by its file or its module
        return (explain_pass(name),)
    found = tuple(describe(name) for names, describe in KINDS.values() if name in names())
    if not found:
        known = {each for names, _ in KINDS.values() for each in names()}
        raise RecipeError(f"nothing is called {name!r}{did_you_mean(name, known)}")
    return found


def names_by_kind() -> dict[str, list[str]]:
    """Return all names that can be explained, by kind."""
    return {kind: list(names()) for kind, (names, _) in KINDS.items()}


def lint_rules() -> Mapping[str, Rule]:
    """Return the rules of all passes that have some, by name."""
    return {name: rule for kind in pass_classes().values() if kind is not None for name, rule in kind.rules().items()}


def _in_a_line(fact: object) -> str:
    match fact:
        case {"type": str(kind), "description": str(description), **default}:
            value = f"= {default['default']!r}" if "default" in default else "required"
            return f"{kind} {value}  {description}".rstrip()
        case list():
            return ", ".join(map(str, fact))
    return str(fact)


def explain_pass(name: str) -> Explanation:
    """Explain a pass by its name, or by its file or module, from the current folder. Raises as `find_pass` does."""
    found = find_pass(name, Path())
    kind = found.pass_class
    facts: Facts = {
        "class": found.origin,
        "version": kind.version,
        "requires": _names(kind.requires),
        "wants": _names(kind.wants),
        "provides": _names(kind.provides),
        "random": kind.random,
        "shared": kind.shared,
        "needs": {distribution: installed_version(distribution) for distribution in kind.needs},
        "options": dict(_options(kind)),
    }
    return Explanation("pass", name, _doc(kind), facts)


def _options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Facts]]:
    """Yield the options of a pass; options inside an option follow it: `budget`, `budget.size`."""
    for name, info in model.model_fields.items():
        option: Facts = {"type": _type_name(info.annotation), "description": info.description or ""}
        if not info.is_required():
            option["default"] = to_jsonable_python(info.get_default(call_default_factory=True))
        yield prefix + name, option
        if get_origin(info.annotation) is None and inspect.isclass(kind := info.annotation):
            yield from _options(kind, f"{prefix}{name}.") if issubclass(kind, BaseModel) else ()


def _type_name(annotation: object) -> str:
    """Write a type as a recipe's author reads it: `tuple[int, ...]`, `Budget`, `'device' | 'host'`."""
    inner = get_args(annotation)
    match get_origin(annotation):
        case None:
            special: dict[object, str] = {Ellipsis: "...", NoneType: "None"}
            return special[annotation] if annotation in special else getattr(annotation, "__name__", str(annotation))
        case origin if origin is Annotated:
            return _type_name(inner[0])
        case origin if origin is Literal:
            return " | ".join(map(repr, inner))
        case origin if origin in (Union, UnionType):
            return " | ".join(map(_type_name, inner))
        case origin:
            return f"{origin.__name__}[{', '.join(map(_type_name, inner))}]"


def _of_target(name: str) -> Explanation:
    target = load_target(name)
    return Explanation("target", name, target.description, target.model_dump(mode="json"))


def _of_rule(name: str) -> Explanation:
    rule = lint_rules()[name]
    return Explanation("rule of lint", name, rule.finds, {"level": rule.level, "fix": rule.fix, "why": rule.why})


_SHAPES: Mapping[OpKind, tuple[int, ...]] = {"linear": (64, 1280), "conv": (64, 128, 3, 3)}
"""Shapes of sample layers for which every scheme of their kind is possible."""


def _of_scheme(name: str) -> Explanation:
    layers = {op: Layer(name="", op=op, shape=shape, bias=True) for op, shape in _SHAPES.items()}
    scheme = known_schemes()[name]
    found = [op for op, layer in layers.items() if scheme in admitted_schemes(layer)]
    targets = [load_target(target) for target in target_names()]
    runs = {op: [t.name for t in targets if name in t.formats[op]] for op in found}
    facts: Facts = {"weight": _weight(scheme), "input": _input(scheme), "output": _output(scheme)}
    facts["measured"] = "if a recipe names no schemes" if name in USUAL_SCHEMES else "if sensitivity.schemes names it"
    return Explanation("scheme", name, _doc(LayerScheme), {**facts, "runs on": runs})


def _weight(scheme: LayerScheme) -> str:
    match scheme.weight:
        case Float():
            return "float"
        case RoundedWeight() as form:
            groups = form.group_size
            size = f"; {form.bits_per_weight:g} with the scales of groups of {groups}" if groups else ""
            return f"{form.bits} bits{size}; {form.scales}"
        case other:
            assert_never(other)


def _input(scheme: LayerScheme) -> str:
    match scheme.input:
        case Float():
            return "float"
        case RoundedInput() as form:
            shifted = "; the middle of its range is subtracted before rounding" if form.shifted else ""
            return f"{form.bits} bits; {_first(_doc(type(form.granularity)))}{shifted}"
        case other:
            assert_never(other)


def _output(scheme: LayerScheme) -> str:
    if isinstance(scheme.output, Float):
        return "float"
    return f"{scheme.output.bits} bits; one scale for each denoising step"


def _of_metric(name: str) -> Explanation:
    return Explanation("metric", name, _doc(type(find_metric(name))), {"class": named_metrics()[name].value})


def _of_artifact(name: str) -> Explanation:
    key = _keys()[name]
    passes = [(name, kind) for name, kind in pass_classes().items() if kind is not None]
    facts: Facts = {
        "class": f"{key.type.__module__}:{key.type.__name__}",
        "published": key.published,
        "provided by": [name for name, kind in passes if key in kind.provides],
        "required by": [name for name, kind in passes if key in kind.requires],
        "wanted by": [name for name, kind in passes if key in kind.wants],
    }
    return Explanation("artifact", name, _doc(key.type), facts)


@cache
def _keys() -> dict[str, AnyKey]:
    from intaglio.pipeline.artifacts import keys

    return {key.name: key for key in vars(keys).values() if isinstance(key, Key)}


def _names(keys: Collection[AnyKey]) -> list[str]:
    return sorted(map(str, keys))


def _doc(documented: type) -> str:
    return inspect.getdoc(documented) or ""


def _first(doc: str) -> str:
    return doc.partition("\n")[0]


KINDS: Mapping[str, tuple[Callable[[], Collection[str]], Callable[[str], Explanation]]] = {
    "passes": (named_passes, explain_pass),
    "targets": (target_names, _of_target),
    "schemes": (scheme_names, _of_scheme),
    "lint rules": (lint_rules, _of_rule),
    "metrics": (named_metrics, _of_metric),
    "artifacts": (_keys, _of_artifact),
}
"""Names of each kind, and the function that explains one."""
