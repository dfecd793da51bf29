"""onnx-graphsurgeon passes: they replace Experts by Dispatch, ExpertGemm and Combine, and by the ops of other lowerings. This
package does not use torch."""
