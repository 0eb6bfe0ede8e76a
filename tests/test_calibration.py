"""Laws of calibration: it starts as the identity, touches nothing frozen, merges without a trace, resumes, and hardens."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from multimodal.bind.adapters import NO_ADAPTERS, AdapterConfig, install, merged_state
from multimodal.bind.attack_losses import scaled_cross_entropy
from multimodal.bind.attacks import apgd
from multimodal.bind.ball import Ball
from multimodal.bind.calibration import CalibratedEncoder, InnerAttackConfig, PlacementConfig, load_calibration
from multimodal.bind.classifier import Classifier
from multimodal.bind.objectives import NAMED, ObjectiveConfig, Targets, attacked_loss, clean_loss, info_nce, named_objective
from multimodal.bind.task import weights_hash
from multimodal.bind.train_calibration import (
    CalibrationBatches,
    CalibrationTraining,
    TrainCalibrationConfig,
    calibrate,
    embed_all,
    task_weights,
)
from multimodal.checkpoint import checkpoint_hash, load_checkpoint
from multimodal.schedule import TrainingConfig
from tests.drawn_shapes import build_task, centers
from vla.cli import main, parse_config

EVERYTHING = PlacementConfig(head="mlp", adapters=AdapterConfig(lora_rank=2, tune_norms=True))
SHORT = TrainingConfig(steps=4, batch_size=16, learning_rate=3e-3, warmup_steps=1, ema_decay=0.0, device="cpu", save_every=2)


def perturbed(model: CalibratedEncoder) -> CalibratedEncoder:
    """Every trainable weight away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("head", ["none", "linear", "mlp"])
def test_a_calibration_starts_as_the_encoder_and_leaves_it_alone(head: str) -> None:
    task = build_task()
    encoder, inputs = task.encoders["image"], task.splits["test"].inputs["image"][:16]
    before = {name: value.clone() for name, value in encoder.trunk.state_dict().items()}
    model = CalibratedEncoder(encoder, replace(EVERYTHING, head=head))
    clean = encoder.embed(inputs)
    assert torch.allclose(model.embed(inputs), clean, atol=1e-6)
    assert not torch.allclose(perturbed(model).embed(inputs), clean, atol=1e-3)
    assert torch.equal(encoder.embed(inputs), clean)
    assert all(torch.equal(value, before[name]) for name, value in encoder.trunk.state_dict().items())


def test_merged_equals_unmerged_bit_for_bit() -> None:
    task = build_task()
    inputs = task.splits["test"].inputs["image"][:16]
    model = perturbed(CalibratedEncoder(task.encoders["image"], EVERYTHING)).eval()
    merged = model.merged()
    assert torch.equal(merged.embed(inputs), model.embed(inputs))
    assert merged.trunk.state_dict().keys() == task.encoders["image"].trunk.state_dict().keys()
    assert model.num_trainable > 0 and merged.num_trainable == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 4, 3), (2, 2, 5, 5)),
        (nn.BatchNorm2d(4), (2, 4, 3, 3)),
        (nn.LayerNorm(4), (2, 4)),
        (nn.Linear(3, 4, bias=False), (2, 3)),
    ],
)
def test_any_layer_takes_an_adapter_and_gives_it_back(layer: nn.Module, shape: tuple[int, ...]) -> None:
    plain = nn.Sequential(layer).eval()
    inputs = torch.randn(shape)
    adapted = copy.deepcopy(plain)
    install(adapted, AdapterConfig(lora_rank=1, tune_norms=True))
    assert torch.equal(adapted(inputs), plain(inputs))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3)
    assert not torch.allclose(adapted(inputs), plain(inputs))
    plain.load_state_dict(merged_state(adapted))
    assert torch.equal(adapted(inputs), plain(inputs))


