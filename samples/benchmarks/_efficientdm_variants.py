"""Models, plans and steps of `efficientdm.py`: its variants, and what each part of the method adds."""

from collections.abc import Mapping
from typing import Any

from intaglio import Step

MODELS = ("emoji-dit", "emoji-unet")
PLANS: Mapping[str, list[str]] = {
    "W8A8": ["w8a8_token", "w8a8_step"],
    "W4A8": ["w4a8_token", "w4a8_step", "w8a8_token", "w8a8_step"],
    "W4A4": ["w4a4_token", "w4a4_step", "w8a8_token", "w8a8_step"],
}
ENDS = ["w8a8_token", "w8a8_step"]
GROUPS = [32]
"""Group size of 4-bit weights, as the peers have it."""
CALIBRATE = Step(uses="calibrate", options={"samples": 32})
BALANCE = Step(uses="balance")
UPDATES: Mapping[str, int] = {"emoji-dit": 120, "emoji-unet": 240}
DISTILL: Mapping[str, Any] = {
    "samples": 4,
    "start": "gptq",
    "rollout": 0.25,
    "weighting": "samples",
    "scale_rate": 1e-4,
}


def ours(model: str, **changes: Any) -> tuple[Step, ...]:
    return (BALANCE, Step(uses="distill", options={**DISTILL, "updates": UPDATES[model], **changes}))


ROUNDED, UNTRAINED, OURS = "round to nearest", "ours without distillation", "ours"
BRANCHED, OURS_BRANCHED = f"{UNTRAINED}, a branch of rank 8", f"{OURS}, a branch of rank 8"


def variants(model: str, plan: str) -> dict[str, tuple[Step, ...]]:
    found = {
        ROUNDED: (Step(uses="distill", options={"updates": 0, "input_rate": 0}),),
        UNTRAINED: ours(model, updates=0),
        OURS: ours(model),
    }
    if plan != "W8A8":
        branch = Step(uses="balance", options={"branch": 8})
        found[BRANCHED] = (branch, found[UNTRAINED][1])
        if plan == "W4A8":
            found[OURS_BRANCHED] = (branch, found[OURS][1])
    return found


TRAINED = "W4A4"
"""The plan of the ablations, and of the comparison with QAT."""


def ablations(model: str) -> dict[str, tuple[Step, ...]]:
    """With the first seed alone."""
    return {
        "ours, one rate for all layers": ours(model, scale_aware="off"),
        "ours, inputs as calibrated": ours(model, input_rate=0),
        "ours, without roll-outs": ours(model, rollout=0),
        "ours, from the nearest codes, not balanced": ours(model, start="round")[1:],
        "ours, 5 times the updates": ours(model, updates=5 * UPDATES[model]),
    }


QAT_START: Mapping[str, Any] = {"start": "round", "rate": 0.01, "scale_rate": 1e-3}
"""Options of QAT on the denoiser's own objective that differ: it starts from the nearest codes, not balanced."""
