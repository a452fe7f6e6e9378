"""Look up installed versions."""

from importlib.metadata import PackageNotFoundError, version


def find_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
