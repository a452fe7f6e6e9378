"""Faults of files: what a user has in the folder of results, folders of others, damaged records, hostile kits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from _faults_bench import TARGET, Bench, Ended, Run, Tally, bar

from intaglio.pipeline.runs.store import remove_tree

PRIVATE = b"only mine 4711"
HELD_S = 120
"""The longest that a command may take that is given a pipe or a file without an end."""

Change = Callable[[Path], object]


class Mine:
    """Files of a user in a folder of results, and whether they are still there as they were."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "drafts/empty").mkdir(parents=True)
        (folder / "my_notes.txt").write_bytes(PRIVATE)
        (folder / "drafts/plan.txt").write_bytes(os.urandom(100_000))
        (folder / "data").symlink_to("/nowhere")
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_bytes(b"coffee")
        self.before = self._content()

    def problems(self) -> list[str]:
        found = self._content()
        lost = [name for name, content in self.before.items() if found.get(name) != content]
        return [f"lost or changed of the user's: {', '.join(map(repr, lost))}"] if lost else []

    def _content(self) -> dict[str, object]:
        names = ("my_notes.txt", "drafts/plan.txt", "drafts/empty", "data", os.fsdecode(b"caf\xe9.txt"))
        paths = {name: self.folder / name for name in names if os.path.lexists(self.folder / name)}
        return {n: os.readlink(p) if p.is_symlink() else p.is_dir() or p.read_bytes() for n, p in paths.items()}


def replacements(bench: Bench, count: int) -> Tally:
    """Kills while results take the place of older ones, with a user's files among them."""
    tally = Tally()
    run = bench.copied("replaced", results=True)
    mine = Mine(run.delivered)
    for number in bar(range(3 * count), "kills while results are replaced"):
        if tally.tried == count:
            break
        by = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        process, left = run.start(), set(run.out.iterdir())
        while process.poll() is None and set(run.out.iterdir()) <= left:
            time.sleep(0.0005)
        time.sleep(bench.rng.uniform(0, 0.03))
        process.send_signal(by)
        code, said = run.ended(process)
        problems = [*run.half_written(), *mine.problems()]
        if code not in (0, 130, -by) or "Traceback" in said:
            problems.append(f"at {by.name} ended with {code}: {said[-300:]}")
        if code or problems:  # else it had ended before
            tally.count(problems)
    problems = [*bench.finished(run), *mine.problems()]
    if others := [path.name for path in run.out.iterdir() if path.name != TARGET]:
        problems.append(f"left beside the results: {', '.join(others)}")
    tally.count(problems)
    remove_tree(run.folder)
    return tally


def users_files(bench: Bench) -> Tally:
    """A run over results that a user changed: all that is the user's is kept, and the results are whole."""

    def changed(name: str, content: bytes) -> Change:
        return lambda folder: (folder / name).write_bytes(content)

    def linked(folder: Path) -> None:
        (folder / "model.onnx").rename(folder.parents[1] / "model.onnx")
        (folder / "model.onnx").symlink_to(folder.parents[1] / "model.onnx")

    changes: Mapping[str, tuple[Change, Callable[[Path], bool]]] = {
        "nothing else": (lambda folder: None, lambda folder: True),
        "a changed file": (
            changed("plan.json", b"{}"),
            lambda folder: (folder / "plan.json.kept").read_bytes() == b"{}",
        ),
        "a pipe": (lambda folder: os.mkfifo(folder / "pipe"), lambda folder: (folder / "pipe").is_fifo()),
        "a delivered file that is a link": (linked, lambda folder: (folder / "model.onnx.kept").is_symlink()),
        "a read-only folder": (
            lambda folder: (folder / "drafts").chmod(0o555),
            lambda folder: (folder / "drafts").stat().st_mode & 0o777 == 0o555,
        ),
    }
    tally = Tally()
    for name, (change, kept) in bar([*changes.items()], "user's files"):
        run = bench.copied("users", results=True)
        mine = Mine(run.delivered)
        change(run.delivered)
        problems = [*bench.finished(run), *mine.problems()]
        if not problems and not kept(run.delivered):
            problems.append("is gone")
        tally.count([f"{name}: {problem}" for problem in problems])
        remove_tree(run.folder)
    return tally


