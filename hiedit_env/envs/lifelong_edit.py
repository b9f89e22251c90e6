"""``hiedit/LifelongEdit-v1``: which layers, and how strongly, one primitive update at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from hiedit_env.envs.actions import Choice, check_layers, check_step_sizes, split_dict
from hiedit_env.envs.base import EditingEnv


class LifelongEdit(EditingEnv):
    r"""Write a stream of facts into a resident language model, one after another.

    ## Description
    A language model is given requests, each a prompt with the answer it shall give from now on. The
    agent sees activations of the model on the present request and decides which of the L candidate
    weight matrices (*layers*) to change and how strongly; an update rule computes the change. The
    model keeps every change, so later edits can destroy earlier ones, and unrelated answers.

    What is edited together is a *unit*: one fact, or n of them with ``edits_per_step=n``; the last
    unit of a stream may be smaller. The prompts of a unit, each in every form asked, are read
    together, and the update rule computes one change for all of their tokens, to which the loss of
    the unit, the mean over its prompts of the mean nats per answer token, gives the gradients.
    Below, "fact" stands for the facts of a unit.

    ## Action Space
    ``Dict(layers=MultiBinary(L), step_size=Box(-1, 1, (L,)))``. Layer l is written if
    ``layers[l]`` is 1, with the rule's nominal step size times ``10 ** step_size[l]``. One step is
    one primitive update of the present fact. A fact already answered is left alone whatever the
    action says, and so is the model under an empty mask. With several facts per step the space is
    the same: one choice of layers and step sizes for all of them, until all are answered.

    ## Observation Space
    ``Box(-1, 1, (22 L + 5,), float32)``: pooled activations of every layer on the present fact and
    the state of its weight, then five numbers about fact and stream; see
    :class:`hiedit_env.envs.observations.Observer`. Of several facts it is the mean of the facts'
    own observations. Ids that end in ``-v2`` add L + 2 numbers: overlap of the keys with what each
    layer has stored, recent retention and agreement. Torch agents find the full keys and value
    gradients in ``env.unwrapped.capture``.

    ## Rewards
    ``reward = sum(info["reward_terms"].values())``. After every step the edited model is judged by
    four terms (see :class:`hiedit_env.evaluation.reward.Evaluator`):

    - ``edit``: success on this fact and its paraphrases,
    - ``locality``: likeness to the reference model on unrelated prompts,
    - ``sparsity``: share of the candidate layers not written for this fact,
    - ``recent_retention``: success on the last ``retention_window`` facts,

    each weighted. A prompt that is asked in two forms counts half in each. Of several facts a term
    is the mean of what each would have alone, with the same memory: the facts before the unit.
    The reward is the increase of the weighted terms since the previous step on this
    fact; the first step of a fact starts from 0. So the rewards of a fact sum up to its final
    terms, however many steps it takes. With ``max_steps_per_edit=1`` and ``reward="loss"`` the
    reward is −L_t, the low-level reward of HiEdit (arXiv 2604.11214), up to averaging. With
    ``intrinsic=True`` each term is the advantage over the same step with all layers (HiEdit's
    high-level reward). ``collapse`` is minus its weight when the model collapses, else 0.

    Ids that end in ``-v2`` count the terms of a fact from the model before its first step, so that
    a fact that is left alone earns 0. ``sparsity`` is minus the number of layers written for the
    fact, and a further term ``steps`` minus the number of its primitive steps that wrote one;
    their weights, 0.1 and 0.3 nats, are prices. ``collapse`` counts for every fact that is not
    finished.

    ## Starting State
    The unedited model, a stream drawn with ``np_random``, the first fact.

    ## Episode End
    A fact ends when it is answered (all answer tokens are the argmax under teacher forcing, in all
    forms, for all facts of the unit) or after ``max_steps_per_edit`` steps. The episode terminates
    at the end of the stream, and when a step fails: then the weights are as before the step and
    ``info["error_type"]`` is 1 (numerical collapse: the loss is no longer finite) or 2 (the rule's
    update is not finite); see :class:`hiedit_env.envs.accounting.StepError`. It is never truncated
    by itself.

    ## Information
    Keys, types and shapes never vary, and every value is a number or an array of numbers:

    - ``reward_terms``: five numbers that sum up to the reward.
    - ``metrics``: token accuracies after the step, from 0 to 1, NaN where there is nothing to
      measure: ``efficacy`` (this fact), ``generalization`` (its paraphrases), ``agreement`` (share
      of the unedited model's own greedy answer tokens, at most five a prompt, that are still the
      argmax, on this fact's unrelated prompts), ``argmax_match`` (share of the true answers' tokens
      on unrelated prompts, those of remembered facts too, where the argmax is the reference
      model's), ``recent_retention`` (the remembered facts); and ``answered``.
    - ``layers``: L int8, the layers written by the step.
    - ``weights_fingerprint``: a 64-bit number that changes when any bit of a weight does.
    - ``edit_index``: the fact that the step worked on, the first of its unit.
    - ``edit_steps``: its primitive steps so far.
    - ``edit_over``: whether it has ended.
    - ``error_type``: 0, or why the step failed.

    With ``edits_per_step`` above 1, ``metrics`` are means over the facts where each is known, and

    - ``unit_size``: facts of the unit, n or fewer.
    - ``fact_metrics``: the same metrics as arrays of n numbers, fact by fact; NaN (and False for
      ``answered``) behind the last.

    With ``prompt_form="both"``

    - ``form_metrics``: ``{"plain": …, "chat": …}``, the metrics of what is asked in one form; NaN
      where a fact is not asked in it.

    After ``reset``, the first fact's ``efficacy`` and ``answered``, and zeros.

    ## Arguments
    - ``model``: a name, folder or hub id for :func:`hiedit_env.model.loading.load_model`.
    - ``dataset``: ``"world-facts"``, ``"tiny-facts"``, ``"planted-facts"`` or a path; None
      picks the one for the model.
    - ``num_edits``: length of the stream; None for all facts.
    - ``max_steps_per_edit``: maximum number of primitive steps per fact; 1 is the papers' setting.
    - ``update_rule``: ``"decorrelated"``, ``"outer-product"``, ``"ridge"``, ``"gradient"`` or
      ``"module:Class"``; see :mod:`hiedit_env.rules.base`.
    - ``reward_weights``: overrides of
      ``{edit: 1, locality: 1, sparsity: 0.1, recent_retention: 1, collapse: 10}``.
    - ``version``: 1 or 2, set by the id.
    - ``device``, ``dtype``: where the model lives; ``"cpu"``, ``"cuda"``, …; ``"float32"``, ….
    - ``render_mode``: ``"ansi"``, ``"rgb_array"`` or None.
    - ``reward``: unit of the terms: ``"loss"`` (nats), ``"token_accuracy"``, ``"generation"``.
    - ``intrinsic``: the reward is the advantage over editing all layers.
    - ``retention_window``, ``retention_decay``: k and μ of the remembered edits.
    - ``edits_per_step``: n, facts that one step edits together. Two that give one prompt different
      answers are refused by ``reset``.
    - ``prompt_form``: how facts, paraphrases and unrelated prompts are asked: ``"plain"``,
      ``"chat"`` (through the tokenizer's chat template) or ``"both"``. A request's own
      ``prompt_form`` and ``system`` message go first.
    - ``end_token``: whether the token that ends the model's turn stands behind every answer, for
      the update rule, the reward and the metrics alike.
    - ``locality_reference``: ``"unedited"``, or ``"previous"`` for the model before the fact.
    - ``stop_when_answered``: if False every fact takes ``max_steps_per_edit`` steps.
    - ``step_size``, ``update_rule_settings``: the rule's nominal step size and other arguments.
    - ``layers``: patterns of candidate layers, e.g. ``"model.layers.{10-14}.mlp.gate_proj"``, or
      the path of a ``.json`` file that ``hiedit layers`` wrote; None for the model's preset.
    - ``shuffle``: if False the stream is the first ``num_edits`` facts in the data set's order.
    - ``memory_check``: what is done if the model seems not to fit into memory: ``"refuse"``,
      ``"warn"`` or ``"off"``; None for ``$HIEDIT_MEMORY_CHECK``, else ``"refuse"``.
    - ``trust_remote_code``, ``progress``: as for ``load_model``.

    ## Version History
    - v2: a fact is rewarded what the agent changed, steps and layers have prices, an early end
      costs every fact that is lost, and the observation holds L + 2 numbers more; see
      ``docs/decisions/reward-of-changes.md``. v1 stays.
    - v1: ``agreement`` and ``recent_retention`` have one meaning each; the keys of ``info`` never
      vary, and its fingerprint and error are numbers.
      A step may edit several facts, in several forms, with an end token.
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

    def _check_action(self, action: Any) -> Choice:
        count = len(self.llm.layers)
        layers, sizes = split_dict(action, count)
        return Choice(check_layers(layers, count), check_step_sizes(sizes, count))
