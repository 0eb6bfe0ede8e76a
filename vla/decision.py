"""What goes into an action head beside the observation and what comes out, whatever runs the model. numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla.interface import ActionChunk


@dataclass(frozen=True)
class KnownActions:
    """The beginnings of chunks that are already decided, for a batch."""

    actions: np.ndarray  # float32 [B, H, D] robot units, zero where unknown
    is_known: np.ndarray  # bool [B, H]


@dataclass(frozen=True)
class Decision:
    """Decoded chunks of a batch."""

    actions: np.ndarray  # float32 [B, H, D], robot units
    rounds: np.ndarray  # int64 [B], passes over the slots that each row took
    confidence: np.ndarray | None = None  # float32 [B, H, D]; None for heads that know no such thing
    tokens: np.ndarray | None = None  # int64 [B, H, D]; None for heads without tokens
    committed: np.ndarray | None = None  # int64 [B, H, D], the round whose token each slot kept, 0: known; None: not unmasked


def known_actions(known: Sequence[np.ndarray | None], action_horizon: int, action_dim: int) -> KnownActions:
    """Known beginnings [k, D] (None: nothing known) padded to whole chunks. Raises ValueError on a wrong shape."""
    actions = np.zeros((len(known), action_horizon, action_dim), dtype=np.float32)
    is_known = np.zeros(actions.shape[:2], dtype=bool)
    for row, given in enumerate(known):
        if given is None:
            continue
        if given.ndim != 2 or given.shape[1] != action_dim or len(given) > action_horizon:
            raise ValueError(
                f"Known actions have shape {given.shape}; expected [k, {action_dim}] with k <= {action_horizon}."
            )
        actions[row, : len(given)] = given
        is_known[row, : len(given)] = True
    return KnownActions(actions, is_known)


def action_chunks(decision: Decision, known: KnownActions, milliseconds: float) -> list[ActionChunk]:
    """One chunk per row; known actions are repeated as they were given, not as the centres of their bins."""
    actions = np.where(known.is_known[..., None], known.actions, decision.actions)
    chunks = []
    for row, chunk in enumerate(actions):
        info = {"rounds": int(decision.rounds[row]), "milliseconds": milliseconds}
        if decision.confidence is not None:
            info["confidence"] = decision.confidence[row]
        if decision.committed is not None:
            info["committed"] = decision.committed[row]
        chunks.append(ActionChunk(chunk, info))
    return chunks
