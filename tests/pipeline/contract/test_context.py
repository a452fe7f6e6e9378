"""Random numbers depend on the seed and the labels, on nothing else."""

import logging
from pathlib import Path

import pytest
import torch

from intaglio import Context
from intaglio.pipeline.errors import ContractError


def test_labels_and_seed_choose_the_numbers(tmp_path: Path) -> None:
    def draw(seed: int, *labels: str | int) -> int:
        return int(Context(scratch=tmp_path, seed=seed).rng(*labels).integers(2**62))

    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({draw(0, "a", 1), draw(0, "a", 2), draw(0, "a1"), draw(0, "a", "1"), draw(1, "a", 1)}) == 5


def test_the_numbers_are_the_same_on_every_machine(tmp_path: Path) -> None:
    context = Context(scratch=tmp_path, seed=0)
    assert context.rng("a").integers(1000, size=4).tolist() == [212, 450, 84, 772]
    assert torch.randint(1000, (4,), generator=context.torch_rng("a")).tolist() == [603, 265, 195, 783]


def test_numbers_that_were_not_declared_are_refused(tmp_path: Path) -> None:
    context = Context(scratch=tmp_path, seed=None, log=logging.getLogger("intaglio.assign"))
    with pytest.raises(ContractError, match=r"intaglio\.assign: asks for random numbers .*: set random = True"):
        context.torch_rng("a")


def test_progress_is_logged_where_there_is_no_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "intaglio"),
        Context(scratch=tmp_path).progress("layers", total=3) as advance,
    ):
        advance()
        advance(2)
    assert [record.message for record in caplog.records] == ["layers 3/3"]
