"""Data sets: requests, file formats, splits and streams. No torch.

``Request`` is one fact to edit with its paraphrases and unrelated prompts; ``load_requests`` reads
a built-in name or a file in any of the field's formats; ``split_by_subject``, ``stream`` and
``fingerprint`` divide, draw and identify lists of requests. The built-in facts are in ``data/``.
"""
