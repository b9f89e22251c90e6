"""Agents side by side on the same streams of facts."""