def folders_of_others(bench: Bench) -> Tally:
    """Folders that no run wrote, in the place of results: refused before the run, and left as they are."""

    def manifest(text: str) -> Change:
        return lambda folder: (folder / "manifest.json").write_text(text)

    changes: Mapping[str, Change] = {
        "no manifest": lambda folder: None,
        "a web app": manifest('{"name": "my web app"}'),
        "no JSON": manifest("{"),
        "digests that are paths": manifest('{"files": {"thesis.txt": {"sha256": "../thesis.txt", "size_bytes": 4}}}'),
        "a pipe": lambda folder: os.mkfifo(folder / "manifest.json"),
        "a link without an end": lambda folder: (folder / "manifest.json").symlink_to("/dev/zero"),
    }
    tally = Tally()
    for name, change in bar([*changes.items()], "folders of others"):
        run = bench.copied("others")
        run.delivered.mkdir(parents=True)
        (run.delivered / "thesis.txt").write_text("mine")
        change(run.delivered)
        before = sorted(path.name for path in run.delivered.iterdir())
        problems = refused(ended(run, bench), TARGET)
        if sorted(path.name for path in run.delivered.iterdir()) != before:
            problems.append("files are gone")
        tally.count([f"{name}: {problem}" for problem in problems])
        remove_tree(run.folder)
    return tally


def linked_results(bench: Bench) -> Tally:
    """The folder of results is a link: it is written through, twice, or refused."""
    tally = Tally()
    for name in bar(["to results", "to nowhere", "in a circle", "to a file"], "linked results"):
        run = bench.copied("linked", results=name == "to results")
        elsewhere, problems = run.folder / "elsewhere", list[str]()
        run.out.mkdir(exist_ok=True)
        if name == "to results":
            run.delivered.rename(elsewhere)
        elif name == "to a file":
            elsewhere.write_bytes(PRIVATE)
        run.delivered.symlink_to(run.delivered if name == "in a circle" else elsewhere)
        if name.startswith("to ") and name != "to a file":
            problems = [*bench.finished(run), *bench.finished(run)]
        else:
            problems = refused(ended(run, bench), TARGET)
        if not run.delivered.is_symlink():
            problems.append("the link is gone")
        tally.count([f"{name}: {problem}" for problem in problems])
        remove_tree(run.folder)
    return tally


def records(bench: Bench) -> Tally:
    """A damaged record: the step runs again, or the message names what to delete, which lies in the store."""

    def says(**facts: object) -> Change:
        return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    def instead(make: Change) -> Change:
        def replace(path: Path) -> None:
            path.unlink()
            make(path)

        return replace

    changes: Mapping[str, Change] = {
        "no UTF-8": lambda path: path.write_bytes(b"\xff"),
        "nested deep": lambda path: path.write_bytes(b"[" * 1_000_000),
        "a list": lambda path: path.write_text("[]"),
        "without outputs": says(outputs={}),
        "a digest that is a path": says(outputs={"TRAJECTORY": "../../../elsewhere"}),
        "a key that is a path": says(key="../../../elsewhere"),
        "another step's": says(ingredients="{}"),
        "1 TB": lambda path: os.truncate(path, 1 << 40),
        "a pipe": instead(os.mkfifo),
        "a folder": instead(Path.mkdir),
        "a link without an end": instead(lambda path: path.symlink_to("/dev/zero")),
    }
    tally = Tally()
    for name, change in bar([*changes.items()], "records"):
        run = bench.copied("records")
        (run.folder / "elsewhere").mkdir()
        record = next(path for path in sorted((run.store / "runs").iterdir()) if '"calibrate"' in path.read_text())
        change(record)
        code, said = ended(run, bench)
        problems = [] if code in (0, 6) and "Traceback" not in said else [f"ended with {code}: {said[-300:]}"]
        if code == 6:
            named = re.search(r"(\S+) is not a run record.*: delete it", said)
            if named is None or Path(named[1]) != record:
                problems.append(f"names nothing to delete: {said[-300:]}")
            remove_tree(record)
        tally.count([f"{name}: {problem}" for problem in [*problems, *bench.finished(run)]])
        remove_tree(run.folder)
    return tally


