"""A model that does not fit is refused before it is read, and what steps took is on record."""

import platform
from mmap import mmap

import peak_memory
import pytest
from forked import printed_forked
from tiny import FACTORY, save_folder, tiny_dit
from toys import START, toy_recipe

from intaglio import Recipe, Store, compile
from intaglio.passes.calibrate import Calibrate
from intaglio.passes.distill.distill import Distill
from intaglio.pipeline import machine
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs import memory


def test_a_model_that_does_not_fit_is_refused_before_any_step(store, tmp_path, monkeypatch):
    save_folder(tiny_dit(), tmp_path / "model")
    recipe = Recipe.parse("{model: model, targets: [onnxruntime-cpu], steps: [calibrate]}")
    sizes = [parameter.numel() for parameter in tiny_dit().parameters()]
    count, least = sum(sizes), memory.least_stored_bytes(max(sizes))
    monkeypatch.setattr(memory, "machine_bytes", lambda: least - 1)
    ran = []
    with pytest.raises(RecipeError, match=rf"has {count:,} parameters, .* at least 0\.5 GB, and there are 0\.5"):
        compile(recipe, store, base=tmp_path, on_step=ran.append)
    assert ran == []
    monkeypatch.setattr(memory, "machine_bytes", lambda: least)
    compile(recipe, store, base=tmp_path, on_step=ran.append)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 0)
    compile(recipe, store, base=tmp_path, on_step=ran.append)  # takes nothing: it is all in the store
    assert [event.status for event in ran] == ["runs", "done", "hit"]
    steps = "[calibrate, {uniform: {schemes: [w8a8_token]}}, {distill: {updates: 1}}]"
    trained = Recipe.parse(f"{{model: model, targets: [onnxruntime-cpu], seed: 1, steps: {steps}}}")
    monkeypatch.setattr(memory, "machine_bytes", lambda: memory.least_bytes(count) - 1)
    with pytest.raises(RecipeError, match="at least 0"):
        compile(trained, store, base=tmp_path)


def test_a_training_of_blocks_holds_the_largest_block():
    sizes = memory.WeightSizes.of(tiny_dit())
    blocks = [sum(p.numel() for p in block.parameters()) for block in tiny_dit().transformer_blocks]
    assert sizes == (
        sum(p.numel() for p in tiny_dit().parameters()),
        max(blocks),
        max(p.numel() for p in tiny_dit().parameters()),
    )
    by_block = Distill(updates=1, scope="block")
    assert memory.held_bytes(by_block, sizes) == 500_000_000 + 36 * max(blocks)
    assert memory.held_bytes(Distill(updates=0), sizes) == 500_000_000 + 16 * sizes.largest
    for step in (
        Distill(updates=1),
        Distill(updates=1, scope="block", start="gptq"),
        Distill(updates=1, scope="block", base="grid"),
    ):
        assert memory.held_bytes(step, sizes) == 500_000_000 + int(4.8 * sizes.whole)


def test_a_factory_makes_all_its_weights(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(FACTORY)
    model = Checkpoint.resolve(ModelRef(path="model.py:make", sampling_steps=1), tmp_path)
    monkeypatch.setattr(memory, "PER_PARAMETER", 1e9)
    monkeypatch.setattr(memory, "machine_bytes", lambda: memory.least_bytes(84) - 1)
    with pytest.raises(RecipeError, match=r"has 84 parameters"):
        memory.check_memory(model, [Calibrate()])
    monkeypatch.setattr(memory, "machine_bytes", lambda: memory.least_bytes(84))
    memory.check_memory(model, [Calibrate()])


@pytest.mark.parametrize("text", ["123456789\n", "max\n"])
def test_the_machine_has_what_a_group_allows(text, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_GROUPS", ())
    whole = machine.machine_bytes()
    assert whole > 1e9
    (tmp_path / "limit").write_text(text)
    monkeypatch.setattr(machine, "_GROUPS", (str(tmp_path / "limit"),))
    assert machine.machine_bytes() == (whole if text == "max\n" else 123456789)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc can be told when to return memory")
def test_freed_memory_returns_to_the_system(tmp_path):
    lean, usual = map(int, printed_forked(peak_memory.print_returned, out=tmp_path / "printed").split())
    assert lean < 10e6 < 60e6 < usual


@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_the_machine_has_what_the_process_may_allocate(kind, monkeypatch):
    resource = pytest.importorskip("resource", reason="only Unix limits the memory of a process")
    limits = {getattr(resource, kind): (123456789, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda of: limits.get(of, (resource.RLIM_INFINITY,) * 2))
    assert machine.machine_bytes() == 123456789


def test_the_peak_counts_from_when_it_was_forgotten():
    if memory.forget_peak() is None:
        pytest.skip("no Linux to ask")
    before = memory.resident_bytes("VmRSS")
    with mmap(-1, 50_000_000) as held:  # which goes back to the system at once
        held[:] = bytes(1) * len(held)
    held_at_most = memory.resident_bytes("VmHWM") - before
    memory.forget_peak()
    assert held_at_most >= 45e6
    assert memory.resident_bytes("VmHWM") - before <= held_at_most - 40e6


def test_a_record_has_the_peak_of_its_step_and_an_older_one_is_read_without(store: Store):
    (record,) = compile(toy_recipe("Append"), store, start=START)["onnxruntime-cpu"].runs
    assert record.peak_bytes is None or record.peak_bytes > 10e6
    older = record.model_dump_json(exclude={"peak_bytes"})
    assert RunRecord.model_validate_json(older).peak_bytes is None
