"""Which layers are worth editing: measured on a few facts, scored, proposed, drawn."""
