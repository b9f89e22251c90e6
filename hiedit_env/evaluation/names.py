"""Names of rewards, references and metrics, for settings that are read without torch."""

from __future__ import annotations

from typing import Literal

from hiedit_env.model.encoded import AskedForm as AskedForm  # where callers look for it

#: What the terms of the reward are measured in.
RewardKind = Literal["loss", "token_accuracy", "generation"]
#: The model that answers to unrelated prompts are compared with.
LocalityReference = Literal["unedited", "previous"]
#: A metric of a whole stream of facts.
Metric = Literal["efficacy", "generalization", "specificity", "retention", "portability"]
#: Those that are the same for every data set, and make up the average.
METRICS: tuple[Metric, ...] = ("efficacy", "generalization", "specificity", "retention")
#: All that answers may be generated for.
GENERATED: tuple[Metric, ...] = (*METRICS, "portability")


def metric_in(form: AskedForm, metric: str) -> str:
    """Name of a metric whose prompts are asked in some form.

    >>> metric_in("plain", "efficacy"), metric_in("chat", "efficacy")
    ('efficacy', 'chat_efficacy')
    """
    return metric if form == "plain" else f"{form}_{metric}"


def portability_of(kind: str) -> str:
    """Name of the metric of one kind of portability prompts.

    >>> portability_of("multi-hop")
    'portability/multi-hop'
    """
    return f"portability/{kind}"
