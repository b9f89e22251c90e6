"""Lifelong language-model editing as Gymnasium environments.

Importing this package registers the environments and imports neither torch nor transformers:

>>> import gymnasium, hiedit_env
>>> sorted(id for id in gymnasium.registry if id.startswith("hiedit/"))
['hiedit/LayerSelection-v0', 'hiedit/LifelongEdit-v0', 'hiedit/StepSize-v0', 'hiedit/Toy-v0']
"""

from __future__ import annotations

from gymnasium.envs.registration import register

__version__ = "0.1.0"

register("hiedit/LifelongEdit-v0", entry_point="hiedit_env.envs.lifelong_edit:LifelongEdit")
register("hiedit/LayerSelection-v0", entry_point="hiedit_env.envs.layer_selection:LayerSelection")
register("hiedit/StepSize-v0", entry_point="hiedit_env.envs.step_size:StepSize")
register("hiedit/Toy-v0", entry_point="hiedit_env.testing.toy:ToyEditing")
