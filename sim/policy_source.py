"""Which policy an evaluation asks, and how it answers: a checkpoint here or a server, its threads, its attacker, its batches."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.episode_worker import Question
from vla.interface import ActionChunk, Policy
from vla.policy_folder import StoredPolicy, open_policy

if TYPE_CHECKING:
    from vla.attacked_policy import PolicyAttackConfig


@dataclass(frozen=True)
class PolicySource:
    """Which policy, and how it decodes."""

    path: str = ""  # checkpoint folder, e.g. RUN/checkpoints/last/policy, or an exported one (`vla export`)
    url: str = ""  # or a server of one: grpc://HOST:PORT, http://..., ws://... (`vla serve`; key: REMASK_API_KEY)
    timeout_s: float = 60.0  # of one request to a server, retries included
    device: str = "cpu"
    decode: dict[str, Any] = field(default_factory=dict)  # overrides, e.g. '{rounds: 6, threshold: 0.9}'


def spare_threads(workers: int) -> int | None:
    """The cores that the simulators leave, at least one; None: OMP_NUM_THREADS says it already.

    Threads without a core of their own wait for each other: on a busy two-core machine two took 35 s a chunk, one 1 s.
    """
    return None if os.environ.get("OMP_NUM_THREADS") else max(1, (os.cpu_count() or 1) - workers)


@contextmanager
def policy_threads(workers: int) -> Iterator[None]:
    """Give torch, if the policy uses it, the cores that the simulators leave (`spare_threads`)."""
    torch, threads = sys.modules.get("torch"), spare_threads(workers)
    if torch is None or threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_source(source: PolicySource, workers: int) -> StoredPolicy:
    """The policy of a folder, whatever runs it, with the threads that `workers` simulators leave; or the one behind a URL.

    Its content hash identifies it in rows either way. Raises ValueError for settings that say neither or both, OSError if
    there is no checkpoint or no server.
    """
    if bool(source.path) == bool(source.url):
        raise ValueError("Which policy? Give --policy.path=RUN/checkpoints/last/policy, or --policy.url of a server.")
    if not source.url:
        return open_policy(source.path, device=source.device, decode=source.decode, threads=spare_threads(workers))
    if source.decode:
        raise ValueError("policy.decode is the server's to choose: give it to `vla serve` (--policy.decode=...).")
    from serve.client import RemotePolicy

    return RemotePolicy(source.url, timeout_s=source.timeout_s, same_checkpoint=True)


def attacked(policy: StoredPolicy, attack: dict[str, Any]) -> StoredPolicy:
    """The policy as its attacker leaves it; itself without an attack. Raises ValueError for a policy without gradients."""
    if not attack:
        return policy
    from vla.attacked_policy import AttackedPolicy

    return AttackedPolicy(policy, attack_config(attack))


def attack_config(attack: dict[str, Any]) -> "PolicyAttackConfig":
    """Every default resolved. It needs torch, so not at import: exported policies run without."""
    from vla.attacked_policy import PolicyAttackConfig, check_attack

    return PolicyAttackConfig(**check_attack(attack))


def answer(policy: Policy, questions: list[Question], max_batch: int | None = None) -> list[ActionChunk]:
    """One chunk per question, in as few batches as allowed; numpy and floats, so that a simulator process can read them."""
    replies = []
    size = max_batch or len(questions)
    for batch in (questions[first : first + size] for first in range(0, len(questions), size)):
        began = time.perf_counter()
        chunks = policy.act(
            [question.observation for question in batch],
            known=[question.known for question in batch],
            seeds=[question.seed for question in batch],
        )
        waited_ms = 1000 * (time.perf_counter() - began)
        for chunk in chunks:
            info = {"milliseconds": float(chunk.info.get("milliseconds", waited_ms))}
            if "rounds" in chunk.info:
                info["rounds"] = float(chunk.info["rounds"])
            info |= {name: np.asarray(chunk.info[name]) for name in ("confidence", "committed") if name in chunk.info}
            replies.append(ActionChunk(np.asarray(chunk.actions, dtype=np.float32), info))
    return replies
