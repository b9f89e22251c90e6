"""Who chooses a block for a fact: rules, learners and oracles, on recorded outcomes.

A learner gets the recorded facts to learn from, with the outcomes of all options, and then chooses
for other facts by what can be seen of them before an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiedit_agents.bandits.full_information import LearnSettings, Pool, learn
from hiedit_agents.bandits.linear import LinearBandit
from hiedit_agents.bandits.shared_ridge import SharedRidge
from hiedit_agents.hierarchy.shared_router import SharedScores
from hiedit_benchmarks.studies.block_outcomes import OutcomeTable, interaction
from hiedit_env.errors import SettingsError

#: Facts that the mean over all relations counts for in that of one.
RELATION_PRIOR = 3
#: Steps in which the router learns.
ROUTER_STEPS = 400

#: ``(table, facts to learn from, facts to choose for, seed)`` → one option per fact to choose for.
Learner = Callable[[OutcomeTable, NDArray[np.int64], NDArray[np.int64], int], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Task:
    """For which facts an agent chooses, and what it may learn from.

    Args:
        table: All recorded facts.
        train: Indices of the facts to learn from.
        test: Indices of the E facts to choose for.
        evaluated: Indices of all facts that are evaluated on, these among them; for oracles.
        seed: Of what is random in learning.
    """

    table: OutcomeTable
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    evaluated: NDArray[np.int64]
    seed: int

    def nothing(self) -> NDArray[np.float64]:
        """E × 2 × (M + 1) zeros."""
        return np.zeros((len(self.test), 2, self.table.outcomes.shape[2]))

    @property
    def means(self) -> NDArray[np.float64]:
        """M, mean outcomes of the options over all that is evaluated on: known in hindsight."""
        found: NDArray[np.float64] = self.table.whole[self.evaluated].mean(0)
        return found


#: E × 2 × (M + 1), for each half the weights of the options, the last of them no edit.
Agent = Callable[[Task], NDArray[np.float64]]


class OptionScores(SharedScores):
    """Scores options by what is seen of each, and of the fact.

    An observation is N × (M · F), the numbers of one option after the other.
    """

    def features(self, observations: NDArray[np.float32]) -> Tensor:
        """N × M × F of N × (M · F)."""
        rows = torch.from_numpy(np.ascontiguousarray(observations, np.float32))
        return rows.view(len(rows), self.count, -1)


def best_fixed(
    table: OutcomeTable, train: NDArray[np.int64], test: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """The option with the best mean outcome on the training facts."""
    return np.full(len(test), table.whole[train].mean(0).argmax())


def best_per_relation(
    table: OutcomeTable, train: NDArray[np.int64], test: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """The best option of a relation's training facts, few of which count less than all facts do."""
    whole, found = table.whole[train], []
    for relation in table.relations[test]:
        own = whole[table.relations[train] == relation]
        found.append((own.sum(0) + RELATION_PRIOR * whole.mean(0)).argmax())
    return np.array(found, np.int64)


def largest(name: str) -> Learner:
    """The option of which some number is largest; learns nothing."""

    def choose(
        table: OutcomeTable, train: NDArray[np.int64], test: NDArray[np.int64], seed: int = 0
    ) -> NDArray[np.int64]:
        found: NDArray[np.int64] = table.options[test, :, table.option_names.index(name)].argmax(1)
        return found

    return choose


