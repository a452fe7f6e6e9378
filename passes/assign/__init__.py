"""Chooses one scheme for every layer under a budget of bytes, time or quality.

Sensitivities and costs enter as tables. A plan leaves that is total: it names a scheme for every layer.
"""
