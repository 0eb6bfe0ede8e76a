"""A trained bound model and its corpus as what calibration is given (multimodal/bind/task.py)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from multimodal.bind.bound_checkpoint import load_bound
from multimodal.bind.corpus_file import TEST, TRAIN, UNSEEN, VALIDATION
from multimodal.bind.data import BoundSamples
from multimodal.bind.task import BindTask, Bound


def build_task(model: str, corpus: str, pooling: str = "mean") -> BindTask:
    """The task of a checkpoint folder and a corpus folder; pooling: mean (one center a class) or lse (one a sentence).

    Raises what `load_bound` and `BoundSamples` raise, ValueError for another pooling.
    """
    if pooling not in ("mean", "lse"):
        raise ValueError(f"pooling is {pooling!r}; calibration knows 'mean' and 'lse'.")
    loaded = load_bound(model)
    kinds = loaded.assets.classes
    vectors = loaded.centers(tuple(range(len(kinds)))).vectors
    centers = F.normalize(vectors.mean(1), dim=-1) if pooling == "mean" else vectors

    def bound(*splits: str) -> Bound:
        parts = [BoundSamples(corpus, split) for split in splits]
        inputs: dict[str, Tensor] = {name: torch.cat([part.inputs(name) for part in parts]) for name in loaded.model.trunks}
        return Bound(inputs, torch.cat([part.labels for part in parts]))

    splits = {"train": bound(TRAIN), "validation": bound(VALIDATION), "test": bound(TEST, UNSEEN)}
    encoders = {name: loaded.model.encoder(name) for name in loaded.model.trunks}
    unseen = tuple(index for index, kind in enumerate(kinds) if not kind.is_seen)
    return BindTask(encoders, centers, tuple(kind.name for kind in kinds), splits, unseen)
