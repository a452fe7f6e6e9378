import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_folder, tiny_dit

from intaglio.pipeline import Store
from intaglio.pipeline.keys import ADAPTER, QUANTIZED, TRAJECTORY
from intaglio.pipeline.processes import Processes, processes
from intaglio.pipeline.store import RunRecord

RECIPE = """
model: {path: model, sampling_steps: 4, guidance: 2.0}
targets: [onnxruntime-cpu]
steps:
  - calibrate: {samples: 16}
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


def run(folder: Path, *launcher: str) -> dict[str, RunRecord]:
    """By step."""
    command = [sys.executable, *launcher, "-m", "intaglio", "run", "recipe.yaml", "--store", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # one of them speaks
    return {record.step: record for record in Store(folder).records()}


def test_two_processes_make_what_one_does(tmp_path):
    save_folder(tiny_dit(), tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    records = [run(tmp_path / "one"), run(tmp_path / "two", *launcher)]
    stores = [Store(tmp_path / "one"), Store(tmp_path / "two")]

    def both(step: str, key):
        return [store.load(key, record[step].outputs[key.name]) for store, record in zip(stores, records, strict=True)]

    one, two = both("calibrate", TRAJECTORY)
    assert torch.equal(one.conditions["class_labels"], two.conditions["class_labels"])
    # products of other heights are summed in another order
    torch.testing.assert_close(two.outputs, one.outputs, rtol=1e-4, atol=1e-5)
    for name, low in one.low.items():
        torch.testing.assert_close(two.low[name], low, rtol=1e-4, atol=1e-5)
    one, two = both("distill", ADAPTER)
    assert two.loss[0] == pytest.approx(one.loss[0], rel=0.01)
    assert two.loss == pytest.approx(one.loss, rel=0.1)  # then a code that rounds otherwise shows
    assert sum(two.loss) == pytest.approx(sum(one.loss), rel=0.02)
    one, two = both("merge", QUANTIZED)
    for name, layer in one.layers.items():
        assert (layer.codes != two.layers[name].codes).float().mean() < 0.01
    manifest = json.loads((tmp_path / "build" / "recipe" / "onnxruntime-cpu" / "manifest.json").read_text())
    assert [step["step"] for step in manifest["steps"]][:2] == ["calibrate", "uniform"]
