"""The training loop: its estimators, what it learns, repeatability, resuming, refusals."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_agents.hierarchy.option_runner import Outcome
from hiedit_agents.hierarchy.options import Choice, HierarchicalAgent, UntrainedChoice
from hiedit_agents.hierarchy.policy_gradient import Tried
from hiedit_agents.hierarchy.routers import PolicyRouter
from hiedit_agents.hierarchy.train_settings import TrainSettings, defaults
from hiedit_agents.hierarchy.trainer import VECTOR_FACTOR, Trainer
from hiedit_agents.registry import make_agent, spec_agent
from hiedit_benchmarks.commands.cli import main as hiedit
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_env.errors import CheckpointError, ResultsExistError, SettingsError
from hiedit_env.resident.low_rank import LowRankUpdate
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import SELECTION, L, make

SHORT = TrainSettings(
    episodes=2,
    edits_per_episode=4,
    retention_window=2,
    evaluation_edits=3,
    held_out=0.1,
)
RUN = TrainingRun(agent="policy+hypernetwork", model="tiny", max_steps_per_edit=2)


# -- estimators ---------------------------------------------------------------------------------


class Forced(PolicyRouter):
    """Draws what it is told to, in the given orders."""

    queue: list[tuple[int, ...]]

    def choose(self, observation: Any, capture: Any, generator: Any = None) -> Choice:
        order = self.queue.pop(0)
        mask = np.zeros(len(self.bias), bool)
        mask[list(order)] = True
        return Choice(mask, self.log_probability(observation, order))


class Tabled(Trainer):
    """Rewards from a table in the place of the environment's."""

    table: dict[tuple[int, ...], float]

    def _reward(self, layers: np.ndarray) -> float:
        return self.table[tuple(np.flatnonzero(layers))]

    def _run(self, choice: Choice, tally: Any) -> Outcome:
        observation = np.zeros(0, np.float32)
        return Outcome(self._reward(choice.layers), 1.0, 1, observation, False, {})


@pytest.mark.parametrize("intrinsic", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_policy_gradient_is_exact_on_average(samples: int, intrinsic: bool) -> None:
    """Every possible set of draws, weighted by its probability, against ∇ E[reward]."""
    env = make(SELECTION, layers=[f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 2)])
    observation, _ = env.reset(seed=0)
    router = Forced(3, torch.device("cpu"), layers_per_edit=2, hidden=3)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.3, -0.4, 0.1]))
    settings = replace(SHORT, samples_per_fact=samples, intrinsic=intrinsic)
    trainer = Tabled(env, HierarchicalAgent("x", router), env.requests, settings)
    trainer.table = {(0, 1): 1.0, (0, 2): -2.0, (1, 2): 5.0, (0, 1, 2): 2.0}
    observation, _ = env.reset(seed=0)
    orders = list(itertools.permutations(range(3), 2))

    def probability(order: tuple[int, ...]) -> Tensor:
        return router.log_probability(observation, order).exp()

    value = torch.stack([probability(o) * trainer.table[tuple(sorted(o))] for o in orders]).sum()
    (exact,) = torch.autograd.grad(value, router.bias)
    total = torch.zeros(3)
    for draws in itertools.product(orders, repeat=samples):
        router.queue = list(draws)
        router.zero_grad()
        _, tried = trainer._fact(observation, None)  # type: ignore[arg-type]
        trainer._reinforce([tried])
        assert router.bias.grad is not None
        weight = math.prod(probability(order).item() for order in draws)
        # The loss goes down where the reward goes up.
        total -= weight * router.bias.grad
    assert total.tolist() == pytest.approx(exact.tolist(), abs=1e-5)


