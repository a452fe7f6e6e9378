"""Find in an ONNX graph what a target refuses, computes wrongly or does not compute on integers.

The input is an ONNX graph from any exporter; the output is a list of findings. The graph is not executed.

An operator that a target refuses is one word in `limits.unsupported` of the target's YAML; the rule `operator` reads
it. A new rule, or a change of one, raises `Lint.version`, because the store takes old findings otherwise.
"""
