"""Open ONNX Runtime sessions that compute exactly what was simulated, and check graphs in them."""