def test_entropy_pulls_towards_choosing_evenly() -> None:
    """All rewards equal: what is left is the gradient of −weight × entropy, by hand."""
    env = make(SELECTION, layers=[f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 2)])
    router = PolicyRouter(3, torch.device("cpu"), layers_per_edit=1, hidden=3)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.3, -0.4, 0.1]))
    settings = replace(SHORT, samples_per_fact=2, entropy_weight=0.5)
    trainer = Tabled(env, HierarchicalAgent("x", router), env.requests, settings)
    trainer.table = {(0,): 1.0, (1,): 1.0, (2,): 1.0}
    observation, _ = env.reset(seed=0)
    _, tried = trainer._fact(observation, None)  # type: ignore[arg-type]
    trainer._reinforce([tried])
    score = torch.tensor([0.3, -0.4, 0.1], requires_grad=True)
    shares = score.exp() / score.exp().sum()
    (wanted,) = torch.autograd.grad(0.5 * (shares * shares.log()).sum(), score)
    assert router.bias.grad is not None
    assert router.bias.grad.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_normalised_advantages_do_not_depend_on_the_scale_of_rewards() -> None:
    env = make(SELECTION)
    observation, _ = env.reset(seed=0)
    found = []
    for scale in (1.0, 1000.0):
        router = Forced(L, env.llm.device, layers_per_edit=1, hidden=3)
        settings = replace(SHORT, samples_per_fact=1, normalize_advantage=True)
        trainer = Tabled(env, HierarchicalAgent("x", router), env.requests, settings)
        choice = Choice(np.arange(L) == 2, router.log_probability(observation, (2,)))
        tried = [[Tried(choice, advantage * scale)] for advantage in (3.0, -1.0)]
        trainer._reinforce(tried)
        assert router.bias.grad is not None
        found.append(router.bias.grad.tolist())
    # ∇ log π = one-hot − 1/L; weights 3/√5 and −1/√5, whose sum is 2/√5.
    wanted = [-(2 / math.sqrt(5)) * ((i == 2) - 1 / L) for i in range(L)]
    assert found[0] == pytest.approx(wanted, abs=1e-6)
    assert found[1] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("agent", ["policy+outer-product", "policy+hypernetwork", "hiedit"])
def test_a_wrecked_model_ends_the_trajectory_and_not_the_training(agent: str) -> None:
    env = make(SELECTION, num_edits=None)
    built = spec_agent(agent).with_low_settings(step_size=1e36).build(env.llm, trained=False)
    trainer = Trainer(env, built, env.requests, replace(SHORT, calibration=4))
    assert ("low" in trainer.optimizers) == (agent != "policy+outer-product")
    trainer.calibrate()
    row = trainer.episode(0)
    assert row["reward"] < -5
    assert all(math.isfinite(value) for value in row.values())
    for level in trainer.levels().values():
        assert all(torch.isfinite(p).all() for p in level.parameters())


class OnlyOneHelps(OuterProductRule):
    """Updates that do nothing in all layers but one."""

    useful = 3

    def compute(self, capture: Any, layers: Any, multipliers: Any = None) -> Any:
        found = super().compute(capture, layers, multipliers)
        return tuple(
            LowRankUpdate(u.left, u.right * float(i == self.useful)) if u is not None else None
            for i, u in enumerate(found)
        )


def test_a_router_finds_the_only_layer_that_helps() -> None:
    env = make(SELECTION, num_edits=None, max_steps_per_edit=1, retention_window=0)
    low = OnlyOneHelps(env.llm.shapes, env.llm.device, step_size=2e-3)
    router = PolicyRouter(L, env.llm.device, layers_per_edit=1, hidden=8)
    settings = TrainSettings(
        edits_per_episode=12, window=4, samples_per_fact=3, high_learning_rate=0.1
    )
    trainer = Trainer(env, HierarchicalAgent("toy", router, low), env.requests, settings)
    for number in range(5):
        trainer.episode(number)
    observation, _ = env.reset(seed=99)
    assert np.flatnonzero(router.choose(observation, env.capture).layers).tolist() == [3]
    probability = router.scores(observation).softmax(0)[3].item()
    assert probability > 0.6


