"""Models that torch exports for no number of rows in its usual way: their graphs compute what torch does at any."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from quantizing import rel_l2
from torch import nn

from intaglio.exporters.float_graph.agreement import Expected, find_magnitudes
from intaglio.exporters.float_graph.by_row import merged
from intaglio.exporters.float_graph.capture import Calls
from intaglio.exporters.float_graph.deciding import deciding_inputs
from intaglio.exporters.float_graph.sites import find_sites
from intaglio.exporters.float_graph.spelled import distances, padded
from intaglio.exporters.float_graph.torch_export import write_graph
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.pipeline.artifacts.graph import Graph, fixed_tensor
from intaglio.pipeline.errors import StepFailed

KEPT = torch.tensor([[True, False, True, True, False]])


class Toy(nn.Module):
    """A layer whose output on the sample is moved by what `text` returns for the texts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, sample, text, mask):
        return self.layer(sample) + self.text(sample, text, mask)


class Listed(Toy):
    """Multiplies a list by the number of rows."""

    def text(self, sample, text, mask):
        return torch.tensor([0.5] * len(sample))[:, None, None] * self.other(text).mean(1, keepdim=True)


class Picked(Toy):
    """Takes each row's tokens by its mask, and attends to them."""

    def text(self, sample, text, mask):
        kept = torch.stack([self.other(row[there]) for row, there in zip(text, mask, strict=True)])
        return nn.functional.scaled_dot_product_attention(sample, kept, kept)


class Counted(Toy):
    """Reads the lengths of texts, and writes into a tensor of that length."""

    def text(self, sample, text, mask):
        lengths = mask.sum(1).tolist()
        joined = text.new_zeros(len(text), max(lengths), 6)
        for row, length in enumerate(lengths):
            joined[row, :length] = self.other(text[row, :length])
        return joined.sum(1, keepdim=True) / len(set(lengths))


class Placed(Toy):
    """Takes each row's last token, and writes it to the first place, by indices of 32 bits."""

    def text(self, sample, text, mask):
        rows, last = torch.arange(text.shape[0]), mask.sum(1).int() - 1
        written = torch.zeros_like(text)
        written[rows, last * 0] = self.other(text[rows, last])
        return written[:, :1] + written[:, 0][rows.int()][:, None]


class Built(Toy):
    """Builds a mask of its own, and decides by the values of another."""

    def text(self, sample, text, mask):
        own = torch.zeros(len(text), 5, dtype=torch.bool)
        own[:, :2] = True
        if not bool(mask[:, 1].any()):
            own[:, 4:] = True
        return torch.stack([self.other(row[there]).mean(0, keepdim=True) for row, there in zip(text, own, strict=True)])


class Repeated(Toy):
    """Puts each token that is there twice, and writes the sample's mean in their places."""

    def text(self, sample, text, mask):
        counts = torch.where(mask[0], 2, 1)
        places = torch.repeat_interleave(mask[0], counts)
        tokens = self.other(text).repeat_interleave(counts, dim=1)
        tokens[:, places] = sample.mean(1, keepdim=True)
        return tokens.square().mean(1, keepdim=True) + float(places.tolist()[0])


class Written(Toy):
    """Writes what it computes from a row into a new tensor, and a number into places that depend on values."""

    def text(self, sample, text, mask):
        rows = []
        for row in self.other(text):
            held = torch.zeros(6, 6)
            held[:5] = row
            held[held < 0] = 0.25
            rows.append(held.mean(0, keepdim=True))
        assert len(mask[mask]) == 3 * len(text)
        return torch.stack(rows)


class Made(Toy):
    """Reads the values of a tensor that it makes, and turns by the orthogonal part of a weight."""

    def text(self, sample, text, mask):
        first, second = self.other(text).split(torch.full((2,), 2).add(torch.tensor([0, 1])).tolist(), dim=1)
        turned = torch.linalg.qr(self.layer.weight + 1e-3)[0]
        return (first.mean(1, keepdim=True) * second.mean(1, keepdim=True)) @ turned


