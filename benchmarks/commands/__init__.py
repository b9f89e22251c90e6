"""The console script ``hiedit`` and what its commands do."""
