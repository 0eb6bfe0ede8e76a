"""One set of weights that speaks and acts: a policy from scratch against the same policy begun on the trained VLM.

Both arms have the VLM's preset and image size, one data set, budget and validation starts; the second begins with the weights
of `vla train-vlm`. After training its backbone is asked the corpus's held-out questions again: what is left of the language.
Finished parts are kept, and a second call goes on from there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from multimodal.answering import Tally, tally_answers
from multimodal.corpus_file import HELD_OUT
from multimodal.data import SceneTexts
from multimodal.images import ImageConfig
from multimodal.vlm import VLM
from multimodal.vlm_checkpoint import LoadedVLM, load_vlm
from tests.benchmarks.arms import COLUMNS, Arm, add_arm_options, compare_arms, policy_of
from tests.benchmarks.harness import parser, report
from vla.frame_cache import FrameCache
from vla.home import remask_home
from vla.policy import load_policy

GROUPS = {"questions as in training": ("training",), "new templates": ("held_out",), "new layouts": ("layout", "new")}
ANSWER_COLUMNS = ("weights", *(f"{name} {unit}" for name in GROUPS for unit in ("exact %", "n", "bits a token")))


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_arm_options(arguments)
    arguments.add_argument("--vlm", type=Path, required=True, help="checkpoint folder of `vla train-vlm`")
    arguments.add_argument("--preset", default="desk-vlm", help="of that VLM, for the arm from scratch")
    arguments.add_argument("--corpus", type=Path, required=True, help="made by `vla corpus`")
    arguments.add_argument("--scenes", type=int, default=60, help="held-out scenes that are asked about")
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    vlm = load_vlm(options.vlm)
    root = remask_home() / "bench" / f"vlm_start-{options.suite}-{options.minutes:g}min-{vlm.content_hash[:8]}"
    frame_size = FrameCache.open(options.dataset).spec.image_size
    config = arm_config(options.config, vlm, options.preset, frame_size, root)
    arms = [Arm("scratch", config), Arm("from-vlm", config, (f"--start_from={options.vlm}",))]
    rows = compare_arms(arms, root, options)
    report(f"vlm_start-{options.suite}", ["arm", *COLUMNS], rows, options.output, minutes=options.minutes, vlm=vlm.content_hash)
    scenes = SceneTexts(options.corpus, HELD_OUT, vlm.assets.tokenizer, limit=options.scenes)
    policy = load_policy(policy_of(arms[1], root))
    spoken = [
        answer_row("the VLM", vlm.model, scenes, vlm.assets.images),
        answer_row("the VLM, other scenes' images", vlm.model, scenes, vlm.assets.images, swap_images=True),
        answer_row(f"after {options.minutes:g} minutes as a policy", policy.model.vlm, scenes, vlm.assets.images),
    ]
    output = options.output and options.output.with_name(f"{options.output.stem}-answers.json")
    report(f"vlm_start-{options.suite}-answers", ANSWER_COLUMNS, spoken, output, scenes=len(scenes), vlm=vlm.content_hash)
    return 0


def arm_config(base: Path, vlm: LoadedVLM, preset: str, frame_size: int, root: Path) -> Path:
    """The base YAML with the VLM's preset and image size, written to root/arm.yaml; a path of it.

    The crop is the share of a frame that the VLM saw of its own.
    """
    seen: ImageConfig = vlm.assets.images
    crop = round(frame_size * seen.crop / vlm.assets.image_size)
    images: Mapping[str, Any] = {"crop": crop, "size": seen.output_size}
    config = yaml.safe_load(base.read_text()) | {"model": {"preset": preset}, "images": images}
    path = root / "arm.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def answer_row(name: str, model: VLM, scenes: SceneTexts, images: ImageConfig, *, swap_images: bool = False) -> list:
    """Exact answers and bits per token on every text of the scenes; empty cells where a corpus lacks a group."""
    tallies = tally_answers(model.float(), scenes, images, swap_images=swap_images)
    row: list = [name]
    for group in GROUPS.values():
        tally = tallies.get(group, Tally())
        row += [100 * tally.accuracy if tally.asked else "", tally.asked, tally.bits_per_token if tally.tokens else ""]
    return row


if __name__ == "__main__":
    raise SystemExit(main())
