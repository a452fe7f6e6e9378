"""Layers that compute as the deployed graph does, in the place of the model's own.

`weight` and `input` round, `cache` keeps rounded weights, `layer` computes the product, and `model` puts such layers
into a module. Distillation trains through them; sensitivity and verification measure with them.
"""
