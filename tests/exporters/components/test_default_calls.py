"""The step `components` calls pipelines that take a picture for each prompt, or have components that are not there."""

from pathlib import Path
from typing import Any

import joined_pipelines
from harness import run_pass

from intaglio.exporters.components.export_components import ExportComponents
from intaglio.pipeline.artifacts.keys import COMPONENTS, MODEL, PIPELINE, TARGET
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.pipeline_folder import PipelineFolder
from intaglio.pipeline.model.recording import record
from intaglio.pipeline.model.ref import ModelRef

STEPS = 2


def saved(pipe: Any, call: dict[str, Any], folder: Path) -> Checkpoint:
    """Save the pipeline and the recording of a call, and return its denoiser."""
    pipe.save_pretrained(folder / "model")
    record(pipe, joined_pipelines.call_of(call, STEPS)).save(folder / "conditions.safetensors")
    return Checkpoint.resolve(ModelRef(path="model", sampling_steps=STEPS, conditions="conditions.safetensors"), folder)


def test_a_pipeline_that_needs_a_picture_for_each_prompt_gets_them(tmp_path):
    model = saved(*joined_pipelines.t2i_adapter(), tmp_path)
    artifacts = {MODEL: model, PIPELINE: PipelineFolder.around(model), TARGET: load_target("onnxruntime-cpu")}
    made = run_pass(ExportComponents(), artifacts, tmp_path / "scratch")[COMPONENTS]
    assert {*made.compiled} == {"text_encoder", "adapter", "vae"}


def test_a_component_that_a_folder_does_not_have_is_none_in_the_pipeline(tmp_path):
    pipe, call = joined_pipelines.flux_kontext()
    folder = PipelineFolder.around(saved(pipe, call, tmp_path))
    assert folder.open(pipe.transformer, ()).text_encoder is None
