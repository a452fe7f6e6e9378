"""Load a compiled folder as a denoiser with the call interface of the original diffusers model.

Shapes: R rows of one call.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from intaglio.exporters.deploy.call_inputs import CallInputs
from intaglio.exporters.deploy.standin import Standin
from intaglio.exporters.runtimes.calls import opened_call
from intaglio.pipeline.artifacts.graph import STEP_INPUT, Graph
from intaglio.pipeline.entry_points import named_runtimes
from intaglio.pipeline.errors import CallError, RecipeError, did_you_mean
from intaglio.pipeline.files import printable
from intaglio.pipeline.model.arguments import flatten
from intaglio.pipeline.model.call_form import CallForm
from intaglio.pipeline.model.model_files import ModelSize
from intaglio.pipeline.model.step_clock import number
from intaglio.pipeline.runs.manifest import MANIFEST, Manifest
from intaglio.pipeline.runs.registry import find_runtime
from intaglio.pipeline.runs.store import files_below

if TYPE_CHECKING:
    from intaglio.pipeline.model.types import Values


class DenoiserOutput(NamedTuple):
    """Output of a denoiser, as in diffusers."""

    sample: torch.Tensor


def _output_class(graph: Graph) -> Any:
    """Return the class of outputs, a tuple whose item has the name that the original's first output has."""
    name = CallForm.fields[0] if graph.interface.form is None else graph.interface.form.fields[0]
    return DenoiserOutput if name in DenoiserOutput._fields else namedtuple("DenoiserOutput", [name])


class CompiledDenoiser(Standin):
    """Denoiser that a runtime executes, with the interface and attributes of the original model.

    A call takes the arguments of the original, at the shapes and timesteps of the compilation, and returns all
    channels of its first output, a learned variance too. If layers have a scale for each denoising step, the step is
    found from the timestep. Any attempt to change the model raises CallError.
    """

    def __init__(self, graph: Graph, call: Values, device: torch.device | None = None) -> None:
        """Wrap `call`, which computes the graph on `device`; the default device is the CPU."""
        original = _original(graph)
        compiled_with = {} if original is None else defaults(original.forward)
        compiled_with |= dict(flatten(graph.interface.constants))
        super().__init__(original)
        own = self.__dict__  # attributes cannot be set in the usual way
        own["graph"], own["_call"], own["_device"] = graph, call, device or torch.device("cpu")
        own["_call_inputs"] = CallInputs(graph, compiled_with)
        own["_output"] = _output_class(graph)

    @property
    def device(self) -> torch.device:
        """Device of outputs; inputs are moved there."""
        device: torch.device = self.__dict__["_device"]
        return device

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """Call the denoiser like the original. Raises CallError for inputs that the graph was not compiled for."""
        self.check_unchanged()
        graph, called = self.graph, self._call_inputs
        given = called.arguments(args, kwargs)
        whole = given.pop("return_dict", True)
        flat = called.flat(given)
        inputs = called.tensors(flat, self.device)
        if STEP_INPUT in graph.inputs and graph.timestep is not None:
            self._check_timestep(inputs[graph.timestep])
        with called.blamed(inputs):
            outputs = self._call(inputs)
        called.check_outputs(inputs, outputs)
        sample: Any = flat[graph.interface.sample]
        output = outputs[next(iter(graph.outputs))].to(sample.dtype)
        return self.__dict__["_output"](output) if whole else (output,)

    def _check_timestep(self, given: torch.Tensor) -> None:
        """Raise CallError if the timestep is over one step outside the range of the scales, or differs between rows."""
        timesteps = self.graph.timesteps
        if len(timesteps) == 1:
            return
        timestep = number(given)
        if any(number(row) != timestep for row in given):
            raise CallError("rows at different timesteps: layers have one scale for all rows of a call")
        last, first = min(timesteps), max(timesteps)
        apart = (first - last) / (len(timesteps) - 1)
        if not last - apart <= timestep <= first + apart:
            raise CallError(
                f"timestep {timestep:g}: the graph has scales for {len(timesteps)} steps from {first:g} to {last:g}:"
                " compile it with the scheduler that calls it"
            )


