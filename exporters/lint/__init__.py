"""Find in an ONNX graph what a target refuses, computes wrongly or does not compute on integers.

An ONNX graph from any exporter enters. Findings leave. The graph is not executed.
"""
