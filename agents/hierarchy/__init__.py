"""Agents of two levels: a high level that picks layers, a low level that computes updates.

``options`` defines both levels and the agent made of them. High levels that learn are in
``routers``, low levels that learn in ``hypernetwork``, ``rehearsal`` and ``step_sizes``;
``simple`` holds agents that do not learn, and ``trainer`` the training loop.
"""
