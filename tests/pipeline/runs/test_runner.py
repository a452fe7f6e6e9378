"""The invariants the runner keeps, and that a killed run goes on to the same result."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import full_disk
from toys import NOISE, NUMBERS, START, SUM, Numbers, toy_recipe

from intaglio import Recipe, Store, bind, compile
from intaglio.pipeline.artifacts.keys import MODEL, PROVENANCE
from intaglio.pipeline.errors import ContractError, IntaglioError, RecipeError, StepFailed, StoreError, TargetError
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.runner import StepEvent, plan
from intaglio.pipeline.runs.store import tree_digest

TWO_TARGETS = ("onnxruntime-cpu", "tensorrt-rtx")


def statuses(recipe: Recipe, store: Store, **options: object) -> list[str]:
    """`step status` for every step of every chain."""
    events: list[StepEvent] = []
    compile(recipe, store, start=START, on_step=events.append, **options)  # type: ignore[arg-type]  # tests only
    return [f"{event.place.step} {event.status}" for event in events if event.status != "runs"]


def test_a_chain_refines_and_derives(store: Store) -> None:
    compiled = compile(toy_recipe(("Append", {"number": 5}), "Add"), store, start=START)["onnxruntime-cpu"]
    assert compiled[NUMBERS].values == [1, 5]
    assert compiled[SUM].values == [6, 26]


def test_second_run_hits_everything(store: Store) -> None:
    recipe = toy_recipe("Append", "Add", "Roll")
    assert statuses(recipe, store) == ["append done", "add done", "roll done"]
    assert statuses(recipe, Store(store.root)) == ["append hit", "add hit", "roll hit"]


def test_another_target_runs_only_what_reads_the_target(store: Store) -> None:
    recipe = toy_recipe("Append", "Add", targets=TWO_TARGETS)
    assert statuses(recipe, store) == ["append done", "add done", "append hit", "add done"]


def test_the_model_is_written_once_for_all_targets(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = Numbers.save
    monkeypatch.setattr(Numbers, "save", lambda self, root: (saved.append(root), save(self, root)))
    compile(toy_recipe("Append", targets=TWO_TARGETS), store, start=START)
    assert [root.name for root in saved].count("start") == len(START)


def test_equal_outputs_let_what_follows_hit(store: Store) -> None:
    """Another pass with the same numbers out."""
    statuses(toy_recipe("Append", "Mutate"), store)
    assert statuses(toy_recipe("Same", "Mutate"), store) == ["same done", "mutate hit"]


def test_a_step_may_want_what_came_before_it(store: Store) -> None:
    recipe = toy_recipe("Append", "Origin", "Add", seed=3)
    compiled = compile(recipe, store, start=START)["onnxruntime-cpu"]
    origin = compiled[PROVENANCE]
    assert origin.recipe.seed == 3
    assert dict(origin.recipe.steps[0].options) == {"number": 1}
    assert set(origin.start) == {"NUMBERS", "TARGET"}
    assert origin.runs == compiled.runs[:1]
    assert compiled[NUMBERS].values == [1, 1, 1]  # as many steps as came before
    assert [step.status for step in plan(recipe, store, start=START)["onnxruntime-cpu"]] == ["hit"] * 3
    other = toy_recipe("Append", "Origin", ("Add", {}), seed=4)
    assert [step.status for step in plan(other, store, start=START)["onnxruntime-cpu"]] == ["hit", "runs", "depends"]
    assert statuses(other, store) == ["append hit", "origin done", "add hit"]
    changed = recipe.with_option("append", ("number",), 7)
    planned = [step.status for step in plan(changed, store, start=START)["onnxruntime-cpu"]]
    assert planned == ["runs", "depends", "depends"]


def test_the_seed_counts_for_random_passes_only(store: Store) -> None:
    statuses(toy_recipe("Append", "Roll", seed=1), store)
    assert statuses(toy_recipe("Append", "Roll", seed=2), store) == ["append hit", "roll done"]


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    rolls = [
        compile(toy_recipe("Roll", seed=3), Store(tmp_path / name), start=START)["onnxruntime-cpu"][NOISE].values
        for name in ("a", "b")
    ]
    assert rolls[0] == rolls[1]


def test_a_step_reads_only_what_it_requires(store: Store) -> None:
    with pytest.raises(ContractError, match="peek: reads TARGET, but may read NUMBERS: add TARGET to `requires`"):
        compile(toy_recipe("Peek"), store, start=START)


def test_what_a_step_wants_it_reads_where_it_is_there(store: Store) -> None:
    before, behind = toy_recipe("WantSum", "Add"), toy_recipe("Add", "WantSum")
    assert compile(before, store, start=START)["onnxruntime-cpu"][NUMBERS].values == [1, 0]
    assert compile(behind, store, start=START)["onnxruntime-cpu"][NUMBERS].values == [1, 1]
    assert statuses(behind, store) == ["add hit", "want-sum hit"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("Forget", "forget: provides NUMBERS, but did not return it"),
        ("Surplus", "surplus: returned SUM, but does not provide it"),
        ("WrongType", "wrong-type: returned int as NUMBERS, which is Numbers"),
        ("RollUndeclared", "roll-undeclared: asks for random numbers without declaring it"),
    ],
)
def test_a_step_keeps_its_contract(store: Store, step: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        compile(toy_recipe(step), store, start=START)
    assert list(store.records()) == []


def test_mutation_does_not_leak(store: Store) -> None:
    compiled = compile(toy_recipe("Mutate", "Append"), store, start=START)["onnxruntime-cpu"]
    assert compiled[NUMBERS].values == [1, 1]


def test_bind_reports_everything_at_once() -> None:
    recipe = toy_recipe(
        "Apend", ("Append", {"numbr": 1}), ("Append", {"number": -1}), "Append", targets=("tensorrt-rtz",)
    )
    with pytest.raises(RecipeError) as caught:
        bind(recipe, start=START)
    listed = "\n".join(caught.value.problems)
    assert "no target 'tensorrt-rtz': did you mean 'tensorrt-rtx'?" in listed
    assert "no class 'Apend': did you mean 'Append'?" in listed
    assert "append: numbr: no such option: did you mean 'number'?" in listed
    assert "append: number: Input should be greater than or equal to 0 (got -1)" in listed
    assert "step 'append' is listed 3 times" in listed
    assert str(caught.value).startswith("5 problems:\n  1. ")


def test_bind_finds_a_missing_input_and_says_where_it_comes_from() -> None:
    with pytest.raises(
        RecipeError, match="add, onnxruntime-cpu: needs NUMBERS, but only PROVENANCE, TARGET exist there: put a step"
    ):
        bind(toy_recipe("Add"), start={})
    with pytest.raises(
        RecipeError, match="needs SUM, but only NUMBERS, PROVENANCE, TARGET exist there: move it after 'add'"
    ) as caught:
        bind(toy_recipe("ReadSum", "Add", targets=TWO_TARGETS), start=START)
    assert len(caught.value.problems) == 2


def test_bind_lists_every_layer_a_target_refuses() -> None:
    with pytest.raises(TargetError, match="layer a: not on onnxruntime-cpu") as caught:
        bind(toy_recipe("Refuse", targets=TWO_TARGETS), start=START)
    assert len(caught.value.problems) == 4


def test_a_step_that_does_not_apply_is_left_out() -> None:
    chains = bind(toy_recipe("OnlyTensorRT", "Append", targets=TWO_TARGETS), start=START)
    assert [[step.name for step in chain.steps] for chain in chains] == [["append"], ["only-tensor-rt", "append"]]


def test_a_failed_step_says_where_its_scratch_is(store: Store) -> None:
    with pytest.raises(StepFailed, match="fail: ZeroDivisionError: no way") as caught:
        compile(toy_recipe("Append", "Fail"), store, start=START)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    (scratch,) = (store.root / "scratch").iterdir()
    assert str(scratch) in str(caught.value)
    assert (scratch / "half").read_text() == "half"
    assert statuses_until_failure(toy_recipe("Append", "Fail"), store) == ["append hit"]


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        ("ValueError('wrong shape')", False),
        ("FileNotFoundError(2, 'No such file')", False),
        ("OSError(28, 'No space left on device')", True),
        ("MemoryError()", True),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", True),
    ],
)
def test_a_failed_step_says_that_it_goes_on_only_where_it_can(
    error: str, goes_on: bool, store: Store, tmp_path: Path
) -> None:
    source = (
        f"from toys import Append\n\n\nclass Ends(Append):\n    def run(self, state, ctx):\n        raise {error}\n"
    )
    (tmp_path / "ends.py").write_text(source)
    with pytest.raises(StepFailed) as caught:
        compile(toy_recipe({"./ends.py:Ends": {}}), store, start=START, base=tmp_path)
    assert ("run the same command again to continue" in str(caught.value)) is goes_on
    assert ("fix the cause first" in str(caught.value)) is not goes_on


def test_an_error_names_the_users_model_and_not_its_copy_in_the_store(store: Store, tmp_path: Path) -> None:
    source = (
        "from intaglio.pipeline.errors import RecipeError\nfrom intaglio.pipeline.artifacts.keys import MODEL\n"
        "from toys import Append\n\n\nclass Blames(Append):\n    requires = frozenset({MODEL})\n"
        "    def run(self, state, ctx):\n        raise RecipeError(f'{state[MODEL].root}/config.json: is wrong')\n"
    )
    (tmp_path / "blames.py").write_text(source)
    (tmp_path / "model.py").write_text("def make(): ...\n")
    recipe = Recipe.parse("{model: ./model.py:make, targets: [onnxruntime-cpu], steps: [./blames.py:Blames]}")
    start = {MODEL: Checkpoint.resolve(recipe.model, tmp_path)}
    with pytest.raises(RecipeError, match=f"^{tmp_path}/config.json: is wrong$"):
        compile(recipe, store, start=start, base=tmp_path)


def statuses_until_failure(recipe: Recipe, store: Store) -> list[str]:
    events: list[StepEvent] = []
    with pytest.raises(StepFailed, match="fail"):
        compile(recipe, store, start=START, on_step=events.append)
    return [f"{event.place.step} {event.status}" for event in events if event.status != "runs"]


def test_editing_a_foreign_pass_runs_it_again(store: Store, tmp_path: Path) -> None:
    source = "from toys import Append\n\n\nclass Twice(Append):\n    name = 'twice'\n"
    recipe = Recipe.model_validate({"model": "toy", "targets": TWO_TARGETS[:1], "steps": ["./mine.py:Twice"]})
    (tmp_path / "mine.py").write_text(source)
    assert statuses(recipe, store, base=tmp_path) == ["twice done"]
    assert statuses(recipe, store, base=tmp_path) == ["twice hit"]
    (tmp_path / "mine.py").write_text(source + "# another content\n")
    assert statuses(recipe, store, base=tmp_path) == ["twice done"]


def test_plan_says_what_would_run(store: Store) -> None:
    def planned(recipe: Recipe) -> list[tuple[str, str, bool]]:
        (steps,) = plan(recipe, store, start=START).values()
        return [(step.step, step.status, step.seconds is not None) for step in steps]

    recipe = toy_recipe("Append", "Add")
    assert planned(recipe) == [("append", "runs", False), ("add", "depends", False)]
    statuses(recipe, store)
    assert planned(recipe) == [("append", "hit", True), ("add", "hit", True)]
    assert planned(recipe.with_option("append", ("number",), 7)) == [("append", "runs", True), ("add", "depends", True)]


def test_what_a_step_took_on_another_model_says_nothing(store: Store, tmp_path: Path) -> None:
    recipe = toy_recipe("Begin", "Add")
    models = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"def make(): ...  # {name}\n")
        models.append({MODEL: Checkpoint.resolve(ModelRef(path=f"./{name}.py:make"), tmp_path)})
    compile(recipe, store, start=models[0])
    one, other = ({s.step: s.seconds for s in plan(recipe, store, start=m)["onnxruntime-cpu"]} for m in models)
    assert one["begin"] is not None
    assert other == {"begin": None, "add": one["add"]}


def test_published_files_the_recipe_and_the_manifest(store: Store, tmp_path: Path) -> None:
    compile(toy_recipe("Append", "Add", "Roll"), store, start=START, out=tmp_path / "out")
    folder = tmp_path / "out" / "onnxruntime-cpu"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "numbers.json", "recipe.yaml", "text.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["numbers.json"]["size_bytes"] == len("[1, 1]")
    assert set(manifest["files"]) == {"numbers.json", "recipe.yaml", "text.json"}
    assert [step["step"] for step in manifest["steps"]] == ["append", "add", "roll"]
    assert set(manifest["start"]) == {"NUMBERS", "TARGET"}
    assert manifest["versions"]["intaglio"]
    assert Recipe.read(folder / "recipe.yaml").steps[0].options == {"number": 1}


def test_publishing_again_replaces_the_folder(store: Store, tmp_path: Path) -> None:
    for number in (1, 2):
        compile(toy_recipe(("Append", {"number": number})), store, start=START, out=tmp_path / "out")
    assert (tmp_path / "out/onnxruntime-cpu/numbers.json").read_text() == "[1, 2]"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["onnxruntime-cpu"]


def test_publishing_spares_a_folder_that_is_not_ours(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out/onnxruntime-cpu").mkdir(parents=True)
    (tmp_path / "out/onnxruntime-cpu/thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="was not written by intaglio: move it"):
        compile(toy_recipe("Append"), store, start=START, out=tmp_path / "out")
    assert (tmp_path / "out/onnxruntime-cpu/thesis.txt").exists()


def test_a_folder_that_cannot_be_written_ends_the_run_before_its_steps(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran: list[object] = []
    with pytest.raises(RecipeError, match=f"cannot be made, as {tmp_path / 'file'} cannot be written to"):
        compile(toy_recipe("Append"), store, start=START, out=tmp_path / "file/out", on_step=ran.append)
    assert not ran


def test_a_disk_that_is_full_at_the_end_leaves_the_folder_as_it_was(store: Store, tmp_path: Path) -> None:
    compile(toy_recipe("Append"), store, start=START, out=tmp_path / "out")
    before = tree_digest(tmp_path / "out")
    with ExitStack() as behind_the_step, pytest.raises(StoreError, match=r"out/onnxruntime-cpu: cannot be written \("):
        compile(
            toy_recipe(("Append", {"number": 2})),
            store,
            start=START,
            out=tmp_path / "out",
            on_step=lambda event: event.status == "done" and behind_the_step.enter_context(full_disk(5)),
        )
    assert tree_digest(tmp_path / "out") == before


def test_two_published_files_of_one_name_are_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"SAME_FILE: delivers the file numbers\.json, but another file"):
        compile(toy_recipe("Clash"), store, start=START, out=tmp_path / "out")
    assert not (tmp_path / "out/onnxruntime-cpu").exists()


# Kills itself at the place named in the file `kill`, once: the second run of the same command goes through.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from toys import Append, Numbers, START, toy_recipe
from intaglio import Store, compile
import intaglio.pipeline.runs.publish as publish, intaglio.pipeline.runs.store as store

place = Path("kill").read_text() if Path("kill").exists() else ""
Path("kill").unlink(missing_ok=True)

def kill_before(owner, name, at):
    inner = getattr(owner, name)
    def killing(*args, **kwargs):
        if place == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)
    setattr(owner, name, killing)

kill_before(Append, "run", "before a step")
kill_before(store, "tree_digest", "while outputs are staged")
kill_before(store, "write_atomically", "before the record")
kill_before(publish, "_manifest", "while publishing")
compile(toy_recipe("Append", "Checkpointed", "Roll", "Add"), Store(Path("store")), start=START, out=Path("out"))
"""
PLACES = ("before a step", "while outputs are staged", "before the record", "inside a step", "while publishing")


def _run_killed(folder: Path) -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", KILLED_RUN], cwd=folder, env=environment, check=False).returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    assert _run_killed(tmp_path / "undisturbed") == 0
    expected = tree_digest(tmp_path / "undisturbed/out")
    for place in PLACES:
        folder = tmp_path / place
        folder.mkdir()
        (folder / ("kill-inside" if place == "inside a step" else "kill")).write_text(place)
        assert _run_killed(folder) == -signal.SIGKILL, place
        assert not (folder / "out/onnxruntime-cpu").exists()
        assert _run_killed(folder) == 0, place
        assert tree_digest(folder / "out") == expected, place
        assert not list((folder / "store/scratch").iterdir())
        assert not list((folder / "store/staging").iterdir())


def test_two_runs_on_one_store_run_each_step_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from toys import START, toy_recipe; from intaglio import Store, compile\n"
        "compile(toy_recipe('Slow'), Store(Path('store')), start=START, out=Path('out'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert (tmp_path / "slow.log").read_text() == "ran\n"


def test_exit_codes_are_distinct() -> None:
    codes = [error.exit_code for error in IntaglioError.__subclasses__()]
    assert sorted(codes) == [2, 3, 4, 5, 6, 7, 8]