def defaults(function: Callable[..., object]) -> dict[str, object]:
    """Return the default values of a function's arguments."""
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def load(
    folder: str | Path, *, backend: str = "onnxruntime", threads: int = 0, providers: Sequence[str] = ()
) -> CompiledDenoiser:
    """Load the denoiser of a compiled folder, `build/<recipe>/<target>`, to replace a pipeline's own.

    `backend`: name of an installed runtime: onnxruntime, a plug-in's runtime, or tensorrt or tensorrt-rtx, which run
    the folder's engine.plan on torch's current GPU and stream without a copy; those two have not run on a GPU yet.
    `threads`: threads of ONNX Runtime, 0 for one on each core; `providers`: execution providers besides the CPU's.
    Raises RecipeError if the folder holds nothing that the backend executes, or if its graph was changed since the run
    that wrote its manifest; TargetError if an engine cannot run here.
    """
    root, device = Path(folder), device_of(backend)
    if not (root / "graph.json").is_file() or not (root / "model.onnx").is_file():
        raise RecipeError(f"{root}: no graph.json and model.onnx: give the folder of a target that a run has written")
    check_delivered(root, ("graph.json", "model.onnx", "model.onnx.data"))
    graph = Graph.load(root)
    return CompiledDenoiser(graph, open_call(graph, backend, threads, providers), device).eval()


def check_delivered(folder: Path, names: Collection[str]) -> None:
    """Raise RecipeError, which lists the files of these names that are missing or differ from the folder's manifest.

    A name that the manifest does not have is not checked, and neither is a folder without a manifest.
    """
    if not (folder / MANIFEST).is_file():
        return
    manifest = Manifest.read(folder)
    own = "if you changed it yourself, remove it from manifest.json"
    if problems := list(manifest.damage(folder, manifest.files.keys() - {*names})):
        raise RecipeError(*(f"{printable(folder)}: {each}: run the recipe again; {own}" for each in problems))


def device_of(backend: str) -> torch.device:
    """Return the device of a backend's inputs and outputs. Raises RecipeError for an unknown name."""
    if backend not in named_runtimes():
        raise RecipeError(f"no backend {backend!r}{did_you_mean(backend, named_runtimes())}")
    return torch.device(find_runtime(backend).device)


def open_call(graph: Graph, backend: str, threads: int, providers: Sequence[str]) -> Values:
    """Open a graph in its folder, or the engine there, as a function of tensors on the backend's device."""
    runtime = find_runtime(backend)
    call = runtime.load(graph, threads=threads, providers=providers)
    return opened_call(graph, runtime.open(graph, threads=threads, providers=providers)) if call is None else call


def size_bound(folder: Path) -> ModelSize:
    """Return an upper bound on the size of a model whose graphs are in `folder`, from the size of its files.

    A number takes at least half a byte; an average tensor takes much more than 256 bytes.
    """
    size_bytes = sum(file.stat().st_size for file in files_below(folder))
    return ModelSize(tensors=500 + size_bytes // 256, elements=10**7 + 8 * size_bytes)


def _original(graph: Graph) -> nn.Module | None:
    """Make the original model without weights, for its attributes; None if it is not of a diffusers class.

    Raises RecipeError that names graph.json if its configuration fits no diffusers model, or one that is too large.
    """
    interface = graph.interface
    if not interface.kind:
        return None
    import diffusers

    from intaglio.pipeline.model.empty_model import empty_model

    file = f"{printable(graph.path.parent)}/graph.json"
    try:
        kind: Any = getattr(diffusers, interface.kind)
    except (AttributeError, ImportError, RuntimeError):  # diffusers imports its modules lazily
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        name = printable(interface.kind)[:100]
        raise RecipeError(f"{file}: compiled from {name}, which diffusers {diffusers.__version__} does not have")
    return empty_model(kind, dict(interface.config), size_bound(graph.path.parent), file)
