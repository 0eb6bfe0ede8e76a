"""Laws of reading published checkpoints: strict, memory-mapped, in the stored dtype; and of what stands around them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from multimodal.attention import causal_mask, within_window
from multimodal.config import DecoderConfig
from multimodal.layers import rotary_frequencies
from multimodal.pretrained.family import Family
from multimodal.pretrained.families import FAMILIES
from multimodal.pretrained.load import fingerprint, load_published
from multimodal.pretrained.source import local_folder
from multimodal.pretrained.text import load_tokenizer
from multimodal.projector import group_patches, ungroup_patches
from multimodal.prompt import PromptFormat
from multimodal.sequences import read, segment_positions
from multimodal.tiles import choose_canvas, unpadded
from multimodal.vocabulary import grow_vocabulary
from tests.published import save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models in single files and in shards, in float32."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("qwen2", "llava", "mistral"):
        save_model(name, root / name)
    save_model("mistral", root / "sharded", sharded=True)
    return root


@pytest.fixture
def llava(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved / "llava", tmp_path / "llava"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------------ weights


def test_a_missing_weight_is_named(llava: Path):
    edit_weights(llava, lambda weights: weights.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"1 missing: decoder\.blocks\.1\.mlp\.up\.weight"):
        load_published(llava)


def test_an_unread_weight_is_named(llava: Path):
    edit_weights(llava, lambda weights: weights.update({"language_model.model.layers.0.adapter.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"1 that nothing reads: language_model\.model\.layers\.0\.adapter\.weight"):
        load_published(llava)


def test_a_weight_of_another_shape_is_named(llava: Path):
    edit_weights(llava, lambda weights: weights.update({"multi_modal_projector.linear_2.bias": torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"multi_modal_projector\.linear_2\.bias is \[7\], the config says \[32\]"):
        load_published(llava)


def test_a_buffer_that_follows_from_the_config_is_no_unread_weight(llava: Path):
    edit_weights(llava, lambda weights: weights.update({"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    load_published(llava)


def test_one_weight_under_two_names_is_an_error(llava: Path):
    edit_weights(llava, lambda weights: weights.update({"model.language_model.norm.weight": torch.ones(32)}))
    with pytest.raises(ValueError, match="holds one weight twice"):
        load_published(llava)


def test_shards_give_what_one_file_gives(saved: Path):
    whole, parts = (load_published(saved / name).vlm.state_dict() for name in ("mistral", "sharded"))
    assert (saved / "sharded" / "model.safetensors.index.json").exists() and whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_missing_shard_is_named(saved: Path, tmp_path: Path):
    folder = Path(shutil.copytree(saved / "sharded", tmp_path / "copy"))
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        load_published(folder)


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_stay_mapped_in_their_stored_dtype(llava: Path):
    """bf16 without a float32 copy: every weight outside its constructor's care lies in the file's own pages."""
    edit_weights(llava, lambda weights: weights.update({name: value.bfloat16() for name, value in weights.items()}))
    vlm = load_published(llava).vlm
    assert {value.dtype for value in vlm.parameters()} == {torch.bfloat16}
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in mapped_files().splitlines()
        if str(llava / "model.safetensors") in line
    ]
    outside = [name for name, value in vlm.named_parameters() if not any(low <= value.data_ptr() < high for low, high in spans)]
    assert outside == []


def test_mapped_weights_train_and_leave_the_file_alone(llava: Path):
    before = fingerprint(llava)
    vlm = load_published(llava).vlm
    vlm.embed_text(torch.tensor([[1, 2]])).sum().backward()
    with torch.no_grad():
        vlm.text_embedding.weight -= vlm.text_embedding.weight.grad
    assert fingerprint(llava) == before
    assert not torch.equal(load_published(llava).vlm.text_embedding.weight, vlm.text_embedding.weight)


def test_tied_weights_are_one_tensor(saved: Path, tmp_path: Path):
    """Whether the file repeats the embedding as its head or leaves it out; a head that differs is a head of its own."""
    folder = Path(shutil.copytree(saved / "qwen2", tmp_path / "qwen2"))
    assert load_published(folder).vlm.head is None
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert load_published(folder).vlm.head is None
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"] + 1}))
    assert load_published(folder).vlm.head is not None


def test_a_head_that_is_not_tied_may_not_be_missing(saved: Path, tmp_path: Path):
    folder = Path(shutil.copytree(saved / "mistral", tmp_path / "mistral"))
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing: head\.weight"):
        load_published(folder)


# ------------------------------------------------------------------------------------------------------------- what is refused


def test_an_unknown_layout_is_refused_with_the_readable_ones(saved: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"'mamba' model.*LLaVA-1\.5.*OpenVLA"):
        load_published(tmp_path)


def test_settings_without_counterpart_are_refused_by_name(saved: Path, tmp_path: Path):
    folder = Path(shutil.copytree(saved / "mistral", tmp_path / "mistral"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act is 'relu'; readable are silu"):
        load_published(folder)


def test_a_config_that_transformers_does_not_understand_names_the_version_that_wrote_it(llava: Path):
    config = json.loads((llava / "config.json").read_text())
    config["text_config"]["model_type"] = "of_the_future"
    (llava / "config.json").write_text(json.dumps(config | {"transformers_version": "9.1"}))
    with pytest.raises(ValueError, match=r"pip install 'transformers>=9\.1'"):
        load_published(llava)


def test_pickles_are_refused(llava: Path):
    (llava / "model.safetensors").rename(llava / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickles.*save_pretrained"):
        load_published(llava)


def test_a_folder_without_a_model_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_published(tmp_path)


def test_without_a_network_the_error_says_how_to_bring_the_model_here():
    """The tests run under HF_HUB_OFFLINE=1 (conftest.py)."""
    with pytest.raises(OSError, match="hf download openvla/openvla-7b --local-dir FOLDER"):
        local_folder("openvla/openvla-7b")


def test_a_name_that_is_neither_folder_nor_repository_is_refused():
    with pytest.raises(FileNotFoundError, match="no Hub repository is named so"):
        local_folder("no/such/folder")


# ------------------------------------------------------------------------------------------------------------------ tokenizers


def write_tokenizer(folder: Path, *, leads: bool, pad: str | None = "<pad>") -> None:
    """A word-level tokenizer in the published layout; `leads`: it puts <s> before a text, as Llama's does."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:", "pick", "up", "the", "cup"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<image>"])
    if leads:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": pad}))


