"""Published names -> ours: a table per family, read strictly."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.pretrained.shards import Shards, as_stored_or

# Published name -> our name. `*` stands for a number, `**` for the rest of the name; both mean the same thing on either side.
Table = Mapping[str, str]

# One Llama-like block stack, below whatever the family calls it. What a model lacks (biases, q/k norms) is simply not there.
DECODER: Table = {
    "embed_tokens.**": "text_embedding.**",
    "layers.*.input_layernorm.**": "decoder.blocks.*.attention_norm.**",
    "layers.*.post_attention_layernorm.**": "decoder.blocks.*.mlp_norm.**",
    "layers.*.self_attn.q_proj.**": "decoder.blocks.*.attention.query.**",
    "layers.*.self_attn.k_proj.**": "decoder.blocks.*.attention.key.**",
    "layers.*.self_attn.v_proj.**": "decoder.blocks.*.attention.value.**",
    "layers.*.self_attn.o_proj.**": "decoder.blocks.*.attention.output.**",
    "layers.*.self_attn.q_norm.**": "decoder.blocks.*.attention.query_norm.**",
    "layers.*.self_attn.k_norm.**": "decoder.blocks.*.attention.key_norm.**",
    "layers.*.mlp.gate_proj.**": "decoder.blocks.*.mlp.gate.**",
    "layers.*.mlp.up_proj.**": "decoder.blocks.*.mlp.up.**",
    "layers.*.mlp.down_proj.**": "decoder.blocks.*.mlp.down.**",
    "norm.**": "decoder.norm.**",
}

# Buffers that old versions of transformers saved, though they follow from the config.
DERIVED = ("**rotary_emb.inv_freq", "**embeddings.position_ids")


def under(prefix: str, table: Table) -> dict[str, str]:
    """The table of names that begin with `prefix`."""
    return {prefix + theirs: ours for theirs, ours in table.items()}


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    parts: tuple[str, ...]  # our name between the wildcards

    def apply(self, name: str) -> str | None:
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        values = [*match.groups(), ""]
        return "".join(part + value for part, value in zip(self.parts, values, strict=True))


def _rule(theirs: str, ours: str) -> _Rule:
    pattern = re.escape(theirs).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)")
    return _Rule(re.compile(pattern), tuple(re.split(r"\*\*|\*", ours)))


def renamed(names: list[str], table: Table) -> tuple[dict[str, str], list[str]]:
    """Our name -> published name for every name that the table knows, and the names it does not.

    The first row that fits wins. Raises ValueError if two published names mean the same weight.
    """
    rules = [_rule(theirs, ours) for theirs, ours in table.items()]
    ignored = [_rule(pattern, pattern) for pattern in DERIVED]
    found: dict[str, str] = {}
    unread: list[str] = []
    for name in names:
        ours = next((result for rule in rules if (result := rule.apply(name)) is not None), None)
        if ours is None:
            if not any(rule.pattern.fullmatch(name) for rule in ignored):
                unread.append(name)
        elif ours in found:
            raise ValueError(
                f"The checkpoint holds one weight twice: {found[ours]} and {name}. It mixes two layouts; save it again."
            )
        else:
            found[ours] = name
    return found, unread


def read_weights(
    shards: Shards, names: list[str], table: Table, expected: Mapping[str, Tensor], dtype: torch.dtype | None, family: str
) -> dict[str, Tensor]:
    """Of the stored `names` a tensor for each of `expected` (a state dict; only its shapes count).

    dtype: of the tensors; None: as stored. Raises ValueError naming every published weight that nothing reads, every weight of
    ours that is missing, and every shape that differs.
    """
    found, unread = renamed(names, table)
    unread += [found[name] for name in found.keys() - expected.keys()]
    missing = [name for name in expected if name not in found]
    shapes = [
        f"{found[name]} is {list(shards.shape(found[name]))}, the config says {list(expected[name].shape)}"
        for name in expected
        if name in found and shards.shape(found[name]) != tuple(expected[name].shape)
    ]
    if unread or missing or shapes:
        parts = (("that nothing reads", sorted(unread)), ("missing", missing), ("of another shape", shapes))
        details = "\n".join(f"  {len(names)} {what}: {_shortened(names)}" for what, names in parts if names)
        raise ValueError(
            f"The weights in {shards.folder} are not laid out as {family}:\n{details}\n"
            f"If it is a model of another kind or an adapter, merge or export it to {family} first."
        )
    return {name: as_stored_or(shards[found[name]], dtype) for name in expected}


def _shortened(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
