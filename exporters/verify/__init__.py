"""Check that the deployed graph computes what was simulated.

The full-precision model, the simulation and the graph draw samples from the same noise. Every layer of the graph is
compared with its simulation on the same input. The option `bisect` looks inside the whole graph and names the layers
that compute wrongly, and the first whose input is wrong.
"""