def test_packed_attention_takes_an_adapter() -> None:
    """open_clip's towers pack query, key and value into one parameter that is no nn.Linear."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    assert install(attention, AdapterConfig(lora_rank=2)) == ["in_proj_weight", "out_proj.weight"]
    inputs = torch.randn(2, 3, 8)
    attention(inputs, inputs, inputs)[0].sum().backward()
    assert attention.parametrizations.in_proj_weight[0].up.grad.abs().sum() > 0


def test_low_rank_is_what_the_paper_writes() -> None:
    layer = nn.Linear(5, 3, bias=False)
    weight = layer.weight.detach().clone()
    install(layer, AdapterConfig(lora_rank=2, lora_alpha=6))
    adapter = layer.parametrizations.weight[0]
    adapter.up.data.normal_()
    inputs = torch.randn(4, 5)
    slow = inputs @ weight.T + 6 / 2 * (inputs @ adapter.down.T) @ adapter.up.T
    assert torch.allclose(layer(inputs), slow, atol=1e-5)


def test_targets_choose_weights_and_a_wrong_one_is_refused() -> None:
    trunk = build_task().encoders["image"].trunk
    queries = PlacementConfig("none", adapters=AdapterConfig(2, lora_targets=("attention.query",)))
    model = CalibratedEncoder(build_task().encoders["image"], queries)
    assert model.adapted == [f"decoder.blocks.{layer}.attention.query.weight" for layer in range(2)]
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    with pytest.raises(ValueError, match="Change lora_targets"):
        CalibratedEncoder(build_task().encoders["image"], PlacementConfig("none", adapters=AdapterConfig(2, lora_targets=("qkv",))))


def targets(count: int = 6, seed: int = 0) -> tuple[torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: nn.functional.normalize(torch.randn(count, 16, generator=generator), dim=-1)  # noqa: E731
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    return draw().requires_grad_(), Targets(labels, draw(), centers(), 14.0, draw())


def test_every_term_is_its_formula() -> None:
    z, about = targets()
    off = ObjectiveConfig(cross_entropy=0, l2=0, info_nce=0, clean_anchor=0, clean_cross_entropy=0, comp_sum=1)
    logits = 14.0 * z @ about.centers.T
    rows = torch.arange(6)
    slow = {
        "cross_entropy": -logits.log_softmax(1)[rows, about.labels],
        "l2": ((z - about.frozen) ** 2).sum(1),
        "consistency": 1 - torch.cosine_similarity(z, about.partner),
    }
    for name, value in slow.items():
        config = replace(off, **{name: 2.0, "comp_sum": 0.0})
        assert torch.allclose(attacked_loss(z, None, about, config), 2 * value, atol=1e-5), name
    nce = []
    for i in range(6):
        others = [j for j in range(6) if j == i or about.labels[j] != about.labels[i]]
        scores = (z[i] @ about.frozen[others].T) / 0.1
        nce.append(scores.logsumexp(0) - z[i] @ about.frozen[i] / 0.1)
    assert torch.allclose(info_nce(z, about.frozen, about.labels, 0.1), torch.stack(nce), atol=1e-4)


def test_comp_sum_is_generalised_cross_entropy_and_the_movement_of_margins() -> None:
    z, about = targets()
    config = ObjectiveConfig(cross_entropy=0, l2=0, info_nce=0, clean_anchor=0, clean_cross_entropy=0, comp_sum=1, comp_sum_tau=1.5, comp_sum_smoothness=0.5)
    p = (14.0 * z @ about.centers.T).softmax(1)[torch.arange(6), about.labels]
    assert torch.allclose(clean_loss(z, about, config), (1 - p**0.5) / 0.5, atol=1e-4)
    assert attacked_loss(z, z, about, config).max() < 1e-5
    moved = attacked_loss(about.frozen, z, about, config)
    own = lambda e: (14 * e @ about.centers.T)  # noqa: E731
    gap = lambda e: own(e).gather(1, about.labels[:, None]) - own(e)  # noqa: E731
    assert torch.allclose(moved, 0.5 * (gap(about.frozen) - gap(z)).norm(dim=1), atol=1e-3)


@pytest.mark.parametrize("name", list(NAMED))
def test_every_objective_trains(name: str, tmp_path: Path) -> None:
    config = TrainCalibrationConfig(
        modality="image", partner="heat", placement=EVERYTHING, objective=named_objective(name), training=replace(SHORT, steps=2),
        attack=InnerAttackConfig(steps=1),
    )  # fmt: skip
    task = build_task()
    model = load_calibration(calibrate(config, task, tmp_path), task.encoders["image"])
    inputs = task.splits["test"].inputs["image"][:8]
    assert not torch.allclose(model.embed(inputs), task.encoders["image"].embed(inputs), atol=1e-5)


def test_training_knows_nothing_of_unseen_classes(tmp_path: Path) -> None:
    """Other centers for them change no weight: else they would be negatives, and zero-shot accuracy on them be trained away."""
    task = build_task()
    assert task.unseen
    centers = task.centers.clone()
    centers[list(task.unseen)] = -centers[list(task.unseen)]
    config = TrainCalibrationConfig(placement=EVERYTHING, training=SHORT, attack=InnerAttackConfig(steps=1))
    folders = [calibrate(config, each, tmp_path / name) for name, each in (("own", task), ("other", replace(task, centers=centers)))]
    first, second = (load_checkpoint(folder).state for folder in folders)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_calibration_is_the_uninterrupted_one(tmp_path: Path) -> None:
    task = build_task()
    config = TrainCalibrationConfig(placement=EVERYTHING, training=SHORT, attack=InnerAttackConfig(steps=1))
    whole = calibrate(config, task, tmp_path / "whole")
    (half := tmp_path / "half").mkdir()
    calibrate(config, task, half)
    (half / "checkpoints" / "last").unlink()  # as if the run had been stopped at step 2
    (half / "checkpoints" / "last").symlink_to("000002")
    resumed = calibrate(replace(config, resume=True), task, half)
    inputs = task.splits["test"].inputs["image"][:8]
    first, second = (load_calibration(folder, task.encoders["image"]).embed(inputs) for folder in (whole, resumed))
    assert torch.equal(first, second)


def test_a_calibration_is_of_one_encoder(tmp_path: Path) -> None:
    """On another one's weights it would be judged as what it never was."""
    task = build_task()
    folder = calibrate(TrainCalibrationConfig(training=SHORT, attack=InnerAttackConfig(steps=1)), task, tmp_path)
    other = copy.deepcopy(task.encoders["image"])
    same = load_calibration(folder, other), load_calibration(folder, task.encoders["image"])
    assert weights_hash(same[0].source) == weights_hash(same[1].source)
    with torch.no_grad():
        next(other.trunk.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="calibrates an encoder with weights"):
        load_calibration(folder, other)


