"""Speculative decoding against the fastest plain decoding of the same engine, on held-out questions; n-gram, oracle and random
beside it.

Runs are interleaved (each repetition times every variant once), medians of paired ratios are quoted, answers are compared in
the same runs. `predicted` is the speed-up that the cost tables, measured by themselves after every repetition, and what a round of the
warm-up took beside its passes (the draft's reading of prompts included) give for the rounds that were run; a claim above what
they allow would be a bug. Decoding is all but the target's prefill, so the draft's reading is part of it. The corpus is easy to
guess: its bits per token stand under the table, and so do the goals and whether they were reached. The visual compressor has
its own table: `vla bench compressor`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

import torch

from multimodal.answering import tally_answers
from multimodal.data import SceneTexts
from multimodal.sampling import SamplingConfig
from serve.controller import (
    AdaptiveConfig, AdaptiveController, Controller, CostTable, Drafting, FixedController, Round, describe
)  # fmt: skip
from serve.costs import measure_costs
from serve.draft_checkpoint import load_draft
from serve.draft_data import CorpusDialogues
from serve.drafters import Drafter, DraftLimits, NgramDrafter, OracleDrafter, RandomDrafter
from serve.eagle_drafter import EagleDrafter
from serve.engine import Engine, EngineConfig
from serve.generate import DTYPES
from serve.generation import Generation
from serve.request import Request
from serve.target import Target, load_target
from serve.train_draft import context_for
from serve.tree import DraftTree
from tests.benchmarks.bench_compressor import plain_engine
from tests.benchmarks.harness import median_ratio, parser, quiet_machine, report

TREES = {
    "chain 3": DraftLimits(3, 3, 1),
    "bush 8": DraftLimits(8, 5, 3),
    "paper 59": DraftLimits(59, 8, 10),
}
COLUMNS = (
    "batch", "T", "type", "variant", "tokens an answer", "tokens/s", "spread %", "decode x", "end to end x", "predicted x",
    "tokens a round", "nodes a round", "accepted at 1, 2, ... %", "draft ms", "verify ms", "other ms", "prefill share",
    "answers that differ",
)  # fmt: skip
# At batch 1 and T = 0: the trained draft against the fastest plain decoding, and against the n-gram drafter.
GOALS = {"decode x": 2.0, "end to end x": 1.6, "decode against n-gram x": 1.15}
AGREEMENT = 0.10  # predicted and measured speed-up
REPETITIONS = 5  # of each entry of the cost tables, which are measured again beside every repetition of the runs
CANDIDATES = 6  # questions tried for each prompt that is wanted


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--vlm", type=Path, required=True, help="checkpoint folder of `vla train-vlm`")
    arguments.add_argument("--draft", type=Path, required=True, help="checkpoint folder of `vla train-draft`")
    arguments.add_argument("--corpus", type=Path, required=True)
    arguments.add_argument("--prompts", type=int, default=12)
    arguments.add_argument("--least-tokens", type=int, default=100, help="of the target's greedy answer to a prompt")
    arguments.add_argument("--max-tokens", type=int, default=160)
    arguments.add_argument("--ignore-end", action="store_true", help="every answer has max-tokens tokens")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    arguments.add_argument("--types", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--scenes", type=int, default=24, help="held-out scenes whose bits per token are counted")
    arguments.set_defaults(repetitions=5)
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    with quiet_machine():
        rows, facts = measure(options)
    facts |= {"bits_per_token": bits_per_token(options), "goals": goals(rows)}
    report("spec", COLUMNS, rows, options.output, threads=options.threads, prompts=options.prompts, **facts)
    print(f"held-out text: {facts['bits_per_token']:.3f} bits a token")
    for name, (reached, wanted) in facts["goals"].items():
        print(f"{name}: {reached:.2f}, goal {wanted}: {'reached' if reached >= wanted else 'NOT REACHED'}")
    apart = [row for row in rows if abs(row[COLUMNS.index("predicted x")] / row[COLUMNS.index("decode x")] - 1) > AGREEMENT]
    print(f"predicted and measured differ by more than {AGREEMENT:.0%} in {len(apart)} of {len(rows)} rows")
    return 0


def bits_per_token(options: argparse.Namespace) -> float:
    """Of the held-out texts of some scenes under the target."""
    target = load_target(options.vlm, device=options.device)
    scenes = SceneTexts(options.corpus, "held_out", target.tokenizer, limit=options.scenes)
    return tally_answers(target.vlm, scenes, target.images)[("all",)].bits_per_token


def goals(rows: Sequence[Sequence]) -> dict[str, tuple[float, float]]:
    """What was reached, and what was to be, of each goal; none without batch 1 at T = 0."""
    named = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    asked = [row for row in named if (row["batch"], row["T"]) == (1, 0.0)]
    best = {
        name: max((row for row in asked if row["variant"] == name), key=lambda row: row["decode x"], default=None)
        for name in ("eagle", "n-gram")
    }
    eagle, ngram = best["eagle"], best["n-gram"]
    if eagle is None or ngram is None:
        return {}
    reached = (eagle["decode x"], eagle["end to end x"], eagle["decode x"] / ngram["decode x"])
    return {name: (value, wanted) for (name, wanted), value in zip(GOALS.items(), reached, strict=True)}


@dataclass
class Variant:
    """One way to decode, with its engine and what its runs gave."""

    kind: str
    name: str
    engine: Engine
    log: "Recorder"
    past: int = 0  # positions at the middle of an answer
    seconds: list[float] = field(default_factory=list)  # of whole runs
    decode: list[float] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # seconds by part, all runs
    overhead: float = 0.0  # seconds of a round beside the models' passes, in the warm-up
    tokens: int = 0  # of all runs, first tokens of requests left out
    drafts: int = 0  # trees verified
    positions: list[int] = field(default_factory=list)  # [i]: of which i + 1 drafted tokens or more were accepted

    @property
    def has_model(self) -> bool:
        """Whether a model drafts; a search in a list is counted with the round's other work."""
        return self.name.startswith("eagle")


