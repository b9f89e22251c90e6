"""Measurements: ablations, the efficacy-agreement curve, speed and memory."""
