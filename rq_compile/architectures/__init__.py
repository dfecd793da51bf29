"""Model families: their differences as small declarations, and models opened through transformers' loader."""
