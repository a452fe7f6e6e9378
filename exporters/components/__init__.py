"""Compile the models around the denoiser in a pipeline: text encoders and autoencoders.

The input is a pipeline's folder. The pipeline runs once to record how it calls its components. The output is one graph
for each component.
"""
