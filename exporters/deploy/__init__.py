"""What users load, copy to a device, or serve.

A compiled folder enters. A denoiser in the place of diffusers' own, a whole pipeline, an archive for a device, or a
model of NVIDIA's Triton Inference Server leaves.
"""
