"""What `linear_cross_entropy` refuses, and that each refusal names the argument, what was given and what is allowed."""

from typing import Any

import pytest
import torch

from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from multimodal.kernels.statistics import VocabShard

H, W, T = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 5, 2, -100])
HALVES = torch.full((4, 2), 0.5)


def call(**changes: Any) -> None:
    arguments = {"hidden": H, "weight": W, "targets": T, **changes}
    linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": W.T}, ["weight", "[3, 6]", "[V, D]", ".T"]),
        ({"weight": W.double()}, ["hidden", "float32", "float64", "weight.to(hidden.dtype)"]),
        ({"targets": T[:3]}, ["targets", "[3]", "[4]"]),
        ({"targets": T.int()}, ["targets", "int32", "int64"]),
        ({"targets": torch.tensor([0, 6, 2, -100])}, ["targets", "6", "0 <= id < 6"]),
        ({"targets": torch.tensor([0, -1, 2, -100])}, ["targets", "-1", "ignore_index"]),
        ({"vocab_range": (1, 6)}, ["targets", "0", "1 <= id < 6", "vocab_range"]),
        ({"vocab_range": (2, 7)}, ["vocab_range", "(2, 7)", "<= 6"]),
        ({"vocab_range": torch.tensor([[0, 6], [0, 5], [0, 6], [0, 6]])}, ["targets", "5", "0 <= id < 5"]),
        ({"vocab_range": torch.tensor([[0, 6], [0, 9], [0, 6], [0, 6]])}, ["vocab_range", "[0, 9]", "<= 6"]),
        ({"vocab_range": torch.zeros(4, 3, dtype=torch.long)}, ["vocab_range", "[4, 3]", "[4, 2]"]),
        ({"targets": T[:, None].expand(4, 2), "target_probs": HALVES * 1.1}, ["target_probs", "1.1", "sum 1"]),
        ({"targets": T[:, None].expand(4, 2), "target_probs": HALVES * torch.nan}, ["target_probs", "nan", "sum 1"]),
        ({"target_probs": HALVES}, ["targets", "[4]", "[4, K]"]),
        ({"targets": T[:, None].expand(4, 2), "target_probs": HALVES.clone().requires_grad_()}, ["target_probs", "detach"]),
        ({"bias": torch.zeros(5)}, ["bias", "[5]", "[6]"]),
        ({"token_weight": torch.ones(3)}, ["token_weight", "[3]", "[4]"]),
        ({"temperature": 0.0}, ["temperature", "0.0", "positive"]),
        ({"temperature": torch.ones(4, requires_grad=True)}, ["temperature", "gradient", "hidden"]),
        ({"softcap": -1.0}, ["softcap", "-1.0", "positive"]),
        ({"label_smoothing": 1.5}, ["label_smoothing", "1.5", "[0, 1]"]),
        ({"reduction": "avg"}, ["reduction", "avg", "'mean'"]),
        ({"reduction": "sum", "normalizer": 3.0}, ["normalizer", "'sum'", "'mean'"]),
        ({"normalizer": 0.0}, ["normalizer", "0.0", "positive"]),
        ({"valid_index": torch.tensor([True])}, ["valid_index", "bool", "int64"]),
        ({"valid_index": torch.tensor([0, 3])}, ["targets", "-100"]),
        ({"backend": "fast"}, ["backend", "fast", "'chunked'"]),
        ({"backend": 3}, ["backend", "3", "'chunked'"]),
        ({"backend": "reference", "vocab_shard": VocabShard(0, 11)}, ["vocab_shard", "'reference'", "'chunked'"]),
        ({"token_loss": lambda statistics: statistics.nll, "z_loss": 0.1}, ["token_loss", "z_loss"]),
        ({"hidden": H * torch.nan}, ["hidden", "NaN"]),
        ({"weight": W / 0}, ["weight", "infinity"]),
        ({"weight": W / 0, "return_stats": True}, ["weight", "infinity"]),
        ({"bias": torch.full((6,), torch.nan)}, ["bias"]),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(changes: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        call(**changes)
    missing = [word for word in words if word not in str(refusal.value)]
    assert not missing, f"{refusal.value}\nlacks {missing}"


def test_validation_of_values_can_be_left_out():
    assert linear_cross_entropy(H * torch.nan, W, T, validate=False).isnan()
