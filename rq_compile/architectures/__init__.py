"""What differs between model families, as small declarations."""
