"""Export the denoiser to an ONNX graph in float32, and check that the graph computes the same.

A module enters. A graph leaves whose linear layers and convolutions can be found again by their names in the model.
"""
