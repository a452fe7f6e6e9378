"""Passes that analyse, decide and train, most of them in torch."""
