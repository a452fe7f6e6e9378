"""Finds in an ONNX graph what a target refuses, computes wrongly or takes off the integers.

Any graph enters, by whomever it was written. Findings leave. Nothing is executed.
"""
