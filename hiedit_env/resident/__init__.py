"""The resident model: exact editable weights, captures, low-rank updates, batched passes.

``ResidentLLM`` is the one model that is read and edited. A ``Capture`` holds keys and value
gradients of an edit unit, the prompts that one step edits; a ``LowRankUpdate`` is what may be
written. Forks share the resident model, each with its own changes, and ``batched``
answers several of them by one pass.
"""
