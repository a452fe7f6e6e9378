"""Measure the time and memory of compiled graphs, as a whole and layer by layer."""
