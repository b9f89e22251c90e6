"""Rows of results: the efficacy that forgetting is measured against."""

from __future__ import annotations

import numpy as np

from hiedit_benchmarks.comparison.rows import efficacy_as_edited
from hiedit_env.datasets.requests import Request
from hiedit_env.evaluation.metrics import Evaluation


def test_forgetting_is_measured_in_the_forms_of_the_edit() -> None:
    plain, nan = np.array([100.0, 50.0, 30.0]), float("nan")
    # The third prompt was written by a chat template, so it is asked in one form.
    chat = np.array([0.0, 10.0, nan])
    found = Evaluation(
        {"efficacy": {"token_accuracy": plain}, "chat_efficacy": {"token_accuracy": chat}}, ()
    )
    requests = [Request(f"P{i}", "A", "S") for i in range(3)]
    assert efficacy_as_edited(requests, found, None).tolist() == [100, 50, 30]
    assert efficacy_as_edited(requests, found, "plain").tolist() == [100, 50, 30]
    assert efficacy_as_edited(requests, found, "chat").tolist() == [0, 10, 30]
    assert efficacy_as_edited(requests, found, "both").tolist() == [50, 30, 30]
    own = [Request("P0", "A", "S", prompt_form="plain"), *requests[1:]]
    assert efficacy_as_edited(own, found, "chat").tolist() == [100, 10, 30]
    only_plain = Evaluation({"efficacy": {"token_accuracy": plain}}, ())
    assert efficacy_as_edited(own, only_plain, "plain").tolist() == [100, 50, 30]
    assert np.isnan(efficacy_as_edited(requests, only_plain, "chat")).all()
