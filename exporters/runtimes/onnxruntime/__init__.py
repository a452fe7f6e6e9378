"""ONNX Runtime: sessions that compute exactly what was simulated, and the step that checks a graph in one."""
