"""Laws of the bound encoders: boxes, patches, trunks, centers, the binding loss, and what `check_encoder` refuses."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from multimodal.bind.binding import BindingConfig, BindingLoss, Words, accuracies, info_nce, train_bind
from multimodal.bind.bound_checkpoint import load_bound
from multimodal.bind.centers import SemanticCenters, build_centers
from multimodal.bind.corpus_file import LABEL, SPLITS, START, BoundManifest, ObjectClass, write_manifest, write_rows
from multimodal.bind.data import BoundSamples, augment
from multimodal.bind.encoder_checks import check_encoder
from multimodal.bind.encoders import BindConfig, BoundModel, TrunkConfig, TrunkEncoder
from multimodal.bind.modalities import MEL_SIZE, LogMel, PointPatches, box_of, build_patches, farthest_points
from multimodal.bind.sensors import SENSORS
from multimodal.decoder import Decoder
from multimodal.tokenizer import train_tokenizer
from multimodal.training import TrainingConfig

DEFAULT_SHAPES = {  # what `vla corpus --bind` makes by default
    "image": (3, 40, 40), "video": (3, 4, 32, 32), "depth": (1, 40, 40), "thermal": (1, 40, 40), "audio": (5120,),
    "point": (256, 3), "trace": (6, 64),
}  # fmt: skip
SHAPES = {
    "image": (3, 16, 16), "video": (3, 2, 16, 16), "depth": (1, 16, 16), "thermal": (1, 16, 16), "audio": (1024,),
    "point": (32, 3), "trace": (6, 16),
}  # fmt: skip
TRUNK = TrunkConfig(hidden_size=16, num_layers=1, num_heads=2, mlp_size=24, dimension=8, text_layers=1)
CLASSES = (
    ObjectClass("can", "cylinder", "metal", True, ("a can", "a metal cylinder")),
    ObjectClass("block", "box", "wood", True, ("a block", "a wooden box")),
    ObjectClass("tin", "box", "metal", False, ("a tin", "a metal box")),
)


def drawn(modality: str, count: int, shape: tuple[int, ...] | None = None) -> Tensor:
    box = box_of(modality)
    return box.low + (box.high - box.low) * torch.rand(count, *(shape or SHAPES[modality]))


def model_of(shapes: dict[str, tuple[int, ...]] = SHAPES, trunk: TrunkConfig = TRUNK) -> BoundModel:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([prompt for kind in CLASSES for prompt in kind.prompts], 64)
    return BoundModel(BindConfig(shapes, trunk), tokenizer).eval()


@pytest.mark.parametrize("modality", list(SENSORS))
def test_an_epsilon_is_a_share_of_the_sensors_range(modality: str) -> None:
    box, sensor = box_of(modality), SENSORS[modality]
    share = 0.5 if modality == "audio" else 1.0  # counted from silence
    assert box.radius(255) == pytest.approx(share * (box.high - box.low)) and box.unit == sensor.unit
    inside = box.clamp(torch.tensor([-1e9, 1e9]))
    assert inside.tolist() == pytest.approx([box.low, box.high]) and len(sensor.reason) > 20


def test_text_cannot_be_perturbed() -> None:
    assert box_of("text", 9).radius(255) == 0.0 and box_of("text", 9).high == 8
    with pytest.raises(ValueError, match="sensors: image, video"):
        box_of("smell")


@pytest.mark.parametrize("modality", list(SENSORS))
def test_our_trunks_keep_to_the_protocol(modality: str) -> None:
    encoder = model_of().encoder(modality)
    inputs = drawn(modality, 3)
    check_encoder(encoder, inputs, 8)
    with torch.no_grad():
        assert torch.allclose(encoder.embed(inputs)[1:2], encoder.embed(inputs[1:2]), atol=1e-5)  # samples do not see each other
        assert encoder.tokens(inputs).shape == (3, encoder.patches.num_tokens, 16)
    with pytest.raises(ValueError, match="this encoder takes"):
        encoder.embed(inputs[..., :-1])


def test_every_trunk_is_the_backbones_decoder() -> None:
    model = model_of()
    for trunk in (*model.trunks.values(), model.text):
        assert type(trunk.decoder) is Decoder
        others = {type(m) for name, m in trunk.named_modules() if "decoder" not in name.split(".") and name}
        assert not any("Attention" in kind.__name__ or "Transformer" in kind.__name__ for kind in others)


@pytest.mark.parametrize("modality", list(SENSORS))
def test_a_trunk_costs_at_most_40_megaflop_a_sample(modality: str) -> None:
    encoder = TrunkEncoder(modality, DEFAULT_SHAPES[modality], TrunkConfig())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.embed(drawn(modality, 1, DEFAULT_SHAPES[modality]))
    assert 5e6 < counter.get_total_flops() <= 40e6


def test_log_mel_equals_the_fourier_transforms_definition() -> None:
    waveform = torch.randn(2, 5120) * 0.2
    front = LogMel(5120)
    padded = F.pad(waveform, (128, 128))
    spectrum = torch.stft(padded, 256, 160, window=torch.hann_window(256), center=False, return_complex=True)[..., :MEL_SIZE]
    expected = torch.log(spectrum.abs().square().transpose(1, 2) @ front.triangles + front.FLOOR)
    assert torch.allclose(front(waveform)[:, 0], expected, atol=1e-4)
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(5120) / 8000)[None]
    loudest = front(tone)[0, 0, 5:-5].mean(0).argmax()
    centre = (front.triangles[:, loudest] * torch.arange(129)).sum() / front.triangles[:, loudest].sum() * 8000 / 256
    assert abs(float(centre) - 1000) < 150
    assert bool((front.triangles.sum(0) > 0).all())


def test_silence_has_a_finite_gradient() -> None:
    waveform = torch.zeros(1, 1024, requires_grad=True)
    LogMel(1024)(waveform).sum().backward()
    assert torch.isfinite(waveform.grad).all()


def test_farthest_points_equal_the_naive_search() -> None:
    cloud = torch.randn(2, 20, 3)
    found = farthest_points(cloud, 6)
    for points, chosen in zip(cloud, found.tolist(), strict=True):
        expected = [int((points - points.mean(0)).norm(dim=1).argmax())]
        for _ in range(5):
            expected.append(int(torch.stack([(points - points[index]).norm(dim=1) for index in expected]).amin(0).argmax()))
        assert chosen == expected


def test_the_order_of_points_does_not_matter() -> None:
    torch.manual_seed(0)
    patches, cloud = PointPatches(32, 16), drawn("point", 2)
    with torch.no_grad():
        assert torch.allclose(patches(cloud), patches(cloud[:, torch.randperm(32)]), atol=1e-6)


UNCUTTABLE = [("image", (3, 20, 16)), ("video", (3, 3, 16, 16)), ("trace", (6, 18)), ("point", (8, 3)), ("audio", (3, 4))]


@pytest.mark.parametrize(("modality", "shape"), UNCUTTABLE)
def test_shapes_that_cannot_be_cut_are_refused(modality: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected|even|multiple|too small"):
        build_patches(modality, shape, 16)


def test_padding_does_not_change_a_sentence() -> None:
    text = model_of().text
    with torch.no_grad():
        assert torch.allclose(text.embed_sentences(["a can"]), text.embed_sentences(["a can", "a wooden box"])[:1], atol=1e-6)
    ids, _ = text.tokenizer.encode_batch(["a can"])
    check_encoder(text, ids, 8)


class Odd(nn.Module):
    """A valid encoder of 4 values, but for what a test changes."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.modality, self.dimension, self.box, self.logit_scale = "depth", 4, box_of("depth"), 1.0
        self.change = lambda embedding: embedding
        for name, value in changes.items():
            setattr(self, name, value)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.change(F.normalize(inputs.flatten(1), dim=-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "smell"}, "Unknown modality 'smell'; allowed"),
        ({"change": lambda e: F.normalize(e + 0.1 * torch.randn_like(e), dim=-1)}, "not deterministic in eval mode.*seed it"),
        ({"dimension": 5}, "says dimension 5 and gives"),
        ({"change": lambda e: 2 * e}, "have length 2.*normalise"),
        ({"change": lambda e: e.detach()}, "an attack would be blind"),
        ({"change": lambda e: e / 0.0}, "not finite"),
    ],
)
def test_encoders_that_break_the_protocol_are_refused(changes: dict, message: str) -> None:
    inputs = drawn("depth", 3, (4,))
    check_encoder(Odd().eval(), inputs, 4)
    with pytest.raises(ValueError, match=message):
        check_encoder(Odd(**changes).eval(), inputs)


