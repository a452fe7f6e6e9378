"""Import weights that other tools quantized, and keep their integers.

A file of Model Optimizer, compressed-tensors or torchao enters. The plan and the integer weights leave, in the form
that `merge` makes. Every problem of a file is reported with the name of its layer.
"""
