"""Load a whole pipeline from a compiled folder: diffusers' class around models that a runtime executes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from intaglio.exporters.deploy.call_inputs import CallInputs
from intaglio.exporters.deploy.denoiser import check_delivered, defaults, device_of, load, open_call, size_bound
from intaglio.exporters.deploy.standin import Standin
from intaglio.pipeline.artifacts.components import Components
from intaglio.pipeline.artifacts.graph import Graph, Interface
from intaglio.pipeline.errors import CallError, RecipeError, did_you_mean
from intaglio.pipeline.files import printable
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.arguments import flatten, nest
from intaglio.pipeline.model.model_files import blamed
from intaglio.pipeline.model.pipeline_folder import INDEX, METHODS, PipelineFolder, is_generator, output_class
from intaglio.pipeline.runs.registry import find_runtime
from intaglio.pipeline.runs.store import files_below

if TYPE_CHECKING:
    from intaglio.pipeline.model.types import Values


class CompiledMethod:
    """Method of a component, called like the original. Inputs that it was not compiled for raise CallError.

    It computes on `device`; outputs are moved to `home`, the device of the pipeline's tensors.
    """

    def __init__(
        self,
        inputs: CallInputs,
        call: Values,
        kind: Any,
        device: torch.device,
        home: torch.device,
    ) -> None:
        self.device, self.home = device, home
        self._call_inputs, self._call, self._kind = inputs, call, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method like the original. Raises CallError."""
        given = self._call_inputs.arguments(args, kwargs)
        whole = given.pop("return_dict", True)
        outputs = self._run(dict(flatten({n: v for n, v in given.items() if not is_generator(v)})))
        if self._kind is None:
            return tuple(outputs.values())
        output = self._kind(**{name: _restored(value) for name, value in nest(outputs).items()})
        return output.to_tuple() if whole is False else output

    def _run(self, given: Mapping[str, object]) -> Mapping[str, torch.Tensor]:
        """Return the graph's outputs by flat name."""
        inputs = self._call_inputs.tensors(given, self.device)
        with self._call_inputs.blamed(inputs):
            outputs = self._call(inputs)
        self._call_inputs.check_outputs(inputs, outputs)
        return {name: value.to(self.home) for name, value in outputs.items()}


