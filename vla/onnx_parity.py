"""The gate of an export: graphs against the modules they came from, chunks against those of the torch policy.

Graphs are fed the torch modules' own outputs, so one graph's error does not hide in another's. Chunks are decoded greedily
from real observations, every second one with a known beginning.

Two float32 programs that sum in another order may differ where two ids or two slots are equally likely. Such a tie is not
taken on trust: an observation whose chunk differs counts as one only if torch itself gives the export's chunk when the
embedded prefix is disturbed by PERTURBATION, less than one float32 rounding per operation; and ties may be few.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from multimodal.onnx_compare import COSINE, MAX_ABS, GraphParity, compare_graph, graph_failures
from vla.decision import KnownActions, known_actions
from vla.frame_cache import FrameCache
from vla.interface import Observation
from vla.onnx_graphs import policy_graphs
from vla.onnx_policy import OnnxPolicy
from vla.policy import TorchPolicy

ACTION_MAX_ABS = 1e-3  # float32: any action, as ActionTokenizer.to_unit scales it
IDENTICAL = 64  # float32: chunks with the same tokens, at least
ACTION_L1 = 0.01  # lower precisions: mean over all actions, scaled like that
PERTURBATION, DISTURBED = 1e-6, 32
MAX_TIES = 0.05  # of the observations
BATCH = 8


@dataclass(frozen=True)
class ChunkParity:
    """Greedy chunks of the same observations."""

    observations: int
    identical: int  # same tokens, actions within ACTION_MAX_ABS
    ties: int  # differ, but torch gives the same under rounding; not asked of lower precisions
    same_tokens: float | None  # share of all tokens; None for heads without tokens
    max_abs: float  # of unit actions, ties left out
    l1: float  # mean of |difference| of unit actions, ties included


@dataclass(frozen=True)
class Parity:
    """What the gate measured."""

    precision: str
    graphs: tuple[GraphParity, ...]
    chunks: ChunkParity | None  # None without observations

    @property
    def failures(self) -> list[str]:
        """What is beyond its limit, in words; [] if the export passes."""
        failed = graph_failures(self.graphs, self.precision)
        if self.chunks is None:
            return failed
        chunks = self.chunks
        if self.precision != "float32":
            is_far = chunks.l1 > ACTION_L1
            return failed + ([f"actions are {chunks.l1:.4f} off in the mean, allowed {ACTION_L1}"] if is_far else [])
        different = chunks.observations - chunks.identical - chunks.ties
        if different:
            off = f"actions up to {chunks.max_abs:.1e}"
            failed.append(f"{different} of {chunks.observations} chunks differ from torch's ({off})")
        elif chunks.identical < IDENTICAL:
            failed.append(f"{chunks.identical} chunks identical, needed {IDENTICAL}: take more observations")
        if chunks.ties > MAX_TIES * chunks.observations:
            failed.append(f"{chunks.ties} of {chunks.observations} chunks hang on rounding, allowed {MAX_TIES:.0%}")
        return failed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"limits": limits(self.precision)}


def limits(precision: str) -> dict[str, float]:
    """What the gate allows at that precision."""
    if precision == "float32":
        return {"max_abs": MAX_ABS, "action_max_abs": ACTION_MAX_ABS, "identical": IDENTICAL, "max_ties": MAX_TIES}
    return {"cosine": COSINE, "action_l1": ACTION_L1}


def measure(
    reference: TorchPolicy,
    exported: OnnxPolicy,
    observations: Sequence[Observation],
    known: Sequence[np.ndarray | None],
) -> Parity:
    """Compare an export with the policy it was made from, in float32 on the CPU; without observations, its graphs only."""
    batches = {"random": random_inputs(reference, 3), "one": random_inputs(reference, 1)}
    if observations:
        batches["real"] = exported.inputs(list(observations)[:BATCH])
    graphs = [row for name, inputs in batches.items() for row in graph_parity(reference, exported, name, inputs)]
    chunks = chunk_parity(reference, exported, observations, known) if observations else None
    return Parity(exported.manifest.precision, tuple(graphs), chunks)


# ------------------------------------------------------------------------------------------------------------------ graphs


@torch.inference_mode()
def graph_parity(
    reference: TorchPolicy, exported: OnnxPolicy, batch: str, inputs: dict[str, np.ndarray]
) -> list[GraphParity]:
    """Every output of every graph on one batch of inputs (see `OnnxPolicy.inputs`)."""
    values, rows = dict(inputs), []
    generator = np.random.default_rng(0)
    for graph in policy_graphs(reference.model, reference.assets.head.type):
        runner = exported.graphs[graph.name]
        for port in runner.inputs:
            if port.name not in values:
                values[port.name] = random_step_input(reference, port.name, port.shape, len(inputs["state"]), generator)
        parts, wanted = compare_graph(graph, runner, values, batch)
        values |= wanted
        rows += parts
    return rows


def random_inputs(reference: TorchPolicy, batch: int) -> dict[str, np.ndarray]:
    """Noise in the place of observations: images in model range, texts of every length from one to `text_length`."""
    generator, config = np.random.default_rng(batch), reference.assets.model
    vision, length = config.vlm.vision, config.text_length
    lengths = np.linspace(length, 1, batch).round().astype(int) if batch > 1 else np.array([1])
    mask = np.arange(lengths.max()) < lengths[:, None]
    size = (batch, config.vlm.num_cameras, 3, vision.image_size, vision.image_size)
    return {
        "images": generator.uniform(-1, 1, size).astype(np.float32),
        "state": generator.normal(size=(batch, config.state_dim)).astype(np.float32),
        "text_ids": generator.integers(0, config.vlm.vocab_size, mask.shape) * mask,
        "text_mask": mask,
    }


def random_step_input(
    reference: TorchPolicy, name: str, shape: Sequence[int | str], batch: int, generator: np.random.Generator
) -> np.ndarray:
    """An input that the step graph has beside the prefix."""
    config = reference.assets.model
    size = [batch if isinstance(length, str) else length for length in shape]
    if name in ("tokens", "previous"):
        return generator.integers(0, config.mask_id + 1, size)
    if name == "slot":
        return np.array([config.num_slots // 2])
    return (generator.random(size) if name == "times" else generator.normal(size=size)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------------ chunks


def chunk_parity(
    reference: TorchPolicy,
    exported: OnnxPolicy,
    observations: Sequence[Observation],
    known: Sequence[np.ndarray | None],
) -> ChunkParity:
    """Greedy chunks of both; known: per observation None or its first actions [k, D]."""
    greedy = {"token_temperature": 0.0, "order_temperature": 0.0}
    assets = replace(reference.assets, decode=replace(reference.assets.decode, **greedy))
    reference = TorchPolicy(assets, reference.model)
    exported = OnnxPolicy(exported.manifest, exported.text_tokenizer, exported.graphs, decode=assets.decode)
    far: list[tuple[float, Case]] = []  # chunks that differ
    near, distances, same_tokens = [], [], []
    for first in range(0, len(observations), BATCH):
        part = slice(first, first + BATCH)
        given = known_actions(known[part], reference.action_horizon, reference.spec.action_dim)
        seeds = list(range(first, first + len(given.actions)))
        theirs, ours = (policy.decide(observations[part], given, seeds) for policy in (reference, exported))
        unit = [reference.assets.action_tokenizer.to_unit(decision.actions) for decision in (theirs, ours)]
        for row, seed in enumerate(seeds):
            distance = np.abs(unit[0][row] - unit[1][row])
            distances.append(distance.mean())
            if theirs.tokens is not None:
                same_tokens.append((theirs.tokens[row] == ours.tokens[row]).mean())
            if distance.max() <= ACTION_MAX_ABS and (not same_tokens or same_tokens[-1] == 1):
                near.append(distance.max())
            else:
                known_row = KnownActions(given.actions[row : row + 1], given.is_known[row : row + 1])
                tokens = None if ours.tokens is None else ours.tokens[row]
                far.append((distance.max(), Case(observations[part][row], known_row, seed, ours.actions[row], tokens)))
    few = exported.manifest.precision == "float32" and len(far) <= MAX_TIES * len(observations)  # else they fail anyway
    different = [distance for distance, case in far if not (few and is_tie(reference, case))]
    return ChunkParity(
        observations=len(observations),
        identical=len(near),
        ties=len(far) - len(different),
        same_tokens=float(np.mean(same_tokens)) if same_tokens else None,
        max_abs=float(max(near + different, default=0.0)),
        l1=float(np.mean(distances)),
    )


@dataclass(frozen=True)
class Case:
    """One observation and the chunk that an export gave for it."""

    observation: Observation
    known: KnownActions  # a batch of one
    seed: int
    actions: np.ndarray  # float32 [H, D]
    tokens: np.ndarray | None  # int64 [H, D]


@torch.inference_mode()
def is_tie(reference: TorchPolicy, case: Case) -> bool:
    """Whether torch too gives that chunk when its prefix is disturbed by rounding."""
    embeddings, is_real = reference.embed([case.observation])
    generator = torch.Generator().manual_seed(case.seed)
    noise = torch.randn(DISTURBED, *embeddings.shape[1:], generator=generator)
    prefix = reference.model.prefill(embeddings * (1 + PERTURBATION * noise), is_real.expand(DISTURBED, -1))
    known = KnownActions(case.known.actions.repeat(DISTURBED, axis=0), case.known.is_known.repeat(DISTURBED, axis=0))
    decision = reference.head.act(reference.model, prefix, known, reference.assets.decode, [case.seed] * DISTURBED)
    to_unit = reference.assets.action_tokenizer.to_unit
    near = np.abs(to_unit(decision.actions) - to_unit(case.actions)).max((1, 2)) <= ACTION_MAX_ABS
    if decision.tokens is not None:
        near &= (decision.tokens == case.tokens).all((1, 2))
    return bool(near.any())


def real_observations(
    cache: FrameCache, policy: OnnxPolicy, count: int
) -> tuple[list[Observation], list[np.ndarray | None]]:
    """`count` frames spread evenly over the cache, and for every second one its first actions, as if already decided.

    Raises ValueError if the cache is of another robot or has fewer frames.
    """
    spec = policy.spec
    missing = [camera for camera in spec.cameras if camera not in cache.images]
    ours, theirs = ((kind.image_size, kind.state_names, kind.action_names) for kind in (spec, cache.spec))
    if missing or ours != theirs or cache.num_frames < count:
        raise ValueError(
            f"{cache.root} holds {cache.num_frames} frames of robot {cache.spec.name!r} with cameras "
            f"{list(cache.spec.cameras)}; the check needs {count} of {spec.name!r} with cameras {list(spec.cameras)}, equal "
            "image size, state and actions."
        )
    observations: list[Observation] = []
    known: list[np.ndarray | None] = []
    steps = max(1, policy.action_horizon // 2)
    for number, frame in enumerate(np.linspace(0, cache.num_frames - 1, count).astype(int)):
        episode = int(cache.episode[frame])
        images = {camera: np.array(cache.images[camera][int(frame)]) for camera in spec.cameras}
        instruction = cache.instructions[cache.episode_instructions[episode]]
        observations.append(Observation(images, np.array(cache.state[frame]), instruction))
        end = min(frame + steps, cache.episode_starts[episode + 1])
        known.append(np.array(cache.action[frame:end]) if number % 2 else None)
    return observations, known
