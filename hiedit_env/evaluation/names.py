"""Names of rewards, references and metrics, for settings that are read without torch."""

from __future__ import annotations

from typing import Literal

#: What the terms of the reward are measured in.
RewardKind = Literal["loss", "token_accuracy", "generation"]
#: The model that answers to unrelated prompts are compared with.
LocalityReference = Literal["unedited", "previous"]
#: A metric of a whole stream of facts.
Metric = Literal["efficacy", "generalization", "specificity", "retention"]
#: All of them.
METRICS: tuple[Metric, ...] = ("efficacy", "generalization", "specificity", "retention")
