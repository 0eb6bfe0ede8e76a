"""What an attacker may choose from: the points near a sample that are still valid inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.bind.interface import Box


@dataclass(frozen=True)
class Ball:
    """Within `radius` of `center` [B, *shape] under the box's norm (l2: over one whole sample), and inside the box.

    The box contains the center, so clamping to it never moves a point away from the center: projecting onto the ball first and
    clamping second ends in both sets.
    """

    center: Tensor
    box: Box
    radius: float

    def __post_init__(self) -> None:
        if not self.radius >= 0:
            raise ValueError(f"An attack has radius {self.radius} {self.box.unit}; it must be 0 or more.")

    def project(self, points: Tensor) -> Tensor:
        if self.box.norm == "linf":
            near = torch.clamp(points, self.center - self.radius, self.center + self.radius)
        else:
            offset = points - self.center
            near = self.center + offset * (self.radius / sample_norm(offset).clamp_min(1e-12)).clamp_max(1.0)
        return self.box.clamp(near)

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Uniform in the ball, then clamped to the box."""
        if self.box.norm == "linf":
            return self.project(self.center + self.radius * (2 * self._uniform(self.center.shape, generator) - 1))
        size = self.center[0].numel()
        share = self._uniform((len(self.center), *[1] * (self.center.ndim - 1)), generator) ** (1 / size)
        return self.project(self.center + self.radius * share * self._direction(generator))

    def surface_point(self, generator: torch.Generator) -> Tensor:
        """On the ball's surface (linf: a corner, l2: any direction), then clamped to the box."""
        if self.box.norm == "linf":
            sign = 2.0 * (self._uniform(self.center.shape, generator) < 0.5).to(self.center) - 1
            return self.project(self.center + self.radius * sign)
        return self.project(self.center + self.radius * self._direction(generator))

    def ascend(self, points: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
        """A step of length `size` (or one per sample, [B, 1, ..]) along the steepest ascent of the norm, projected."""
        if self.box.norm == "linf":
            return self.project(points + size * gradient.sign())
        return self.project(points + size * gradient / sample_norm(gradient).clamp_min(1e-12))

    def size_of(self, points: Tensor) -> Tensor:
        """Distance of each point from its center under the norm: [B]."""
        offset = (points - self.center).flatten(1)
        return offset.abs().amax(1) if self.box.norm == "linf" else offset.norm(dim=1)

    def rows(self, index: Tensor) -> "Ball":
        return Ball(self.center[index], self.box, self.radius)

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device, dtype=self.center.dtype).to(self.center.device)

    def _direction(self, generator: torch.Generator) -> Tensor:
        shape, dtype = self.center.shape, self.center.dtype
        normal = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(self.center.device)
        return normal / sample_norm(normal).clamp_min(1e-12)


def sample_norm(values: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped to broadcast over it: [B, *shape] -> [B, 1, ..]."""
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.ndim - 1))
