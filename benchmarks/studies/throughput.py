"""How fast a step is, and against what: ``python -m hiedit_benchmarks.studies.throughput``.

Everything is measured in one run on one machine and reported as ratios.

* ``overhead``: time of ``env.step`` over the time its own forward and backward passes take inside
  it, minus one. The rest is layer choice, update rule, weight writes, fingerprint, reward and
  observation.
* ``plain``: the same quantities by a plain loop: one prompt at a time, full forward over all blocks
  and all positions, dense in-place writes, as in the released code of HiEdit
  (``editor/hiedit.py``). It caches nothing, so that it runs the unedited model on the unrelated
  prompts again at every step. Steps of the two are interleaved, on the same facts.
* ``training``: one training step of the agents ``rledit`` and ``hiedit``, as their presets have it
  but for a step after every fact, with 10 remembered edits.
* ``tiny``: ``hiedit/LayerSelection-v1`` with its defaults, on one thread.
* ``vector``: eight of them as a vector environment, against eight single environments stepped in
  turn, on the same facts with the same actions; on one thread, episodes of the two interleaved.

The file is longer than others because the plain loop is written out in it, for comparison.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hiedit_env
from hiedit_agents.command_line import parse, run_script
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.registry import spec_agent
from hiedit_benchmarks.commands.train import build, make_env
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_benchmarks.comparison.results import write_text
from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.settings import AtLeast1, settings
from hiedit_env.errors import ResultsExistError
from hiedit_env.model.tokenization import EncodedFact, EncodedPrompt
from hiedit_env.resident.capture import Capture
from hiedit_env.resident.resident import ResidentLLM

PROGRAM = "python -m hiedit_benchmarks.studies.throughput"


def clock(device: torch.device) -> float:
    """Seconds of a clock, after all work given to the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PassTimer:
    """Adds up the time spent inside the model's own passes of one resident model."""

    def __init__(self, llm: ResidentLLM) -> None:
        self.llm = llm
        self.seconds = 0.0
        self._depth = 0

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._depth:  # inside a pass that is timed as a whole
                return function(*args, **kwargs)
            self._depth += 1
            start = clock(self.llm.device)
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self.seconds += clock(self.llm.device) - start

        return run

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times the passes made in the body."""
        split = self.llm.halves
        saved = (split.prefix, split.suffix, self.llm._logits, torch.autograd.grad)
        try:
            split.prefix, split.suffix = map(self._timed, saved[:2])  # type: ignore[method-assign]
            self.llm._logits = self._timed(saved[2])  # type: ignore[method-assign]
            torch.autograd.grad = self._timed(saved[3])
            yield
        finally:
            for name in ("prefix", "suffix"):
                delattr(split, name)
            del self.llm._logits
            torch.autograd.grad = saved[3]


class PlainLoop:
    """One edit as a plain script would do it: same quantities, nothing shared, nothing cached.

    Args:
        env: Gives the model, the rule's arithmetic and the facts; weights are left as found.
    """

    def __init__(self, env: EditingEnv) -> None:
        self.env, self.llm = env, env.llm

    def _logits(self, prompt: EncodedPrompt) -> Tensor:
        ids = torch.tensor([prompt.input_ids], device=self.llm.device)
        logits: Tensor = self.llm.model(input_ids=ids, use_cache=False).logits
        return logits[0, prompt.first_position :].float()

    def _labels(self, prompt: EncodedPrompt) -> Tensor:
        return torch.tensor(prompt.answer_ids, device=self.llm.device)

    def _loss(self, prompt: EncodedPrompt) -> Tensor:
        return F.cross_entropy(self._logits(prompt), self._labels(prompt))

    def step(self, fact: EncodedFact, remembered: tuple[EncodedFact, ...]) -> float:
        """Runs one primitive step on a fact and judges it, then takes it back.

        Args:
            fact: The fact to edit.
            remembered: Facts edited before.

        Returns:
            The sum, over all prompts, of nats per answer token on the fact, its paraphrases and the
            remembered facts, and of KL(unedited ‖ edited) per answer token on unrelated prompts.
        """
        llm, rule = self.llm, self.env.rule
        probes = [*fact.probes, *(old.probes[0] for old in remembered if old.probes)]
        # Run again at every step: nothing is cached.
        with torch.no_grad(), llm.unedited():
            references = [self._logits(probe).log_softmax(-1) for probe in probes]
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def record(index: int) -> Any:
            def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs[index], outputs[index] = args[0].detach(), output.requires_grad_(True)

            return hook

        handles = [
            layer.module.register_forward_hook(record(i)) for i, layer in enumerate(llm.layers)
        ]
        logits, labels = self._logits(fact.prompt), self._labels(fact.prompt)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, [outputs[i] for i in range(len(llm.layers))])
        for handle in handles:
            handle.remove()
        order = range(len(llm.layers))
        predictions = logits.argmax(-1)
        capture = Capture(
            prompts=(fact.prompt,),
            keys=tuple(inputs[i][0] for i in order),
            value_gradients=tuple(gradient[0] for gradient in gradients),
            loss=float(loss.detach()),
            predictions=predictions,
            correct=predictions == labels,
        )
        updates = rule.propose(capture, np.ones(len(llm.layers), bool))
        dense = [update.dense().mT for update in updates if update is not None]
        with torch.no_grad():
            weights = [cast(Tensor, layer.module.weight) for layer in llm.layers]
            saved = [weight.clone() for weight in weights]
            for weight, change in zip(weights, dense, strict=True):
                weight.add_(change)
            total = float(self._loss(fact.prompt))
            for prompt in (*fact.paraphrases, *(old.prompt for old in remembered)):
                total += float(self._loss(prompt))
            for probe, reference in zip(probes, references, strict=True):
                now = self._logits(probe).log_softmax(-1)
                total += float(F.kl_div(now, reference, log_target=True, reduction="batchmean"))
            for weight, change in zip(weights, dense, strict=True):
                weight.sub_(change)
            # Adding and subtracting does not give the old bits back.
            for weight, old in zip(weights, saved, strict=True):
                weight.copy_(old)
        return total


def measure_model(model: str, dataset: str | None, edits: int, device: str) -> dict[str, Any]:
    """Overhead of ``env.step`` and its speed against the plain loop, with 10 remembered edits."""
    env = gymnasium.make(
        "hiedit/LifelongEdit-v1",
        model=model,
        dataset=dataset,
        num_edits=10 + edits,
        max_steps_per_edit=1,
        stop_when_answered=False,
        device=device,
        disable_env_checker=True,
    )
    base = env.unwrapped
    assert isinstance(base, EditingEnv)
    env.reset(seed=0)
    count = len(base.llm.layers)
    action = {"layers": np.ones(count, np.int8), "step_size": np.zeros(count, np.float32)}
    for _ in tqdm(range(10), desc="fill the memory", leave=False):
        env.step(action)
    plain, timer = PlainLoop(base), PassTimer(base.llm)
    step_seconds: list[float] = []
    pass_seconds: list[float] = []
    plain_seconds: list[float] = []
    for _ in tqdm(range(edits), desc="measure", leave=False):
        fact, remembered = base.fact, base.episode.remembered
        start = clock(base.llm.device)
        plain.step(fact, remembered)
        plain_seconds.append(clock(base.llm.device) - start)
        timer.seconds = 0.0
        with timer.running():
            start = clock(base.llm.device)
            env.step(action)
            step_seconds.append(clock(base.llm.device) - start)
        pass_seconds.append(timer.seconds)
    overhead = [s / p - 1 for s, p in zip(step_seconds, pass_seconds, strict=True)]
    speedup = [p / s for p, s in zip(plain_seconds, step_seconds, strict=True)]
    return {
        "model": model,
        "remembered_edits": len(base.episode.remembered),
        "step_seconds": statistics.median(step_seconds),
        "pass_seconds": statistics.median(pass_seconds),
        "overhead_percent": 100 * statistics.median(overhead),
        "plain_seconds": statistics.median(plain_seconds),
        "times_faster_than_plain": statistics.median(speedup),
        **peak_device_memory(base.llm.device),
    }


def measure_training(
    agent: str, model: str, dataset: str | None, edits: int, device: str
) -> dict[str, Any]:
    """One training step of an agent as its preset has it, 10 edits remembered.

    For ``rledit`` a step is a capture, the update of all layers, the objective over 23 or so
    prompts with the update as an overlay, its gradient in the hypernetwork, the optimiser and the
    write; for ``hiedit`` three options of several steps, each judged, two of which are undone, and
    the optimiser.
    """
    editor = spec_agent(agent)
    own = {"retention_window": 10, "window": 1, "edits_per_episode": 11 + edits}
    # How much it is calibrated on is nothing to a step.
    settings = TrainSettings(**{**editor.spec.train, **own, "calibration": 20})
    run = TrainingRun(agent=agent, model=model, dataset=dataset, device=device)
    with closing(make_env(run, settings, editor, progress=False)) as env:
        base = env.unwrapped
        assert isinstance(base, EditingEnv)
        built, _ = build(editor, base, run, settings.seed)
        trainer = Trainer(base, built, base.requests, settings)
        trainer.calibrate()
        times: list[float] = []
        trainer.episode(0, lambda _: times.append(clock(base.llm.device)))
        remembered = len(base.episode.remembered)
    seconds = np.diff(times)[10:]
    return {
        "agent": agent,
        "remembered_edits": remembered,
        "step_seconds": float(np.median(seconds)),
        "longest_step_seconds": float(seconds.max()),
    }


def peak_device_memory(device: torch.device) -> dict[str, float]:
    """Most memory that tensors have held on a CUDA device at once, in MB; nothing elsewhere."""
    if device.type != "cuda":
        return {}
    return {"peak_device_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20}


def measure_tiny(steps: int) -> dict[str, Any]:
    """``LayerSelection-v1`` steps a second on one thread, defaults, all layers and random ones.

    By the clock, and per second of processor time: the two agree where nothing else is running.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for name in ("all", "random"):
        env = gymnasium.make("hiedit/LayerSelection-v1", disable_env_checker=True)
        env.action_space.seed(0)
        count = env.action_space.shape[0]  # type: ignore[index]
        rates, own_rates = [], []
        # Many, since another program's turn spoils an episode: the quickest says what a step takes.
        for episode in range(14):
            env.reset(seed=episode % 2)
            done, taken, start, own = False, 0, time.perf_counter(), time.process_time()
            while not done and taken < steps:
                action = np.ones(count, np.int8) if name == "all" else env.action_space.sample()
                _, _, done, _, _ = env.step(action)
                taken += 1
            rates.append(taken / (time.perf_counter() - start))
            own_rates.append(taken / (time.process_time() - own))
        result[f"{name}_layers_steps_per_second"] = max(rates[2:])
        result[f"{name}_layers_steps_per_processor_second"] = max(own_rates[2:])
        result[f"{name}_layers_first_episode"] = rates[0]
    torch.set_num_threads(threads)
    return result


