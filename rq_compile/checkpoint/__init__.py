"""Opens a safetensors checkpoint and reads one tensor or one layer at a time, never the whole checkpoint."""
