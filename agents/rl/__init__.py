"""Training scripts: PPO in one file, and one script for every library of reinforcement learning.

Each runs as ``python -m hiedit_agents.rl.NAME`` and writes a folder that ``hiedit compare`` plays.
"""
