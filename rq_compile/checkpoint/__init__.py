"""Open a safetensors checkpoint; read one tensor or one layer, never the whole."""