class Recorder:
    """A controller that also writes down the rounds."""

    def __init__(self, inner: Controller) -> None:
        self.inner = inner
        self.rounds: list[Round] = []

    def plan(self, generations: Sequence[Generation]) -> list[DraftLimits]:
        return self.inner.plan(generations)

    def trim(self, trees: Sequence[DraftTree], drafting: Drafting) -> list[DraftTree]:
        return self.inner.trim(trees, drafting)

    def observe(self, outcome: Round) -> None:
        self.rounds.append(outcome)
        self.inner.observe(outcome)

    def release(self, request_id: int) -> None:
        self.inner.release(request_id)


def questions(options: argparse.Namespace) -> list[Request]:
    """Held-out questions that the target itself answers, greedily, in `least_tokens` or more: the corpus's answer may be longer."""
    target = load_target(options.vlm, dtype=DTYPES[options.types[0]], device=options.device)
    corpus = CorpusDialogues(options.corpus, "held_out", target)
    found = corpus.questions(CANDIDATES * options.prompts, least_tokens=options.least_tokens, max_tokens=options.max_tokens)
    found = [replace(request, ignore_eos=options.ignore_end) for request in found]
    answers = plain_engine(target, found, batch=8).run(found)
    long = [request for request, answer in zip(found, answers, strict=True) if len(answer.token_ids) >= options.least_tokens]
    if len(long) < options.prompts:
        raise ValueError(
            f"The target answers {len(long)} of {len(found)} questions in {options.least_tokens} tokens or more, {options.prompts} "
            "are wanted; lower --prompts or --least-tokens, or give --ignore-end."
        )
    return long[: options.prompts]


def measure(options: argparse.Namespace) -> tuple[list[list], dict]:
    rows, facts, chosen = [], {}, questions(options)
    for batch in options.batches:
        for temperature in options.temperatures:
            asked, variants = with_temperature(chosen, temperature), list[Variant]()
            measured: dict[str, list[Costs]] = {kind: [] for kind in options.types}
            for kind in options.types:
                target = load_target(options.vlm, dtype=DTYPES[kind], device=options.device)
                variants += build_variants(options, kind, target, asked, batch)
            for repetition in range(options.repetitions + 1):
                shown = f"\rbatch {batch}, T {temperature}: repetition {repetition} of {options.repetitions}, "
                for variant in variants:
                    print(f"{shown}{variant.kind} {variant.name:<20}", end="", flush=True)
                    run(variant, asked, keep=repetition > 0)
                for kind, found in measured.items():
                    found.append(costs(variants, kind))
            print()
            tables = {kind: median_costs(found) for kind, found in measured.items()}
            facts[f"batch {batch}, T {temperature}"] = {kind: table.record() for kind, table in tables.items()}
            for kind, table in tables.items():
                print(f"batch {batch}, T {temperature}, {kind}: {json.dumps(table.record())}")
            rows += [row(variant, variants, tables, batch, temperature) for variant in variants]
    return rows, {"costs": facts}


