"""Update rules: from a capture to low-rank updates; and simple choices of layers."""