def test_calibration_hardens_and_keeps_clean_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """LoRA and a head, combined objective, 60 steps of PGD-3 at 3/255: well more survives a stronger attack."""
    task = build_task()
    config = TrainCalibrationConfig(
        modality="heat", placement=PlacementConfig("linear", adapters=AdapterConfig(4)), attack=InnerAttackConfig(epsilon=3.0, steps=3),
        training=TrainingConfig(steps=60, batch_size=64, learning_rate=5e-3, warmup_steps=5, ema_decay=0.0, device="cpu", save_every=60),
    )  # fmt: skip
    model = load_calibration(calibrate(config, task, tmp_path), task.encoders["heat"])
    assert f"% of the model ({task_weights(task)})" in capsys.readouterr().out
    bound = task.splits["test"]
    bound = bound.select((~task.is_unseen(bound)).nonzero()[:128, 0])
    inputs, labels = bound.inputs["heat"], bound.labels
    clean, robust = {}, {}
    for name, encoder in (("frozen", task.encoders["heat"]), ("calibrated", model)):
        classifier = Classifier(encoder, task.centers).eval()
        ball = Ball(inputs, encoder.box, encoder.box.radius(3))
        attacked = apgd(scaled_cross_entropy(classifier, labels, inputs), ball, steps=20, generator=torch.Generator().manual_seed(0))
        clean[name] = float((classifier(inputs).argmax(1) == labels).float().mean())
        robust[name] = float((~attacked.fooled).float().mean())
    assert robust["calibrated"] > robust["frozen"] + 0.1, (clean, robust)
    assert clean["calibrated"] > clean["frozen"] - 0.04, (clean, robust)


def test_batches_are_a_function_of_their_index() -> None:
    task = build_task()
    first, second = (CalibrationBatches(task, "image", "heat", 16, seed=1) for _ in range(2))
    for index in (0, 3, 130):
        assert all(torch.equal(a, b) for a, b in zip(first(index), second(index), strict=True))
    inputs, labels, frozen, partner = first(0)
    assert torch.allclose(frozen, embed_all(task.encoders["image"], inputs), atol=1e-6) and partner.shape == frozen.shape
    epoch = torch.cat([first(index)[1] for index in range(125)])
    assert torch.equal(task.seen[epoch].sort().values, task.splits["train"].labels.sort().values)  # 125 x 16 = 2000: each sample once


