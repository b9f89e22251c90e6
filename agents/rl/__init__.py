"""Training scripts: PPO in one file, and one script for every library of reinforcement learning."""
