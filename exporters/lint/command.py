"""Define the command `intaglio lint`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from intaglio.pipeline.artifacts.graph import Graph
from intaglio.pipeline.artifacts.keys import GRAPH, LINT, TARGET
from intaglio.pipeline.cli.console import print_json, print_table
from intaglio.pipeline.cli.explain import lint_rules
from intaglio.pipeline.cli.options import json_option
from intaglio.pipeline.cli.printing import say
from intaglio.pipeline.contract.artifact import Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.formats.target import load_target, target_names
from intaglio.pipeline.runs.registry import find_pass


def lint_command(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="An ONNX model from any exporter.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="T", autocompletion=target_names, help="Target to check for; see `intaglio targets`."),
    ] = None,
    as_json: Annotated[bool, json_option("the findings")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules and what each finds.")] = False,
) -> None:
    """Find what the target would refuse, compute wrongly or compute in float. Exits with 1 if there are errors."""
    if rules:
        _print_rules(as_json)
        return
    if model is None or target is None:
        raise RecipeError("lint: give an ONNX model and its --target, or --rules")
    artifacts: Outputs = {GRAPH: Graph(model, {}, {}), TARGET: load_target(target)}
    step = find_pass("lint", Path()).pass_class.model_validate({"refuse": "nothing"})
    found = State(step.run(State(artifacts, reader="lint"), Context(scratch=Path())), reader="lint")[LINT]
    if as_json:
        print_json(asdict(found))
    else:
        rows = [(f.level, f.rule, f.node, f"{f.message}: {f.fix}") for f in found.findings]
        print_table(f"{model}: {len(rows)} findings", ("", "rule", "node", "what to do"), rows)
    if found.at("error"):
        raise typer.Exit(1)


def _print_rules(as_json: bool) -> None:
    rules = lint_rules()
    if as_json:
        facts = ("level", "finds", "fix", "why")
        print_json({name: {fact: getattr(rule, fact) for fact in facts} for name, rule in rules.items()})
        return
    for rule in rules.values():
        say(f"{rule.name:<18} {rule.level:<8} {rule.finds}")
