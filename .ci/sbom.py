"""Lists a wheel and all that it needs, in the versions installed here, as CycloneDX: `python .ci/sbom.py WHEEL OUT`."""

import hashlib
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def components_of(wheel: Path) -> Bom:
    """The wheel, without its extras, and what needs what on this machine.

    Raises PackageNotFoundError for what is not installed.
    """
    (metadata,) = (entry for entry in ZipPath(wheel).iterdir() if entry.name.endswith(".dist-info"))
    release = PathDistribution(metadata)
    found = {release.name: release}
    edges: dict[str, set[str]] = {release.name: set()}
    waiting = [(release.name, "")]
    looked_at = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        for needed, extras in _needed(found[name], extra):
            found.setdefault(needed, distribution(needed))
            edges[name].add(needed)
            edges.setdefault(needed, set())
            fresh = {(needed, each) for each in ("", *extras)} - looked_at
            looked_at |= fresh
            waiting += fresh
    components = {name: _component(each) for name, each in found.items()}
    bom = Bom(components=(each for name, each in components.items() if name != release.name))
    bom.metadata.component = components[release.name]
    bom.metadata.component.hashes.add(
        HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(wheel.read_bytes()).hexdigest())
    )
    for name, needs in edges.items():
        bom.register_dependency(components[name], [components[needed] for needed in needs])
    return bom


def _needed(found: Distribution, extra: str) -> Iterator[tuple[str, set[str]]]:
    """Names, and extras of theirs."""
    for each in map(Requirement, found.requires or ()):
        if each.marker is None or each.marker.evaluate({"extra": extra}):
            yield canonicalize_name(each.name), each.extras


def _component(found: Distribution) -> Component:
    name, metadata = canonicalize_name(found.name), found.metadata
    package = PackageURL("pypi", name=name, version=found.version)
    licence = metadata.get("License-Expression") or metadata.get("License") or ""
    return Component(
        name=name,
        version=found.version,
        type=ComponentType.LIBRARY,
        purl=package,
        bom_ref=package.to_string(),
        licenses=[LicenseFactory().make_from_string(licence)] if licence and "\n" not in licence else [],
    )


if __name__ == "__main__":
    listed = components_of(Path(sys.argv[1]))
    make_outputter(listed, OutputFormat.JSON, SchemaVersion.V1_6).output_to_file(
        sys.argv[2], allow_overwrite=True, indent=1
    )
