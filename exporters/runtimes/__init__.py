"""One package for each runtime contains everything that knows the runtime."""
