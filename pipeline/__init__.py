"""The core: artifacts, passes, recipes, targets, the store and the runner."""
