"""What calibration and its evaluation are given: encoders of one shared space, its centers, aligned samples, unseen classes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.bind.classifier import check_centers, check_modality
from multimodal.bind.encoder_checks import check_encoder
from multimodal.bind.interface import ModalityEncoder, check_inputs

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Bound:
    """Samples of one split; sample i of every modality shows the same thing."""

    inputs: Mapping[str, Tensor]  # modality -> [N, *shape], in its encoder's box
    labels: Tensor  # int64 [N], index of the class

    def select(self, index: Tensor) -> "Bound":
        return Bound({name: values[index] for name, values in self.inputs.items()}, self.labels[index])


@dataclass(frozen=True)
class BindTask:
    """Trained encoders and the data to calibrate and judge them with.

    unseen: classes that no training or validation sample has; test holds them beside the others. A command finds a task as
    "module:function", called with the settings `task_options`.
    """

    encoders: Mapping[str, ModalityEncoder]
    centers: Tensor  # unit vectors [C, D] or [C, K, D]
    class_names: tuple[str, ...]
    splits: Mapping[str, Bound]  # train, validation, test
    unseen: tuple[int, ...] = ()

    def check(self, modality: str) -> ModalityEncoder:
        """The modality's encoder, once it, its inputs and the centers are what they should be; else ValueError."""
        encoder = check_modality(self.encoders, modality)
        check_centers(self.centers, encoder.dimension, self.class_names)
        missing = [split for split in SPLITS if split not in self.splits]
        if missing:
            raise ValueError(f"The task has no split {missing[0]!r}; needed: {list(SPLITS)}.")
        for name, bound in self.splits.items():
            if modality not in bound.inputs:
                raise ValueError(f"Split {name!r} has no {modality!r} inputs; it has {sorted(bound.inputs)}.")
            check_inputs(encoder.box, modality, bound.inputs[modality])
            if name != "test" and torch.isin(bound.labels, torch.tensor(self.unseen, dtype=torch.long)).any():
                raise ValueError(f"Split {name!r} holds samples of the unseen classes {list(self.unseen)}; drop them.")
        check_encoder(encoder, self.splits["test"].inputs[modality][:4], modalities=None)
        return encoder

    def is_unseen(self, bound: Bound) -> Tensor:
        """bool [N]"""
        return torch.isin(bound.labels, torch.tensor(self.unseen, dtype=torch.long))

    @property
    def seen(self) -> Tensor:
        """The other classes: int64 [S]. Training knows their centers alone: a negative is something that was seen too."""
        return torch.tensor([index for index in range(len(self.class_names)) if index not in self.unseen])


def trunk_of(encoder: ModalityEncoder) -> nn.Module:
    """The module that holds an encoder's weights: the encoder itself, or the modules among its attributes."""
    if isinstance(encoder, nn.Module):
        return encoder
    modules = {name: value for name, value in vars(encoder).items() if isinstance(value, nn.Module)}
    return next(iter(modules.values())) if len(modules) == 1 else nn.ModuleDict(modules)


def count_weights(module: nn.Module) -> int:
    """All scalars, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def weights_hash(encoder: ModalityEncoder) -> str:
    """First 16 hex digits of a SHA-256 over the names and bytes of an encoder's weights: which encoder a figure or folder is of."""
    digest = hashlib.sha256()
    for name, value in sorted(trunk_of(encoder).state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
