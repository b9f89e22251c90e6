"""The language model as it is loaded: weights, tokens, texts, candidate layers, memory."""
