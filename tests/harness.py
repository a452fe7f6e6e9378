"""Runs one pass on given artifacts, without a store."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from intaglio.pipeline.contract.artifact import AnyKey, Artifact, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass

Artifacts = dict[AnyKey, Artifact]


def run_pass(step: Pass, artifacts: Artifacts, scratch: Path) -> Artifacts:
    """Run the step on the artifacts that it reads, and return those that it provides."""
    scratch.mkdir(exist_ok=True)
    wanted = step.wants & artifacts.keys()
    state = State({key: artifacts[key] for key in step.requires | wanted}, reader=step.name)
    return dict(step.run(state, Context(scratch=scratch, seed=0, log=logging.getLogger("test"))))


@contextmanager
def killed_at_save(number: int = 1) -> Iterator[None]:
    """End the code inside, as a kill would, after it has moved its `number`-th checkpoint into place."""
    real_replace, saves = os.replace, 0

    def dies(source: str, target: str) -> None:
        nonlocal saves
        real_replace(source, target)
        saves += 1
        if saves == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("os.replace", dies)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes."""
    resource = pytest.importorskip("resource", reason="no limits of resources on this system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
