"""Replace layers of a model by layers that compute as the deployed graph does.

`weight` and `input` round, `cache` keeps rounded weights, `layer` computes the product, and `model` puts such layers
into a module. Distillation trains through them; sensitivity and verification measure with them.
"""
