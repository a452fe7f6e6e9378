"""Reaches the user's model: opens it, lists its layers, records its calls, and drives its sampler.

A diffusers folder, a hub id or a factory in a Python file enters. A `DenoiserModel` leaves: a module in float32 with
its scheduler and everything else it is called with. No model family has code of its own here.
"""
