"""Exports a model to an ONNX graph with one Experts node per MoE layer."""
