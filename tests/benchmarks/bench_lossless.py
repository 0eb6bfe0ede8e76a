"""Lossless, the heart: 1000 prompts with images x drafters x trees x batch sizes x cancel-and-resume, token for token.

In float64 on a small random model every answer must equal the naive decoder's, greedy and sampled alike. In float32 and
bfloat16 a pass over several rows rounds otherwise than a pass over one, so the first difference to plain decoding must lie
where the two best tokens were closer than a stated bound; such flips are counted.

Every prompt meets every drafter in float64, each time in another of the 12 settings (3 trees x 2 batch sizes x run straight
or cancelled and resumed), at random; so a setting of a drafter, a cell, sees a twelfth of the prompts, greedy and sampled, with
none to two images. In each rounded type every prompt is decoded plainly and by a third of the drafters. The naive answers are
computed once. Cells that were done are kept in OUTPUT-PROMPTS.jsonl and skipped: the run can be resumed.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from multimodal.compressor import CompressorConfig
from multimodal.sampling import SamplingConfig, gumbel_noise
from serve.controller import FixedController
from serve.draft_model import DraftModel, DraftModelConfig
from serve.drafters import Drafter, DraftLimits, NgramDrafter, OracleDrafter, RandomDrafter
from serve.eagle_drafter import EagleDrafter
from serve.engine import Engine, EngineConfig
from serve.generation import Generation
from serve.request import Finished, Request
from serve.target import Target, cast
from tests.benchmarks.harness import parser, report
from tests.drafting import AdversarialDrafter, SwappedCompressor
from tests.tiny_vlm import VOCAB, naive, pixels, request, target

TREES = {
    "chain 4": DraftLimits(max_nodes=4, max_depth=4, width=1),
    "bush 12": DraftLimits(max_nodes=12, max_depth=4, width=3),
    "paper 59": DraftLimits(max_nodes=59, max_depth=8, width=10),
}
COLUMNS = ("type", "drafter", "tree", "batch", "run", "prompts", "tokens", "different", "flips", "margin", "a round")
DRAFTERS = ("none", "ngram", "oracle", "random", "adversarial", "eagle", "eagle, swapped")
SETTINGS = tuple(product(TREES, (1, 4), ("straight", "resumed")))
SHARE = 3  # in a rounded type a drafter sees one prompt in so many
CONTEXT = 64
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}  # bfloat16: times the larger logit's size
KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--prompts", type=int, default=1000, help="50 is a quick look")
    arguments.add_argument("--fresh", action="store_true", help="forget the cells that were done")
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    journal = Journal(options)
    requests = [request(index) for index in range(options.prompts)]
    truth = [
        answer
        for start in range(0, len(requests), 100)
        for answer in journal.once(
            f"truth/{start}", "naive decoder, f64", lambda start=start: _naive_answers(requests[start : start + 100])
        )["answers"]
    ]
    rows = [*exact_rows(journal, requests, truth), *rounded_rows(journal, requests)]
    runs = {kind: sum(row[COLUMNS.index("prompts")] for row in rows if row[0] == kind) for kind in ("f64", *KINDS.values())}
    facts = {"prompts": len(requests), "answers": runs, "bounds": {KINDS[key]: value for key, value in BOUNDS.items()}}
    report("lossless", COLUMNS, rows, options.output, **facts)
    wrong = sum(row[COLUMNS.index("different")] for row in rows)
    print(f"{len(requests)} prompts, answers: {runs}")
    print("every answer equals plain decoding" if wrong == 0 else f"{wrong} ANSWERS DIFFER")
    return 0 if wrong == 0 else 1


def _naive_answers(requests: Sequence[Request]) -> dict:
    return {"answers": [naive(target(), asked) for asked in requests]}


class Journal:
    """Finished cells by name, on disk; a bar over those that are to come."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tqdm import tqdm

        folder = (options.output or Path("outputs") / "bench" / "lossless.json").with_suffix("")
        self._path = folder.with_name(f"{folder.name}-{options.prompts}.jsonl")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if options.fresh:
            self._path.unlink(missing_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._done = {row.pop("cell"): row for row in map(json.loads, lines)}
        cells = -(-options.prompts // 100) + len(DRAFTERS) * len(SETTINGS) + len(BOUNDS) * (1 + len(DRAFTERS))
        self._bar = tqdm(total=cells, unit="cell", dynamic_ncols=True)

    def once(self, cell: str, shown: str, work: Callable[[], dict]) -> dict:
        """The record of a cell, from disk or from `work()`."""
        self._bar.set_description(shown)
        if cell not in self._done:
            self._done[cell] = work()
            with self._path.open("a") as file:
                file.write(json.dumps({"cell": cell, **self._done[cell]}) + "\n")
        self._bar.update()
        return self._done[cell]


@dataclass(frozen=True)
class Cell:
    """Some of the prompts under one drafter, tree and batch size."""

    drafter: str
    tree: str
    batch: int
    run: str  # straight | resumed
    members: tuple[int, ...]  # numbers of its prompts

    @property
    def name(self) -> str:
        return f"{self.drafter}/{self.tree}/{self.batch}/{self.run}"


def exact_cells(num_prompts: int) -> Iterator[Cell]:
    """All drafters under all settings; each prompt is once with every drafter."""
    for number, drafter in enumerate(DRAFTERS):
        order = np.random.default_rng(number).permutation(num_prompts)
        for place, (tree, batch, run) in enumerate(SETTINGS):
            yield Cell(drafter, tree, batch, run, tuple(int(index) for index in order[place :: len(SETTINGS)]))


def exact_rows(journal: Journal, requests: Sequence[Request], truth: Sequence[Sequence[int]]) -> Iterator[list]:
    """Rows of the float64 table; the `different` column must be 0."""
    known = Answers(requests, truth)
    for cell in exact_cells(len(requests)):
        asked = [requests[index] for index in cell.members]

        def work(cell=cell, asked=asked) -> dict:
            engine = build(target(), cell.drafter, TREES[cell.tree], cell.batch, known)
            if cell.run == "straight":
                answers = [list(finished.token_ids) for finished in engine.run(asked)]
            else:
                answers = cancel_and_resume(engine, asked, seed=cell.batch)
            different = sum(answer != truth[index] for answer, index in zip(answers, cell.members, strict=True))
            return {"tokens": sum(map(len, answers)), "different": different, "rate": engine.stats().tokens_per_round}

        done = journal.once(cell.name, f"f64, {cell.name}", work)
        yield [
            "f64", cell.drafter, cell.tree, cell.batch, cell.run, len(asked), done["tokens"], done["different"], 0, 0.0,
            done["rate"],
        ]  # fmt: skip


def rounded_rows(journal: Journal, requests: Sequence[Request]) -> Iterator[list]:
    """Rows for float32 and bfloat16: first differences to plain decoding, one request at a time, of the same engine and type.
    """
    asked_all = [replace(asked, sampling=replace(asked.sampling, top_p=1.0)) for asked in requests]
    order = np.random.default_rng(99).permutation(len(requests))
    for dtype, bound in BOUNDS.items():
        kind, model = KINDS[dtype], target(0, dtype)

        def alone(model=model) -> dict:
            engine = build(model, "none", TREES["chain 4"], 1, Answers([], []))
            return {"answers": [list(finished.token_ids) for finished in engine.run(asked_all)]}

        plain = journal.once(f"{kind}/plain", f"{kind}, plain decoding", alone)["answers"]
        known = Answers(asked_all, plain)
        for number, drafter in enumerate(DRAFTERS):
            members = [int(index) for index in order[number % SHARE :: SHARE]]

            def compare(drafter=drafter, members=members, model=model, bound=bound, plain=plain, known=known) -> dict:
                engine = build(model, drafter, TREES["bush 12"], 4, known)
                answers = [list(finished.token_ids) for finished in engine.run([asked_all[index] for index in members])]
                margins = [
                    margin(model, asked_all[index], plain[index], place)
                    for index, answer in zip(members, answers, strict=True)
                    if (place := first_difference(answer, plain[index])) is not None
                ]
                is_relative = model.vlm.head_weight.dtype == torch.bfloat16
                beyond = [gap for gap, size in margins if gap > bound * (size if is_relative else 1)]
                return {
                    "tokens": sum(map(len, answers)),
                    "different": len(beyond),
                    "flips": len(margins) - len(beyond),
                    "margin": max((gap for gap, _ in margins), default=0.0),
                    "rate": engine.stats().tokens_per_round,
                }

            done = journal.once(f"{kind}/{drafter}", f"{kind}, {drafter}", compare)
            figures = [done[key] for key in ("tokens", "different", "flips", "margin", "rate")]
            yield [kind, drafter, "bush 12", 4, "straight", len(members), *figures]


class Answers:
    """What drafters that know the answers know."""

    def __init__(self, requests: Sequence[Request], answers: Sequence[Sequence[int]]) -> None:
        self._known = {tuple(asked.prompt): answer for asked, answer in zip(requests, answers, strict=True)}

    def __call__(self, generation: Generation) -> Sequence[int]:
        """What is to be said; of a resumed request, whose prompt ends with what was said already, the rest."""
        prompt = tuple(generation.request.prompt)
        for size in range(len(prompt), 0, -1):
            answer = self._known.get(prompt[:size])
            if answer is not None and tuple(answer[: len(prompt) - size]) == prompt[size:]:
                return answer[len(prompt) - size :]
        return []


def build(model: Target, name: str, limits: DraftLimits, batch: int, known: Answers) -> Engine:
    config = EngineConfig(max_batch=batch, context=CONTEXT, prefill_chunk=16, max_nodes=64)
    return Engine(model, config, build_drafter(model, name, batch, known), FixedController(limits))


def build_drafter(model: Target, name: str, batch: int, known: Answers) -> Drafter | None:
    if name.startswith("eagle"):
        torch.manual_seed(0)
        config = DraftModelConfig(compressor=CompressorConfig(prune_ratio=2.0, pool_ratio=4.0))
        draft = cast(DraftModel(config, model.vlm), model.vlm.head_weight.dtype)
        kind = SwappedCompressor if name == "eagle, swapped" else EagleDrafter
        return kind(draft, model.vlm, num_slots=batch, capacity=CONTEXT + 80)
    simple = {
        "none": lambda: None,
        "ngram": NgramDrafter,
        "oracle": lambda: OracleDrafter(known),
        "random": lambda: RandomDrafter(VOCAB),
        "adversarial": lambda: AdversarialDrafter(known, VOCAB),
    }
    return simple[name]()


def cancel_and_resume(engine: Engine, requests: Sequence[Request], seed: int) -> list[list[int]]:
    """Answers where about half of the requests were cancelled at a random round and asked to go on from what they had said."""
    random = np.random.default_rng(seed)
    answers: list[list[int]] = [[] for _ in requests]
    fuse = {index: int(random.integers(1, 8)) for index in range(len(requests)) if random.random() < 0.5}
    place: dict[int, int] = {}  # request id -> number
    waiting = list(range(len(requests)))[::-1]
    while waiting or engine.has_work:
        while waiting and len(place) < engine.config.max_batch * 2:
            index = waiting.pop()
            asked, said = requests[index], answers[index]
            place[engine.submit(replace(asked, prompt=[*asked.prompt, *said], max_tokens=asked.max_tokens - len(said)))] = index
        for event in engine.step():
            if isinstance(event, Finished):
                index = place.pop(event.request_id)
                answers[index] += event.token_ids
                if event.reason == "cancelled":
                    waiting.append(index)
        for request_id, index in list(place.items()):
            if index in fuse:
                fuse[index] -= 1
                if fuse[index] == 0:
                    engine.cancel(request_id)
    return answers


def first_difference(answer: Sequence[int], right: Sequence[int]) -> int | None:
    if list(answer) == list(right):
        return None
    return next((place for place, pair in enumerate(zip(answer, right)) if pair[0] != pair[1]), min(len(answer), len(right)))


def margin(model: Target, asked: Request, right: Sequence[int], place: int) -> tuple[float, float]:
    """By how much the best token led at a place of an answer, noise included, and the size of its logit: one uncached pass."""
    vlm = model.vlm
    prompt = vlm.expand_prompt(asked.prompt, len(asked.images))
    images = pixels(model, asked)
    with torch.inference_mode():
        features = None if images is None else vlm.image_features(images)
        ids = [*prompt, *right[:place]]
        hidden = vlm.hidden(vlm.embed_prompt(ids, features)[None], [ids])
        logits = vlm.logits(hidden[0, -1]).double().numpy()
    sampling: SamplingConfig = asked.sampling
    scale = 1.0 if sampling.is_greedy else sampling.temperature
    noise = 0.0 if sampling.is_greedy else gumbel_noise(sampling.seed, len(prompt) + place, len(logits))
    best, second = np.sort(logits / scale + noise)[:-3:-1]
    return float(best - second) * scale, float(np.abs(logits).max())


if __name__ == "__main__":
    raise SystemExit(main())
