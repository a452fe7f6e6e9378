"""Takes weights that other tools quantized, and keeps their integers.

A file of Model Optimizer, compressed-tensors or torchao enters. The plan and the integer weights leave, as `merge`
would have made them. Every problem of a file is reported by the name of its layer.
"""