class CompiledComponent(Standin):
    """Text encoder or autoencoder whose methods a runtime executes; everything else is the original's.

    It has no weights: calls of other methods, and every change of it, raise CallError.
    """

    def __init__(self, name: str, original: nn.Module, methods: Mapping[str, CompiledMethod]) -> None:
        super().__init__(original, name, f"this folder has only {', '.join(methods)} of {name}")
        self.__dict__["_methods"] = methods  # attributes cannot be set in the usual way

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self._method(name) if name in METHODS else found

    @property
    def device(self) -> torch.device:
        """Device of outputs; inputs may be anywhere."""
        methods: Mapping[str, CompiledMethod] = self._methods
        return next(iter(methods.values())).home

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled `forward` like the original. Raises CallError."""
        return self._method("forward")(*args, **kwargs)

    def _method(self, name: str) -> Callable[..., Any]:
        return self._methods.get(name) or self._uncompiled(name)

    def _uncompiled(self, name: str) -> Callable[..., NoReturn]:
        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise CallError(
                f"{self._name}.{name} was not compiled: {self._compiled}; its weights are not in the folder"
            )

        return refuse


def load_pipeline(
    folder: str | Path,
    *more: str | Path,
    backend: str = "onnxruntime",
    threads: int = 0,
    providers: Sequence[str] = (),
    **components: Any,
) -> Any:  # a diffusers pipeline
    """Load the diffusers pipeline of a compiled folder, `build/<recipe>/<target>`, around its graphs or engines.

    No other weights are read. `more`: compiled folders of the pipeline's other denoisers, where several share the steps
    of a sample; each takes the place that its recipe names in `model.subfolder`. `backend`, `threads`, `providers`: as
    in `load`; components compiled for ONNX Runtime run in it beside engines. `components`: replacements of the folder's
    own, such as another scheduler.
    Raises RecipeError if the folder holds no pipeline, or nothing that the backend executes, if a denoiser is missing
    or given twice, or for a component that the pipeline does not have; TargetError if an engine does not run here.
    """
    root = Path(folder)
    home = device_of(backend)
    if not (root / "pipeline" / INDEX).is_file():
        raise RecipeError(f"{root}: no pipeline/{INDEX}: compile a whole pipeline with the step `components`")
    below = files_below(root / "pipeline")
    check_delivered(root, [file.relative_to(root).as_posix() for file in below if file.name != "engine.plan"])
    compiled = Components(root / "pipeline")
    settings, there = PipelineFolder(compiled.root), compiled.compiled
    whole = settings.kind()
    taken = inspect.signature(whole).parameters
    if unknown := [name for name in components if name not in taken]:
        raise RecipeError(f"{whole.__name__} has no component {unknown[0]!r}{did_you_mean(unknown[0], taken)}")
    made: dict[str, Any] = dict.fromkeys(settings.absent())
    denoisers = _denoisers(settings, (root, *map(Path, more)), components)
    for name in settings.classes():
        if name in components:
            continue
        if name in denoisers:
            made[name] = load(denoisers[name], backend=backend, threads=threads, providers=providers)
        elif name not in there:
            made[name] = settings.component_class(name).from_pretrained(compiled.root / name, local_files_only=True)
        else:
            original = _without_weights(settings.component_class(name), compiled.root / name)
            runtime = find_runtime(load_target(there[name].target).runtime)
            own = runtime.name if runtime.runs_graph else backend
            methods = {}
            for method, kind in there[name].returns.items():
                graph = Graph.load(compiled.root / name / method)
                call = open_call(graph, own, threads, providers)
                output = output_class(kind) if kind else None
                usual = defaults(getattr(original, method)) | dict(flatten(graph.interface.constants))
                inputs = CallInputs(graph, usual, f"{name}.{method}")
                methods[method] = CompiledMethod(inputs, call, output, device_of(own), home)
            made[name] = CompiledComponent(name, original, methods).eval()
    pipe = whole(**{n: v for n, v in (made | settings.settings()).items() if n in taken} | components)
    pipe.save_pretrained = _not_saved  # saving would leave out the compiled models
    return pipe


def _denoisers(settings: PipelineFolder, folders: Sequence[Path], replaced: Collection[str]) -> dict[str, Path]:
    """Return the compiled folder of each denoiser of the pipeline that is not replaced, by name of the component.

    Raises RecipeError for a denoiser that has no folder or two, and for a folder of another model.
    """
    kinds, found = settings.classes(), dict[str, Path]()
    for folder in folders:
        graph = folder / "graph.json"
        interface = Graph.load(folder).interface if graph.exists() else Interface()  # `load` says what is missing
        name = interface.component or settings.denoiser
        if name not in settings.denoisers or (interface.kind and interface.kind != kinds[name][1]):
            known = ", ".join(f"{each} ({kinds[each][1]})" for each in settings.denoisers)
            raise RecipeError(f"{folder}: was compiled from {name} ({interface.kind}): the pipeline has {known}")
        if name in found:
            raise RecipeError(f"{folder}: is {name}, as is {found[name]}: give one folder for each denoiser")
        found[name] = folder
    if missing := [name for name in settings.denoisers if name not in (*found, *replaced)]:
        raise RecipeError(
            f"{folders[0]}: its pipeline also calls {', '.join(missing)}: compile it with model.subfolder, and give its"
            " compiled folder behind this one"
        )
    return found


def _not_saved(*_: Any, **__: Any) -> NoReturn:
    raise CallError("save_pretrained: the weights of a compiled pipeline are in its compiled folder alone: copy that")


def _without_weights(kind: Any, folder: Path) -> nn.Module:
    """Make a model without weights from its configuration, for its attributes."""
    from intaglio.pipeline.model.empty_model import bounded

    origin = f"{printable(folder)}/config.json"
    with blamed(origin), bounded(size_bound(folder), origin):
        if hasattr(kind, "config_class"):  # transformers
            original = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        else:
            original = kind.from_config(kind.load_config(folder, local_files_only=True))
    return original.eval()  # type: ignore[no-any-return]  # classes of diffusers and transformers


def _restored(value: Any) -> Any:
    """Return a distribution of latents if the value holds the parameters of one, else the value."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(value["parameters"]) if isinstance(value, dict) else value
