"""Load a compiled folder as a denoiser or pipeline, pack it for a device, or write it for a server.

A compiled folder enters. A denoiser that replaces that of diffusers, a whole pipeline, an archive for a device, or a
model of NVIDIA's Triton Inference Server leaves.
"""
