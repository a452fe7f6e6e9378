"""Find in an ONNX graph what a target refuses, computes wrongly or does not compute on integers.

The input is an ONNX graph from any exporter; the output is a list of findings. The graph is not executed.
"""