def test_a_low_level_learns_from_a_bad_beginning() -> None:
    """From a step size a hundred times too small, the objective falls."""
    env = make(SELECTION, num_edits=None, max_steps_per_edit=1)
    agent = spec_agent("all-layers+hypernetwork").with_low_settings(step_size=2e-5).build(env.llm)
    settings = TrainSettings(edits_per_episode=8, window=1, low_learning_rate=5e-3)
    trainer = Trainer(env, agent, env.requests, settings)
    rows = [trainer.episode(0) for _ in range(8)]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["right_after"] > rows[0]["right_after"]


@pytest.mark.parametrize("network", ["rows", "tokens"])
@pytest.mark.parametrize("form", ["outer", "ridge", "decorrelated"])
def test_every_parameter_of_a_fresh_low_level_learns(form: str, network: str) -> None:
    env = make(SELECTION, num_edits=None, max_steps_per_edit=2)
    name = f"all-layers+hypernetwork,form={form},network={network}"
    agent = spec_agent(name).build(env.llm)
    low = agent.low
    assert isinstance(low, Hypernetwork)
    before = {name: value.clone() for name, value in low.net.named_parameters()}
    settings = TrainSettings(edits_per_episode=3, window=1, calibration=4)
    trainer = Trainer(env, agent, env.requests, settings)
    trainer.calibrate()
    trainer.episode(0)
    unused = {"outer": ("log_ridge", "log_prior"), "ridge": ("log_prior",)}.get(form, ())
    for name, value in low.net.named_parameters():
        moved = not torch.equal(value, before[name])
        assert moved != name.endswith(unused), name


# -- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "agent",
    ["policy+hypernetwork", "straight-through+hypernetwork", "policy", "all-layers+step-sizes"],
)
def test_same_seed_same_parameters(agent: str) -> None:
    found = []
    for _ in range(2):
        env = make(SELECTION, num_edits=None)
        built = spec_agent(agent).build(env.llm)
        trainer = Trainer(env, built, env.requests, SHORT)
        rows = [trainer.episode(number) for number in range(2)]
        found.append((rows, {name: level.state_dict() for name, level in trainer.levels().items()}))
    (rows, one), (again, two) = found
    assert rows == again
    assert one.keys() == two.keys()
    for name in one:
        for path, value in one[name].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[name][path])), path


@pytest.mark.parametrize("agent", ["policy+hypernetwork", "policy+ridge", "hiedit"])
def test_another_seed_begins_elsewhere(tmp_path: Path, agent: str) -> None:
    settings = replace(SHORT, episodes=1, evaluation_edits=0, calibration=4)
    run = replace(RUN, agent=agent)
    states = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        train(run, replace(settings, seed=seed), out, progress=False)
        states.append(load_file(out / "agent.safetensors"))
        level = json.loads((out / "agent.json").read_text())["high"]
        assert level["settings"]["seed"] == seed
    # Random from the beginning, and moved by one step of Adam at most.
    assert (states[0]["high.embedding"] - states[1]["high.embedding"]).abs().mean() > 0.5
    for path in states[0]:
        if path.startswith("low.") and path.endswith(".a"):
            assert (states[0][path] - states[1][path]).abs().mean() > 0.01


