"""Run the model over text: loads, importance, activation statistics."""
