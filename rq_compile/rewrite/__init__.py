"""onnx-graphsurgeon passes: Experts to Dispatch, ExpertGemm and Combine, and the lowerings. Knows no torch."""
