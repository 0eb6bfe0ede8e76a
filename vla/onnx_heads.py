"""The action heads on onnxruntime and numpy: what vla/token_heads.py and vla/continuous_heads.py do on torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from multimodal.onnx_runner import OnnxRunner
from vla.action_tokenizer import ActionTokenizer
from vla.decision import Decision, KnownActions
from vla.numpy_decoding import Decoded, decode, one_hot, softmax
from vla.unmasking import DecodeConfig, RowNoise


@dataclass(frozen=True)
class OnnxPrefix:
    """An encoded batch of observations, see `vla.model.Prefix`."""

    is_real: np.ndarray  # bool [B, P']
    cache: dict[str, Any]  # keys.i, values.i -> [B, kv_heads, P', head_dim], where the graph left them

    def select(self, rows: np.ndarray) -> "OnnxPrefix":
        """Rows of the batch; the prefix itself when they are all of it, in order."""
        if len(rows) == len(self.is_real):
            return self
        return OnnxPrefix(self.is_real[rows], {name: as_array(value)[rows] for name, value in self.cache.items()})

    @property
    def feeds(self) -> dict[str, Any]:
        """The inputs that every step graph has."""
        return {"is_real": self.is_real} | self.cache


@dataclass(frozen=True)
class OnnxHead:
    """A step graph and how its head is decoded."""

    type: str
    step: OnnxRunner
    tokenizer: ActionTokenizer

    def act(self, prefix: OnnxPrefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]) -> Decision:
        """Decode whole chunks that continue the known actions, see `vla.action_head.ActionHead.act`."""
        return _DECIDE[self.type](self, prefix, known, config, seeds)


def as_array(value: Any) -> np.ndarray:
    """An OrtValue, or an array, as an array."""
    return value if isinstance(value, np.ndarray) else value.numpy()


# -------------------------------------------------------------------------------------------------------- heads of tokens


def _diffusion(
    head: OnnxHead, prefix: OnnxPrefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]
) -> Decision:
    tokens, is_known = _known_tokens(head.tokenizer, known)
    horizon, ranges = known.actions.shape[1], np.array([head.tokenizer.valid_range(d) for d in range(known.actions.shape[2])])
    allowed = np.tile(head.tokenizer.allowed, (horizon, 1))  # [L, V]
    is_ordinal = np.tile(ranges[:, 1] - ranges[:, 0] > 2, horizon)

    def logits_of(noisy: np.ndarray, rows: np.ndarray) -> np.ndarray:
        logits = head.step.run({"tokens": noisy, **prefix.select(rows).feeds})["logits"]
        return np.where(allowed, logits, -np.inf)

    decoded = decode(logits_of, tokens, is_known, head.tokenizer.mask_id, config, seeds, is_ordinal)
    return _token_decision(head.tokenizer, decoded, known)


def _parallel(
    head: OnnxHead, prefix: OnnxPrefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]
) -> Decision:
    return _diffusion(head, prefix, known, replace(config, rounds=1), seeds)


def _autoregressive(
    head: OnnxHead, prefix: OnnxPrefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]
) -> Decision:
    given_tokens, is_known = _known_tokens(head.tokenizer, known)
    batch, num_slots = given_tokens.shape
    buffers = {
        port.name: np.zeros((batch, *port.shape[1:]), dtype=port.dtype)
        for port in head.step.inputs
        if port.name.startswith("slot_")
    }
    previous = np.full((batch, 1), head.tokenizer.mask_id)
    tokens, probs = np.empty_like(given_tokens), []
    for slot in range(num_slots):
        feeds = {"previous": previous, "slot": np.array([slot]), **prefix.feeds, **buffers}
        result = head.step.run(feeds)
        for name, buffer in buffers.items():
            buffer[:, :, slot : slot + 1] = result[name.replace("slot_", "new_", 1)]
        logits = np.where(head.tokenizer.allowed[slot % head.tokenizer.action_dim], result["logits"][:, 0], -np.inf)
        slot_probs = softmax(logits.astype(np.float32))
        given = is_known[:, slot]
        tokens[:, slot] = np.where(given, given_tokens[:, slot], slot_probs.argmax(-1))
        probs.append(np.where(given[:, None], one_hot(tokens[:, slot], slot_probs.shape[-1]), slot_probs))
        previous = tokens[:, slot : slot + 1]
    all_probs = np.stack(probs, axis=1)
    confidence = np.take_along_axis(all_probs, tokens[..., None], axis=2)[..., 0]
    return _token_decision(head.tokenizer, Decoded(tokens, all_probs, confidence, np.full(batch, num_slots)), known)


def _known_tokens(tokenizer: ActionTokenizer, known: KnownActions) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 [B, L] of the known actions, and which slots they hold, bool [B, L]."""
    batch, _, dim = known.actions.shape
    return tokenizer.encode(known.actions).reshape(batch, -1), np.repeat(known.is_known, dim, axis=1)


def _token_decision(tokenizer: ActionTokenizer, decoded: Decoded, known: KnownActions) -> Decision:
    shape = known.actions.shape
    probs, tokens = decoded.probs.reshape(*shape, -1), decoded.tokens.reshape(shape)
    actions = tokenizer.decode_expectation(probs, tokens)
    return Decision(actions, decoded.rounds, decoded.confidence.reshape(shape), tokens)


# -------------------------------------------------------------------------------------------------------- heads of values


def _l1(head: OnnxHead, prefix: OnnxPrefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]) -> Decision:
    given, is_known = head.tokenizer.to_unit(known.actions), known.is_known[..., None]
    predicted = _predict(head, prefix, given * is_known, known.is_known.astype(np.float32))
    return _value_decision(head.tokenizer, np.where(is_known, given, predicted), 1)


def _flow(head: OnnxHead, prefix: OnnxPrefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]) -> Decision:
    given, is_known = head.tokenizer.to_unit(known.actions), known.is_known[..., None]
    values = np.where(is_known, given, RowNoise(seeds).normal(range(len(seeds)), *given.shape[1:]))
    for step in range(config.euler_steps):
        times = np.where(known.is_known, np.float32(1.0), np.float32(step / config.euler_steps))
        velocity = _predict(head, prefix, values, times)
        values = np.where(is_known, given, values + velocity / np.float32(config.euler_steps))
    return _value_decision(head.tokenizer, values, config.euler_steps)


def _predict(head: OnnxHead, prefix: OnnxPrefix, values: np.ndarray, times: np.ndarray) -> np.ndarray:
    return head.step.run({"values": values, "times": times, **prefix.feeds})["predictions"]


def _value_decision(tokenizer: ActionTokenizer, values: np.ndarray, rounds: int) -> Decision:
    return Decision(tokenizer.from_unit(values), np.full(len(values), rounds))


_DECIDE: dict[str, Callable[[OnnxHead, OnnxPrefix, KnownActions, DecodeConfig, Sequence[int]], Decision]] = {
    "discrete_diffusion": _diffusion,
    "parallel": _parallel,
    "autoregressive": _autoregressive,
    "l1": _l1,
    "flow": _flow,
}
