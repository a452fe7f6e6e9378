"""Writes the report of a run, a page with samples, plots and figures, and the comparison of two runs."""
