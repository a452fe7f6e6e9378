"""Run a recipe: bind its steps, run each once, store the outputs, and deliver the results.

`bind` finds nearly every error before the first step. The store keeps artifacts under the digest of their content, and
a step whose inputs and options are unchanged is not run again.
"""