@pytest.mark.parametrize("leads", [True, False])
def test_a_prompt_is_what_the_tokenizer_makes_of_the_written_one(tmp_path: Path, leads: bool):
    write_tokenizer(tmp_path, leads=leads)
    found = load_tokenizer(tmp_path, PromptFormat("{bos}USER: ", "<image>", "", " {instruction} ASSISTANT:"))
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("USER: <image> pick up the cup ASSISTANT:").ids
    assert [*found.prompt.before_ids, *found.prompt.image_before_ids, *found.encode("pick up the cup")] == whole


def test_padding_is_the_pad_token_or_the_end_token(tmp_path: Path):
    write_tokenizer(tmp_path, leads=True, pad=None)
    ids, mask = load_tokenizer(tmp_path, PromptFormat()).encode_batch(["pick up", "cup"], max_length=3)
    assert ids.tolist() == [[7, 8, 2], [10, 2, 2]] and mask.tolist() == [[True, True, False], [True, False, False]]


def test_an_instruction_cannot_spell_a_special_token(tmp_path: Path):
    write_tokenizer(tmp_path, leads=True)
    with pytest.raises(ValueError, match="spells the special token '</s>'"):
        load_tokenizer(tmp_path, PromptFormat()).encode("pick up </s> the cup")


def test_a_missing_tokenizer_names_the_command_that_makes_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"python -c .*AutoTokenizer.*save_pretrained"):
        load_tokenizer(tmp_path, PromptFormat())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_prompt_holds_the_instruction_once_behind_the_images(family: Family):
    assert family.prompt.after.count("{instruction}") == 1
    assert "{instruction}" not in family.prompt.before + family.prompt.image_before + family.prompt.image_after


