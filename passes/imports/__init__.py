"""Import weights that other tools quantized, and keep their codes.

The input is a file of Model Optimizer, compressed-tensors, torchao or ComfyUI, or a GGUF file. The step `modelopt`
needs no file: it runs Model Optimizer on the recorded calls. Outputs are the plan and the rounded weights, in the form
that `merge` makes. Every problem of a file is reported with the name of its layer.
"""
