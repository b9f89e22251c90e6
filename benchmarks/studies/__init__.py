"""Measurements: ablations, the efficacy-agreement curve, speed and memory.

Each runs as ``python -m hiedit_benchmarks.studies.NAME``; ``docs/measurements.md`` has the results.
"""
