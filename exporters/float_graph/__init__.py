"""float_graph."""
