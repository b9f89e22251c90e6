"""Lifelong language-model editing as Gymnasium environments.

Importing this package registers the environments and imports neither torch nor transformers:

>>> import gymnasium, hiedit_env
>>> for name in sorted(id for id in gymnasium.registry if id.startswith("hiedit/")):
...     print(name)
hiedit/LayerSelection-v1
hiedit/LifelongEdit-v1
hiedit/Planted-v1
hiedit/StepSize-v1
hiedit/Toy-v1
"""

from __future__ import annotations

from gymnasium.envs.registration import register

__version__ = "0.1.0"

for _name, _module in (
    ("LifelongEdit", "lifelong_edit"),
    ("LayerSelection", "layer_selection"),
    ("Planted", "planted"),
    ("StepSize", "step_size"),
):
    register(
        f"hiedit/{_name}-v1",
        entry_point=f"hiedit_env.envs.{_module}:{_name}",
        vector_entry_point=f"hiedit_env.envs.vector:Vector{_name}",
    )
register("hiedit/Toy-v1", entry_point="hiedit_env.testing.toy:ToyEditing")
