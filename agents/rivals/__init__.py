"""Rivals for comparisons: fine-tuning of all kinds, MEMIT and AlphaEdit, the prompt."""
