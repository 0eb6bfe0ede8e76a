"""Three Bind layouts by six modalities through one code: checks, calibration with its inner attack, attacks, judgement."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from multimodal.bind.adapters import AdapterConfig
from multimodal.bind.calibration import InnerAttackConfig, PlacementConfig, load_calibration
from multimodal.bind.classifier import Classifier
from multimodal.bind.encoders import TrunkConfig, TrunkEncoder
from multimodal.bind.interface import ModalityEncoder
from multimodal.bind.layouts.imagebind import load_imagebind_tower
from multimodal.bind.layouts.languagebind import languagebind_encoder
from multimodal.bind.layouts.unibind import UniBindEncoder
from multimodal.bind.reference_attacks import AutoAttackConfig
from multimodal.bind.robustness import AttackSuite
from multimodal.bind.task import BindTask, Bound
from multimodal.bind.train_calibration import TrainCalibrationConfig, calibrate
from multimodal.schedule import TrainingConfig
from tests.test_bind_layouts import HEADS, SHAPES, film_encoder, random_state

NAMES = ("ball", "box", "can")
BRIEF = AttackSuite(steps=3, targets=1, foolbox=False, auto=AutoAttackConfig(("apgd-ce",), steps=3, targets=1, queries=5))
TOWERS = {"image": "vision", "video": "vision", "audio": "audio", "depth": "depth", "thermal": "thermal", "trace": "imu"}
DRAWN = {"image": (3, 32, 32), "video": (3, 2, 32, 32), "audio": (1, 26, 36), "depth": (1, 32, 32), "thermal": (1, 32, 32)}
DRAWN |= {"trace": (1, 6, 32)}
SENSED = {"image": (3, 16, 16), "video": (3, 2, 16, 16), "audio": (5120,), "depth": (1, 16, 16), "thermal": (1, 16, 16)}
SENSED |= {"point": (64, 3)}


def imagebind(modality: str) -> tuple[ModalityEncoder, tuple[int, ...]]:
    shape = SHAPES[TOWERS[modality]]
    tower = load_imagebind_tower(random_state(TOWERS[modality]), TOWERS[modality], num_heads=HEADS)
    return tower, (shape[0], 2, *shape[1:]) if modality == "video" else shape


def languagebind(modality: str) -> tuple[ModalityEncoder, tuple[int, ...]]:
    """Whatever is not a picture comes drawn as one: a spectrogram, a trace by channels."""
    shape = DRAWN[modality]
    return languagebind_encoder(film_encoder(1).model, modality) if modality != "video" else film_encoder(2), shape


def unibind(modality: str) -> tuple[ModalityEncoder, tuple[int, ...]]:
    trunk = TrunkConfig(hidden_size=32, num_layers=1, num_heads=2, mlp_size=48, dimension=12)
    return UniBindEncoder(TrunkEncoder(modality, SENSED[modality], trunk).eval()).eval(), SENSED[modality]


def bound(encoder: ModalityEncoder, modality: str, shape: tuple[int, ...], count: int) -> Bound:
    box = encoder.box
    inputs = box.clamp(box.low + (box.high - box.low) * torch.rand(count, *shape))
    return Bound({modality: inputs}, torch.arange(count) % len(NAMES))


def centers_of(encoder: ModalityEncoder, several: bool) -> Tensor:
    shape = (len(NAMES), 4, encoder.dimension) if several else (len(NAMES), encoder.dimension)
    return F.normalize(torch.randn(shape), dim=-1)


@pytest.mark.parametrize("modality", list(TOWERS))
@pytest.mark.parametrize("layout", [imagebind, languagebind, unibind])
def test_a_layout_s_modality_is_checked_calibrated_attacked_and_judged(layout, modality: str, tmp_path: Path) -> None:
    """The very calls that `vla calibrate` makes; UniBind's with several centers a class, and a point cloud for the trace."""
    torch.manual_seed(3)
    modality = "point" if layout is unibind and modality == "trace" else modality
    encoder, shape = layout(modality)
    splits = {name: bound(encoder, modality, shape, 12) for name in ("train", "validation", "test")}
    task = BindTask({modality: encoder}, centers_of(encoder, layout is unibind), NAMES, splits)
    frozen = task.check(modality)
    config = TrainCalibrationConfig(
        modality=modality,
        placement=PlacementConfig("linear", adapters=AdapterConfig(lora_rank=1)),
        training=TrainingConfig(steps=2, batch_size=6, learning_rate=0.01, warmup_steps=1, ema_decay=0.0, threads=1),
        attack=InnerAttackConfig(steps=1),
    )
    calibrated = load_calibration(calibrate(config, task, tmp_path), frozen)
    merged, inputs, labels = calibrated.merged(), splits["test"].inputs[modality], splits["test"].labels
    with torch.no_grad():
        assert not torch.equal(merged.embed(inputs), frozen.embed(inputs))
        assert torch.allclose(merged.embed(inputs), calibrated.embed(inputs), atol=1e-5)
    models = [Classifier(each, task.centers).eval() for each in (merged, frozen)]
    survived = BRIEF.run(models[0], inputs, labels, frozen.box.radius(8), 0, models[1])
    assert not (survived["worst"] & ~survived["clean"]).any()
    untouched = BRIEF.run(models[0], inputs, labels, 0.0, 0, models[1])
    assert torch.equal(untouched["worst"], untouched["clean"]) and torch.equal(untouched["clean"], survived["clean"])
