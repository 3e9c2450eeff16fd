"""Policy files: building an ONNX graph, and loading one."""