# ------------------------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize("name", ["qwen2", "llava"])  # tied, untied
def test_only_the_new_rows_of_a_grown_vocabulary_train(saved: Path, name: str):
    vlm = load_published(saved / name).vlm
    before = vlm.text_embedding.weight.clone()
    ids = torch.tensor([[3, 64, 66, 5]])
    is_real = torch.ones_like(ids, dtype=torch.bool)
    old_logits = vlm.logits(read(vlm, ids[:, :1], is_real[:, :1]).hidden)
    grow_vocabulary(vlm, 3)
    logits = vlm.logits(read(vlm, ids, is_real).hidden)
    assert logits.shape[-1] == 67
    assert torch.allclose(logits[:, :1, :64], old_logits, atol=1e-5)  # the old ids mean what they meant
    trainable = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    torch.nn.functional.cross_entropy(logits[0], torch.tensor([64, 66, 5, 65])).backward()
    optimizer.step()
    assert torch.equal(vlm.text_embedding.weight, before) and vlm.text_embedding.weight.grad is None
    assert vlm.new_embedding.weight.grad.abs().sum(1).gt(0)[[0, 2]].all()
    assert vlm.head is None or vlm.new_head.weight.grad.abs().sum(1).gt(0).all()


def test_a_vocabulary_grows_once(saved: Path):
    vlm = grow_vocabulary(load_published(saved / "qwen2").vlm, 2)
    with pytest.raises(ValueError, match="has grown by 2 ids already"):
        grow_vocabulary(vlm, 2)


# ------------------------------------------------------------------------------------------------------------------ small laws


def test_grouping_patches_is_undone_by_its_inverse():
    patches = torch.randn(2, 4 * 6, 5)
    groups = group_patches(patches, (4, 6), 2)
    assert groups.shape == (2, 6, 20) and torch.equal(ungroup_patches(groups, (4, 6), 2), patches)
    assert torch.equal(groups[0, 1].view(4, 5), patches[0, [2, 3, 8, 9]])  # rows 0, 1 and columns 2, 3 of 6
    with pytest.raises(ValueError, match="grouped 4 by 4"):
        group_patches(patches, (4, 6), 4)


def test_image_positions_count_rows_and_columns_from_the_text_before():
    """The example of Qwen2-VL's paper, section 2.1, with an image of 2 x 3 tokens between texts of 2 and 2."""
    expected = [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]]
    assert segment_positions([2, (2, 3), 2]).tolist() == expected


@pytest.mark.parametrize("num_queries", [1, 3, 6])
def test_a_window_hides_what_lies_farther_back(num_queries: int):
    mask = within_window(causal_mask(num_queries, 6), num_queries, 6, 3, torch.device("cpu"))
    seen = [[key for key in range(6) if mask[row, key]] for row in range(num_queries)]
    assert seen == [[key for key in range(max(0, query - 2), query + 1)] for query in range(6 - num_queries, 6)]


def test_llama3_scaling_keeps_fast_pairs_slows_slow_ones_and_is_between_elsewhere():
    plain = DecoderConfig(hidden_size=128, num_heads=1)
    scaled = DecoderConfig(hidden_size=128, num_heads=1, rotary_scaling="llama3", rotary_factor=8.0, rotary_length=64)
    before, after = rotary_frequencies(plain), rotary_frequencies(scaled)
    turns = 64 * before / (2 * torch.pi)
    assert torch.equal(after[turns > 4], before[turns > 4])
    assert torch.allclose(after[turns < 1], before[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and (after[between] < before[between]).all() and (after[between] > before[between] / 8).all()


def test_a_canvas_keeps_the_pixels_and_an_image_loses_only_its_padding():
    canvases = [(28, 56), (56, 28), (56, 56)]
    assert [choose_canvas(size, canvases) for size in ((20, 90), (90, 20), (60, 60), (10, 10))] == [(28, 56), (56, 28), (56, 56), (28, 56)]
    plane = torch.arange(16.0).view(4, 4, 1)
    assert unpadded(plane, (10, 20)).shape == (2, 4, 1) and unpadded(plane, (20, 10)).shape == (4, 2, 1)
    assert unpadded(plane, (10, 20))[0, 0, 0] == 4.0


@pytest.fixture(autouse=True)
def quiet_generator() -> Iterator[None]:
    torch.manual_seed(0)
    yield
