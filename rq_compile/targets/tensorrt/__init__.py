"""TensorRT and TensorRT-RTX engines: the batched lowering in 16 bit, its builder, and what lies beside an engine."""
