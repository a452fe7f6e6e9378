"""Examine what is installed on this machine and what works with it. Heavy packages are imported only on request."""

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
    """Package to look for: the first installed of these distributions counts; `install` is one way to get it."""

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
    Package(("nvidia-modelopt",), "modelopt", "writing files for import-modelopt", CORE),
    Package(("transformers",), "transformers", "text encoders of whole pipelines", "pip install transformers"),
    Package(("peft",), "peft", "model.loras", "pip install 'intaglio[lora]'"),
    Package(("tensorrt-rtx-cu12",), "tensorrt_rtx", "engines of TensorRT-RTX", "pip install 'intaglio[rtx]'"),
    Package(("tensorrt-cu12", "tensorrt"), "tensorrt", "engines of TensorRT", "pip install 'intaglio[tensorrt]'"),
)
COMPILING = ("torch", "diffusers", "accelerate", "safetensors", "scipy", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
"""Modules that compiling needs."""
LIGHT = ("onnxruntime", "tensorrt_rtx", "tensorrt")
"""Modules that are always imported: their facts depend on the machine."""


@dataclass(frozen=True)
class Found:
    """State of one package: its version, None if not installed, and why an import failed, if it was tried."""

    module: str
    version: str | None
    fault: str | None
    serves: str
    install: str

    @property
    def works(self) -> bool:
        """True if the package is installed and no import has failed."""
        return self.version is not None and self.fault is None

    @property
    def lack(self) -> str:
        """Advice for a missing or broken package."""
        return self.install if self.version is None else f"{self.module} is broken"


@dataclass(frozen=True)
class Ability:
    """Answer to whether an operation works here: how, or what is missing."""

    here: bool
    how: str


@dataclass(frozen=True)
class Gpu:
    """GPU that torch can use."""

    name: str
    memory_bytes: int
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """All facts about this machine; `faults` holds the error of each check that failed, by its name."""

    python: str
    system: str
    cpu: str
    cores: int | None
    cpu_features: Mapping[str, bool] | None
    """Features of the CPU; None if the system does not tell."""
    memory_bytes: int | None
    """Memory and swap in bytes that this process may use."""
    packages: Mapping[str, Found]
    """Packages by distribution."""
    providers: Mapping[str, bool]
    """Execution providers of the targets in ONNX Runtime, and whether each runs here."""
    kernels: str | None
    """First kernels of the target onnxruntime-cpu that are exact on this CPU."""
    gpus: tuple[Gpu, ...]
    trtexec: str | None
    faults: Mapping[str, str]
    targets: Mapping[str, Mapping[str, Ability]]
    """Abilities by target: compile, build, run, verify."""


def examine(imports: bool = False) -> Machine:
    """Examine this machine. Never raises for broken packages.

    `imports`: import every installed package, not only the light ones.
    """
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
    """Run a check; if it raises, note the error in `faults` and return None."""
    try:
        return ask()
    except Exception as error:  # a broken installation raises exceptions of any type
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
    """Return whether each provider of a target runs here.

    A session replaces a provider that cannot start by the CPU's and logs a complaint.
    """
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
    """Return the GPUs that torch can use. Without a driver torch, which takes seconds, is not imported."""
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
    """Return the abilities of an ONNX Runtime target; graphs load on the CPU if the provider does not run."""
    runs = machine.providers.get(target.provider, False)
    how = target.provider if runs else f"{target.provider} does not run here"
    return {"build": Ability(runs, how), "run": Ability(runs, how)}


def _engine_abilities(target: Target, machine: Machine) -> dict[str, Ability]:
    """Return the abilities of a TensorRT target.

    TensorRT builds on the GPU that will run the engine, TensorRT-RTX without a GPU; both run on a GPU.
    """
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
    """Return the module and the installing extra of each runtime of the TensorRT family."""
    modules: Mapping[str, tuple[str, str]] = pass_module("tensorrt").MODULES
    return modules


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _cpu_features() -> dict[str, bool] | None:
    """Return the CPU features that affect the speed and the choice of 8-bit kernels."""
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
    """Return the facts that Linux gives about the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
