"""A bound task that is drawn and learnt in seconds: shapes of four colours, as pictures and as heat maps.

A class is a pair (colour, shape) and its center the normalised sum of one vector for each, so that two pairs can be kept from
training and still be recognised. Contrast is low: encoders get it right, and break at a few 255ths.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.interface import Box, check_inputs
from multimodal.bind.task import BindTask, Bound
from multimodal.config import DecoderConfig
from multimodal.decoder import Decoder, arange_positions

SIDE, PATCH, WIDTH, DIMENSION = 12, 4, 32, 16
COLOURS, SHAPES = ("red", "green", "blue", "grey"), ("bar", "pole", "square")
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
UNSEEN = (1, 5)
BOXES = {
    "image": Box(0.0, 1.0, "intensity", 1 / 255),
    "heat": Box(20.0, 80.0, "degrees C", 60 / 255),
    "heat-l2": Box(20.0, 80.0, "degrees C", 2.0, "l2"),
}


class Trunk(nn.Module):
    """Patches -> the backbone with a full mask -> mean -> shared space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patch = nn.Linear(channels * PATCH**2, WIDTH)
        tokens = (SIDE // PATCH) ** 2
        self.decoder = Decoder(
            DecoderConfig(hidden_size=WIDTH, num_layers=2, num_heads=2, mlp_size=64, positions="learned", max_positions=tokens)
        )
        self.output = nn.Linear(WIDTH, DIMENSION)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        tokens = self.patch(patches)
        positions = arange_positions(*tokens.shape[:1], 0, tokens.shape[1], tokens.device)
        return F.normalize(self.output(self.decoder(tokens, None, positions).mean(1)), dim=-1)


@dataclass
class DrawnEncoder:
    """A ModalityEncoder over a trunk."""

    modality: str
    box: Box
    trunk: Trunk
    dimension: int = DIMENSION
    logit_scale: float = 14.0

    def embed(self, inputs: Tensor) -> Tensor:
        check_inputs(self.box, self.modality, inputs.detach())
        return self.trunk(4 * (inputs - self.box.low) / (self.box.high - self.box.low) - 2)


def draw(count: int, generator: torch.Generator, classes: Tensor, contrast: float) -> Bound:
    """Shapes at random places with random light and noise."""
    labels = classes[torch.randint(len(classes), (count,), generator=generator)]
    colour, shape = labels // len(SHAPES), labels % len(SHAPES)
    tall, wide = torch.tensor([2, 8, 4])[shape], torch.tensor([8, 2, 4])[shape]
    corner = torch.rand(count, 2, generator=generator)
    top, left = (corner[:, 0] * (SIDE - tall + 1)).long(), (corner[:, 1] * (SIDE - wide + 1)).long()
    place = torch.arange(SIDE)
    rows = (place >= top[:, None]) & (place < (top + tall)[:, None])
    columns = (place >= left[:, None]) & (place < (left + wide)[:, None])
    mask = (rows[:, :, None] & columns[:, None, :]).float()
    tint = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])[colour]
    light = 0.45 + 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    image = light + contrast * tint[:, :, None, None] * mask[:, None]
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    warmth = torch.tensor([-2.0, -1, 1, 2])[colour][:, None, None, None]
    heat = 50 + 60 * contrast * warmth * mask[:, None] + 1.0 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    heat = heat.clamp(20, 80)
    return Bound({"image": image.clamp(0, 1), "heat": heat, "heat-l2": heat}, labels)


def centers() -> Tensor:
    basis = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=torch.Generator().manual_seed(1)))[0]
    colour, shape = basis[: len(COLOURS)], basis[len(COLOURS) : len(COLOURS) + len(SHAPES)]
    return F.normalize((colour[:, None] + shape[None]).flatten(0, 1), dim=-1)


@functools.cache
def build_task(contrast: float = 0.2, steps: int = 300) -> BindTask:
    """Draw the data and train both trunks: some seconds on one core."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(len(NAMES))
    seen = every[~torch.isin(every, torch.tensor(UNSEEN))]
    splits = {
        "train": draw(2000, generator, seen, contrast),
        "validation": draw(200, generator, seen, contrast),
        "test": draw(400, generator, every, contrast),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunks = {name: train_trunk(splits["train"], name, steps) for name in ("image", "heat")}
    trunks["heat-l2"] = trunks["heat"]
    encoders = {name: DrawnEncoder(name, BOXES[name], trunk) for name, trunk in trunks.items()}
    return BindTask(encoders, centers(), NAMES, splits, UNSEEN)


def train_trunk(bound: Bound, modality: str, steps: int) -> Trunk:
    inputs, seen = bound.inputs[modality], [row for row in range(len(NAMES)) if row not in UNSEEN]
    target, column = centers()[seen], torch.searchsorted(torch.tensor(seen), bound.labels)
    trunk = Trunk(inputs.shape[1])
    encoder = DrawnEncoder(modality, BOXES[modality], trunk)
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (64,))
        loss = F.cross_entropy(encoder.logit_scale * encoder.embed(inputs[rows]) @ target.T, column[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return trunk.eval().requires_grad_(False)
