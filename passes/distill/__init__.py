"""Heals the loss of quantization by distilling the full-precision denoiser into its quantized self.

The plan and the trajectories enter. Adapters and scales leave, which `merge` rounds into integer weights.
"""
