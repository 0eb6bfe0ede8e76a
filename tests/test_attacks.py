"""Laws of the attacks: they stay in ball and box, never weaken with more of anything, and find what the libraries find."""

import math

import pytest
import torch
from torch import nn

from multimodal.bind.attack_losses import dlr_loss, expected, margin_loss, margin_of, scaled_cross_entropy, targeted_margin_loss
from multimodal.bind.attacks import apgd, checkpoints, gradient_of, pgd, pgd_last, worst_of
from multimodal.bind.ball import Ball
from multimodal.bind.classifier import Classifier, center_logits, check_centers
from multimodal.bind.encoder_checks import check_encoder
from multimodal.bind.interface import Box, check_inputs
from multimodal.bind.modalities import box_of
from multimodal.bind.reference_attacks import AutoAttackConfig, autoattack, foolbox_pgd, plane_shape, square_fits
from tests.drawn_shapes import BOXES, build_task, centers

SAMPLES = 96


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(modality: str):
    task = build_task()
    bound = task.splits["test"]
    bound = bound.select((~task.is_unseen(bound)).nonzero()[:SAMPLES, 0])
    encoder = task.encoders[modality]
    return Classifier(encoder, task.centers).eval(), bound.inputs[modality], bound.labels, encoder.box


@pytest.mark.parametrize("modality", list(BOXES))
@pytest.mark.parametrize("steps", [0.0, 4.0, 1000.0])
def test_points_stay_in_ball_and_box(modality: str, steps: float) -> None:
    model, inputs, labels, box = scene(modality)
    inputs, labels = inputs[:8], labels[:8]
    ball = Ball(inputs, box, box.radius(steps))
    tolerance = 1e-6 * max(1.0, box.high)
    found = [ball.random_point(seeded()), ball.surface_point(seeded())]
    found.append(pgd_last(lambda x: model(x).sum(1), ball, steps=2, generator=seeded()))
    found += [attack(margin_loss(model, labels), ball, steps=3, generator=seeded()).points for attack in (pgd, apgd)]
    for points in found:
        assert ball.size_of(points).max() <= ball.radius + tolerance * 10
        assert box.low <= points.min() and points.max() <= box.high
        if steps == 0.0:
            assert torch.equal(points, inputs)


def test_projection_is_the_nearest_point_of_the_ball() -> None:
    box = Box(-100.0, 100.0, "m", 1.0, "l2")
    center, far = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert torch.allclose(Ball(center, box, 1.0).project(far), torch.tensor([[0.6, 0.8]]))
    assert torch.allclose(Ball(center, Box(-100.0, 100.0, "m", 1.0), 1.0).project(far), torch.tensor([[1.0, 1.0]]))


def test_checkpoints_are_those_of_the_paper() -> None:
    """Shares 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 of the steps (p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06))."""
    assert [*sorted(checkpoints(100))] == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_halves_its_step_where_it_oscillates() -> None:
    """On a valley narrower than the ball, fixed large steps bounce over the peak; halved ones reach it."""
    box = Box(-1.0, 1.0, "m", 1.0)
    peak = torch.tensor([[0.101, -0.037]])

    def loss(points: torch.Tensor):
        value = -(points - peak).abs().sum(1)
        return value, value

    ball = Ball(torch.zeros(1, 2), box, 1.0)
    halved = apgd(loss, ball, steps=60, generator=seeded()).loss
    fixed = pgd(loss, ball, steps=60, step_size=2 * ball.radius, generator=seeded()).loss
    assert halved > -0.01 and halved > fixed


@pytest.mark.parametrize("modality", ["image", "heat-l2"])
def test_our_apgd_finds_what_the_library_finds(modality: str) -> None:
    """The same loss, steps and radius; random starts differ, so a sample or two may."""
    model, inputs, labels, box = scene(modality)
    radius = box.radius(2)
    ours = apgd(scaled_cross_entropy(model, labels, inputs), Ball(inputs, box, radius), steps=40, generator=seeded())
    config = AutoAttackConfig(attacks=("apgd-ce",), steps=40)
    theirs = autoattack(model, inputs, labels, box, radius, config)
    right = model(inputs).argmax(1) == labels
    assert 0.1 < float((right & ours.fooled).float().mean()) < 0.97  # neither trivial
    assert abs(float((~ours.fooled).float().mean()) - float(theirs.survived.float().mean())) <= 3.5 / SAMPLES
    assert Ball(inputs, box, radius).size_of(theirs.points).max() <= radius * (1 + 1e-4)


def test_foolbox_is_not_stronger_than_the_worst_case() -> None:
    model, inputs, labels, box = scene("heat")
    ball = Ball(inputs, box, box.radius(4))
    worst = worst_of([
        apgd(margin_loss(model, labels), ball, steps=30, generator=seeded()),
        apgd(scaled_cross_entropy(model, labels, inputs), ball, steps=30, generator=seeded()),
    ])  # fmt: skip
    theirs = foolbox_pgd(model, inputs, labels, box, ball.radius)
    assert float((~worst.fooled).float().mean()) <= float(theirs.survived.float().mean()) + 1 / SAMPLES
    assert float(theirs.survived.float().mean()) < 0.8  # it does attack


