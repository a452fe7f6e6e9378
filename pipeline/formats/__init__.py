"""Define the formats of layers, and the targets that execute them.

A scheme is a weight format with an input format, such as 8-bit weights with per-token 8-bit inputs. A target lists the
schemes that one runtime executes on one device. `illegal` in `layer.py` says why a layer cannot take a scheme there.
A weight format defines how scales are fitted, how weights are rounded and how files store them, with the arithmetic of
`numerics`. Simulation, merge, export and verification all use this definition.
"""
