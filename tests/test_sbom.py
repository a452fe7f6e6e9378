"""The bill of materials of a release names the wheel, and what it depends on in the versions that are installed."""

import hashlib
import json
import tomllib
from importlib.metadata import version
from pathlib import Path

from cyclonedx.output.json import JsonV1Dot6
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sbom import components_of

ROOT = Path(__file__).parents[1]


def test_it_names_the_wheel_and_all_that_it_needs_with_versions(tmp_path: Path) -> None:
    wheel = Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    listed = json.loads(JsonV1Dot6(components_of(wheel)).output_as_string())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    release = listed["metadata"]["component"]
    assert (release["name"], release["version"]) == ("intaglio", project["version"])
    assert release["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}]

    declared = [
        each for each in map(Requirement, project["dependencies"]) if each.marker is None or each.marker.evaluate()
    ]
    direct = {canonicalize_name(each.name) for each in declared}
    needs = {
        each["ref"]: {purl.partition("@")[0] for purl in each.get("dependsOn", ())} for each in listed["dependencies"]
    }
    assert needs[release["bom-ref"]] == {f"pkg:pypi/{name}" for name in direct}

    versions = {each["name"]: each["version"] for each in listed["components"]}
    assert direct < versions.keys()
    assert {"markupsafe", "huggingface-hub"} <= versions.keys()  # of jinja2, of diffusers
    assert not {"pytest", "ruff", "mypy", "peft"} & versions.keys()
    assert all(version(name) == listed_version for name, listed_version in versions.items())
