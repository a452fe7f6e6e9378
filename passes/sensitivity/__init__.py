"""Measures how much each layer, in each scheme, changes the final samples at each denoising step.

The model, its trajectories and the target enter. A table of errors by layer, scheme and group of steps leaves. Nothing
is decided here.
"""
