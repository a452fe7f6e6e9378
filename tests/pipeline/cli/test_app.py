"""The command as a user meets it: output, messages, exit codes."""

import ast
import inspect
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from intaglio import Recipe
from intaglio.pipeline.cli.app import app
from intaglio.pipeline.errors import exit_codes
from intaglio.pipeline.formats.target import Target, load_target, target_names

RECIPE = """
model: ./model.py:make
targets: [onnxruntime-cpu, tensorrt-rtx]
steps: ['toys:Begin', {'toys:Append': {number: 2}}, 'toys:Add', 'toys:Score']
"""

MODEL = """
def make():
    import torch
    from intaglio.pipeline.model.checkpoint import DenoiserModel
    return DenoiserModel(torch.nn.Linear(1, 1), None, (1,))
"""


@pytest.fixture(autouse=True)
def _recipe(tmp_path: Path) -> None:
    """recipes/toy.yaml, with a model beside it."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/model.py").write_text(MODEL)
    (tmp_path / "recipes/toy.yaml").write_text(RECIPE)


def intaglio(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def run(*arguments: str) -> Result:
    return intaglio("run", "recipes/toy.yaml", "--out", "out", *arguments)


def test_run_publishes_and_names_each_target(tmp_path: Path) -> None:
    result = run()
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["onnxruntime-cpu: out/onnxruntime-cpu", "tensorrt-rtx: out/tensorrt-rtx"]
    assert (tmp_path / ".intaglio/store/runs").is_dir()
    assert "onnxruntime-cpu 2/4 append done in" in result.stderr
    assert "tensorrt-rtx 2/4 append is in the store" in result.stderr


def test_run_as_json_says_where_and_what_ran() -> None:
    found = json.loads(run("--json").stdout)["tensorrt-rtx"]
    assert (found["folder"], found["report"]) == ("out/tensorrt-rtx", None)
    assert [(step["step"], step["status"]) for step in found["steps"]] == [
        ("begin", "hit"),
        ("append", "hit"),
        ("add", "done"),
        ("score", "hit"),
    ]


def test_set_and_insert_change_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from toys import Append\n\n\nclass Mine(Append):\n    name = 'mine'\n")
    result = run("--insert", "after:append=./mine.py:Mine", "--set", "mine.number=7", "--set", "append.number=3")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out/tensorrt-rtx/numbers.json").read_text() == "[1, 3, 7]"
    written = Recipe.read(tmp_path / "out/tensorrt-rtx/recipe.yaml")
    assert written.model.path == "./model.py:make"
    assert written.steps[2].uses == "./../mine.py:Mine"


def test_the_store_can_be_named_by_the_environment(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", "recipes/toy.yaml"], env={"INTAGLIO_STORE": "elsewhere"})
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "elsewhere/objects").is_dir()
    assert (tmp_path / "build/toy/onnxruntime-cpu/manifest.json").is_file()


def test_plan_says_what_would_run() -> None:
    assert intaglio("plan", "recipes/toy.yaml").stdout.count(" seconds ") == 8
    run()
    planned = intaglio("plan", "recipes/toy.yaml", "--set", "append.number=3").stdout
    rows = [line.split() for line in planned.splitlines() if line.split()[:1] == ["begin"] or "append " in line]
    assert [row[1:4] for row in rows] == [["in", "the", "store"], ["runs", "0.0", "s"]] * 2
    assert planned.count("runs if an earlier output changes") == 4
    steps = json.loads(intaglio("plan", "recipes/toy.yaml", "--json").stdout)["tensorrt-rtx"]
    assert [(step["step"], step["status"]) for step in steps] == [
        (name, "hit") for name in ("begin", "append", "add", "score")
    ]


def test_show_prints_the_metrics_of_every_target() -> None:
    run()
    metrics = {"quality": {"psnr_db": 1.5}, "layers": [1, 2]}
    shown = intaglio("show", "out", "--json").stdout
    assert json.loads(shown) == {"onnxruntime-cpu": metrics, "tensorrt-rtx": metrics}
    table = [line.split() for line in intaglio("show", "out").stdout.splitlines()]
    assert ["quality.psnr_db", "1.5", "1.5"] in table


def test_passes_lists_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = {name: EntryPoint(name, f"toys:{name}", "intaglio.passes") for name in ("Append", "Missing")}
    monkeypatch.setattr("intaglio.pipeline.runs.registry.named_passes", lambda: points)
    monkeypatch.setattr("intaglio.pipeline.cli.app.named_passes", lambda: points)
    listed = intaglio("passes").stdout
    assert "Append\n    Refines NUMBERS.\n    number: int = 1  what is appended\n" in listed
    assert "Missing: no class 'Missing'" in listed
    found = json.loads(intaglio("passes", "--json").stdout)
    option = {"type": "int", "description": "what is appended", "default": 1}
    assert found["Append"]["facts"]["options"] == {"number": option}
    assert found["Missing"]["fault"].startswith("Missing: no class 'Missing'")


def test_targets_lists_all_with_a_row_for_each_device() -> None:
    rows = [line.split() for line in intaglio("targets").stdout.splitlines()]
    first = {row[0]: row for row in rows if row}
    assert set(target_names()) <= set(first)
    assert first["tensorrt-10.3-orin"][1:] == [
        *("21", "w8a8", "w4a16", "w7a8", "w8a8", "w7a8"),
        *("Jetson", "Orin", "NX", "16GB", "16", "GB", "102.4", "15", "30.1"),
    ]
    assert ["Jetson", "AGX", "Orin", "64GB", "64", "GB", "204.8", "42.5", "85"] in rows


@pytest.mark.parametrize("name", target_names())
def test_a_target_is_shown_with_every_fact_and_source(name: str) -> None:
    target, shown = load_target(name), intaglio("targets", name).stdout.splitlines()
    assert shown[0] == f"{name}: {target.description}"
    for statement in target.facts:
        assert shown[shown.index(statement.fact) + 1] == f"    [{statement.source}]"
    for device in target.devices:
        assert f"    [{device.source}]" in shown


def test_targets_as_json_hold_all_that_there_is() -> None:
    shown = json.loads(intaglio("targets", "--json").stdout)
    assert tuple(shown) == target_names()
    assert Target.model_validate(shown["tensorrt-11"]) == load_target("tensorrt-11")
    assert list(json.loads(intaglio("targets", "tensorrt-10", "--json").stdout)) == ["tensorrt-10"]


def test_a_target_that_is_not_there_is_named() -> None:
    result = intaglio("targets", "tensorrt-9")
    assert result.exit_code == 2
    assert "no target 'tensorrt-9'" in result.stderr


@pytest.mark.parametrize(
    ("step", "exit_code", "message"),
    [
        ("toys:Apend", 2, "did you mean 'Append'"),
        ("toys:Forget", 3, "forget: provides NUMBERS, but did not return it"),
        ("toys:Refuse", 4, "layer b: not either"),
        ("toys:Fail", 5, "fail: ZeroDivisionError: no way"),
        ("toys:NeedsExtra", 7, "pip install 'intaglio[rtx]'"),
        ("toys:Interrupt", 130, "interrupted: run the same command again to continue"),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(step: str, exit_code: int, message: str) -> None:
    result = run("--insert", f"after:append={step}")
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_traceback_comes_with_debug_alone_and_the_exit_code_stays() -> None:
    debugged = intaglio("--debug", "run", "recipes/toy.yaml", "--insert", "after:append=toys:Fail")
    assert debugged.exit_code == 5
    assert "Traceback" in debugged.stderr
    assert "ZeroDivisionError: no way" in debugged.stderr


def test_a_file_that_cannot_be_written_is_one_message() -> None:
    result = intaglio("schema", "--out", "nowhere/recipe.schema.json")
    assert result.exit_code == 1
    assert result.stderr == "intaglio: nowhere/recipe.schema.json: No such file or directory\n"


def test_help_says_every_exit_code() -> None:
    shown = " ".join(intaglio("--help").stdout.split())
    assert list(exit_codes()) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 130]
    assert all(f"{code} {meaning}" in shown for code, meaning in exit_codes().items())


def test_every_command_takes_json() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert "as_json" in inspect.signature(command.callback).parameters, command.name


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("intaglio targets tensorrt-r", ["tensorrt-rtx", "tensorrt-rtx-ada", "tensorrt-rtx-blackwell"]),
        ("intaglio explain w8a8_", ["w8a8_token", "w8a8_step"]),
        ("intaglio lint --target onnxruntime-cp", ["onnxruntime-cpu"]),
        ("intaglio doc", ["doctor"]),
    ],
)
def test_the_shell_completes_names(words: str, completed: list[str]) -> None:
    env = {"_INTAGLIO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert CliRunner().invoke(app, [], prog_name="intaglio", env=env).stdout.split() == completed


def test_a_store_that_cannot_be_used_exits_with_6(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run("--store", "file/store").exit_code == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "append=1"), "write it as STEP.FIELD=VALUE"),
        (("--set", "append.number"), "write it as STEP.FIELD=VALUE"),
        (("--set", "append.number=["), "expected node content"),
        (("--set", "apend.number=1"), "no step 'apend' in the recipe: did you mean 'append'"),
        (("--insert", "append=toys:Add"), "write it as after:STEP=PASS"),
        (("--insert", "after:append=calibrat"), "no pass 'calibrat': did you mean 'calibrate'"),
        (("--set", "append.numbr=2"), "append: numbr: no such option: did you mean 'number'"),
    ],
)
def test_a_bad_option_says_how_to_write_it(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "out/onnxruntime-cpu").mkdir(parents=True)
    (tmp_path / "out/onnxruntime-cpu/metrics.json").write_text("{")
    result = intaglio("show", "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("intaglio: out/onnxruntime-cpu/metrics.json: is not JSON: ")
    assert result.stderr.count("\n") == 1


def test_show_without_results_says_what_to_give() -> None:
    result = intaglio("show", ".")
    assert result.exit_code == 2
    assert "give a folder that `intaglio run` wrote" in result.stderr


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _gigabyte(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 30)


@pytest.mark.parametrize("make", [_fifo, _device, _gigabyte, Path.mkdir])
def test_a_recipe_that_is_no_file_of_a_recipes_size_is_refused_at_once(make: Callable[[Path], None]) -> None:
    make(Path("r.yaml"))
    began = time.process_time()
    result = intaglio("plan", "r.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith("intaglio: r.yaml: ")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "append." + "a." * 2000 + "b=1"), "--set append.a.a."),
        (("--set", "append." + "a." * 2000 + "b=1"), "an option of 2001 nested names: at most 50 are read"),
        (("--set", "append.number=0x" + "f" * 5000), ": a number of 5002 characters"),
        (("--set", "append.number=" + "[" * 2000), "nested in each other more than 50 deep"),
        (("--set", "append.number=2026-01-01"), "a date instead of text"),
        (("--set", "append.number=1") * 1001, "--set: given 1001 times, at most 1000"),
        (("--insert", "after:append=" + "x" * 2000), "name: String should have at most 1000 characters"),
        (("--insert", "after:append=a\x1bb"), "a name is not empty, and has no control characters"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_option_that_nobody_writes_by_hand_is_refused_by_name(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "\x1b" not in result.stderr
    assert len(result.stderr) < 1000


def test_what_comes_from_a_file_is_printed_without_control_characters() -> None:
    folder = Path("out/onnxruntime-cpu")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"\x1b[31mred\x1b[0m": "\x9b[bold]a\nb"}))
    result = intaglio("show", "out")
    assert result.exit_code == 0
    assert r"\x1b[31mred\x1b[0m" in result.stdout
    assert r"\x9b[bold]a\nb" in result.stdout
    assert not {"\x1b", "\x9b"} & {*result.stdout}


def test_nothing_is_printed_past_the_function_that_escapes() -> None:
    import intaglio.pipeline.cli.app as cli
    import intaglio.pipeline.cli.console as console
    import intaglio.pipeline.cli.printing as printing

    bare = [
        (module.__name__, function.name)
        for module in (cli, printing, console)
        for function in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"
    ]
    assert bare == [("intaglio.pipeline.cli.printing", "say"), ("intaglio.pipeline.cli.console", "print_json")]


def test_an_error_that_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("x" * 100_000)

    monkeypatch.setattr("intaglio.pipeline.cli.app.load_target", broken)
    result = intaglio("targets", "tensorrt-rtx")
    assert result.exit_code == 1
    assert result.stderr.startswith("intaglio: unexpected KeyError: 'xxx")
    assert len(result.stderr) < 9000
    assert result.stderr.count("\n") == 1
