"""The language model as it is loaded: weights, tokens, texts, candidate layers, memory.

``load_model`` turns a name into a model and its tokenizer, once device and memory are known to do;
``find_candidates`` says which weight matrices may be edited; ``tokenization`` is the only place
where text becomes tokens; ``generation`` writes greedy texts. The built-in models are in
``assets/``.
"""
