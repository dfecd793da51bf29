"""Which checkpoint tensors make up each parameter and each expert of a model, for every family that transformers loads."""
