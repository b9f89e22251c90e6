"""How good an edit is: reward terms within an episode, metrics over a stream."""
