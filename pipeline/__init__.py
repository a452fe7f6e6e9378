"""The core: numerics, formats, models, artifacts, recipes, the store and the runner.

It names no pass, no exporter and no runtime. Each folder imports only itself and folders that come before it in this
list: numerics, formats, model, contract, artifacts, simulation, runs, cli.
"""


def __getattr__(name: str) -> object:
    """Return a public name of intaglio, so that `from intaglio.pipeline import Pass` works as `from intaglio` does.

    Raises AttributeError for other names.
    """
    import intaglio

    if name not in intaglio.__all__:
        raise AttributeError(f"module 'intaglio.pipeline' has no attribute {name!r}")
    return getattr(intaglio, name)
