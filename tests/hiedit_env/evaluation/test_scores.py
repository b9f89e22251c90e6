"""Scores of the prompts of several environments, against one by one."""

from __future__ import annotations

import pytest
import torch

from hiedit_env.evaluation.scores import scores_together
from hiedit_env.model.tokenization import EncodedPrompt
from tests.hiedit_env.resident.test_batched import close, edited
from tests.support.models import PROMPTS, prompt, resident


@pytest.mark.parametrize("limit", [1, 20, 1024])
def test_scores_together_are_scores_one_by_one(limit: int) -> None:
    llm = resident("llama", max_batch_tokens=limit)
    forks = [edited(llm, seed) for seed in range(3)] + [llm.fork()]
    more = [prompt([i, i + 1, 5], [i + 2]) for i in range(3, 8)]
    wanted: list[list[EncodedPrompt]] = [
        [*PROMPTS, PROMPTS[0]],
        [],
        [more[0]],
        [*more, *PROMPTS],
    ]
    with torch.no_grad():
        batch = llm.batch([PROMPTS[0]])
        known = {PROMPTS[0]: llm.answer_logits(batch).log_softmax(-1)}
    references = [known, known, {}, known]
    asked = list(zip(forks, wanted, references, strict=True))
    found = scores_together(asked)
    for one, together in zip(asked, found, strict=True):
        close(together, scores_together([one])[0])
        assert together.shape == (len(one[1]), 4)
    # The unedited environment agrees with the reference completely; the edited one does not.
    torch.testing.assert_close(found[3][5, 2:], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert found[0][0, 2] > 1e-4
    assert torch.equal(found[0][0], found[0][3])
