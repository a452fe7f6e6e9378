"""Compile the models around the denoiser in a pipeline: text encoders and autoencoders.

A pipeline's folder enters, and runs once to record how it calls its components. A graph for each component leaves.
"""