class Turned(Toy):
    """Turns pairs of channels by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1, 0.01]))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def text(self, sample, text, mask):
        pairs = torch.view_as_complex(self.other(text).unflatten(-1, (3, 2)))
        turned = pairs * self.turns[: text.shape[1]].unsqueeze(0)
        return torch.view_as_real(turned).flatten(2).mean(1, keepdim=True) + turned.abs().mean()


class Padded(Turned):
    """Turns each row alone, and pads all rows to one length."""

    def text(self, sample, text, mask):
        rows = [torch.view_as_complex(self.other(row).unflatten(-1, (3, 2))) for row in text]
        turned = nn.utils.rnn.pad_sequence([row * self.turns[: len(row)] for row in rows], batch_first=True)
        return torch.view_as_real(turned).flatten(2).mean(1, keepdim=True)


class Filtered(Turned):
    """Multiplies the frequencies of the texts by complex numbers, and mixes them along the tokens."""

    def text(self, sample, text, mask):
        spectrum = torch.fft.rfft(self.other(text), dim=1, norm="ortho")
        held = torch.zeros_like(spectrum)
        held[:, :2] = torch.einsum("bkc,cd->bkd", spectrum[:, :2], torch.cat([self.turns[:6]] * 2, dim=1))
        return torch.fft.irfft(held, n=5, dim=1, norm="ortho").mean(1, keepdim=True)


class Mixed(Toy):
    """Keeps the real part of a Fourier transform along tokens and channels."""

    def text(self, sample, text, mask):
        return torch.fft.fft2(self.other(text)).real[:, :1]


class Strided(Padded):
    """Applies a layer to values whose channels are not next to each other in memory."""

    def text(self, sample, text, mask):
        return super().text(sample, self.other(text.mT.contiguous().mT), mask)


class Near(Toy):
    """Weights tokens by their distances."""

    def text(self, sample, text, mask):
        return torch.softmax(-torch.cdist(sample, text), -1) @ self.other(text)


def call(rows: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(rows)
    sample, text = (torch.randn(rows, tokens, 6, generator=rng) for tokens in (4, 5))
    return {"sample": sample, "text": text, "mask": KEPT.expand(rows, 5).clone()}


def export(module: nn.Module, folder: Path, recorded: dict[str, torch.Tensor], **given: torch.Tensor) -> Graph:
    calls = Calls({**call(2), **given}, None, frozenset(), recorded)
    compute = lambda inputs: {"output": module(**inputs)}  # noqa: E731
    return write_graph(folder / "model.onnx", module, compute, calls, ("output",), opset=21, called="the toy")


@pytest.mark.parametrize(
    ("kind", "fixed"),
    [
        (Listed, []),
        (Picked, ["mask"]),
        (Counted, ["mask"]),
        (Placed, []),
        (Built, ["mask"]),
        (Repeated, ["mask"]),
        (Made, []),
        (Written, ["mask"]),
        (Turned, []),
        (Padded, []),
        (Filtered, []),
        (Mixed, []),
        (Near, []),
        (Strided, []),
    ],
)
def test_the_graph_computes_what_torch_does_at_any_number_of_rows(kind, fixed, tmp_path, capfd):
    module = kind().eval()
    graph = export(module, tmp_path, {"mask": KEPT})
    assert list(graph.interface.constants) == fixed
    assert set(graph.inputs) == {"sample", "text", "mask"} - set(fixed)
    assert {spec.shape[0] for spec in (*graph.inputs.values(), *graph.outputs.values())} == {"batch"}
    assert set(graph.nodes) == {"layer", "other"}
    assert all(site.bias is not None for sites in find_sites(ir.load(graph.path).graph).values() for site in sites)
    assert not {"DFT", "STFT"} & {node.op_type for node in onnx.load(graph.path, load_external_data=False).graph.node}
    if fixed:
        torch.testing.assert_close(fixed_tensor(graph.interface.constants["mask"]), KEPT)
    denoise = graph_denoise(graph, OnnxRuntime())
    for rows in (1, 2, 5):
        with torch.no_grad():
            expected = module(**call(rows))
        assert rel_l2(denoise(call(rows)), expected) < 1e-6
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_an_input_may_have_the_name_that_torch_gives_to_an_inner_value(tmp_path):
    module = Counted().eval()
    names = {"sample": "sample", "t": "text", "mask": "mask"}
    given = {name: call(2)[meant] for name, meant in names.items()}
    compute = lambda inputs: {"output": module(*(inputs[name] for name in names))}  # noqa: E731
    calls = Calls(given, None, frozenset(), {"mask": KEPT})
    graph = write_graph(tmp_path / "model.onnx", module, compute, calls, ("output",), opset=21, called="the toy")
    with torch.no_grad():
        expected = module(*given.values())
    assert set(graph.inputs) == {"sample", "t"}
    assert rel_l2(graph_denoise(graph, OnnxRuntime())(given), expected) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_is_that_of_torch(side, batch_first):
    rows = [torch.randn(length, 3, generator=torch.Generator().manual_seed(length)) for length in (2, 5, 4)]
    torch.testing.assert_close(
        padded(rows, batch_first, 0.5, side), nn.utils.rnn.pad_sequence(rows, batch_first, 0.5, side), rtol=0, atol=0
    )


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.0, float("inf")])
def test_distances_are_those_of_torch(p):
    a, b = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), torch.eye(3).expand(2, 3, 3)
    torch.testing.assert_close(distances(a, b, p), torch.cdist(a, b, p))


def test_values_that_decide_and_differ_between_rows_are_named(tmp_path, capfd):
    differing = torch.tensor([[True, True, True, True, False], [True, False, True, True, True]])
    with pytest.raises(StepFailed, match=r"(?s)torch cannot export the toy .*mask: the values decide what the model"):
        export(Picked().eval(), tmp_path, {}, mask=differing)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_model_that_reads_its_sample_is_refused_as_torch_does(tmp_path):
    class Reads(Toy):
        def text(self, sample, text, mask):
            return text[:, : 1 + int(sample.mean() > 0)].mean(1, keepdim=True)

    at = r"test_capture.py:\d+ in text"
    message = rf"(?s)torch cannot export the toy called with sample \(2, 4, 6\).*, at {at}\n.*{at}: the model reads"
    with pytest.raises(StepFailed, match=message):
        export(Reads().eval(), tmp_path, {"mask": KEPT})


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class KernelsOfRows(Toy):
        def text(self, sample, text, mask):
            tokens = text.flatten(0, 1)
            made = nn.functional.conv1d(tokens[None], tokens[:, :1, None], groups=tokens.shape[0])
            return made.reshape(text.shape).mean(1, keepdim=True)

    with pytest.raises(StepFailed, match=r"torch cannot export the toy .*, in the operator aten\.conv1d"):
        export(KernelsOfRows().eval(), tmp_path, {"mask": KEPT})


def test_inputs_whose_values_decide_are_found():
    def compute(inputs):
        length = int((inputs["mask"] * 2).sum())
        sizes = inputs["sizes"].clone()
        held = torch.zeros(2)
        held[0] = sizes[0]
        x = inputs["x"][inputs["choice"]] * inputs["scale"]
        x = torch.cat([x, inputs["few"].repeat_interleave(inputs["counts"])])
        x = x[:length] + held.tolist()[0] + inputs["x"][inputs["places"]].sum()
        return x[: inputs["length"]]

    inputs = {
        "x": torch.ones(4),
        "mask": torch.tensor([1, 0]),
        "choice": torch.tensor([True, True, False, False]),
        "scale": torch.tensor(2.0),
        "sizes": torch.tensor([3.0]),
        "places": torch.tensor([0, 1]),
        "few": torch.ones(2),
        "counts": torch.tensor([2, 1]),
        "length": torch.tensor(1),
    }
    found = deciding_inputs(compute, inputs)
    assert tuple(found) == ("mask", "choice", "sizes", "counts", "length")
    assert all(place.startswith("test_capture.py:") and place.endswith(" in compute") for place in found.values())


def test_a_sequence_of_tensors_has_no_magnitude(tmp_path):
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[4, 2] x) => (float[4, 2] y)
    <int64 size = {8}, int64 first = {0}> {
        pieces = SplitToSequence <axis: int = 0> (x, size)  y = SequenceAt (pieces, first)
    }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "model.onnx")
    x = torch.arange(8.0).view(4, 2)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"))
    onnx.save(model, tmp_path / "model.onnx")
    assert find_magnitudes(tmp_path / "model.onnx", [Expected("", {"x": x}, {"y": x})], 1e-6) == {"y": 7.0}


@pytest.mark.parametrize("difference", ["nodes", "weights"])
def test_graphs_that_differ_in_more_than_rows_are_not_merged(difference):
    def graph(rows: int, operator: str, weight: float) -> ir.Model:
        text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[{rows}, 4] x) => (float[{rows}, 4] y)
        <float[1] w = {{{weight}}}> {{ z = {operator} (x, w)  y = Relu (z) }}"""
        return ir.from_onnx_text(text)

    two, other = graph(2, "Add", 1.5), graph(3, "Add", 1.5)
    assert [str(size) for size in merged(two, other, "x").graph.outputs[0].shape] == ["batch", "4"]
    changed = graph(3, "Sub", 1.5) if difference == "nodes" else graph(3, "Add", 2.5)
    with pytest.raises(StepFailed, match="differ in more than the number of rows"):
        merged(graph(2, "Add", 1.5), changed, "x")