def kits(bench: Bench) -> Tally:
    """Check that a kit contains nothing that `intaglio verify` refuses, and replaces nothing but a kit."""

    def linked(name: str) -> Change:
        def link(folder: Path) -> None:
            with suppress(FileNotFoundError):
                (folder / name).unlink()
            (folder / name).symlink_to(folder.parent / "private.txt")

        return link

    def in_place(make: Change) -> Change:
        return lambda folder: make(folder.parent / "kit.tar.gz")

    changes: Mapping[str, Change] = {
        "a link beside the model": linked("model.onnx_more"),
        "a link in the model's place": linked("model.onnx"),
        "a linked folder": lambda folder: (folder / "more").symlink_to(folder.parent),
        "a pipe": lambda folder: os.mkfifo(folder / "model.onnx_more"),
        "a changed byte": lambda folder: _flip_last(folder / "model.onnx"),
        "a missing file": lambda folder: (folder / "recipe.yaml").unlink(),
        "no manifest": lambda folder: (folder / "manifest.json").unlink(),
        "a link as --out": in_place(lambda path: path.symlink_to(path.with_name("private.txt"))),
        "a pipe as --out": in_place(os.mkfifo),
        "a folder as --out": in_place(Path.mkdir),
        "a thesis as --out": in_place(lambda path: path.write_bytes(PRIVATE)),
    }
    tally = Tally()
    tally.count([] if _kit_of(bench, lambda folder: None)[0] == 0 else ["as delivered: is not packed"])
    for name, change in bar([*changes.items()], "kits"):
        tally.count([f"{name}: {problem}" for problem in refused(_kit_of(bench, change), "")])
    return tally


def _kit_of(bench: Bench, change: Change) -> Ended:
    """Return how `intaglio kit` ended on a changed folder."""
    place = bench.place / "kits"
    folder = Path(shutil.copytree(bench.undisturbed.delivered, place / "tensorrt-10"))
    (place / "private.txt").write_bytes(PRIVATE)
    change(folder)
    code, said = limited([sys.executable, "-m", "intaglio", "kit", folder, "--out", place / "kit.tar.gz"])
    if (place / "private.txt").read_bytes() != PRIVATE or _packs_private(place / "kit.tar.gz"):
        said += "; a private file is packed, or written over"
        code = -1
    remove_tree(place)
    return code, said


def ended(run: Run, bench: Bench) -> Ended:
    """Return how a run ended that has nothing to compute, after at most `HELD_S` seconds."""
    command = [
        sys.executable,
        "-m",
        "intaglio",
        "run",
        bench.undisturbed.recipe,
        "--store",
        run.store,
        "--out",
        run.out,
    ]
    return limited(command)


def limited(command: list[object]) -> Ended:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, check=False, timeout=HELD_S
        )
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL, f"more than {HELD_S} s"
    return done.returncode, done.stderr


def refused(end: Ended, naming: str) -> list[str]:
    """Problems of an end that should be exit code 2 and one message that names something."""
    code, said = end
    fine = code == 2 and "Traceback" not in said and naming in said
    return [] if fine else [f"ended with {code}: {said[-300:]}"]


def _flip_last(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _packs_private(archive: Path) -> bool:
    if archive.is_symlink() or not archive.is_file() or archive.read_bytes() == PRIVATE:
        return False
    with tarfile.open(archive) as packed:
        files = [packed.extractfile(member) for member in packed if member.isfile()]
        return any(PRIVATE in file.read() for file in files if file is not None)
