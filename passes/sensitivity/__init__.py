"""Estimate how much error each layer causes in each scheme: in the output of a call, and in the final samples.

Inputs are the model and its trajectories, and optionally a plan. The output is a table of errors by layer, scheme and
part of the trajectory. The choice of schemes is made in `assign`.
"""
