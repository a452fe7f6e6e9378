"""Define the values that passes exchange, and the keys that name them.

An artifact is validated when it is made, so no reader checks it again. Saving and loading gives an equal value, and
equal values are saved as equal bytes.
"""
