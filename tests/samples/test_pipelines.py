"""The benchmark draws with a compiled denoiser in an unmodified pipeline."""

import diffusers
import pipelines


def test_a_pipeline_draws_with_its_denoiser_compiled(tmp_path):
    row = pipelines.measure("sd15", tmp_path)
    assert (row.pipeline, row.denoiser) == ("StableDiffusionPipeline", "UNet2DConditionModel")
    assert len(row.psnr_db) == 2
    assert min(row.psnr_db) > 35


def test_every_pipeline_is_that_of_another_class_and_its_reason_fits_in_a_line():
    made = [type(make()[0]) for make in pipelines.PIPELINES.values()]
    assert len(set(made)) == len(made) >= 30
    assert all(issubclass(kind, diffusers.DiffusionPipeline) for kind in made)
    assert pipelines.line("x", ValueError("a | b\n c")) == "| x | | ValueError: a / b c | |"
    assert pipelines.line("x", pipelines.Row("P", "D", 4.0, (40.0, 50.0))) == "| P | D | 4 | 45.0 dB, 40.0 |"
