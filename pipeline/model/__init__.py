"""Open the user's model, list its layers, record its calls, and drive its sampler.

The input is a diffusers folder, a hub id or a factory in a Python file. The output is a `DenoiserModel`: a module in
float32 with its scheduler and everything else that a call needs. No model family has code of its own here.
"""
