"""The resident model: exact editable weights, captures, low-rank updates, batched passes."""
