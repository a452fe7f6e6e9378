"""Build engines with TensorRT and TensorRT-RTX, read what they execute, and run them."""
