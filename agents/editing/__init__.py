"""Editing a model from Python: the editor, its ledger, undo, and what is exported.

``Editor`` in :mod:`.editor` is also ``hiedit_agents.Editor``.
"""
