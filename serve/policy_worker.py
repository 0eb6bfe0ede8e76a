"""The process that owns a policy: `python -m serve.policy_worker FD`, started by serve/policy_batcher.py.

Batches come over the socket, chunks go back. A request that the policy refuses (ValueError) does not fail its batch
mates: such a batch is computed again one by one.
"""

import logging
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.protocol import msgpack_numpy
from serve.protocol.requests import ActRequest
from serve.worker_process import ServerLink, resolve
from vla.interface import ActionChunk, Observation, Policy, RobotSpec

CHECKPOINT_FACTORY = "vla.policy_folder:open_policy"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One observation as it reaches the policy."""

    observation: Observation
    known: np.ndarray | None  # [k, D]
    seed: int


def pack_request(request: ActRequest) -> bytes:
    """A request without its deadline: the server drops what is late before it sends a batch."""
    observation = request.observation
    return msgpack_numpy.pack(
        {
            "images": observation.images,
            "state": observation.state,
            "instruction": observation.instruction,
            "known": request.known,
            "seed": request.seed,
        }
    )


def unpack_request(data: bytes) -> Question:
    values = msgpack_numpy.unpack(data, max_bytes=len(data))
    observation = Observation(values["images"], values["state"], values["instruction"])
    return Question(observation, values["known"], values["seed"])


def pack_chunk(chunk: ActionChunk) -> dict[str, Any]:
    """A chunk with the numbers of its info; what is neither number nor array stays here."""
    kinds = int | float | np.integer | np.floating | np.ndarray
    info = {name: value for name, value in chunk.info.items() if isinstance(value, kinds)}
    return {"actions": np.asarray(chunk.actions, dtype=np.float32), "info": info}


def answer(policy: Policy, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Per question a chunk, or {"refused": why}."""
    try:
        return [pack_chunk(chunk) for chunk in _act(policy, questions)]
    except ValueError as error:
        if len(questions) == 1:
            return [{"refused": str(error)}]
        return [row for question in questions for row in answer(policy, [question])]


def warm_up(policy: Policy, sizes: Sequence[int]) -> None:
    """Run batches of blank observations, so that no robot waits for a first-time compilation or allocation."""
    spec: RobotSpec = policy.spec
    blank = np.zeros((spec.image_size, spec.image_size, 3), dtype=np.uint8)
    observation = Observation({camera: blank for camera in spec.cameras}, np.zeros(spec.state_dim, dtype=np.float32), "")
    for size in sizes:
        _act(policy, [Question(observation, None, 0)] * size)


def _act(policy: Policy, questions: Sequence[Question]) -> list[ActionChunk]:
    return policy.act(
        [question.observation for question in questions],
        known=[question.known for question in questions],
        seeds=[question.seed for question in questions],
    )


def load_policy_of(settings: dict[str, Any]) -> Policy:
    """The policy that `PolicySource.settings` describe, warmed up."""
    if settings["threads"] is not None and settings["factory"] == CHECKPOINT_FACTORY:
        import torch

        torch.set_num_threads(settings["threads"])
    policy = resolve(settings["factory"])(**settings["arguments"])
    warm_up(policy, settings["warm_batches"])
    return policy


def main() -> None:
    """Load, warm up, say hello, answer until the server hangs up."""
    logging.basicConfig(format="policy worker %(process)d: %(levelname)s %(message)s")
    link = ServerLink(int(sys.argv[1]))
    try:
        policy = load_policy_of(link.settings)
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        if not isinstance(error, ValueError | OSError):  # those explain themselves
            logger.error("%s", traceback.format_exc())
        link.send({"failed": f"The policy could not be loaded: {error}"})
        return
    checkpoint = getattr(policy, "content_hash", "") or "unknown"
    link.send({"spec": policy.spec.to_dict(), "action_horizon": policy.action_horizon, "checkpoint": checkpoint})
    while True:
        message = link.next_message()
        began = time.perf_counter()
        try:
            rows = answer(policy, [unpack_request(data) for data in message["requests"]])
        except Exception as error:  # the border of the process: one batch fails, its reason goes to the log
            logger.error("%s", traceback.format_exc())
            link.send({"id": message["id"], "error": type(error).__name__})
            continue
        link.send({"id": message["id"], "rows": rows, "seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main()
