"""Writes the first recipe for a model: what can be known of the model without its weights, and steps that suit it."""
