"""Stands in the place of a denoiser: a compiled folder, called as the diffusers model that it was made from.

Shapes: R rows of one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from intaglio.pipeline.errors import CallError, RecipeError, did_you_mean
from intaglio.pipeline.graph import STEP_INPUT, Graph, Interface, TensorSpec
from intaglio.pipeline.nesting import flatten

if TYPE_CHECKING:
    from intaglio.exporters._departure import Values


ONNXRUNTIME = "onnxruntime"
BACKENDS = (ONNXRUNTIME, "tensorrt", "tensorrt-rtx")


class DenoiserOutput(NamedTuple):
    """What diffusers' denoisers return unless a tuple is asked for."""

    sample: torch.Tensor


class CompiledDenoiser(nn.Module):
    """A denoiser that a runtime executes. Everything but the computation is as in the original.

    It takes what the original takes, in the same order, at the shapes and timesteps that it was compiled for. Where
    layers have a scale for each denoising step, the step is found from the timestep. A learned variance is not computed
    and not in `config` either, so that pipelines look for none.
    """

    def __init__(self, graph: Graph, call: Values, device: torch.device | None = None) -> None:
        """`call` computes what the graph does, on the device; without one, the CPU."""
        super().__init__()
        self.graph, self._call, self._device = graph, call, device or torch.device("cpu")
        # in a tuple, as it is no submodule: its weights are nowhere
        self._original = (_original(graph.interface, next(iter(graph.outputs.values())).shape[1]),)
        original = self._original[0]
        self._compiled_with = {} if original is None else defaults(original.forward)
        self._compiled_with |= dict(flatten(graph.interface.constants))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__["_original"][0]
            if original is None:
                raise
            return getattr(original, name)

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Of outputs, and of inputs, which are brought there."""
        return self._device

    def forward(self, *args: Any, **kwargs: Any) -> DenoiserOutput | tuple[torch.Tensor]:
        """As the original. Raises CallError for what it was not compiled for."""
        arguments = self.graph.interface.arguments
        if len(args) > len(arguments):
            raise CallError(f"called with {len(args)} arguments, but it takes {', '.join(arguments)}")
        given = dict(zip(arguments, args, strict=False)) | kwargs
        whole = given.pop("return_dict", True)
        inputs = self._inputs(dict(flatten(given)))
        output = self._call(inputs)[next(iter(self.graph.outputs))]
        sample = given[self.graph.interface.sample]
        output = output.to(sample.dtype)
        return DenoiserOutput(sample=output) if whole else (output,)

    def _inputs(self, given: Mapping[str, object]) -> dict[str, torch.Tensor]:
        """What the graph takes beside the step, by name."""
        graph = self.graph
        names = [name for name in graph.inputs if name != STEP_INPUT]
        if absent := [name for name in names if given.get(name) is None]:
            raise CallError(f"called without {', '.join(absent)}, which it was compiled with")
        sample = given[graph.interface.sample]
        assert isinstance(sample, torch.Tensor)  # its input is there
        inputs = {}
        for name in names:
            value = torch.as_tensor(given[name]).detach().to(self.device)
            if name == graph.timestep:
                value = value.reshape(-1).expand(len(sample))
            inputs[name] = value.to(getattr(torch, graph.inputs[name].dtype)).contiguous()
        check_others(given, graph.inputs, self._compiled_with)
        check_shapes(graph.inputs, inputs)
        if STEP_INPUT in graph.inputs and graph.timestep is not None:
            self._check_timestep(inputs[graph.timestep])
        return inputs

    def _check_timestep(self, given: torch.Tensor) -> None:
        """Raise CallError for one beyond the first or the last of those that there are scales for, or for several."""
        timesteps = self.graph.timesteps
        if len(timesteps) == 1:
            return
        timestep = float(given[0])
        if (given != given[0]).any():
            raise CallError("rows at different timesteps: layers have one scale for all rows of a call")
        last, first = min(timesteps), max(timesteps)
        apart = (first - last) / (len(timesteps) - 1)
        if not last - apart <= timestep <= first + apart:
            raise CallError(
                f"timestep {timestep:g}, but its scales are of {len(timesteps)} steps from {first:g} to {last:g}:"
                " compile with the scheduler that it is used with"
            )


def check_others(
    given: Mapping[str, object], inputs: Collection[str], compiled_with: Mapping[str, object], name: str = ""
) -> None:
    """Raise CallError for arguments that a graph knows nothing of, unless they are what it was compiled with."""
    called = f"{name} called".lstrip()
    problems = []
    for argument, value in given.items():
        if value is None or argument in inputs:
            continue
        if isinstance(value, torch.Tensor):
            problems.append(f"{called} with {argument}, which it was compiled without")
        elif value != (compiled := compiled_with.get(argument)) and (value is not False or compiled is not None):
            problems.append(f"{called} with {argument} = {value!r}, but compiled with {compiled!r}")
    if problems:
        raise CallError(*problems)


def check_shapes(specs: Mapping[str, TensorSpec], inputs: Mapping[str, torch.Tensor], name: str = "") -> None:
    """Raise CallError for sizes that a graph does not take."""
    before = f"{name}: " if name else ""
    sizes: dict[str, int] = {}
    problems = []
    for tensor, value in inputs.items():
        wanted = specs[tensor].shape
        if len(wanted) != value.dim():
            problems.append(f"{before}{tensor} has the shape {tuple(value.shape)}, but {_shape(wanted)} is taken")
            continue
        for axis, (size, there) in enumerate(zip(wanted, value.shape, strict=True)):
            if there != (size if isinstance(size, int) else sizes.setdefault(size, there)):
                taken = size if isinstance(size, int) else sizes[size]
                problems.append(f"{before}{tensor} has {there} at axis {axis}, but {taken} is taken")
    if problems:
        raise CallError(*problems)


def defaults(function: Callable[..., object]) -> dict[str, object]:
    """Of its arguments."""
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def load(
    folder: str | Path, *, backend: str = "onnxruntime", threads: int = 0, providers: Sequence[str] = ()
) -> CompiledDenoiser:
    """The denoiser of a compiled folder, `build/<recipe>/<target>`, for the place of a pipeline's own.

    `backend`: onnxruntime, or tensorrt or tensorrt-rtx, which run the folder's engine.plan on torch's current GPU and
    stream without a copy; those two have not run on a GPU yet. `threads`: of ONNX Runtime, 0 for one a core;
    `providers`: those wanted beside the CPU's. Raises RecipeError where the folder holds nothing that the backend
    executes, TargetError where an engine does not run here.
    """
    root, device = Path(folder), device_of(backend)
    if not (root / "graph.json").is_file() or not (root / "model.onnx").is_file():
        raise RecipeError(f"{root}: no graph.json and model.onnx: give the folder of a target that a run has written")
    graph = Graph.load(root)
    return CompiledDenoiser(graph, open_call(graph, backend, threads, providers), device).eval()


def device_of(backend: str) -> torch.device:
    """Where it takes and leaves tensors. Raises RecipeError for a name that is none."""
    if backend not in BACKENDS:
        raise RecipeError(f"no backend {backend!r}{did_you_mean(backend, BACKENDS)}")
    return torch.device("cpu" if backend == ONNXRUNTIME else "cuda")


def open_call(graph: Graph, backend: str, threads: int, providers: Sequence[str]) -> Values:
    """What computes a graph that is in its folder, or the engine there, on tensors where the backend takes them."""
    if backend == ONNXRUNTIME:
        from intaglio.exporters._session import graph_call

        return graph_call(graph, threads=threads, providers=providers)
    from intaglio.exporters._engine import engine_call

    return engine_call(graph, backend)


def _original(interface: Interface, channels: int | str) -> nn.Module | None:
    """The model without weights, for its attributes; None where it is no class of diffusers."""
    if not interface.kind:
        return None
    import accelerate
    import diffusers

    kind: Any = getattr(diffusers, interface.kind, None)
    if kind is None:
        raise RecipeError(f"compiled from {interface.kind}, which diffusers {diffusers.__version__} does not have")
    with accelerate.init_empty_weights():
        original: nn.Module = kind.from_config(dict(interface.config))
    if "out_channels" in interface.config and isinstance(channels, int):
        original.register_to_config(out_channels=channels)  # type: ignore[operator]  # a method of diffusers
    return original


def _shape(sizes: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, sizes))})"
