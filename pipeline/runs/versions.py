"""Which versions are installed."""

from importlib.metadata import PackageNotFoundError, version


def find_version(distribution: str) -> str | None:
    """None for what is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
