"""What is installed on this machine, and what can be done with it. Nothing heavy is imported without need."""

import ctypes
import io
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from intaglio.pipeline.formats.target import Target, load_target, target_names
from intaglio.pipeline.runs.memory import machine_bytes
from intaglio.pipeline.runs.registry import pass_module
from intaglio.pipeline.runs.versions import find_version

T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """What is looked for: the first of these distributions that is there, for which `install` is one way."""

    distributions: tuple[str, ...]
    module: str
    serves: str
    install: str


CORE = "pip install intaglio"
PACKAGES = (
    Package(("torch",), "torch", "all that computes", CORE),
    Package(("diffusers",), "diffusers", "models and schedulers", CORE),
    Package(("accelerate",), "accelerate", "models without weights, several processes", CORE),
    Package(("safetensors",), "safetensors", "weights", CORE),
    Package(("scipy",), "scipy", "assign", CORE),
    Package(("onnx",), "onnx", "graphs", CORE),
    Package(("onnx-ir",), "onnx_ir", "graphs", CORE),
    Package(("onnxscript",), "onnxscript", "export from torch", CORE),
    Package(("onnxruntime-gpu", "onnxruntime"), "onnxruntime", "running and verifying graphs", CORE),
    Package(("nvidia-modelopt",), "modelopt", "writing files for import-modelopt", "pip install nvidia-modelopt"),
    Package(("transformers",), "transformers", "text encoders of whole pipelines", "pip install transformers"),
    Package(("peft",), "peft", "model.loras", "pip install 'intaglio[lora]'"),
    Package(("tensorrt-rtx-cu12",), "tensorrt_rtx", "engines of TensorRT-RTX", "pip install 'intaglio[rtx]'"),
    Package(("tensorrt-cu12", "tensorrt"), "tensorrt", "engines of TensorRT", "pip install 'intaglio[tensorrt]'"),
)
COMPILING = ("torch", "diffusers", "accelerate", "safetensors", "scipy", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
"""Modules without which nothing is compiled."""
LIGHT = ("onnxruntime", "tensorrt_rtx", "tensorrt")
"""Modules that are imported in any case: what they say of themselves depends on the machine."""


@dataclass(frozen=True)
class Found:
    """One package: its version, None where it is not installed, and why it cannot be imported, where that was tried."""

    module: str
    version: str | None
    fault: str | None
    serves: str
    install: str

    @property
    def works(self) -> bool:
        """As far as is known."""
        return self.version is not None and self.fault is None

    @property
    def lack(self) -> str:
        """What is to be done about it."""
        return self.install if self.version is None else f"{self.module} is broken"


@dataclass(frozen=True)
class Ability:
    """Whether a thing can be done here, and how, or what it takes."""

    here: bool
    how: str


@dataclass(frozen=True)
class Gpu:
    """One that torch can use."""

    name: str
    memory_bytes: int
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """Everything that was found. What could not be asked says why in `faults`, by what was asked."""

    python: str
    system: str
    cpu: str
    cores: int | None
    cpu_features: Mapping[str, bool] | None
    """None where the system does not say."""
    memory_bytes: int | None
    """With swap, as far as this process may have it."""
    packages: Mapping[str, Found]
    """By distribution."""
    providers: Mapping[str, bool]
    """Of targets, the execution providers of ONNX Runtime, and whether each runs here."""
    kernels: str | None
    """Of the target onnxruntime-cpu, the first that are exact on this CPU."""
    gpus: tuple[Gpu, ...]
    trtexec: str | None
    faults: Mapping[str, str]
    targets: Mapping[str, Mapping[str, Ability]]
    """By target: compile, build, run, verify."""


def examine(imports: bool = False) -> Machine:
    """`imports`: import every package that is there, not only the light ones. Never raises for what is broken."""
    faults: dict[str, str] = {}
    packages = dict(_packages(imports))
    by_module = {found.module: found for found in packages.values()}
    runs_graphs = by_module["onnxruntime"].works and by_module["onnx"].works
    providers = _asked(faults, "providers", _providers) if runs_graphs else None
    kernels = _asked(faults, "kernels", _kernels) if runs_graphs else None
    gpus = _asked(faults, "gpus", _gpus) if by_module["torch"].works else None
    machine = Machine(
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        cpu_features=_cpu_features(),
        memory_bytes=_asked(faults, "memory", machine_bytes),
        packages=packages,
        providers=providers or {},
        kernels=kernels,
        gpus=gpus or (),
        trtexec=shutil.which("trtexec"),
        faults=faults,
        targets={},
    )
    return replace(machine, targets={name: _abilities(load_target(name), machine) for name in target_names()})


def _asked(faults: dict[str, str], what: str, ask: Callable[[], T]) -> T | None:
    """None where asking raises, which is a fault."""
    try:
        return ask()
    except Exception as error:  # whatever a broken installation raises is what is looked for
        faults[what] = _in_words(error)
        return None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _packages(imports: bool) -> Iterator[tuple[str, Found]]:
    for package in PACKAGES:
        there = {name: found for name in package.distributions if (found := find_version(name)) is not None}
        name = next(iter(there), package.distributions[0])
        faults: dict[str, str] = {}
        if there and (imports or package.module in LIGHT):
            _asked(faults, package.module, lambda module=package.module: import_module(module))  # type: ignore[misc]
        yield name, Found(package.module, there.get(name), faults.get(package.module), package.serves, package.install)


def _providers() -> dict[str, bool]:
    """A session takes a provider that cannot start for the CPU's, and complains."""
    import onnx
    import onnxruntime

    open_session = import_module("intaglio.exporters.runtimes.onnxruntime.session").open_session
    targets = [load_target(name) for name in target_names()]
    names = {target.provider for target in targets if target.runtime == "onnxruntime"}
    model = onnx.parser.parse_model(_NOTHING).SerializeToString()
    onnxruntime.set_default_logger_severity(4)
    try:
        with redirect_stdout(io.StringIO()):
            return {name: name in open_session(model, providers=[name]).get_providers() for name in sorted(names)}
    finally:
        onnxruntime.set_default_logger_severity(2)


_NOTHING = '<ir_version: 10, opset_import: ["": 21]> graph (float[1] x) => (float[1] y) { y = Identity (x) }'


def _kernels() -> str:
    settings = import_module("intaglio.exporters.runtimes.onnxruntime.session").exact_kernels()
    return next(k.name for k in load_target("onnxruntime-cpu").kernels if k.settings == settings)


def _gpus() -> tuple[Gpu, ...]:
    """Without a driver there is none, and torch, which takes seconds, is not imported."""
    if not _has_driver():
        return ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = (torch.cuda.get_device_properties(index) for index in range(count))
    return tuple(Gpu(each.name, each.total_memory, f"{each.major}.{each.minor}") for each in found)


def _has_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()  # AMD's, for torch with ROCm
    return True


def _abilities(target: Target, machine: Machine) -> dict[str, Ability]:
    by_module = {found.module: found for found in machine.packages.values()}
    lacks = "; ".join(sorted({by_module[name].lack for name in COMPILING if not by_module[name].works}))
    verify = lacks or machine.faults.get("kernels", "")
    engine = _session_abilities if target.runtime == "onnxruntime" else _engine_abilities
    return {
        "compile": Ability(not lacks, lacks or "yes"),
        **engine(target, machine),
        "verify": Ability(not verify, verify or "yes, on the CPU"),
    }


def _session_abilities(target: Target, machine: Machine) -> dict[str, Ability]:
    """Where the provider does not run, the graph is loaded on the CPU."""
    runs = machine.providers.get(target.provider, False)
    how = target.provider if runs else f"{target.provider} does not run here"
    return {"build": Ability(runs, how), "run": Ability(runs, how)}


def _engine_abilities(target: Target, machine: Machine) -> dict[str, Ability]:
    """TensorRT builds on the GPU that is to run the engine, TensorRT-RTX without one; both run on one."""
    module, _ = _engine_modules()[target.runtime]
    found = next(each for each in machine.packages.values() if each.module == module)
    builder = f"{module} {found.version}" if found.works else found.lack
    ahead = target.runtime == "tensorrt-rtx"
    listed = {device.compute_capability for device in target.devices}
    fitting = [gpu.name for gpu in machine.gpus if ahead or gpu.compute_capability in listed]
    if not fitting:
        absent = "needs a GPU" if ahead else "on the device"
        built = Ability(found.works, builder) if ahead else Ability(False, "on the device, by intaglio kit")
        return {"build": built, "run": Ability(False, absent)}
    if not found.works and machine.trtexec is not None and not ahead:
        return {"build": Ability(True, "trtexec, by intaglio kit"), "run": Ability(False, builder)}
    return {"build": Ability(found.works, builder), "run": Ability(found.works, fitting[0] if found.works else builder)}


def _engine_modules() -> Mapping[str, tuple[str, str]]:
    """By runtime of the TensorRT family, its module and the extra that installs it."""
    modules: Mapping[str, tuple[str, str]] = pass_module("tensorrt").MODULES
    return modules


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _cpu_features() -> dict[str, bool] | None:
    """Those on which the speed and the choice of 8-bit kernels depend."""
    flags = set(_cpu_info().get("flags", "").split())
    if not flags:
        return None
    return {
        "AVX2": "avx2" in flags,
        "AVX512": "avx512f" in flags,
        "VNNI": not flags.isdisjoint({"avx512_vnni", "avx_vnni"}),
        "AMX": "amx_int8" in flags,
    }


def _cpu_info() -> dict[str, str]:
    """Of the first core, as Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
