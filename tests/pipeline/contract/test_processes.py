import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_folder, tiny_dit

from intaglio import Recipe, Store, compile
from intaglio.pipeline.artifacts.keys import ADAPTER, QUANTIZED, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.contract.processes import Processes, processes

RECIPE = """
model: {path: model, sampling_steps: 4, guidance: 2.0}
targets: [onnxruntime-cpu]
steps:
  - calibrate: {samples: 16}
  - sensitivity: {buckets: 2, rows: 2, samples: 2, drift_samples: 2}
  - uniform: {schemes: [w4a8_token, w8a8_token, w8a8_step]}
  - distill: {updates: 20, samples: 4, rank: 4, rollout: 0.3}
  - merge
"""


@pytest.mark.parametrize(("count", "total"), [(1, 5), (2, 5), (3, 7), (4, 4)])
def test_shares_are_the_whole_in_order(count, total):
    parts = [list(range(total))[Processes(index, count).share(total)] for index in range(count)]
    assert [item for part in parts for item in part] == list(range(total))
    assert min(map(len, parts)) >= 1


def test_one_process_keeps_to_itself():
    alone = processes()
    tensor = torch.ones(3)
    alone.add([tensor])
    assert (alone.count, alone.first, alone.agree("a"), alone.gather("a")) == (1, True, "a", ["a"])
    assert tensor.tolist() == [1, 1, 1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As `torchrun` gives each of its processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_by_two(store: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "intaglio"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "run", "recipe.yaml", "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # one of them speaks


def only_calibrated(store: Path) -> Store:
    """A copy in which nothing else is on record."""
    copy = Store(shutil.copytree(store, store.with_name("calibrated")))
    for file in (copy.root / "runs").iterdir():
        if json.loads(file.read_text())["step"] != "calibrate":
            file.unlink()
    return copy


def test_two_processes_make_what_one_does(tmp_path, one_thread):
    save_folder(tiny_dit(), tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = Recipe.parse(RECIPE)
    run_by_two(tmp_path / "two")
    compile(recipe, Store(tmp_path / "one"), base=tmp_path)
    stores = [Store(tmp_path / "one"), Store(tmp_path / "two")]
    records = [{record.step: record for record in store.records()} for store in stores]

    def both(step: str, key):
        return [store.load(key, record[step].outputs[key.name]) for store, record in zip(stores, records, strict=True)]

    _, measured = both("sensitivity", SENSITIVITY)
    from_the_same = recipe.model_copy(update={"steps": recipe.steps[:2]})
    (done,) = compile(from_the_same, only_calibrated(tmp_path / "two"), base=tmp_path).values()
    assert done[SENSITIVITY] == measured  # to the bit, all estimates and drift included
    assert measured.rank_correlation is not None
    assert measured.drift
    assert measured.drift_screened
    one, two = both("calibrate", TRAJECTORY)
    assert torch.equal(one.conditions["class_labels"], two.conditions["class_labels"])
    # products of other heights are summed in another order
    torch.testing.assert_close(two.outputs, one.outputs, rtol=1e-4, atol=1e-5)
    for name, low in one.low.items():
        torch.testing.assert_close(two.low[name], low, rtol=1e-4, atol=1e-5)
    one, two = both("distill", ADAPTER)
    assert two.loss[0] == pytest.approx(one.loss[0], rel=0.01)
    assert two.loss == pytest.approx(one.loss, rel=0.1)  # then a code that rounds otherwise shows
    assert (two.drawn[0].update, two.drawn[0].mse) == (0, pytest.approx(one.drawn[0].mse, rel=0.01))
    assert two.peak == pytest.approx(one.peak, rel=1e-4)
    assert sum(two.loss) == pytest.approx(sum(one.loss), rel=0.02)
    # which state is kept is decided by drawn samples: where two are nearly as good, by the order of sums
    most = 0.01 if one.kept.update == two.kept.update else 0.5
    assert two.kept.mse == pytest.approx(one.kept.mse, rel=0.1)
    one, two = both("merge", QUANTIZED)
    for name, layer in one.layers.items():
        assert (layer.codes != two.layers[name].codes).float().mean() < most
    manifest = json.loads((tmp_path / "build" / "recipe" / "onnxruntime-cpu" / "manifest.json").read_text())
    assert [step["step"] for step in manifest["steps"]][:2] == ["calibrate", "sensitivity"]
