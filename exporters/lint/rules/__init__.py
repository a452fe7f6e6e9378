"""Collect all rules of `lint`. A new rule is one decorated function in a module that `RULES` lists."""

from intaglio.exporters.lint.rule import Rule, rules_in
from intaglio.exporters.lint.rules import codes, parsing, products, scales, validity

RULES: tuple[Rule, ...] = tuple(
    sorted(
        (rule for module in (validity, scales, codes, products, parsing) for rule in rules_in(module)),
        key=lambda rule: rule.when == "no errors",  # after all others, which may find the errors
    )
)
"""Every rule, in the order in which findings are reported."""
