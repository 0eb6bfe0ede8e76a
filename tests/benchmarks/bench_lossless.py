"""Lossless, the heart: >= 1000 prompts with images x drafters x trees x batch sizes x cancel-and-resume, token for token.

In float64 on a small random model every answer must equal the naive decoder's, greedy and sampled alike. In float32 and
bfloat16 a pass over several rows rounds otherwise than a pass over one, so the first difference to plain decoding must lie
where the two best tokens were closer than a stated bound; such flips are counted. Cells that were done are kept in OUTPUT.jsonl
and skipped: the run can be resumed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from tests.drafting import AdversarialDrafter
from tests.tiny_vlm import VOCAB, naive, pixels, request, target

TREES = {
    "chain 4": DraftLimits(max_nodes=4, max_depth=4, width=1),
    "bush 12": DraftLimits(max_nodes=12, max_depth=4, width=3),
    "paper 59": DraftLimits(max_nodes=59, max_depth=8, width=10),
}
COLUMNS = ("type", "drafter", "tree", "batch", "tokens", "different", "flips", "margin", "a round")
DRAFTERS = ("none", "ngram", "oracle", "random", "adversarial", "eagle")
BATCHES = (1, 4)
CONTEXT = 64
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}  # bfloat16: times the larger logit's size


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--prompts", type=int, default=1000, help="of each cell; 50 is a quick look")
    arguments.add_argument("--fresh", action="store_true", help="forget the cells that were done")
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    journal = Journal(options)
    requests = [request(index) for index in range(options.prompts)]
    slow = journal.once("truth", "naive decoder, float64", lambda: {"answers": [naive(target(), asked) for asked in requests]})
    rows = [*exact_cells(journal, requests, slow["answers"]), *rounded_cells(journal, requests)]
    facts = {"answers_per_row": options.prompts, "bounds": {str(key): value for key, value in BOUNDS.items()}}
    report("lossless", COLUMNS, rows, options.output, **facts)
    wrong = sum(row[COLUMNS.index("different")] for row in rows)
    print("every answer equals plain decoding" if wrong == 0 else f"{wrong} ANSWERS DIFFER")
    return 0 if wrong == 0 else 1


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
        cells = 1 + len(DRAFTERS) * (len(BATCHES) * (len(TREES) + 1)) + 2 * len(DRAFTERS)
        self._bar = tqdm(total=cells, unit="cell", dynamic_ncols=True)

    def once(self, cell: str, shown: str, work) -> dict:
        """The record of a cell, from disk or from `work()`."""
        self._bar.set_description(shown)
        if cell not in self._done:
            self._done[cell] = work()
            with self._path.open("a") as file:
                file.write(json.dumps({"cell": cell, **self._done[cell]}) + "\n")
        self._bar.update()
        return self._done[cell]


def exact_cells(journal: Journal, requests: Sequence[Request], truth: Sequence[Sequence[int]]) -> Iterator[list]:
    """Rows of the float64 table; the `different` column must be 0."""
    for name in DRAFTERS:
        for batch in BATCHES:
            for tree, limits in TREES.items():

                def straight(name=name, batch=batch, limits=limits) -> dict:
                    engine = build(target(), name, limits, batch, truth)
                    answers = [list(finished.token_ids) for finished in engine.run(requests)]
                    different = sum(answer != right for answer, right in zip(answers, truth, strict=True))
                    return {"tokens": sum(map(len, answers)), "different": different, "rate": engine.stats().tokens_per_round}

                done = journal.once(f"{name}/{tree}/{batch}", f"{name}, {tree}, batch {batch}", straight)
                yield ["f64", name, tree, batch, done["tokens"], done["different"], 0, 0.0, done["rate"]]

            def resumed(name=name, batch=batch) -> dict:
                engine = build(target(), name, TREES["bush 12"], batch, truth)
                answers = cancel_and_resume(engine, requests, seed=batch)
                different = sum(answer != right for answer, right in zip(answers, truth, strict=True))
                return {"tokens": sum(map(len, answers)), "different": different, "rate": engine.stats().tokens_per_round}

            done = journal.once(f"{name}/resumed/{batch}", f"{name}, cancelled and resumed, batch {batch}", resumed)
            yield ["f64", name, "bush 12, resumed", batch, done["tokens"], done["different"], 0, 0.0, done["rate"]]


def rounded_cells(journal: Journal, requests: Sequence[Request]) -> Iterator[list]:
    """Rows for float32 and bfloat16: first differences to plain decoding, one request at a time, of the same engine and type.
    """
    plain_sampling = [replace(asked, sampling=replace(asked.sampling, top_p=1.0)) for asked in requests]
    for dtype, bound in BOUNDS.items():
        model = target(0, dtype)
        plain: list[list[int]] = []
        for name in DRAFTERS:

            def compare(name=name, model=model, bound=bound, plain=plain) -> dict:
                if not plain:
                    alone = build(model, "none", TREES["chain 4"], 1, [])
                    plain += [list(each.token_ids) for each in alone.run(plain_sampling)]
                engine = build(model, name, TREES["bush 12"], 4, plain)
                answers = [list(finished.token_ids) for finished in engine.run(plain_sampling)]
                margins = [
                    margin(model, asked, right, place)
                    for asked, answer, right in zip(plain_sampling, answers, plain, strict=True)
                    if (place := first_difference(answer, right)) is not None
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

            kind = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
            done = journal.once(f"{kind}/{name}", f"{kind}, {name}", compare)
            yield [kind, name, "bush 12", 4, *(done[key] for key in ("tokens", "different", "flips", "margin", "rate"))]


def build(model: Target, name: str, limits: DraftLimits, batch: int, answers: Sequence[Sequence[int]]) -> Engine:
    config = EngineConfig(max_batch=batch, context=CONTEXT, prefill_chunk=16, max_nodes=64)
    return Engine(model, config, build_drafter(model, name, batch, answers), FixedController(limits))


def build_drafter(model: Target, name: str, batch: int, answers: Sequence[Sequence[int]]) -> Drafter | None:
    known = {tuple(request(index).prompt): answer for index, answer in enumerate(answers)}

    def answer_of(generation: Generation) -> Sequence[int]:
        """What is to be said; of a resumed request, whose prompt ends with what was said already, the rest."""
        prompt = tuple(generation.request.prompt)
        for size in range(len(prompt), 0, -1):
            answer = known.get(prompt[:size])
            if answer is not None and tuple(answer[: len(prompt) - size]) == prompt[size:]:
                return answer[len(prompt) - size :]
        return []

    if name == "eagle":
        torch.manual_seed(0)
        config = DraftModelConfig(compressor=CompressorConfig(prune_ratio=2.0, pool_ratio=4.0))
        draft = cast(DraftModel(config, model.vlm), model.vlm.head_weight.dtype)
        return EagleDrafter(draft, model.vlm, num_slots=batch, capacity=CONTEXT + 80)
    simple = {
        "none": lambda: None,
        "ngram": NgramDrafter,
        "oracle": lambda: OracleDrafter(answer_of),
        "random": lambda: RandomDrafter(VOCAB),
        "adversarial": lambda: AdversarialDrafter(answer_of, VOCAB),
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
