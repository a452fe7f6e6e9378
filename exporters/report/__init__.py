"""Write the report of a run and the comparison of two runs, as pages with samples, plots and figures."""
