"""Find what is installed on this machine, and what can be done with it. No heavy package is imported without need."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from intaglio.pipeline.entry_points import named_runtimes
from intaglio.pipeline.formats.target import Target, load_target, target_names
from intaglio.pipeline.machine import machine_bytes
from intaglio.pipeline.runs.machine import Abilities, Ability, Fact, Faults, Found, Gpu, Machine, Package
from intaglio.pipeline.runs.registry import find_runtime, runtimes
from intaglio.pipeline.runs.versions import find_version

CORE = "pip install intaglio"
PACKAGES = (
    Package(("torch",), "torch", "calibration, training and simulation", CORE, compiles=True),
    Package(("diffusers",), "diffusers", "models and schedulers", CORE, compiles=True),
    Package(("accelerate",), "accelerate", "models without weights, runs of several processes", CORE, compiles=True),
    Package(("safetensors",), "safetensors", "weights", CORE, compiles=True),
    Package(("scipy",), "scipy", "choosing a scheme for each layer", CORE, compiles=True),
    Package(("onnx",), "onnx", "graphs", CORE, compiles=True),
    Package(("onnx-ir",), "onnx_ir", "graphs", CORE, compiles=True),
    Package(("onnxscript",), "onnxscript", "export from torch", CORE, compiles=True),
    Package(
        ("nvidia-modelopt",), "modelopt.torch", "quantizing with Model Optimizer", "pip install 'intaglio[modelopt]'"
    ),
    Package(("transformers",), "transformers", "text encoders of whole pipelines", "pip install transformers"),
    Package(("peft",), "peft", "model.loras", "pip install 'intaglio[lora]'"),
)
"""Packages of the core; each runtime has its own."""


def all_packages() -> tuple[Package, ...]:
    """Return the packages of the core and of every runtime, each once."""
    return tuple(dict.fromkeys((*PACKAGES, *(each for runtime in runtimes().values() for each in runtime.packages))))


def examine(imports: bool = False) -> Machine:
    """Examine the machine. Broken packages and drivers are reported as faults and raise no error.

    imports: import every installed package, not only the light ones.
    """
    faults = Faults()
    packages = dict(_packages(imports))
    by_module = {found.module: found for found in packages.values()}
    facts: dict[str, Fact] = {}
    for name in named_runtimes():
        if (runtime := faults.ask(f"runtime {name}", lambda name=name: find_runtime(name))) is not None:  # type: ignore[misc]
            facts |= runtime.examine(by_module, faults)
    gpus = faults.ask("gpus", _gpus) if by_module["torch"].works else None
    machine = Machine(
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        cpu_features=_cpu_features(),
        memory_bytes=faults.ask("memory", machine_bytes),
        packages=packages,
        facts=facts,
        gpus=gpus or (),
        faults=faults,
        targets={},
    )
    return replace(machine, targets={name: _abilities(load_target(name), machine) for name in target_names()})


def _packages(imports: bool) -> Iterator[tuple[str, Found]]:
    for package in all_packages():
        there = {name: found for name in package.distributions if (found := find_version(name)) is not None}
        name = next(iter(there), package.distributions[0])
        faults = Faults()
        if there and (imports or package.light):
            faults.ask(package.module, lambda module=package.module: import_module(module))  # type: ignore[misc]
        yield name, Found(package.module, there.get(name), faults.get(package.module), package.serves, package.install)


def _gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that torch finds. Without a driver, return none, and do not import torch, which takes seconds."""
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


def _abilities(target: Target, machine: Machine) -> Abilities:
    runtime = runtimes().get(target.runtime)
    if runtime is None:
        broken = Ability(False, machine.faults.get(f"runtime {target.runtime}", "its runtime is broken"))
        return Abilities(broken, broken, broken, broken)
    found = [machine.package(each.module) for each in all_packages() if each.compiles]
    lacks = "; ".join(sorted({each.lack for each in found if not each.works}))
    return Abilities(
        compile=Ability(not lacks, lacks or "yes"),
        build=runtime.build(target, machine),
        run=runtime.run(target, machine),
        verify=Ability(False, lacks) if lacks else runtime.verify(machine),
    )


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
