"""TensorRT and TensorRT-RTX: builds engines, reads what they execute, and runs them."""
