"""Where episodes start: disjoint seed ranges for training, validation and official evaluation; nothing else draws one."""

from dataclasses import dataclass

SPLIT_SIZE = 1_000_000_000
# First seed of each split; a split owns [first, first + SPLIT_SIZE). All fit in numpy's 32-bit seeds.
FIRST_SEED = {"train": 0, "validation": 1_000_000_000, "official": 2_000_000_000}


@dataclass(frozen=True)
class Start:
    """How one episode begins; the same start of the same task is the same world, bit for bit."""

    split: str  # "train", "validation" or "official"
    index: int  # position within the split; LIBERO's official starts are the suite's stored states [index]
    seed: int  # of the placement, disjoint between splits


def start(split: str, index: int) -> Start:
    """The `index`-th start of a split. Raises ValueError on an unknown split or an index outside it."""
    if split not in FIRST_SEED:
        raise ValueError(f"Unknown split {split!r}; allowed: {', '.join(FIRST_SEED)}.")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"Start index {index} is outside split {split!r}; allowed: 0 to {SPLIT_SIZE - 1}.")
    return Start(split, index, FIRST_SEED[split] + index)
