"""Agents side by side on the same streams of facts.

``compare`` plays every agent and seed, ``episode`` one of them; ``results`` keeps the rows on disk,
``statistics`` turns them into means, paired differences and intervals, ``figure`` into a picture.
"""
