"""All numerics: what a format means, as one set of functions for simulation, merge, export and verification."""
