"""One package for each runtime: everything that knows the runtime is in it."""
