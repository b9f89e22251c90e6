"""Agents of two levels: a high level that picks layers, a low level that computes updates."""
