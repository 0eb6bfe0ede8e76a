"""Randomised smoothing: a certified l2 radius of the classifier that votes under Gaussian noise (Cohen et al., arXiv 1902.02918).

The certificate is of the smoothed classifier, not of the encoder as it is used otherwise. Noise is clamped to the box before the
encoder sees it: the clamped encoder is a classifier like another, and the theorem holds for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.bind.interface import Box
from multimodal.bind.intervals import lower_bound, normal_quantile


@dataclass(frozen=True)
class SmoothingConfig:
    """How the votes are drawn."""

    sigma: float = 8.0  # standard deviation of the noise, in 255ths of the box's height
    choosing: int = 100  # draws that choose the class
    certifying: int = 1000  # draws that bound its probability
    alpha: float = 0.001  # probability that a radius is wrong


@dataclass(frozen=True)
class Certificates:
    """Per sample: the class voted for (-1: abstained) and the radius within which the vote cannot change, box's unit."""

    classes: Tensor  # int64 [B]
    radius: Tensor  # float64 [B], l2 over a sample; 0 where abstained

    def certified_share(self, labels: Tensor, radius: float) -> float:
        """Share of samples that are right and certified for at least `radius`."""
        return float(((self.classes == labels) & (self.radius >= radius) & (self.radius > 0)).float().mean())


@torch.no_grad()
def certify(
    logits: Callable[[Tensor], Tensor], inputs: Tensor, box: Box, config: SmoothingConfig, generator: torch.Generator, batch: int = 500
) -> Certificates:
    """Algorithm CERTIFY of the paper for each of inputs [B, *shape]."""
    sigma = config.sigma * (box.high - box.low) / 255
    classes = torch.full((len(inputs),), -1)
    radius = torch.zeros(len(inputs), dtype=torch.float64)
    for row, sample in enumerate(inputs):
        guess = int(votes(logits, sample, box, sigma, config.choosing, generator, batch).argmax())
        count = int(votes(logits, sample, box, sigma, config.certifying, generator, batch)[guess])
        share = lower_bound(count, config.certifying, config.alpha)
        if share > 0.5:
            classes[row], radius[row] = guess, sigma * normal_quantile(share)
    return Certificates(classes.to(inputs.device), radius.to(inputs.device))


def votes(
    logits: Callable[[Tensor], Tensor], sample: Tensor, box: Box, sigma: float, draws: int, generator: torch.Generator, batch: int
) -> Tensor:
    """How often each class wins under noise: int64 [C]."""
    counts = torch.zeros(0, dtype=torch.long)
    for first in range(0, draws, batch):
        noise = torch.randn((min(batch, draws - first), *sample.shape), generator=generator).to(sample)
        values = logits(box.clamp(sample + sigma * noise))
        part = torch.bincount(values.argmax(1).cpu(), minlength=values.shape[1])
        counts = part if counts.numel() == 0 else counts + part
    return counts