def test_options_that_are_only_tried_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(SELECTION, num_edits=None)
    built = spec_agent("policy+ridge").build(env.llm)
    trainer = Trainer(env, built, env.requests, SHORT)
    before: list[str] = []
    own = Trainer._reward

    def fails(self: Trainer, layers: np.ndarray) -> float:
        before.append(env.llm.weights_fingerprint())
        own(self, layers)
        assert env.llm.weights_fingerprint() != before[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_reward", fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.episode(0)
    assert env.llm.weights_fingerprint() == before[0]


def test_windows_step_more_often_than_episodes() -> None:
    env = make(SELECTION, num_edits=None)
    for window, steps in ((0, 1), (2, 2), (3, 2), (1, 4)):
        agent = spec_agent("all-layers+hypernetwork").build(env.llm)
        trainer = Trainer(env, agent, env.requests, replace(SHORT, window=window))
        assert trainer.episode(0)["updates"] == steps


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rates_fall_to_zero_in_a_straight_line(anneal: bool) -> None:
    env = make(SELECTION, num_edits=None)
    agent = spec_agent("policy+hypernetwork").build(env.llm)
    settings = replace(SHORT, episodes=4, window=0, anneal=anneal)
    trainer = Trainer(env, agent, env.requests, settings)
    for number, share in enumerate((1.0, 0.75, 0.5, 0.25)):
        trainer.episode(number)
        for level, full in (
            ("high", settings.high_learning_rate),
            ("low", settings.low_learning_rate),
        ):
            rates = [group["lr"] for group in trainer.optimizers[level].param_groups]
            # A low level's vectors learn ten times as fast as its matrices.
            wanted = [full, full] if level == "high" else [full, VECTOR_FACTOR * full]
            assert rates == pytest.approx([(share if anneal else 1) * rate for rate in wanted])


def files(folder: Path) -> dict[str, bytes]:
    names = ("agent.safetensors", "train.jsonl", "evaluation.json")
    found = {name: (folder / name).read_bytes() for name in names}
    evaluation = json.loads(found["evaluation.json"])
    del evaluation["seconds_per_edit"]
    found["evaluation.json"] = json.dumps(evaluation).encode()
    return found


@pytest.mark.parametrize("agent", ["policy+hypernetwork", "straight-through+hypernetwork"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(RUN, agent=agent)
    settings = replace(SHORT, episodes=3, anneal=True)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(run, settings, whole, progress=False)
    own = Trainer.episode

    def stopped(self: Trainer, number: int, on_fact: Any = None) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return own(self, number, on_fact)

    monkeypatch.setattr(Trainer, "episode", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(run, settings, parted, progress=False)
    monkeypatch.setattr(Trainer, "episode", own)
    assert [f.name for f in parted.glob("checkpoint-*")] == ["checkpoint-000002"]
    with pytest.raises(ResultsExistError, match="--resume"):
        train(run, settings, parted, progress=False)
    # The learning rates of the episodes that are done were those of three episodes.
    with pytest.raises(SettingsError, match="episodes was 3 and is now 4"):
        train(run, replace(settings, episodes=4), parted, resume=True, progress=False)
    with pytest.raises(SettingsError, match="seed was 0 and is now 1"):
        train(run, replace(settings, seed=1), parted, resume=True, progress=False)
    # Cut off once more, in the evaluation at the end.
    with monkeypatch.context() as patch:
        patch.setattr("hiedit_benchmarks.commands.train._evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run, settings, parted, resume=True, progress=False)
    train(run, settings, parted, resume=True, progress=False)
    assert files(parted) == files(whole)
    assert not list(parted.glob("checkpoint-*"))
    with pytest.raises(ResultsExistError, match="trained agent"):
        train(run, settings, parted, progress=False)


def test_a_trained_agent_is_made_again_from_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "agent"
    result = train(RUN, SHORT, out, progress=False)
    assert result["num_edits"] == 3
    assert {f.suffix for f in out.iterdir()} <= {".json", ".jsonl", ".safetensors", ""}
    env = make(SELECTION, num_edits=3)
    agent = make_agent(str(out))
    agent.reset(env, 0)
    assert env.episode.max_steps_per_edit == 2
    observation, info = env.reset(seed=0)
    action = agent.select_action(observation, info)
    assert action.sum() == 3
    # Its low level under another high level, and its high level over another low level.
    for name, count in ((f"all-layers+{out}", 6), (f"{out}+ridge", 3)):
        mixed = make_agent(name)
        mixed.reset(env, 0)
        observation, info = env.reset(seed=0)
        assert mixed.select_action(observation, info).sum() == count


def test_resuming_on_other_facts_is_refused(tmp_path: Path) -> None:
    facts = [
        {"prompt": r.prompt, "answer": r.answer, "subject": r.subject}
        for r in make(SELECTION).requests[:12]
    ]
    file, out = tmp_path / "facts.json", tmp_path / "out"
    file.write_text(json.dumps(facts))
    run = replace(RUN, dataset=str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hiedit_benchmarks.commands.train._evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run, SHORT, out, progress=False)
    file.write_text(json.dumps(facts[::-1]))
    with pytest.raises(SettingsError, match="training was"):
        train(run, SHORT, out, resume=True, progress=False)


def test_remembered_edits_weigh_what_the_papers_sums_do() -> None:
    """Σ μ^i over ages 1 … 10 and 0 … 10, μ = 0.95, by the geometric series."""
    past = 0.95 * (1 - 0.95**10) / 0.05
    for name, weight in (("rledit", 0.6), ("hiedit-paper", 1.0)):
        found = spec_agent(name).spec.train
        assert found["retention_weight"] == pytest.approx(past, abs=1e-3)
        assert found["locality_weight"] == pytest.approx(weight * (1 + past), abs=1e-3)


def test_the_papers_objectives_and_statistics_are_theirs() -> None:
    env = make(SELECTION)
    for name in ("rledit", "mend", "malmen", "hiedit-paper"):
        spec = spec_agent(name).spec
        assert spec.train["locality_reference"] == "previous"
        built = spec_agent(name).build(env.llm, trained=False)
        trainer = Trainer(env, built, env.requests, replace(SHORT, **spec.train))
        trainer.calibrate()
        assert isinstance(built.low, Hypernetwork)
        assert not built.low.is_calibrated


def test_a_model_it_does_not_fit_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "agent"
    train(RUN, replace(SHORT, episodes=1, evaluation_edits=0), out, progress=False)
    env = make(SELECTION, layers=["model.layers.1.mlp.up_proj"])
    with pytest.raises(CheckpointError, match=r"candidate layers .*gate_proj.* here they are"):
        make_agent(str(out)).reset(env, 0)
    record = json.loads((out / "agent.json").read_text())
    record["format"] = 99
    (out / "agent.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="format 99"):
        make_agent(str(out))
    record["format"] = 2
    (out / "agent.json").write_text(json.dumps(record))
    (out / "agent.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"missing or damaged.*train the agent"):
        make_agent(str(out)).reset(make(SELECTION), 0)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    for agent in ("ultraedit", "random-layers+ridge"):
        with pytest.raises(SettingsError, match="nothing to train"):
            train(replace(RUN, agent=agent), SHORT, tmp_path / "x", progress=False)
    env = make(SELECTION)
    agent = HierarchicalAgent("x", UntrainedChoice("all-layers", L))
    with pytest.raises(SettingsError, match="nothing to train"):
        Trainer(env, agent, env.requests, SHORT)
    learner = spec_agent("policy").build(env.llm)
    with pytest.raises(SettingsError, match="only 2 training facts"):
        Trainer(env, learner, env.requests[:2], SHORT)
    with pytest.raises(SettingsError, match="window must be"):
        TrainSettings(window=-1)
    with pytest.raises(SettingsError, match="unknown agent"):
        spec_agent("nobody")
    with pytest.raises(SettingsError, match="unknown low level"):
        make_agent("all-layers+nothing")
    with pytest.raises(SettingsError, match="no trained one ships"):
        make_agent("mend").reset(env, 0)


def test_every_setting_is_an_option_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        hiedit(["train", "--help"])
    text = capsys.readouterr().out
    for name in defaults():
        assert "--" + name.replace("_", "-") in text
    out = str(tmp_path / "agent")
    arguments = ["train", "mend", "--model", "tiny", "--out", out, "--episodes", "1"]
    arguments += ["--edits-per-episode", "3", "--evaluation-edits", "2", "--no-tensorboard"]
    assert hiedit(arguments) == 0
    record = json.loads((tmp_path / "agent" / "agent.json").read_text())
    # The agent's own defaults hold where nothing was given.
    assert record["training"]["settings"]["window"] == 1
    assert record["training"]["settings"]["episodes"] == 1
    assert record["low"]["settings"]["step_size"] == 2e-3
