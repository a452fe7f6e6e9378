"""The step `import-weights` refuses files of other tools by name, and its key covers all files that it reads."""

import json

import pytest
import torch
from pydantic import ValidationError
from quantized_files import WEIGHTS, take
from safetensors.torch import save_file

from intaglio.passes.imports.weights import ImportWeights
from intaglio.pipeline.artifacts.keys import MODEL
from intaglio.pipeline.errors import RecipeError


def test_files_of_others(dit, tmp_path):
    save_file({"proj.weight._data": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(RecipeError, match="quanto's files are not read"):
        take(dit, tmp_path)
    nunchaku = ("qweight", "wscales", "proj_down", "proj_up", "smooth_factor")
    save_file({f"transformer_blocks.0.qkv_proj.{part}": torch.ones(1) for part in nunchaku}, tmp_path / WEIGHTS)
    with pytest.raises(RecipeError, match="nunchaku's SVDQuant files are not read: they round inputs to 4 bits"):
        take(dit, tmp_path)
    save_file({"proj.weight": torch.ones(1)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(RecipeError, match=r"'gptq' as quantization_config\.quant_method"):
        take(dit, tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    with pytest.raises(RecipeError, match="is not one of compressed-tensors: config_groups: Field required"):
        take(dit, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"half")
    with pytest.raises(ValidationError, match=r"model\.safetensors: is not a safetensors file"):
        take(dit, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS, metadata={"tensor_names": '["a"]'})
    (tmp_path / "config.json").unlink()
    with pytest.raises(RecipeError, match="metadata is not torchao's, or tensors are missing: KeyError"):
        take(dit, tmp_path)


def test_a_file_in_which_no_layer_is_quantized(dit, tmp_path):
    tensors = dit[MODEL].open().module.state_dict()
    said = rf"{WEIGHTS}: none of its \d+ layers is quantized \(.* and \d+ more: the file has its weight in float\)"
    whole = {name: json.dumps({"_type": "Tensor"}) for name in tensors}
    for metadata in (
        {"_quantization_metadata": '{"layers": {}}'},
        {"tensor_names": json.dumps(list(tensors)), **whole},
    ):
        save_file(tensors, tmp_path / WEIGHTS, metadata=metadata)
        with pytest.raises(RecipeError, match=said):
            take(dit, tmp_path / WEIGHTS)


def test_all_its_files_are_part_of_the_key(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    with pytest.raises(ValidationError, match=r"saved: no \*\.safetensors in it"):
        ImportWeights.model_validate({"path": "saved"}, context={"base": tmp_path})
    save_file({"a": torch.ones(1)}, folder / "b.safetensors")
    steps = [ImportWeights.model_validate({"path": "saved"}, context={"base": tmp_path})]
    for name, content in (("a.safetensors", (folder / "b.safetensors").read_bytes()), ("config.json", b"{}")):
        (folder / name).write_bytes(content)
        steps.append(ImportWeights.model_validate({"path": "saved"}, context={"base": tmp_path}))
    assert len({step.sha256 for step in steps}) == 3
    with pytest.raises(ValidationError, match=r"its sha256 is .*, not"):
        ImportWeights.model_validate(steps[0].model_dump(), context={"base": tmp_path})
