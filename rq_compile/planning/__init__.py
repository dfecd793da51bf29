"""LIS, cost models and policies: a plan from loads, errors, sizes and a budget. Pure functions, without torch and ONNX."""
