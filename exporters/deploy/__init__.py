"""Load a compiled folder as a denoiser or pipeline, pack it for a device, or write it for a server.

The input is a compiled folder. The output is a denoiser that replaces that of diffusers, a whole pipeline, an archive
for a device, or a model of NVIDIA's Triton Inference Server.
"""
