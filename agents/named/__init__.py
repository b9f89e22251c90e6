"""Agents by name: as plain data, as presets, on disk.

``spec`` describes an agent as data and builds it; ``presets`` lists the named agents with their
sources; ``checkpoints`` reads and writes trained ones; ``candidates`` says which layers they act
on.
"""
