"""New token ids behind a published vocabulary (masks, actions, markers), in rows of their own."""

from dataclasses import replace

import torch
from torch import nn

from multimodal.vlm import VLM


def grow_vocabulary(vlm: VLM, count: int) -> VLM:
    """Give `vlm`, in place, the ids vocab_size .. vocab_size + count - 1; only their rows of the vocabulary train from then on.

    The published table stays one frozen tensor (memory-mapped as it was read), so optimiser state and checkpoints of a run grow
    by `count` rows, not by a table. A new row starts as the mean of all, where it changes the other ids' probabilities least
    (Hewitt 2021, "Initializing new word embeddings"). Raises ValueError if the vocabulary has grown before.
    """
    if vlm.config.num_new_tokens:
        raise ValueError(f"The vocabulary has grown by {vlm.config.num_new_tokens} ids already; load the model again to choose another number.")
    if count < 1:
        raise ValueError(f"Cannot grow a vocabulary by {count} ids; give at least 1.")
    width = vlm.config.decoder.hidden_size
    vlm.new_embedding = nn.Embedding.from_pretrained(_mean_rows(vlm.text_embedding.weight, count), freeze=False)
    vlm.new_head = None
    if vlm.head is not None:
        vlm.new_head = nn.Linear(width, count, bias=False, device="meta")
        vlm.new_head.weight = nn.Parameter(_mean_rows(vlm.head.weight, count))
        vlm.head.weight.requires_grad_(False)
    vlm.text_embedding.weight.requires_grad_(False)
    vlm.config = replace(vlm.config, num_new_tokens=count)
    return vlm


@torch.no_grad()
def _mean_rows(table: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of a table [V, D], `count` times: [count, D]."""
    return table.mean(0, dtype=torch.promote_types(table.dtype, torch.float32)).to(table.dtype).repeat(count, 1)
