"""Formats of layers, and the targets that execute them.

A scheme is a weight format with an input format, such as 8-bit weights with per-token 8-bit inputs. A target lists the
schemes that one runtime executes on one device. `illegal` in `layer.py` says why a layer cannot take a scheme there.
A weight format says how its scales are found, how it rounds and how files store it, with the arithmetic of `numerics`,
so that simulation, merge, export and verification all do the same.
"""
