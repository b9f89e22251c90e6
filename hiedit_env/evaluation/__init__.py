"""How good an edit is: reward terms within an episode, metrics over a stream.

``reward`` and ``reward_terms`` judge the present edit; ``evaluate`` measures efficacy,
generalization, specificity and retention over all facts of a stream; ``matching`` decides when a
generated text counts as the answer.
"""
