"""Show what a run made: a page with samples, plots and figures, and the comparison of two runs."""
