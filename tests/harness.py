"""Runs one pass on given artifacts, without a store."""

import logging
from pathlib import Path

from intaglio.pipeline.artifact import AnyKey, Artifact, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.pass_base import Pass

Artifacts = dict[AnyKey, Artifact]


def run_pass(step: Pass, artifacts: Artifacts, scratch: Path) -> Artifacts:
    """What the step provides, from what it requires of `artifacts`."""
    scratch.mkdir(exist_ok=True)
    wanted = step.wants & artifacts.keys()
    state = State({key: artifacts[key] for key in step.requires | wanted}, reader=step.name)
    return dict(step.run(state, Context(scratch=scratch, seed=0, log=logging.getLogger("test"))))
