"""Measure how much each layer, in each scheme, changes the final samples at each denoising step.

Inputs are the model and its trajectories, and optionally a plan. The output is a table of errors by layer, scheme and
part of the trajectory. The choice of schemes is made in `assign`.
"""
