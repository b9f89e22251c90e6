"""Command line, comparisons, demo, throughput and figures of hiedit.

``commands`` is the console script ``hiedit``, ``comparison`` plays agents side by side, ``layers``
measures which layers are worth editing, ``studies`` measures parts and speed, ``worlds`` makes the
built-in models and their facts.
"""
