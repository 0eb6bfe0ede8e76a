"""What an attack raises, sample by sample.

An attack loss is a function of points [B, *shape] in the box that returns (loss [B], margin [B]): the loss has the gradient
to follow, and a margin above 0 means that the sample is fooled there. A loss that does not speak of classes has itself as
margin. Every one of them is unchanged, or scaled, when the logits are multiplied by a positive number, so that flat logits
cannot hide an adversarial example: plain cross-entropy of cosines has gradients that vanish or point nowhere in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

AttackLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
Logits = Callable[[Tensor], Tensor]  # points [B, *shape] -> [B, C]
Embed = Callable[[Tensor], Tensor]  # points [B, *shape] -> [B, D]

SHARPNESS = 3.0  # standard deviation over classes that a clean sample's logits are brought to before the cross-entropy


def margin_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Best other logit minus the label's: > 0 is misclassified. [B, C], [B] -> [B]."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def margin_loss(logits: Logits, labels: Tensor) -> AttackLoss:
    """Carlini and Wagner's margin (arXiv 1608.04644, f6)."""

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        margin = margin_of(logits(points), labels)
        return margin, margin

    return loss


def targeted_margin_loss(logits: Logits, labels: Tensor, targets: Tensor) -> AttackLoss:
    """The margin towards one given other class each; fooled is still any other class."""

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        values = logits(points)
        wanted = values.gather(1, targets[:, None])[:, 0] - values.gather(1, labels[:, None])[:, 0]
        return wanted, margin_of(values, labels)

    return loss


def scaled_cross_entropy(logits: Logits, labels: Tensor, clean: Tensor) -> AttackLoss:
    """Cross-entropy of logits brought to one sharpness, by a factor of each sample that its clean point decides.

    The factor is constant during an attack, so losses of different steps compare.
    """
    with torch.no_grad():
        factor = SHARPNESS / logits(clean).std(1, keepdim=True).clamp_min(1e-30)

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        values = factor * logits(points)
        return F.cross_entropy(values, labels, reduction="none"), margin_of(values, labels)

    return loss


def dlr_loss(logits: Logits, labels: Tensor) -> AttackLoss:
    """Difference of logits ratio (Croce and Hein, arXiv 2003.01690, eq. 6). Needs three classes."""

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        values = logits(points)
        if values.shape[1] < 3:
            raise ValueError(f"The DLR loss needs 3 classes; there are {values.shape[1]}. Use the margin instead.")
        top = values.topk(3, dim=1).values
        margin = margin_of(values, labels)
        return margin / (top[:, 0] - top[:, 2]).clamp_min(1e-12), margin

    return loss


def rank_loss(logits: Logits, labels: Tensor, rank: int) -> AttackLoss:
    """Margin of the `rank`-th best other column over the label's: > 0 is a miss at recall `rank`."""

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        values = logits(points)
        own = values.gather(1, labels[:, None])[:, 0]
        others = values.scatter(1, labels[:, None], -torch.inf).topk(min(rank, values.shape[1] - 1), dim=1).values
        margin = others[:, -1] - own
        return margin, margin

    return loss


def feature_loss(embed: Embed, wanted: Tensor, logits: Logits | None = None, labels: Tensor | None = None) -> AttackLoss:
    """Minus the squared distance of the embedding to a wanted one [B, D] (feature matching: it ignores the classifier)."""

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        value = -(embed(points) - wanted).square().sum(1)
        if logits is None or labels is None:
            return value, value
        with torch.no_grad():
            return value, margin_of(logits(points), labels)

    return loss


def drift_loss(embed: Embed, clean: Tensor) -> AttackLoss:
    """Squared distance of the embedding from the clean one [B, ...] (FARE's inner attack, arXiv 2402.12336)."""

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        value = (embed(points) - clean).flatten(1).square().sum(1)
        return value, value

    return loss


def expected(loss: AttackLoss, draws: int) -> AttackLoss:
    """Mean over `draws` evaluations (expectation over transformation, arXiv 1707.07397), for anything random."""

    def averaged(points: Tensor) -> tuple[Tensor, Tensor]:
        values = [loss(points) for _ in range(draws)]
        return torch.stack([value for value, _ in values]).mean(0), torch.stack([margin for _, margin in values]).mean(0)

    return averaged if draws > 1 else loss