def test_wrong_mode_inputs_and_objects_are_refused() -> None:
    inputs = drawn("depth", 3, (4,))
    with pytest.raises(ValueError, match=r"call .eval\(\)"):
        check_encoder(Odd().train(), inputs)
    with pytest.raises(ValueError, match="expected .3, 6.*one binding"):
        check_encoder(Odd().eval(), inputs, 6)
    with pytest.raises(ValueError, match="allowed: .0.25, 0.75"):
        check_encoder(Odd().eval(), inputs + 1)
    with pytest.raises(ValueError, match="lacks modality"):
        check_encoder(nn.Identity(), inputs)


def test_many_centers_lie_between_their_mean_and_their_nearest() -> None:
    vectors = F.normalize(torch.randn(3, 4, 8), dim=-1)
    centers = SemanticCenters(("a", "b", "c"), vectors)
    embedding = F.normalize(torch.randn(5, 8), dim=-1)
    nearest = centers.pooled("max").scores(embedding)
    sharp = SemanticCenters(centers.names, vectors, "lse", 1e4).scores(embedding)
    assert torch.allclose(sharp, nearest, atol=1e-3)
    assert bool((centers.pooled("lse").scores(embedding) >= nearest).all())
    single = SemanticCenters(centers.names, vectors[:, :1])
    scores = [single.pooled(pooling).scores(embedding) for pooling in ("mean", "lse", "max")]
    assert torch.allclose(scores[0], scores[1], atol=1e-6) and torch.allclose(scores[0], scores[2], atol=1e-6)
    assert torch.equal(centers.select([2, 0]).scores(embedding), centers.scores(embedding)[:, [2, 0]])
    assert torch.allclose(centers.logits(embedding, 7.0), 7 * centers.scores(embedding))


