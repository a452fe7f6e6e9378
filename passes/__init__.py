"""Passes that analyse, decide and train: the only folder that needs torch at its core."""
