"""Choose one scheme for every layer under a budget of bytes, time or quality.

Inputs are tables of sensitivities and costs. The output is a plan that names a scheme for every layer.
"""
