"""Run the command where its output cannot be written, or was closed by the caller."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "intaglio")
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no device that is always full")
@pytest.mark.parametrize("arguments", [("targets",), ("explain", "w8a8_token", "--json"), ("--help",)])
def test_an_output_that_cannot_be_written_is_one_line_that_names_it(arguments: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        ended = subprocess.run((*COMMAND, *arguments), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "intaglio: standard output: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors in a POSIX shell")
@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), (">&- 2>&- <&-", 0)])
def test_a_command_works_where_its_caller_closed_the_streams(closed: str, code: int) -> None:
    ended = subprocess.run(f"{' '.join(COMMAND)} targets {closed}", shell=True, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, b"", b"")


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors in a POSIX shell")
def test_messages_do_not_go_to_the_output_where_the_caller_closed_theirs() -> None:
    ended = subprocess.run(f"{' '.join(COMMAND)} run no.yaml 2>&-", shell=True, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")