def linear_bandit(
    table: OutcomeTable, train: NDArray[np.int64], test: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """A regression per option on all numbers of fact and options."""
    seen = np.concatenate((table.facts, table.options.reshape(len(table), -1)), 1)
    bandit = LinearBandit(seed=seed)
    bandit.fit(seen[train], table.whole[train])
    return bandit.choose(seen[test])


def shared_numbers(table: OutcomeTable) -> NDArray[np.float64]:
    """N × M × (F + G): an option's own numbers, and those of the fact times its depth.

    The depth runs from −1 at the first block to 1 at the last one.
    """
    depth = np.linspace(-1, 1, table.options.shape[1])
    centred = table.facts - table.facts.mean(0)
    return np.concatenate((table.options, centred[:, None, :] * depth[None, :, None]), 2)


def shared_ridge(
    table: OutcomeTable, train: NDArray[np.int64], test: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """One regression for all options."""
    numbers, ridge = shared_numbers(table), SharedRidge()
    ridge.fit(numbers[train], table.whole[train])
    return ridge.choose(numbers[test])


def shared_router(
    table: OutcomeTable, train: NDArray[np.int64], test: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """The network of ``hiedit``'s shared router, which learns from the outcomes of all options."""
    count = table.options.shape[1]
    facts = np.broadcast_to(table.facts[:, None, :], (len(table), count, table.facts.shape[1]))
    places = np.broadcast_to(np.eye(count), (len(table), count, count))
    numbers = np.concatenate((table.options, facts, places), 2)
    seen = numbers.reshape(len(table), -1).astype(np.float32)
    router = OptionScores(count, numbers.shape[2], hidden=16, seed=seed)
    pool = Pool(np.eye(count, dtype=bool), seen[train], table.whole[train])
    learn(router, pool, torch.Generator().manual_seed(seed), LearnSettings(steps=ROUTER_STEPS))
    with torch.no_grad():
        found: NDArray[np.int64] = router.scores(router.features(seen[test])).argmax(1).numpy()
    return found


def learned(learner: Learner) -> Agent:
    """An agent that takes the same option on both halves."""

    def weights(task: Task) -> NDArray[np.float64]:
        found = task.nothing()
        choice = learner(task.table, task.train, task.test, task.seed)
        found[np.arange(len(found)), :, choice] = 1
        return found

    return weights


def no_edit(task: Task) -> NDArray[np.float64]:
    """The unedited model."""
    found = task.nothing()
    found[..., -1] = 1
    return found


def random(task: Task) -> NDArray[np.float64]:
    """The mean over all options, which is what random ones bring."""
    found = task.nothing()
    found[..., :-1] = 1 / (found.shape[2] - 1)
    return found


def best_constant(task: Task) -> NDArray[np.float64]:
    """The option with the best mean outcome on the very facts that are evaluated on."""
    found = task.nothing()
    found[..., task.means.argmax()] = 1
    return found


def oracle(task: Task) -> NDArray[np.float64]:
    """On each half the option that is best on the other half, as far as that can be believed.

    An outcome is expected to be the option's mean, known in hindsight, plus a share of what the
    fact differs by on its other half; the share is the correlation of these differences between the
    halves of the training facts. So where all differences are noise, it is the best constant.
    """
    share = max(0.0, interaction(task.table.outcomes[task.train][:, :, :-1]).correlation)
    known = task.table.outcomes[task.evaluated][:, ::-1, :-1].mean(0)
    rest = task.table.outcomes[task.test][:, ::-1, :-1] - known
    return _best(task.means + share * (rest - rest.mean(2, keepdims=True)))


def believing_oracle(task: Task) -> NDArray[np.float64]:
    """On each half the option that is best on the other half; of equal ones the best on average."""
    return _best(task.table.outcomes[task.test][:, ::-1, :-1] + _TIE * task.means)


def hindsight(task: Task) -> NDArray[np.float64]:
    """On each half the option that is best on it: what it gains by noise is scored as a gain."""
    return _best(task.table.outcomes[task.test][:, :, :-1])


#: Decides between equal outcomes, and between no others.
_TIE = 1e-9


def _best(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """E × 2 × (M + 1) weights of the best options, shared among equal ones."""
    best = (scores >= scores.max(2, keepdims=True) - 1e-12).astype(float)
    best /= best.sum(2, keepdims=True)
    return np.concatenate((best, np.zeros((*best.shape[:2], 1))), 2)


#: The agent that all others are compared with.
REFERENCE = "best block in hindsight"
#: The oracle that headroom is measured by.
ORACLE = "oracle, other prompts"
#: The one that is scored on the prompts it chose on.
HINDSIGHT = "oracle, same prompts"
#: Name → agent, in the order of the table.
AGENTS: Mapping[str, Agent] = MappingProxyType(
    {
        "no edit": no_edit,
        "random": random,
        "best fixed": learned(best_fixed),
        "best per relation": learned(best_per_relation),
        "largest gradient": learned(largest("weight_gradient")),
        "largest push": learned(largest("push")),
        "linear bandit": learned(linear_bandit),
        "shared ridge": learned(shared_ridge),
        "shared router": learned(shared_router),
        REFERENCE: best_constant,
        ORACLE: oracle,
        f"{ORACLE}, as they come": believing_oracle,
        HINDSIGHT: hindsight,
    }
)


def play(
    table: OutcomeTable, agent: Agent, folds: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The facts to evaluate on, and what an agent chooses for them.

    Args:
        table: All recorded facts.
        agent: Who chooses.
        folds: 0 to learn from the facts that are there for it and to evaluate on the others; else
            all facts are evaluated on, each with an agent that learned from the other folds.
        seed: Of the folds and of what is random in learning.

    Returns:
        E indices of facts, and E × 2 × (M + 1) weights of the options.

    Raises:
        SettingsError: too few facts, or none of a kind.
    """
    every = np.arange(len(table))
    if not folds:
        train, test = every[table.is_train], every[~table.is_train]
        if len(train) < 2 or not len(test):
            raise SettingsError(
                f"there are {len(train)} facts to learn from and {len(test)} to evaluate on; "
                "record more, or give --folds"
            )
        return test, agent(Task(table, train, test, test, seed))
    if len(table) < max(folds, 3) or folds < 2:
        raise SettingsError(f"{folds} folds of {len(table)} facts are not possible; give others")
    order = np.random.default_rng([seed, 23]).permutation(len(table))
    weights = np.zeros(table.outcomes.shape)
    for fold in range(folds):
        test = np.sort(order[fold::folds])
        train = np.setdiff1d(every, test)
        weights[test] = agent(Task(table, train, test, every, seed))
    return every, weights