def with_temperature(asked: Sequence[Request], temperature: float) -> list[Request]:
    return [replace(each, sampling=SamplingConfig(temperature=temperature, seed=index)) for index, each in enumerate(asked)]


def build_variants(
    options: argparse.Namespace, kind: str, target: Target, asked: Sequence[Request], batch: int
) -> list[Variant]:
    context = context_for(asked, target)
    truth: list[tuple[int, ...]] = []
    draft = load_draft(options.draft, target)
    adaptive = AdaptiveConfig()

    def eagle(width: int, depth: int) -> Drafter:
        return EagleDrafter(draft, target.vlm, num_slots=batch, capacity=context + width * depth)

    def engine(drafter: Drafter | None, controller: Controller) -> tuple[Engine, Recorder]:
        config = EngineConfig(max_batch=batch, context=context, max_nodes=64)
        recorder = Recorder(controller)
        return Engine(target, config, drafter, recorder), recorder

    plain = Variant(kind, "plain", *engine(None, FixedController(DraftLimits(0, 0, 0))))
    truth += [finished.token_ids for finished in plain.engine.run(asked)]
    count = len(asked)
    known = OracleDrafter(lambda generation: truth[generation.id % count])
    prompts = [len(target.vlm.expand_prompt(each.prompt, len(each.images))) for each in asked]
    past = (sum(prompts) + sum(map(len, truth)) // 2) // count  # at the middle of an answer
    variants = [plain]
    makers: dict[str, Callable[[], Drafter]] = {
        "eagle": lambda: eagle(adaptive.width, adaptive.max_depth),
        "n-gram": NgramDrafter,
        "oracle": lambda: known,
        "random": lambda: RandomDrafter(target.vlm.config.vocab_size),
    }
    overhead = plain_overhead(plain)
    for name, make in makers.items():
        drafter = make()
        tables = measure_costs(plain.engine.runner, drafter, past, repetitions=REPETITIONS)
        controller = AdaptiveController(*tables, overhead, adaptive)
        variants.append(Variant(kind, name, *engine(drafter, controller), past))
    for name, limits in TREES.items():
        drafter = eagle(limits.width, limits.max_depth)
        variants.append(Variant(kind, f"eagle, {name}", *engine(drafter, FixedController(limits))))
    return variants


def plain_overhead(plain: Variant) -> float:
    stats = plain.engine.stats()
    return stats.overhead_seconds / max(1, stats.rounds)


@dataclass(frozen=True)
class Costs:
    """Of one type: what the prediction knows."""

    target: CostTable
    draft: CostTable
    overhead: float  # of a plain round

    def record(self) -> dict:
        return {
            "v(M)": {str(rows): round(value, 3) for rows, value in describe(self.target).items()},
            "c(W)": {str(rows): round(value, 3) for rows, value in describe(self.draft, self.target.seconds[0]).items()},
            "v(1) ms": round(1e3 * self.target.seconds[0], 3),
            "overhead ms": round(1e3 * self.overhead, 3),
        }

    def seconds(self, variant: Variant, width: int) -> float:
        """Predicted for the rounds that a variant ran; its drafter's levels are of `width` rows a request."""

        def drafting(done: Drafting) -> float:
            return done.num_levels * self.draft(done.num_requests * width) if variant.has_model else 0.0

        return sum(self.target(each.num_rows) + drafting(each.drafting) + variant.overhead for each in variant.log.rounds)


def costs(variants: Sequence[Variant], kind: str) -> Costs:
    """Measured now, every engine being idle: what other jobs of the machine do changes within minutes."""
    plain, eagle = (next(each for each in variants if (each.kind, each.name) == (kind, name)) for name in ("plain", "eagle"))
    found = measure_costs(plain.engine.runner, eagle.engine.drafter, eagle.past, repetitions=REPETITIONS)
    return Costs(*found, eagle.log.inner.overhead)


def median_costs(found: Sequence[Costs]) -> Costs:
    def median(tables: Sequence[CostTable]) -> CostTable:
        return CostTable(tables[0].rows, tuple(map(statistics.median, zip(*(table.seconds for table in tables), strict=True))))

    return Costs(median([each.target for each in found]), median([each.draft for each in found]), found[0].overhead)


def run(variant: Variant, asked: Sequence[Request], keep: bool) -> None:
    """All questions through one engine; the first run of each is thrown away."""
    before = variant.engine.stats()
    if not keep:
        variant.log.rounds.clear()
    start = time.perf_counter()
    finished = variant.engine.run(asked)
    seconds = time.perf_counter() - start
    after = variant.engine.stats()
    variant.answers = [each.token_ids for each in finished]
    names = ("draft_seconds", "draft_read_seconds", "verify_seconds", "prefill_seconds", "overhead_seconds")
    parts = {name: getattr(after, name) - getattr(before, name) for name in names}
    if not keep:
        beside = ("overhead_seconds", "draft_read_seconds", *(() if variant.has_model else ("draft_seconds",)))
        variant.overhead = sum(parts[name] for name in beside) / max(1, len(variant.log.rounds))
        variant.log.rounds.clear()
        return
    for name, value in parts.items():
        variant.parts[name] = variant.parts.get(name, 0.0) + value
    drafted = [(stats.spec_decode_num_drafts, stats.spec_decode_num_accepted_tokens_per_pos) for stats in (before, after)]
    gained = [late - early for early, late in zip_longest(drafted[0][1], drafted[1][1], fillvalue=0)]
    variant.positions = [sum(pair) for pair in zip_longest(variant.positions, gained, fillvalue=0)]
    variant.drafts += drafted[1][0] - drafted[0][0]
    variant.seconds.append(seconds)
    variant.decode.append(seconds - parts["prefill_seconds"])
    variant.tokens += sum(len(answer) - 1 for answer in variant.answers)


def row(variant: Variant, variants: Sequence[Variant], tables: dict[str, Costs], batch: int, temperature: float) -> list:
    plains = [each for each in variants if each.name == "plain"]
    fastest = min(plains, key=lambda each: statistics.median(each.decode))
    own = next(each for each in plains if each.kind == variant.kind)
    rates = sorted(variant.tokens / len(variant.decode) / seconds for seconds in variant.decode)
    spread = 100 * (rates[-1] - rates[0]) / statistics.median(rates)
    width = TREES[variant.name.removeprefix("eagle, ")].width if "," in variant.name else AdaptiveConfig().width
    predicted = tables[fastest.kind].seconds(fastest, 1) / tables[variant.kind].seconds(variant, width)
    count = max(1, len(variant.log.rounds))
    requests = sum(len(each.ids) for each in variant.log.rounds)
    return [
        batch, temperature, variant.kind, variant.name,
        statistics.mean(map(len, variant.answers)), statistics.median(rates), spread,
        median_ratio(fastest.decode, variant.decode), median_ratio(fastest.seconds, variant.seconds), predicted,
        variant.tokens / max(1, requests),
        sum(tree.num_drafted for each in variant.log.rounds for tree in each.trees) / max(1, requests),
        accepted_shares(variant.positions, variant.drafts), 1e3 * variant.parts["draft_seconds"] / count,
        1e3 * variant.parts["verify_seconds"] / count, 1e3 * variant.parts["overhead_seconds"] / count,
        variant.parts["prefill_seconds"] / sum(variant.seconds),
        sum(mine != right for mine, right in zip(variant.answers, own.answers, strict=True)),
    ]  # fmt: skip


def accepted_shares(positions: Sequence[int], drafts: int) -> str:
    """Of the trees verified, the per cent of which one drafted token was accepted, two, ..."""
    return " ".join(f"{100 * count / max(1, drafts):.0f}" for count in positions)


if __name__ == "__main__":
    raise SystemExit(main())
