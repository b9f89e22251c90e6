"""Agents by name: as plain data, as presets, on disk."""
