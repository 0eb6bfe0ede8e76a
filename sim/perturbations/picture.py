"""One start of a suite under every perturbation, as one picture (`vla perturb-picture`): a row a kind, a column a severity."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.environment import Environment
from sim.perturbations.kinds import KINDS, SEVERITIES, PerturbConfig
from sim.perturbations.perturbed_environment import PerturbedEnvironment, perturbed
from sim.seeds import start
from sim.suites import build_environment, get_suite

LABEL_WIDTH, LABEL_HEIGHT = 74, 14  # pixels
INK, PAPER = (20, 20, 20), (255, 255, 255)
COLOURS = 160  # of the PNG's palette
SHOWN = tuple(kind for kind in KINDS if kind != "state_noise")  # which cannot be seen


@dataclass(frozen=True)
class PictureConfig:
    """Settings of `vla perturb-picture`."""

    suite: str = "robosuite_lift"
    output: Path = Path("perturbations.png")
    task: int = 0
    split: str = "validation"
    index: int = 0  # of the start
    tile: int = 96  # pixels, width of each camera frame
    moves: int = 12  # steps of motion before the frame is taken, so that what comes late is seen to


def draw(config: PictureConfig, environment: Environment, kinds: Sequence[str] = SHOWN) -> np.ndarray:
    """uint8 [rows, columns, 3]: kinds downwards, severities 0 to 5 to the right, the first camera's view in each tile."""
    from PIL import Image, ImageDraw

    size = config.tile
    page = Image.new("RGB", (LABEL_WIDTH + len(SEVERITIES) * size, LABEL_HEIGHT + len(kinds) * size), PAPER)
    pen = ImageDraw.Draw(page)
    for column, severity in enumerate(SEVERITIES):
        pen.text((LABEL_WIDTH + column * size + 2, 1), "clean" if severity == 0 else f"severity {severity}", fill=INK)
    clean = shown(environment, config, PerturbConfig())
    for row, kind in enumerate(kinds):
        top = LABEL_HEIGHT + row * size
        pen.text((2, top + size // 2 - 6), kind, fill=INK)
        for column, severity in enumerate(SEVERITIES):
            seen = shown(environment, config, PerturbConfig(kind, severity)) if severity else clean
            left = LABEL_WIDTH + column * size
            if kind == "instruction":
                pen.multiline_text((left + 3, top + 8), textwrap.fill(seen.instruction, (size - 6) // 6), fill=INK)
            else:
                page.paste(Image.fromarray(seen.images[environment.spec.cameras[0]]), (left, top))
    return np.asarray(page)


def shown(environment: Environment, config: PictureConfig, perturb: PerturbConfig) -> Any:
    """The observation after some steps of one motion from the start. The environment is left as it was."""
    world = perturbed(environment, perturb)
    world.reset(config.task, start(config.split, config.index))
    for _ in range(config.moves):
        world.step(np.array([0.3, 0.5, -0.4, 0.0, 0.0, 0.0, -1.0]))
    seen = world.observe()
    if isinstance(world, PerturbedEnvironment):
        world.restore()
    return seen


def main(argv: list[str]) -> None:
    """`vla perturb-picture`."""
    from PIL import Image

    from vla.cli import parse_config

    config = parse_config(PictureConfig, argv, verb="perturb-picture")
    get_suite(config.suite)
    environment = build_environment(config.suite, image_size=config.tile)
    pixels = draw(config, environment)
    environment.close()
    path = Path(config.output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, {path.stat().st_size / 1000:.0f} kB")
