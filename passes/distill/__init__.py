"""Reduce the loss of quantization: distil the full-precision denoiser into the quantized one.

Inputs are the model, the plan and the trajectories. Outputs are adapters and scales, which `merge` rounds into integer
weights.
"""
