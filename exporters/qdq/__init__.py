"""Writes a plan into a float graph: codes, scales, QuantizeLinear and DequantizeLinear.

The float graph and the integer weights enter. A graph of standard operators leaves that a runtime executes on integers.
The lowering table says how each scheme is written for each runtime.
"""
