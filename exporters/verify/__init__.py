"""Proves that the deployed graph computes what was simulated.

Samples are drawn by full precision, by the simulation and by the graph; every layer is compared on the same input.
Where results differ, a bisection names the first layer whose output differs.
"""
