"""Layers that compute as the deployed graph does, in the place of the model's own.

`quantize_model` replaces the layers of a module by `QuantizedLayer`s that round weights and inputs with the functions
of `numerics`. Distillation trains through them; sensitivity and verification measure with them.
"""
