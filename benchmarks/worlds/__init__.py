"""Scripts that make the built-in models and their facts again.

``make_tiny`` and ``make_planted`` write the two models that ship; ``planted_world`` and
``synthetic_facts`` hold their invented facts.
"""
