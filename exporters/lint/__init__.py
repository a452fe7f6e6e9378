"""Find in an ONNX graph what a target refuses, computes wrongly or does not compute on integers.

The input is an ONNX graph from any exporter; the output is a list of findings. The graph is not executed.

An operator that a target refuses is one word in `limits.unsupported` of the target's YAML; the rule `operator` reads
it. Raise `Lint.version` after adding or changing a rule; otherwise the store returns the old findings.
"""
