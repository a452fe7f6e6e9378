"""Runs a recipe: binds its steps, runs each once, stores what it made, and delivers the results.

`bind` finds nearly every error before the first step. The store keeps artifacts under the digest of their content, and
a step whose inputs and options are unchanged is not run again.
"""