def test_settings_that_cannot_train_are_refused(tmp_path: Path) -> None:
    task = build_task()
    with pytest.raises(ValueError, match="needs --partner"):
        calibrate(TrainCalibrationConfig(objective=ObjectiveConfig(consistency=1.0)), task, tmp_path)
    with pytest.raises(ValueError, match="Nothing to train"):
        calibrate(TrainCalibrationConfig(placement=PlacementConfig("none", adapters=NO_ADAPTERS)), task, tmp_path)
    with pytest.raises(ValueError, match="Unknown modality"):
        calibrate(TrainCalibrationConfig(modality="sonar"), task, tmp_path)
    with pytest.raises(ValueError, match="one of them above 0"):
        ObjectiveConfig(0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="combined"):
        named_objective("fare")


def test_the_command_trains_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One field of `training` given: the others keep a calibration's defaults."""
    assert main(["calibrate"]) == 0 and "train" in capsys.readouterr().out
    assert main(["calibrate", "tune"]) == 2 and "does train, eval, policy" in capsys.readouterr().err
    assert main(["calibrate", "train"]) == 2 and "BindTask" in capsys.readouterr().err
    config = parse_config(TrainCalibrationConfig, ["--training.steps=2", "--placement.adapters.tune_norms=true"])
    assert config.training == replace(CalibrationTraining(), steps=2)
    assert config.placement == PlacementConfig(adapters=AdapterConfig(lora_rank=4, tune_norms=True))
    assert config.terms == NAMED["combined"] and parse_config(TrainCalibrationConfig, ["--objective_name=robust"]).terms == NAMED["robust"]
    assert parse_config(TrainCalibrationConfig, ["--objective.l2=0.5"]).terms == ObjectiveConfig(l2=0.5)
    with pytest.raises(ValueError, match="leave one of them out"):  # though 0.25 is what l2 would be anyway
        parse_config(TrainCalibrationConfig, ["--objective_name=robust", "--objective.l2=0.25"])
    with pytest.raises(ValueError, match="No objective 'fare'; there are"):
        parse_config(TrainCalibrationConfig, ["--objective_name=fare"])
    with pytest.raises(ValueError, match="^Objective weights are"):
        parse_config(TrainCalibrationConfig, ["--objective.l2=-1"])
    task = ["--task=tests.drawn_shapes:build_task", "--modality=heat"]
    brief = ["--training.steps=2", "--training.batch_size=8", "--attack.steps=1"]
    command = ["calibrate", "train", *task, *brief, f"--output_dir={tmp_path}"]
    assert main(command) == 0
    assert "trainable weights" in capsys.readouterr().out
    assert main(command) == 2 and "--resume=true" in capsys.readouterr().err
    brief = ["--samples=8", "--epsilons=[2.0]", "--seeds=[0]", "--steps=4", "--sanity_samples=8", "--retrieval_samples=12"]
    brief += ["--certified_samples=0", "--sanity.steps=[1, 3]", "--sanity.epsilons=[2.0, 16.0]", "--sanity.restarts=[1, 2]"]
    brief += ["--sanity.queries=20", "--sanity.binarised=4"]
    folder = tmp_path / "checkpoints" / "last" / "policy"
    code = main(["calibrate", "eval", *task, f"--calibration={folder}", *brief, f"--output_dir={tmp_path / 'report'}"])
    shown = capsys.readouterr().out
    assert code in (0, 1) and "## Sanity: calibrated" in shown and (tmp_path / "report" / "robustness.json").exists()
    assert code == (1 if "SANITY FAILED" in shown else 0)
    assert f"Task tests.drawn_shapes:build_task, calibration {checkpoint_hash(folder)}; at most 8 samples" in shown


def test_a_task_called_with_what_it_does_not_take_is_refused() -> None:
    from vla.calibrate import main

    for options in ("{}", "{model: x, corpus: y, colour: red}"):
        with pytest.raises(ValueError, match=r"bound_task:build_task\(model.*Give --task_options"):
            main(["eval", "--task=multimodal.bind.bound_task:build_task", f"--task_options={options}"])
