"""Layer selection as a contextual bandit: recorded outcomes, the best fixed set, regression."""
