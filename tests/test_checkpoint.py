"""Laws of the checkpoint folder: whole or not at all, strict, no pickle."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from multimodal import checkpoint
from multimodal.checkpoint import checkpoint_hash, load_checkpoint, load_weights, replaced_folder, save_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16)}
CONFIG = {"width": 8, "rates": [0.1, 1e-4], "nested": {"name": "x", "none": None}}
BLOBS = {"tokenizer.json": '{"é": 1}', "statistics.json": b"\x00\xff"}


def save(folder: Path, **changes: object) -> Path:
    return save_checkpoint(folder, **{"model_state": STATE, "config": CONFIG, "blobs": BLOBS} | changes)


def test_everything_comes_back(tmp_path: Path) -> None:
    loaded = load_checkpoint(save(tmp_path / "model"))
    assert loaded.config == CONFIG
    assert loaded.text("tokenizer.json") == BLOBS["tokenizer.json"] and loaded.blobs["statistics.json"] == b"\x00\xff"
    assert loaded.state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert loaded.state[name].dtype == value.dtype and torch.equal(loaded.state[name], value)


def test_tied_and_sliced_tensors_come_back_under_each_name(tmp_path: Path) -> None:
    table = torch.randn(100, 4)
    loaded = load_checkpoint(save(tmp_path / "model", model_state={"in": table, "out": table, "row": table[3], "t": table.T}))
    assert torch.equal(loaded.state["out"], table) and torch.equal(loaded.state["row"], table[3])
    assert torch.equal(loaded.state["t"], table.T)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 2 * table.nbytes + 16 + 1000


def test_replacing_leaves_only_the_new_files(tmp_path: Path) -> None:
    save(tmp_path / "model")
    save(tmp_path / "model", blobs={}, config={"width": 9})
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert sorted(os.listdir(tmp_path / "model")) == ["config.yaml", "model.safetensors"]
    assert load_checkpoint(tmp_path / "model").config == {"width": 9}


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_between_renames_leaves_a_usable_one(tmp_path: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model")
    before, rename, calls = checkpoint_hash(tmp_path / "model"), Path.rename, []

    def crash(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", crash)
        save(tmp_path / "model", config={"width": 9})
    assert load_checkpoint(tmp_path / "model").config == CONFIG and checkpoint_hash(tmp_path / "model") == before
    save(tmp_path / "model", config={"width": 10})
    assert sorted(os.listdir(tmp_path)) == ["model"] and load_checkpoint(tmp_path / "model").config == {"width": 10}


def test_full_disk_keeps_the_old_one_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model")
    before = checkpoint_hash(tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="disk full while writing .*model; the previous one is untouched") as caught:
        save(tmp_path / "model", config={})
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == ["model"] and checkpoint_hash(tmp_path / "model") == before


def test_an_error_inside_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "x") as temporary:
        (temporary / "part").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_hash_follows_content_and_nothing_else(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    assert len({checkpoint_hash(save(second)) for _ in range(16)} | {checkpoint_hash(first)}) == 1
    assert len(checkpoint_hash(first)) == 16
    (tmp_path / "last").symlink_to("a")
    assert checkpoint_hash(tmp_path / "last") == checkpoint_hash(first)
    changed = {**STATE, "b": torch.tensor(4)}
    hashes = {checkpoint_hash(save(second, **change)) for change in ({"model_state": changed}, {"config": {}}, {"blobs": {}})}
    assert len(hashes | {checkpoint_hash(first)}) == 4


def test_strict_load_lists_what_differs_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state["extra"] = state.pop("0.bias")
    state["1.weight"] = torch.zeros(1, 4)
    before = model[0].weight.clone()
    with pytest.raises(ValueError) as caught:
        load_weights(model, state, "somewhere")
    message = str(caught.value)
    assert "somewhere" in message and "1 missing: 0.bias" in message and "1 unexpected: extra" in message
    assert "1.weight is [1, 4], the model has [1, 3]" in message
    assert torch.equal(model[0].weight, before)


def test_missing_checkpoint_says_where_one_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="needs model.safetensors and config.yaml"):
        load_checkpoint(tmp_path / "none")
    save(tmp_path / "run" / "checkpoints" / "last" / "policy")
    with pytest.raises(FileNotFoundError, match="Did you mean .*run/checkpoints/last/policy?"):
        load_checkpoint(tmp_path / "run")


def test_damaged_weights_and_bad_blob_names_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="plain file names"):
        save(tmp_path / "other", blobs={"../escape": b""})
    with pytest.raises(ValueError, match="holds no 'schema.json'; it holds"):
        load_checkpoint(save(tmp_path / "third")).text("schema.json")


def test_config_cannot_run_code(tmp_path: Path) -> None:
    import yaml

    folder = save(tmp_path / "model")
    (folder / "config.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(yaml.YAMLError):
        load_checkpoint(folder)
