"""Laws of the language side's training: packed equals alone, exactness equals greedy decoding, resume, checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")

from multimodal.answering import score, tally_answers, text_hidden, text_hidden_reference
from multimodal.checkpoint import load_checkpoint, load_weights, read_tensors
from multimodal.config import get_preset
from multimodal.corpus_file import HELD_OUT, TRAIN, read_manifest
from multimodal.data import SceneTexts, TextRows
from multimodal.decoder import Decoder, count_parameters
from multimodal.dialogue import EOS, encode_prompt
from multimodal.images import ImageConfig, prepare_images
from multimodal.train_vlm import (
    AnswerLoss,
    TrainVLMConfig,
    VLMModelConfig,
    build_assets,
    build_vlm,
    check_crop,
    load_or_train_tokenizer,
    train_vlm,
)
from multimodal.training import TrainingConfig
from multimodal.training_log import read_log
from multimodal.vision import VisionTower
from multimodal.vlm import VLM
from multimodal.vlm_checkpoint import load_vlm
from tests.test_corpus_data import make_corpus
from vla.cli import parse_config
from vla.model import VLA, VLAConfig

IMAGES = ImageConfig(crop=36, size=32)
TRAINING = TrainingConfig(
    steps=4, batch_size=8, learning_rate=3e-3, warmup_steps=2, save_every=2, log_every=1, keep_last=9, device="cpu"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    make_corpus(root)
    return root


def config_of(corpus: Path, run: Path, **training: object) -> TrainVLMConfig:
    model = VLMModelConfig(preset="debug", vocab_size=400)
    return TrainVLMConfig(corpus, run, model, IMAGES, training=replace(TRAINING, **training), held_out_scenes=3)


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """A fresh double-precision model and the training scenes."""
    config = config_of(corpus, tmp_path_factory.mktemp("run"))
    tokenizer = load_or_train_tokenizer(config.output_dir / "tokenizer.json", corpus, 400)
    assets = build_assets(config, read_manifest(corpus), tokenizer)
    torch.manual_seed(0)
    return build_vlm(assets).double().eval(), SceneTexts(corpus, TRAIN, tokenizer), assets


def prepared(scenes: SceneTexts, scene: int) -> torch.Tensor:
    return prepare_images(scenes.image(scene)[None], IMAGES).double()


def test_packed_and_cached_equals_one_text_in_one_pass(made) -> None:
    model, scenes, _ = made
    chosen = [(0, [0, 4, 2]), (3, [1, 5])]
    batch = scenes.rows(chosen)
    images = torch.cat([prepared(scenes, scene) for scene, _ in chosen])
    packed = text_hidden(model, images, batch.ids, batch.segment, batch.position)
    for row, (scene, texts) in enumerate(chosen):
        for number, text in enumerate(texts):
            own = batch.segment[row] == number
            alone = text_hidden_reference(model, prepared(scenes, scene), batch.ids[row][own][None])
            torch.testing.assert_close(packed[row][own], alone[0], atol=1e-10, rtol=1e-8)


def test_text_sees_the_image_and_its_past_alone(made) -> None:
    model, scenes, _ = made
    batch = scenes.rows([(1, [0])])
    hidden = text_hidden_reference(model, prepared(scenes, 1), batch.ids)
    changed = batch.ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 300
    after = text_hidden_reference(model, prepared(scenes, 1), changed)
    assert torch.equal(after[0, :-1], hidden[0, :-1]) and not torch.equal(after[0, -1], hidden[0, -1])
    assert not torch.allclose(text_hidden_reference(model, prepared(scenes, 2), batch.ids)[0, 0], hidden[0, 0])


def greedy(model: VLM, images: torch.Tensor, prompt: list[int], steps: int, end: int) -> list[int]:
    """The definition of greedy decoding: the likeliest next id after everything so far, again and again."""
    ids = list(prompt)
    while len(ids) < len(prompt) + steps:
        hidden = text_hidden_reference(model, images, torch.tensor([ids]))
        ids.append(int((hidden[0, -1] @ model.text_embedding.weight.T).argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def test_exact_means_that_greedy_decoding_gives_the_answer(made) -> None:
    """On texts that are what a model says itself, and on the same with one id changed."""
    model, scenes, _ = made
    tokenizer = scenes.tokenizer
    prompt = encode_prompt(tokenizer, "What is left of the milk?")
    said = greedy(model, prepared(scenes, 2), prompt, 6, tokenizer.token_id(EOS))
    for wrong in (None, 0, len(said) - 1):
        answer = [(index + 1) % 300 if place == wrong else index for place, index in enumerate(said)]
        ids = torch.tensor([[*prompt, *answer]])
        targets = torch.full_like(ids[:, 1:], -100)
        targets[:, len(prompt) - 1 :] = ids[:, len(prompt) :]
        zeros = torch.zeros_like(targets)
        row = TextRows(scenes.image(2)[None], ids[:, :-1], targets, zeros, torch.arange(len(targets[0]))[None], zeros.float())
        single = model.float()
        nats, is_right = score(single, row, IMAGES)
        model.double()
        assert bool(is_right[targets != -100].all()) == (wrong is None)
        logits = text_hidden_reference(model, prepared(scenes, 2), ids[:, :-1])[0] @ model.text_embedding.weight.T
        expected = torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum").item()
        assert nats.sum().item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_the_weighted_mean_over_answers(made) -> None:
    model, scenes, assets = made
    batch = scenes.batch(0, scenes=2, texts_per_scene=3, seed=0, length_power=0.5)
    model.float()
    terms = AnswerLoss(replace(IMAGES, crop=40, size=32, brightness=0, contrast=0, saturation=0))(
        model, batch, torch.Generator().manual_seed(0)
    )
    images = prepare_images(batch.images, replace(IMAGES, crop=40))
    logits = text_hidden(model, images, batch.ids, batch.segment, batch.position) @ model.text_embedding.weight.T
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    expected = (nats * batch.weight.flatten()).sum() / batch.weight.sum()
    model.double()
    assert (terms.loss_sum / terms.normalizer).item() == pytest.approx(expected.item(), rel=1e-4)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "policy").state | read_tensors(folder / "training_state" / "state.safetensors")


def test_two_steps_and_two_resumed_equal_four_straight(corpus: Path, tmp_path: Path) -> None:
    half = train_vlm(config_of(corpus, tmp_path / "halved", steps=2, final_scale=1.0))  # a rate that knows no end
    assert half == tmp_path / "halved" / "checkpoints" / "000002" / "policy"
    straight = train_vlm(config_of(corpus, tmp_path / "straight", final_scale=1.0))
    resumed = train_vlm(replace(config_of(corpus, tmp_path / "halved", final_scale=1.0), resume=True))
    first, second = contents(straight.parent), contents(resumed.parent)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], value) for name, value in contents(half.parent).items())
    rows = [row for row in read_log(tmp_path / "halved") if "validation/bits_seen_templates" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for name in ("exact_seen_templates", "bits_new_templates", "exact_seen_templates_wrong_images"):
        assert f"validation/{name}" in rows[-1]


def test_the_loss_falls(corpus: Path, tmp_path: Path) -> None:
    train_vlm(config_of(corpus, tmp_path, steps=25, learning_rate=1e-2, save_every=100))
    losses = [row["loss"] for row in read_log(tmp_path) if "loss" in row]
    assert losses[-1] < 0.75 * losses[0], losses


def test_a_checkpoint_alone_makes_the_model(corpus: Path, tmp_path: Path) -> None:
    folder = train_vlm(config_of(corpus, tmp_path, steps=2, ema_decay=0.0))
    loaded = load_vlm(folder)
    assert loaded.assets.cameras == ("base", "wrist") and loaded.assets.image_size == 40 and not loaded.model.training
    assert loaded.assets.images == IMAGES and loaded.assets.config.vocab_size == loaded.assets.tokenizer.vocab_size == 400
    assert json.loads(load_checkpoint(folder).text("provenance.json"))["training"]["steps"] == 2
    held_out = SceneTexts(corpus, HELD_OUT, loaded.assets.tokenizer)
    tallies = tally_answers(loaded.model, held_out, IMAGES)
    total = tallies[("all",)]
    assert total.texts == sum(map(len, held_out.texts)) == tallies[("training",)].texts + tallies[("held_out",)].texts
    assert total.asked == sum(text.is_exact for texts in held_out.texts for text in texts) > 0
    assert tallies[("layout", "new")].texts + tallies[("layout", "old")].texts == total.texts
    assert 0 < total.bits_per_token < 20 and 0 <= total.accuracy <= 1
    with pytest.raises(ValueError, match="remask-vlm-1"):
        broken = tmp_path / "policy_like"
        broken.mkdir()
        for path in folder.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        (broken / "config.yaml").write_text("format: remask-policy-1\n")
        load_vlm(broken)


def test_a_policy_takes_the_weights_as_they_are(corpus: Path, tmp_path: Path) -> None:
    """The VLM and a policy build the same modules, name by name, and the policy's prefix then is the VLM's."""
    loaded = load_vlm(train_vlm(config_of(corpus, tmp_path, steps=2)))
    policy = VLA(VLAConfig(vlm=loaded.assets.config)).eval()
    load_weights(policy.vlm, loaded.model.state_dict(), "test")
    assert type(policy.vlm.decoder) is type(loaded.model.decoder) and policy.vlm.config == loaded.model.config
    images = torch.randn(1, 2, 3, 32, 32)
    ids = torch.randint(5, 300, (1, 6))
    expected = text_hidden_reference(loaded.model, images, ids)
    assert torch.equal(text_hidden_reference(policy.vlm, images, ids), expected)


@pytest.mark.parametrize(("preset", "least", "most"), [("desk-vlm", 15e6, 25e6), ("desk-vlm-l", 40e6, 120e6)])
def test_presets_are_of_the_promised_size(preset: str, least: float, most: float) -> None:
    config = get_preset(preset)
    with torch.device("meta"):
        decoder = Decoder(config.decoder)
    tower = VisionTower(config.vision)
    rest = (config.vocab_size + tower.width + config.num_cameras * tower.tokens_per_image + 1) * config.decoder.hidden_size
    assert least < count_parameters(decoder) + count_parameters(tower) + rest < most


def test_a_crop_beyond_the_rim_is_refused(corpus: Path) -> None:
    manifest = read_manifest(corpus)
    check_crop(ImageConfig(crop=36), manifest)
    with pytest.raises(ValueError, match="Set it to 36 or more"):
        check_crop(ImageConfig(crop=35), manifest)


def test_a_run_keeps_its_tokenizer(corpus: Path, tmp_path: Path) -> None:
    first = load_or_train_tokenizer(tmp_path / "tokenizer.json", corpus, 400)
    again = load_or_train_tokenizer(tmp_path / "tokenizer.json", corpus, 300)
    assert again.to_json() == first.to_json() and first.vocab_size == 400


def test_settings_come_from_the_command_line(tmp_path: Path) -> None:
    config = parse_config(
        TrainVLMConfig,
        ["--corpus=/d", f"--output_dir={tmp_path}", "--images.crop=120", "--images.size=112", "--training.steps=5"],
    )
    assert config.images == ImageConfig(crop=120, size=112) and config.training.steps == 5
    with pytest.raises(ValueError, match="not a multiple of texts_per_scene 4"):
        parse_config(TrainVLMConfig, ["--corpus=/d", "--output_dir=/r", "--training.steps=5", "--training.batch_size=6"])