def test_scale_of_logits_changes_no_attack() -> None:
    model, inputs, labels, box = scene("heat")
    ball = Ball(inputs, box, box.radius(2))
    counts = []
    for scale in (0.01, 1.0, 100.0):
        scaled = lambda points: scale * model(points)  # noqa: B023, E731
        losses = (scaled_cross_entropy(scaled, labels, inputs), margin_loss(scaled, labels), dlr_loss(scaled, labels))
        ours = [int((~apgd(loss, ball, steps=8, generator=seeded()).fooled).sum()) for loss in losses]
        library = autoattack(scaled, inputs, labels, box, ball.radius, AutoAttackConfig(attacks=("apgd-ce",), steps=8))
        counts.append([*ours, int(library.survived.sum())])
    assert all(abs(a - b) <= 1 for row in counts for a, b in zip(row, counts[0], strict=True)), counts


def test_worst_case_is_never_weaker_and_margins_are_true() -> None:
    model, inputs, labels, box = scene("heat")
    ball = Ball(inputs, box, box.radius(2))
    targets = (labels + 1) % 12
    results = [
        apgd(targeted_margin_loss(model, labels, targets), ball, steps=5, generator=seeded()),
        pgd(margin_loss(model, labels), ball, steps=5, generator=seeded(), restarts=2),
    ]
    worst = worst_of(results)
    for result in [*results, worst]:
        assert torch.allclose(margin_of(model(result.points), labels), result.margin, atol=1e-4)
        assert bool((worst.margin >= result.margin).all())


def test_expectation_sees_through_noise() -> None:
    """A gradient drowned in fresh noise is useless for one draw a step, and found by the mean of many."""
    box = Box(-1.0, 1.0, "m", 1.0)
    center, generator = torch.zeros(64, 4), seeded(1)

    def noisy(points: torch.Tensor):
        slope = torch.tensor([1.0, -1.0, 1.0, -1.0]) + 6 * torch.randn(points.shape, generator=generator)
        return (points * slope).sum(1), (points * slope).sum(1)

    def reached(draws: int) -> float:
        points = center
        for _ in range(5):
            gradient, *_ = gradient_of(expected(noisy, draws), points)
            points = Ball(center, box, 0.5).ascend(points, gradient, 0.2)
        return float((points * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum(1).mean())

    assert reached(64) > reached(1) + 0.5


def test_several_centers_a_class_are_their_soft_maximum() -> None:
    base = centers()
    copies = base[:, None].expand(-1, 3, -1)
    embeddings = torch.nn.functional.normalize(torch.randn(5, base.shape[1], generator=seeded()), dim=-1)
    assert torch.allclose(center_logits(embeddings, copies, 14.0), center_logits(embeddings, base, 14.0), atol=1e-5)
    three = torch.nn.functional.normalize(torch.randn(4, 3, base.shape[1], generator=seeded(2)), dim=-1)
    slow = [[math.log(sum(math.exp(14 * float(z @ c)) for c in group) / 3) for group in three] for z in embeddings]
    assert torch.allclose(center_logits(embeddings, three, 14.0), torch.tensor(slow), atol=1e-4)


def test_planes_hold_every_value_and_square_is_asked_only_where_it_fits() -> None:
    for shape in ((3, 8, 8), (2, 3, 8, 8), (128, 3), (6, 64), (7,)):
        assert math.prod(plane_shape(shape)) == math.prod(shape)
    assert square_fits((1, 32, 32)) and not square_fits((1, 12, 12)) and not square_fits((1, 4, 4))


def test_a_value_clamped_to_its_box_is_in_it() -> None:
    """Bounds that float32 cannot hold: the clamped value is a little outside of the float64 bound."""
    box = Box(-58.86, 58.86, "m/s^2", 0.4)
    clamped = box.clamp(torch.tensor([-100.0, 100.0]))
    assert float(clamped.max()) > box.high
    check_inputs(box, "trace", clamped)
    with pytest.raises(ValueError, match="Convert the unit"):
        check_inputs(box, "trace", clamped * (1 + 1e-6))
    for name, refused in (("image", torch.tensor([1.0]).nextafter(torch.tensor(2.0))), ("depth", torch.tensor([0]))):
        with pytest.raises(ValueError, match="Convert the unit"):  # bounds that the type holds, and integers, have no slack
            check_inputs(box_of(name), name, refused)


class _Dropping(nn.Module):
    modality, dimension, logit_scale, box = "image", 4, 10.0, Box(0.0, 1.0, "intensity", 1 / 255)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(nn.functional.dropout(inputs + 1.0, 0.5) + 0.1, dim=-1)


def test_what_does_not_fit_is_refused_with_its_fix() -> None:
    task = build_task()
    encoder, inputs = task.encoders["image"], task.splits["test"].inputs["image"][:2]
    with pytest.raises(ValueError, match=r"eval\(\)"):
        check_encoder(_Dropping(), torch.rand(8, 4, generator=seeded()))
    with pytest.raises(ValueError, match="Convert the unit or clamp"):
        check_encoder(encoder, 255 * inputs)
    with pytest.raises(ValueError, match=r"\[classes, 16\]"):
        Classifier(encoder, torch.eye(8))
    with pytest.raises(ValueError, match="normalise them"):
        check_centers(2 * centers(), 16)
    with pytest.raises(ValueError, match="one name per center"):
        check_centers(centers(), 16, ["bar"])
    with pytest.raises(ValueError, match=r"Unknown modality 'sonar'.*'heat'"):
        task.check("sonar")
    with pytest.raises(ValueError, match="allowed:.*apgd-ce"):
        AutoAttackConfig(attacks=("fgsm",))
    with pytest.raises(ValueError, match="0 or more"):
        Ball(inputs, encoder.box, -1.0)
