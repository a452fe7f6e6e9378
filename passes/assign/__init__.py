"""Choose one scheme for every layer under a budget of bytes, time or quality.

Sensitivities and costs enter as tables. A plan leaves that names a scheme for every layer.
"""