def test_centers_are_frozen_and_of_one_width() -> None:
    text = model_of().text
    centers = build_centers(CLASSES, text.embed_sentences)
    assert centers.names == ("can", "block", "tin") and centers.vectors.shape == (3, 2, 8) and not centers.vectors.requires_grad
    with pytest.raises(ValueError, match="width 6, the centers 8"):
        centers.scores(torch.randn(1, 6))
    with pytest.raises(ValueError, match="detach"):
        SemanticCenters(("a",), torch.randn(1, 1, 8, requires_grad=True))
    with pytest.raises(ValueError, match="the same number"):
        build_centers([CLASSES[0], replace(CLASSES[1], prompts=("one",))], text.embed_sentences)


def test_info_nce_equals_its_definition_and_leaves_classmates_out() -> None:
    first, second = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    labels = torch.tensor([0, 0, 1, 2])
    expected = 0.0
    for a, b in ((first, second), (second, first)):
        for i in range(4):
            others = [j for j in range(4) if j == i or labels[j] != labels[i]]
            expected -= 0.5 * float(torch.log_softmax(torch.stack([5 * a[i] @ b[j] for j in others]), 0)[others.index(i)])
    assert float(info_nce(first, second, 5.0, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(info_nce(first, second, 5.0)) > expected


@pytest.mark.parametrize("modality", list(SENSORS))
def test_augmented_inputs_stay_in_the_box_and_follow_the_seed(modality: str) -> None:
    inputs = drawn(modality, 4)
    draws = [augment(modality, inputs, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    box = box_of(modality)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and draws[0].shape == inputs.shape
    assert float(draws[0].min()) >= box.low and float(draws[0].max()) <= box.high


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seen classes whose sensors differ in level, and an unseen one that never trains."""
    root, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for split in SPLITS:
        labels = np.array([2] * 4 if split == "unseen" else [0, 1] * 8)
        rows = {}
        for name, sensor in SENSORS.items():
            codes = generator.integers(0, sensor.levels // 4, (len(labels), *SHAPES[name]))
            codes += (labels % 2).reshape(-1, *[1] * len(SHAPES[name])) * (sensor.levels // 2)
            rows[name] = codes.astype(sensor.encode(np.zeros(1)).dtype)
        write_rows(root / f"{split}-00000.npz", rows | {LABEL: labels, START: np.arange(len(labels))})
    write_manifest(root, BoundManifest(CLASSES, SHAPES, {split: 4 if split == "unseen" else 16 for split in SPLITS}))
    return root


def test_batches_show_each_sample_once_an_epoch(corpus: Path) -> None:
    samples = BoundSamples(corpus, "train")
    batches = [samples.batch(index, size=8, seed=3, modalities=["trace"]) for index in range(4)]
    for epoch in (batches[:2], batches[2:]):
        rows = torch.cat([batch["trace"] for batch in epoch]).flatten(1)
        assert len({tuple(row.tolist()) for row in rows}) == 16
    assert torch.equal(samples.batch(1, size=8, seed=3, modalities=["trace"])["trace"], batches[1]["trace"])
    with pytest.raises(ValueError, match="allowed: train"):
        BoundSamples(corpus, "trian")


def test_binding_learns_saves_and_loads(corpus: Path, tmp_path: Path) -> None:
    training = TrainingConfig(
        steps=30, batch_size=16, learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, save_every=30, device="cpu"
    )
    config = BindingConfig(corpus, tmp_path, ["image", "audio", "point"], TRUNK, training=training)
    folder = train_bind(config)
    bound = load_bound(folder)
    assert set(bound.model.trunks) == {"image", "audio", "point"} and not any(p.requires_grad for p in bound.model.parameters())
    shares = accuracies(bound.model, BoundSamples(corpus, "test"))
    assert shares["image"] == 1.0 and min(shares.values()) > 0.8
    centers = bound.centers()
    assert centers.names == ("can", "block") and bound.centers((2,), "lse").names == ("tin",)
    samples = BoundSamples(corpus, "test")
    for name in bound.model.trunks:
        check_encoder(bound.model.encoder(name), samples.inputs(name, slice(4)), centers.dimension)
    again = load_bound(folder)
    sounds = samples.inputs("audio")
    assert torch.equal(again.model.encoder("audio").embed(sounds), bound.model.encoder("audio").embed(sounds))
    assert float(bound.model.encoder("image").patches.standardise.std) != 1.0
    with pytest.raises(ValueError, match="this model has image"):
        bound.model.encoder("trace")


def test_every_modality_and_the_text_take_part_in_the_loss(corpus: Path) -> None:
    model, samples = model_of(), BoundSamples(corpus, "train")
    config = BindingConfig(corpus, corpus, list(SENSORS), TRUNK)
    words = Words.of(samples.manifest)
    assert asdict(words)["index"].tolist() == [[0, 1], [1, 0], [0, 1]]  # can: cylinder, metal; block: box, wood
    batch = samples.batch(0, size=8, seed=0, modalities=config.modalities)
    terms = BindingLoss(config, words)(model, batch, torch.Generator().manual_seed(0))
    terms.loss_sum.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent and terms.normalizer == 8.0
    with pytest.raises(ValueError, match="image among them"):
        BindingConfig(corpus, corpus, ["audio"])
