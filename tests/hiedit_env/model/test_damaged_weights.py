"""Files of weights that are damaged, or not those of the configuration, are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hiedit_env.errors import ModelError
from hiedit_env.model.loading import load_model
from tests.hiedit_env.model.test_loading import save_model


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "with 'git lfs pull'$"),
        (b"", r"as safetensors: a header of 0 bytes in a file of 0; copy the file again$"),
        (b"\xff" * 90, r"as safetensors: a header of \d+ bytes in a file of 90; copy the file"),
    ],
)
def test_a_damaged_file_of_weights_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(tmp_path), progress=False)
    assert str(caught.value).count(str(tmp_path / "model.safetensors")) == 1


def test_a_matrix_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"'{name}' has the shape \(5, 16\), .* needs \(24, 16\)"):
        load_model(str(tmp_path), progress=False)