def measure_vector(num_envs: int, steps: int) -> dict[str, Any]:
    """Tiny ``LayerSelection-v1``: N environments together against N single ones, all layers.

    Args:
        num_envs: N.
        steps: Steps of every environment per episode.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    name = "hiedit/LayerSelection-v1"
    apart = [
        gymnasium.make(name, disable_env_checker=True, num_edits=steps) for _ in range(num_envs)
    ]
    together = gymnasium.make_vec(
        name,
        num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="Disabled",
        num_edits=steps,
    )
    size = apart[0].action_space.shape
    assert size is not None
    one, all_of_them = np.ones(size, np.int8), np.ones((num_envs, *size), np.int8)
    seconds: dict[str, list[float]] = {"apart": [], "together": []}
    largest = 0.0
    for episode in range(5):
        for i, env in enumerate(apart):
            env.reset(seed=episode + i)
        together.reset(seed=episode)
        found: dict[str, list[Any]] = {"apart": [], "together": []}
        for kind in ("apart", "together"):
            start = time.perf_counter()
            for _ in range(steps):
                if kind == "apart":
                    found[kind].append([env.step(one)[1] for env in apart])
                else:
                    found[kind].append(together.step(all_of_them)[1])
            seconds[kind].append(time.perf_counter() - start)
        difference = np.array(found["apart"]) - np.array(found["together"])
        largest = max(largest, float(np.abs(difference).max()))
    torch.set_num_threads(threads)
    # The first episode fills the caches of both.
    ratios = [a / b for a, b in zip(seconds["apart"][1:], seconds["together"][1:], strict=True)]
    return {
        "num_envs": num_envs,
        "apart_steps_per_second": num_envs * steps / min(seconds["apart"][1:]),
        "together_steps_per_second": num_envs * steps / min(seconds["together"][1:]),
        "times_faster": statistics.median(ratios),
        "largest_difference_of_rewards": largest,
    }


@settings
class Options:
    """Time of a step, against a plain loop and single environments."""

    model: str = "smollm2-135m"
    """name or path"""
    dataset: str | None = None
    """name or path; by default the facts that belong to the model"""
    edits: AtLeast1 = 8
    """measured steps"""
    tiny_steps: AtLeast1 = 200
    """measured steps on the tiny model"""
    device: str = "cpu"
    """of the model"""
    out: Path | None = None
    """also write the JSON to this file"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements and prints them as JSON; returns 0."""
    given = parse(Options, arguments, program=PROGRAM)
    if given.out is not None and given.out.exists():
        raise ResultsExistError(f"{given.out} exists; choose another --out")
    result = {
        "tiny": measure_tiny(given.tiny_steps),
        "vector": measure_vector(8, 20),
        "model": measure_model(given.model, given.dataset, given.edits, given.device),
        "training": [
            measure_training(agent, given.model, given.dataset, given.edits, given.device)
            for agent in ("rledit", "hiedit")
        ],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gymnasium": gymnasium.__version__,
            "hiedit": hiedit_env.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.out is not None:
        write_text(given.out, text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
