"""Compiled folders and the kits of them, made once for all tests."""

from pathlib import Path

import pytest
from compiled import compiled, delivered, unpacked

from intaglio.exporters.deploy import kit


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a run for four targets writes; the engine of TensorRT-RTX is a stand-in."""
    root = tmp_path_factory.mktemp("build") / "emoji"
    for target in ("tensorrt-10.3-orin", "tensorrt-10.16-orin", "tensorrt-rtx", "onnxruntime-cpu"):
        compiled(root / target)
    (root / "tensorrt-rtx/engine.plan").write_bytes(b"built ahead of time")
    delivered(root / "tensorrt-rtx")
    return root


@pytest.fixture(scope="session")
def archives(build: Path) -> dict[str, Path]:
    targets = ("tensorrt-10.3-orin", "tensorrt-10.16-orin", "tensorrt-rtx")
    return {t: kit.write_kit(build / t, build.parent / f"{t}.tar.gz") for t in targets}


@pytest.fixture
def orin(archives: dict[str, Path]) -> Path:
    return unpacked(archives["tensorrt-10.3-orin"])


@pytest.fixture
def rtx(archives: dict[str, Path]) -> Path:
    return unpacked(archives["tensorrt-rtx"])
