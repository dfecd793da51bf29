"""LIS, cost models and policies: from loads, errors, sizes and a budget to a plan. Pure; knows no torch and no ONNX."""
