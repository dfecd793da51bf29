"""The checkpoint tensors of each parameter and each expert of a model, for every family that transformers loads."""
