"""Export the denoiser to an ONNX graph in float32, and check that both compute the same.

The input is a module. The output is a graph in which every linear layer and convolution can be found by its name in the
model. Where the usual export of torch fails, complex numbers become pairs of real numbers, inputs whose values decide
what is computed become constants of the graph, and the model is traced row by row.
"""
