"""``hiedit/LifelongEdit-v1``: which layers, and how strongly, one primitive update at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hiedit_env.envs.actions import check_layers, check_step_sizes, split_dict
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.scheduler import Passes


class LifelongEdit(EditingEnv):
    r"""Write a stream of facts into a resident language model, one after another.

    ## Description
    A language model is given requests, each a prompt with the answer it shall give from now on. The
    agent sees activations of the model on the present request and decides which of the L candidate
    weight matrices (*layers*) to change and how strongly; an update rule computes the change. The
    model keeps every change, so later edits can destroy earlier ones, and unrelated answers.

    ## Action Space
    ``Dict(layers=MultiBinary(L), step_size=Box(-1, 1, (L,)))``. Layer l is written if
    ``layers[l]`` is 1, with the rule's nominal step size times ``10 ** step_size[l]``. One step is
    one primitive update of the present fact. A fact already answered is left alone whatever the
    action says, and so is the model under an empty mask.

    ## Observation Space
    ``Box(-1, 1, (22 L + 5,), float32)``: pooled activations of every layer on the present fact and
    the state of its weight, then five numbers about fact and stream; see
    :class:`hiedit_env.envs.observations.Observer`. Torch agents find the full keys and value
    gradients in ``env.unwrapped.capture``.

    ## Rewards
    ``reward = sum(info["reward_terms"].values())``. After every step the edited model has a level
    in each of four terms (see :class:`hiedit_env.evaluation.reward.Evaluator`):

    - ``edit``: success on this fact and its paraphrases,
    - ``locality``: agreement with the reference model on unrelated prompts,
    - ``sparsity``: share of the candidate layers not written for this fact,
    - ``retention``: success on the last ``retention_window`` facts,

    each weighted. A step is paid what the levels rose by since the previous step of the same fact;
    the first step of a fact counts from 0. So the rewards of a fact sum up to its final levels
    whatever the number of steps, and with ``max_steps_per_edit=1`` and ``reward="loss"`` a step is
    paid −L_t, the low-level reward of HiEdit (arXiv 2604.11214) up to averaging. With
    ``intrinsic=True`` each term is what it exceeds the same step with all layers by (HiEdit's
    high-level reward). ``collapse`` is minus its weight when the model collapses, else 0.

    ## Starting State
    The unedited model, a stream drawn with ``np_random``, the first fact.

    ## Episode End
    A fact ends when it is answered (all answer tokens are the argmax under teacher forcing) or
    after ``max_steps_per_edit`` steps. The episode terminates at the end of the stream, and on
    numerical collapse: then the weights are as before the step and ``info["error_type"]`` is
    ``"numerical_collapse"`` (the loss stopped being finite) or ``"non_finite_update"`` (the rule's
    update was not). It is never truncated.

    ## Information
    ``reward_terms`` (they sum up to the reward), ``metrics`` (token accuracies after the step:
    ``efficacy``, ``generalization``, ``agreement``, ``retention``, each absent where there is
    nothing to measure, and ``answered``), ``layers`` (L int8, layers written by the step),
    ``weights_fingerprint`` (hexadecimal), ``edit_index`` (the fact the step worked on),
    ``edit_steps`` (its primitive steps so far), ``edit_over``. After ``reset``, the first fact's
    ``efficacy`` and ``answered``, and zeros.

    ## Arguments
    - ``model``: a name, folder or hub id for :func:`hiedit_env.model.loading.load_model`.
    - ``dataset``: ``"world-facts"``, ``"tiny-facts"``, ``"planted-facts"`` or a path; None
      picks the one for the model.
    - ``num_edits``: length of the stream; None for all facts.
    - ``max_steps_per_edit``: most primitive steps per fact; 1 is the papers' setting.
    - ``update_rule``: ``"decorrelated"``, ``"outer-product"``, ``"ridge"``, ``"gradient"`` or
      ``"module:Class"``; see :mod:`hiedit_env.rules.base`.
    - ``reward_weights``: overrides of
      ``{edit: 1, locality: 1, sparsity: 0.1, retention: 1, collapse: 10}``.
    - ``device``, ``dtype``: where the model lives; ``"cpu"``, ``"cuda"``, …; ``"float32"``, ….
    - ``render_mode``: ``"ansi"``, ``"rgb_array"`` or None.
    - ``reward``: unit of the levels: ``"loss"`` (nats), ``"token_accuracy"``, ``"generation"``.
    - ``intrinsic``: pay the advantage over editing all layers instead.
    - ``retention_window``, ``retention_decay``: k and μ of the remembered edits.
    - ``locality_reference``: ``"unedited"``, or ``"previous"`` for the model before the fact.
    - ``stop_when_answered``: if False every fact takes ``max_steps_per_edit`` steps.
    - ``step_size``, ``update_rule_settings``: the rule's nominal step size and other arguments.
    - ``layers``: patterns of candidate layers, e.g. ``"model.layers.{10-14}.mlp.gate_proj"``; None
      for the model's preset.
    - ``shuffle``: if False the stream is the first ``num_edits`` facts in the data set's order.
    - ``trust_remote_code``, ``progress``: as for ``load_model``.

    ## Version History
    - v1: ``agreement`` and ``recent_retention`` have one meaning each; the keys of
      ``info`` never vary.
    - v0: first version, never released.

    >>> import gymnasium, hiedit_env
    >>> env = gymnasium.make("hiedit/LifelongEdit-v1", num_edits=2)
    >>> observation, info = env.reset(seed=0)
    >>> action = {"layers": [1, 1, 1, 1, 1, 1], "step_size": [0.0] * 6}
    >>> observation, reward, terminated, truncated, info = env.step(action)
    >>> abs(reward - sum(info["reward_terms"].values())) < 1e-12
    True
    """

    def _make_action_space(self, num_layers: int) -> spaces.Space[Any]:
        return spaces.Dict(
            layers=spaces.MultiBinary(num_layers),
            step_size=spaces.Box(-1.0, 1.0, (num_layers,), np.float32),
        )

    def _check_action(self, action: Any) -> tuple[Any, ...]:
        count = len(self.llm.layers)
        layers, sizes = split_dict(action, count)
        return check_layers(layers, count), check_step_sizes(sizes, count)

    def _run(self, *chosen: Any) -> Passes[NDArray[np.bool_]]:
        layers, multipliers = chosen
        return self._primitive(layers, multipliers)

    def _run_all(self, *chosen: Any) -> Passes[NDArray[np.bool_]]:
        layers, multipliers = chosen
        return self._primitive(np.ones_like(layers), multipliers)
