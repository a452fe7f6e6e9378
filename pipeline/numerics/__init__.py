"""Define the arithmetic of quantization: scales, rounding, codes, bases and packing.

Tensors enter as float32 and leave as float32 values or as integer codes. Simulation, merge, export and verification all
call the functions of this package, so that the exported graph computes what was simulated, bit for bit.
"""
