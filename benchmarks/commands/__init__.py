"""The console script ``hiedit`` and what its commands do: one module per command."""
