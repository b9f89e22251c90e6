"""Scripts that make the built-in models and their facts again."""
