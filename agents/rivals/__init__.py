"""Rivals for comparisons: fine-tuning over all facts, fine-tuning with a penalty, the prompt."""
