"""Reads the Markdown documents: their fenced blocks, the commands in them, and their links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "samples/guides").glob("*.md"))
RESULTS = ROOT / "samples/benchmarks/README.md"
CONTRIBUTING = ROOT / ".github/CONTRIBUTING.md"
DOCUMENTS = [README, *GUIDES, RESULTS, CONTRIBUTING, ROOT / "CHANGELOG.md"]

FENCE = re.compile(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
REASON = re.compile(r"(needs|takes) \w+")
"""A block that is not run says so in the line of its fence: it needs something, or takes too long."""


@dataclass(frozen=True)
class Block:
    """One fenced block. `label` is the rest of its first line: the name of a file, or the reason not to run it."""

    place: str
    language: str
    label: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the reader is told to write, or None."""
        return self.label if re.fullmatch(r"[\w./-]+\.(py|yaml)", self.label) else None

    @property
    def is_run(self) -> bool:
        """True if the tests run it."""
        return self.language != "console" and not REASON.match(self.label)

    def commands(self) -> Iterator[list[str]]:
        """Yield every command as its words, without comments."""
        for line in self.text.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document, from top to bottom."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(f"{document.relative_to(ROOT)}:{line}", match[1], match[2], match[3]))
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(found), f"{document.name}: a fence is not closed"
    return found


def links(document: Path) -> list[str]:
    """Return the targets of all links and pictures outside of fenced blocks."""
    return LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8")))


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
