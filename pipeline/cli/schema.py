"""Make the JSON schema of recipes, with every pass and its options, for editors."""

from typing import Any, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.runs.registry import pass_classes

Schema: TypeAlias = dict[str, Any]

FILE = "recipe.schema.json"
"""Usual name of the schema's file, beside recipes."""
OTHER_PASS = {"type": "string", "pattern": r"^[^:]+(\.py)?:\w+$"}
"""Schema of a pass outside the named ones: `./file.py:Class` or `package.module:Class`."""


def editor_line(file: str) -> str:
    """Return the comment that names the schema to language servers for YAML."""
    return f"# yaml-language-server: $schema={file}"


def recipe_schema() -> Schema:
    """Return the schema of recipes in every spelling. A pass that cannot be imported accepts any options."""
    passes = pass_classes()
    models: list[type[BaseModel]] = [Recipe, *(kind for kind in passes.values() if kind is not None)]
    places, content = models_json_schema([(model, "validation") for model in models])
    definitions = content["$defs"]
    options = {n: {} if kind is None else places[kind, "validation"] for n, kind in passes.items()}
    alone = [n for n, kind in passes.items() if kind is None or not any(_required(kind))]
    definitions["Step"] = _step(options, alone)
    recipe = definitions.pop(places[Recipe, "validation"]["$ref"].rpartition("/")[2])
    recipe["properties"]["targets"]["items"] = {
        "anyOf": [{"const": name, "description": load_target(name).description} for name in target_names()]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "$defs": definitions}


def _required(kind: type[Pass]) -> list[str]:
    return [name for name, info in kind.model_fields.items() if info.is_required()]


def _step(options: Schema, alone: list[str]) -> Schema:
    """Return the schema of a step: `name`, `name: {options}`, or the fields uses, name and options."""
    free: Schema = {"type": ["object", "null"]}
    named = {name: {"anyOf": [found, {"type": "null"}]} if name in alone else found for name, found in options.items()}
    fields: Schema = {
        "uses": {"anyOf": [{"enum": list(options)}, OTHER_PASS]},
        "name": {"type": "string", "description": "name of the step, needed if a pass is used twice"},
        "options": free,
    }
    rules = [
        {"if": {"properties": {"uses": {"const": name}}}, "then": {"properties": {"options": found}}}
        for name, found in options.items()
    ]
    return {
        "anyOf": [
            {"enum": alone},
            OTHER_PASS,
            {
                "type": "object",
                "properties": named,
                "patternProperties": {OTHER_PASS["pattern"]: free},
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
            {
                "type": "object",
                "properties": fields,
                "required": ["uses"],
                "additionalProperties": False,
                "allOf": rules,
            },
        ]
    }
