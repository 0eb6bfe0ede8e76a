"""Forward passes of the target over slots: read a part of a prompt, or verify the draft trees of many requests at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.attention import ragged_mask, tree_mask
from multimodal.slot_cache import SlotCache
from multimodal.vlm import VLM
from serve.request import TokenLogprobs
from serve.tree import DraftTree


@dataclass(frozen=True)
class Verified:
    """Of each request r and each node of its tree: rows beyond a tree's nodes are padding."""

    hidden: Tensor  # [R, M, hidden_size]
    logits: Tensor  # [R, M, vocab_size]

    def best(self) -> list[list[int]]:
        """The most likely token after each node, the lowest id among equals."""
        return self.logits.argmax(-1).tolist()


class Runner:
    """The target's weights and its key/value slots."""

    def __init__(self, vlm: VLM, num_slots: int, capacity: int) -> None:
        self.vlm = vlm
        weight = vlm.text_embedding.weight
        self.cache = SlotCache(vlm.config.decoder, num_slots, capacity, weight.dtype, weight.device)
        self.device = weight.device

    @torch.inference_mode()
    def read(self, slot: int, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Append prompt positions [T, hidden_size] to a slot; their hidden states [T, hidden_size].

        mask bool [T, length + T]: whom they see among what the slot holds and themselves (`VLM.sequence_mask`).
        """
        start, count = self.cache.lengths[slot], len(embeddings)
        positions = torch.arange(start, start + count, device=self.device)[None]
        hidden = self.vlm.decoder(embeddings[None], mask, positions, self.cache.rows([slot], count))
        self.cache.commit(slot, range(count))
        return hidden[0]

    @torch.inference_mode()
    def verify(self, slots: Sequence[int], trees: Sequence[DraftTree]) -> Verified:
        """The trees' roots and nodes behind what each slot holds, in one pass; nothing is committed.

        Rows are padded to the largest tree. The controller sizes the trees of a round together, and up to a machine-dependent
        number of rows a pass costs what one row costs, so padding is cheaper than a second pass.
        """
        inputs = tree_inputs([self.cache.lengths[slot] for slot in slots], trees, self.device)
        rows = self.cache.rows(slots, inputs.tokens.shape[1])
        hidden = self.vlm.decoder(self.vlm.embed_text(inputs.tokens), inputs.mask, inputs.positions, rows)
        return Verified(hidden, self.vlm.logits(hidden))


@dataclass(frozen=True)
class TreeInputs:
    """Arguments of one pass over several trees."""

    tokens: Tensor  # int64 [R, M]
    positions: Tensor  # int64 [R, M]
    mask: Tensor | None  # bool [R, 1, M, K]; None: everything may look at everything


def tree_inputs(starts: Sequence[int], trees: Sequence[DraftTree], device: torch.device) -> TreeInputs:
    """starts: positions before each tree's root. Padding nodes see the past and themselves."""
    num_nodes = max(len(tree.tokens) for tree in trees)
    tokens = [list(tree.tokens) + [0] * (num_nodes - len(tree.tokens)) for tree in trees]
    depths = [list(tree.depths) + [0] * (num_nodes - len(tree.tokens)) for tree in trees]
    positions = torch.tensor(depths) + torch.tensor(starts)[:, None]
    if num_nodes == 1 and min(starts) == max(starts):
        mask = None
    else:
        blocks = torch.eye(num_nodes, dtype=torch.bool).repeat(len(trees), 1, 1)
        for row, tree in enumerate(trees):
            blocks[row, : len(tree.tokens), : len(tree.tokens)] = tree_mask(tree.parents)
        mask = ragged_mask(starts, blocks).to(device)
    return TreeInputs(torch.tensor(tokens).to(device), positions.to(device), mask)


def token_logprobs(rows: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of tokens [n] under the logits rows [n, V] that they were chosen from, and of the `top` best ids."""
    logs = rows.double().log_softmax(-1)
    values, ids = logs.topk(top, dim=-1) if top else (logs[:, :0], logs[:, :0].long())
    chosen = logs.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0].tolist()
    pairs = zip(chosen, ids.tolist(), values.tolist(), strict=True)
    return tuple(TokenLogprobs(logprob, tuple(zip(row_ids, row_values, strict=True))) for logprob, row_ids, row_values in pairs)
