"""The trained draft: what training shows it is what drafting does, it may change or lose its images, and it never changes an
answer.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from multimodal.compressor import BRANCHES, CompressorConfig
from multimodal.decoder import Decoder
from multimodal.sampling import SamplingConfig
from multimodal.vlm import VLM
from serve.controller import FixedController, Round
from serve.draft_loss import Dialogue, DistillationConfig, DistillationLoss, Teacher, rollout_mask
from serve.draft_model import DraftModel, DraftModelConfig
from serve.drafters import DraftLimits
from serve.eagle_drafter import EagleDrafter
from serve.engine import Engine, EngineConfig
from serve.request import Request, SpeculationConfig
from serve.target import Target, cast
from serve.tree import TreeBuilder
from tests.tiny_vlm import VOCAB, naive, request, target

BUSH = DraftLimits(max_nodes=10, max_depth=4, width=3)


def build_draft(mode: str = "select", dtype: torch.dtype = torch.float64, model: Target | None = None) -> DraftModel:
    torch.manual_seed(0)
    config = DraftModelConfig(compressor=CompressorConfig(mode=mode, prune_ratio=2.0, pool_ratio=4.0))
    return cast(DraftModel(config, (model or target()).vlm), dtype)


def build(draft: DraftModel, limits: DraftLimits = BUSH, max_batch: int = 3, controller=None) -> Engine:
    drafter = EagleDrafter(draft, target().vlm, num_slots=max_batch, capacity=64 + 40, chunk=5)
    config = EngineConfig(max_batch=max_batch, context=64, prefill_chunk=7, max_nodes=VOCAB)
    return Engine(target(), config, drafter, controller or FixedController(limits))


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [list(finished.token_ids) for finished in engine.run(requests)]


def dialogue(index: int, size: int = 12) -> tuple[Dialogue, Request]:
    asked = request(index, sampling=SamplingConfig(), max_tokens=size, ignore_eos=True)
    said = naive(target(), asked)
    flags = (False,) * len(asked.prompt) + (True,) * len(said)
    return Dialogue(tuple(asked.images), (*asked.prompt, *said), flags), asked


def training_features(draft: DraftModel, taught: Dialogue, rollout: int) -> list[dict[int, torch.Tensor]]:
    """What the draft estimates in training: of each rollout step, feature by position."""
    loss = DistillationLoss(Teacher(target()), DistillationConfig(rollout=rollout, feature_noise=0.0))
    with torch.no_grad():
        entries = loss._entries(draft, loss.teacher([taught]), torch.Generator())
        steps = loss._rollout(draft, entries)
    return [dict(zip(entries.positions[0].tolist(), step[0], strict=True)) for step in steps]


@pytest.mark.parametrize("mode", ["pool", "none", "text_only"])
@pytest.mark.parametrize("index", [3, 4, 8])  # none, one, two images
def test_drafting_meets_what_training_showed(index, mode, monkeypatch):
    """Level s of drafting after token j gives the feature that rollout step s gives at j + s, for drafts that are right."""
    draft, depth = build_draft(mode=mode), 4
    taught, asked = dialogue(index)
    expected = training_features(draft, taught, depth)
    whole = target().vlm.expand_prompt(taught.ids, len(taught.images))
    limits = DraftLimits(max_nodes=VOCAB * depth, max_depth=depth, width=VOCAB)
    engine, seen = build(draft, limits, 1), []
    ranked = engine.drafter._ranked

    def record(hidden, generations, level, count):
        seen.append((generations[0].num_tokens - 1 + level, level, hidden[0, 0]))
        return ranked(hidden, generations, level, count)

    def follow(self, candidates, count, least_score=-np.inf):
        position = seen[-1][0] + 1
        return [node for node in candidates if position < len(whole) and self.tokens[node] == whole[position]]

    monkeypatch.setattr(engine.drafter, "_ranked", record)
    monkeypatch.setattr(TreeBuilder, "likeliest", follow)
    assert answers(engine, [asked]) == [list(taught.ids[len(asked.prompt) :])]
    assert {level for _, level, _ in seen} == set(range(depth))
    for position, level, hidden in seen:
        torch.testing.assert_close(hidden, expected[level][position])


def test_only_what_drafting_meets_is_supervised():
    """Entry j of step s: the root and the s tokens before are answer tokens, and so is the token to be guessed."""
    taught = Dialogue((), (9, 8, 20, 21, 22, 9, 23, 24), (False, False, True, True, True, False, True, True))
    loss = DistillationLoss(Teacher(target()), DistillationConfig(rollout=3))
    entries = loss._entries(build_draft(mode="text_only"), loss.teacher([taught]), torch.Generator())
    found = [entries.positions[valid].tolist() for valid in entries.supervised(3)]
    assert found == [[2, 3, 6], [3], []]


def test_a_rollout_mask_is_the_path_of_a_draft():
    first, second = rollout_mask(0, 4), rollout_mask(2, 4)
    assert torch.equal(first, torch.ones(4, 4).tril().bool())
    assert second[3].int().tolist() == [1, 1, 0, 0] + [0, 0, 1, 0] + [0, 0, 0, 1]  # true up to 3 - 2, step 1 at 2, itself


def test_a_grown_vocabulary_is_sampled_and_drafted_alike():
    torch.manual_seed(1)
    grown = VLM(replace(target().vlm.config, num_new_tokens=5))
    grown = replace(target(), vlm=cast(grown, torch.float64))
    asked = [request(index, sampling=SamplingConfig(temperature=1.0, seed=index)) for index in range(6)]
    drafter = EagleDrafter(build_draft(mode="pool", model=grown), grown.vlm, num_slots=2, capacity=104)
    engine = Engine(grown, EngineConfig(max_batch=2, context=64), drafter, FixedController(BUSH))
    assert answers(engine, asked) == [naive(grown, each) for each in asked]
    assert engine.stats().spec_decode_num_draft_tokens > 0


def test_what_a_slot_held_before_reaches_no_draft():
    asked = [request(index, max_tokens=12) for index in (4, 6)]
    fresh, used = (build(build_draft(mode="pool"), max_batch=2) for _ in range(2))
    used.drafter.cache.buffer.fill_(torch.nan)
    first, second = (engine.run(asked) for engine in (fresh, used))
    assert [each.usage.drafted_tokens for each in first] == [each.usage.drafted_tokens for each in second]
    assert used.stats().spec_decode_num_accepted_tokens == fresh.stats().spec_decode_num_accepted_tokens


def test_a_draft_counts_as_no_look_up_of_images():
    asked = [request(index) for index in (4, 5, 4)]
    engines = [build(build_draft(mode="pool")), Engine(target(), EngineConfig(max_batch=3, context=64))]
    for engine in engines:
        engine.run(asked)
    hits, misses = ({getattr(engine.stats(), f"image_cache_{name}") for engine in engines} for name in ("hits", "misses"))
    assert len(hits) == len(misses) == 1


@pytest.mark.parametrize("mode", ["select", "weighted", "concat", "text_only"])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_no_draft_changes_an_answer(mode, max_batch):
    asked = [request(index) for index in range(12)]
    engine = build(build_draft(mode=mode), max_batch=max_batch)
    assert answers(engine, asked) == [naive(target(), each) for each in asked]
    assert engine.stats().spec_decode_num_draft_tokens > 0


def test_swapping_compressor_and_gate_in_mid_run_changes_nothing(monkeypatch):
    asked = [request(index) for index in range(24)]
    draft, random, by_gate = build_draft(), np.random.default_rng(0), []
    forward = draft.compressor.forward

    def swap(*arguments, **options):
        with torch.no_grad():
            for parameter in draft.compressor.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(int(random.integers(99))))
        branch = (None, *BRANCHES)[random.integers(len(BRANCHES) + 1)]
        compressed = forward(*arguments, **{**options, "branch": branch})
        by_gate.extend(compressed.chosen if branch is None else ())
        return compressed

    monkeypatch.setattr(draft.compressor, "forward", swap)
    engine = build(draft)
    assert answers(engine, asked) == [naive(target(), each) for each in asked]
    assert len(engine.drafter.branches) > 2 and len(set(by_gate)) > 1


def test_a_draft_whose_image_is_gone_goes_on_without_it():
    asked = [request(index) for index in (4, 5, 8)]
    engine = build(build_draft(mode="pool"))
    engine.image_cache.max_bytes = 1  # nothing is kept
    assert answers(engine, asked) == [naive(target(), each) for each in asked]
    assert engine.drafter.branches == {} and engine.stats().spec_decode_num_draft_tokens > 0


class OnAndOff(FixedController):
    """Drafts in stretches of `period` rounds."""

    def __init__(self, limits: DraftLimits, period: int) -> None:
        super().__init__(limits)
        self.period, self.round = period, 0

    def plan(self, generations):
        self.round += 1
        off = DraftLimits(0, 0, 0)
        return [self.limits if (self.round // self.period + row) % 2 else off for row in range(len(generations))]


@pytest.mark.parametrize("period", [3, 19])  # shorter and longer than what requests read together
def test_drafting_can_stop_and_start_again_without_loss(monkeypatch, period):
    """The draft read lazily what the target did meanwhile: it estimates what it would have."""
    draft = build_draft(mode="pool")
    taught, asked = dialogue(4, 26)
    (expected,) = training_features(draft, taught, 1)
    engine, seen = build(draft, max_batch=1, controller=OnAndOff(BUSH, period)), []
    catch_up = engine.drafter._catch_up

    def record(generations):
        hidden = catch_up(generations)
        seen.append((generations[0].num_tokens - 1, hidden[0]))
        return hidden

    monkeypatch.setattr(engine.drafter, "_catch_up", record)
    assert answers(engine, [asked]) == [list(taught.ids[len(asked.prompt) :])]
    assert 0 < len(seen) < engine.stats().rounds
    for position, hidden in seen:
        torch.testing.assert_close(hidden, expected[position])


class Recorder(FixedController):
    """Keeps the rounds."""

    def __init__(self, limits: DraftLimits) -> None:
        super().__init__(limits)
        self.rounds: list[Round] = []

    def observe(self, outcome: Round) -> None:
        self.rounds.append(outcome)


def test_a_round_tells_what_its_drafting_cost():
    asked = [request(0, max_tokens=9, ignore_eos=True), request(3, max_tokens=9, ignore_eos=True)]
    asked[1] = replace(asked[1], speculation=SpeculationConfig(enabled=False))
    limits = DraftLimits(max_nodes=10, max_depth=4, width=3, least_score=-1e-9)  # nothing is worth keeping
    recorder = Recorder(limits)
    build(build_draft(mode="pool"), max_batch=2, controller=recorder).run(asked)
    costs = [each.drafting for each in recorder.rounds]
    depths = [4, 4, 4, 4, 3, 2, 1]  # and no draft for the last token
    assert [dict(cost.levels) for cost in costs if cost.levels] == [{0: depth} for depth in depths] and len(costs) > len(depths)
    assert costs[0].read_seconds > 0 and {cost.read_seconds for cost in costs[1:]} == {0.0}
    assert all(0 < each.draft_seconds + each.verify_seconds <= each.seconds for each in recorder.rounds)


def test_a_long_catch_up_beside_a_full_slot_has_room():
    asked = [request(index, max_tokens=40, ignore_eos=True) for index in (0, 3, 6)]
    engine = build(build_draft(mode="text_only"), max_batch=3, controller=OnAndOff(BUSH, 20))
    assert answers(engine, asked) == [naive(target(), each) for each in asked]


def test_a_trimmed_head_drafts_only_its_ids():
    ids = list(range(5, 300, 3))
    torch.manual_seed(0)
    config = DraftModelConfig(head_size=len(ids), compressor=CompressorConfig(mode="text_only"))
    draft = cast(DraftModel(config, target().vlm, ids), torch.float64)
    engine, drafted = build(draft), []
    propose = engine.drafter.propose

    def record(generations, limits):
        proposal = propose(generations, limits)
        drafted.extend(proposal.trees)
        return proposal

    engine.drafter.propose = record
    asked = [request(index) for index in range(9)]
    assert answers(engine, asked) == [naive(target(), each) for each in asked]
    said = {token for tree in drafted for token in tree.tokens[1:]}
    assert said and said <= set(ids)
    with pytest.raises(ValueError, match="head ids"):
        DraftModel(config, target().vlm, ids[:-1])


def test_the_draft_is_the_one_decoder_and_its_config_survives_its_dictionary():
    config = DraftModelConfig(num_layers=2, head_size=99, compressor=CompressorConfig(mode="concat"))
    draft = DraftModel(config, target().vlm)
    assert type(draft.decoder) is type(target().vlm.decoder) is Decoder and len(draft.decoder.blocks) == 2
    assert DraftModelConfig.from_dict(config.to_dict()) == config


def rescaled(factor: float) -> Target:
    """The target with features `factor` times as large and the same logits."""
    vlm = copy.deepcopy(target().vlm)
    vlm.decoder.norm.weight.data.mul_(factor)
    vlm.config = replace(vlm.config, logit_scale=vlm.config.logit_scale / factor)
    return replace(target(), vlm=vlm)


def first_loss(model: Target) -> tuple[float, list[float]]:
    """Loss and gradients' sizes of a fresh draft."""
    draft = build_draft(mode="pool", model=model)
    loss = DistillationLoss(Teacher(model), DistillationConfig())
    terms = loss(draft, [dialogue(index)[0] for index in (3, 4, 8)], torch.Generator().manual_seed(0))
    terms.loss_sum.backward()
    trained = (draft.fuse, draft.decoder.blocks[0].mlp.down)
    return float(terms.loss_sum.detach()), [float(part.weight.grad.norm()) for part in trained]


@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_the_loss_does_not_depend_on_the_scale_of_features(factor):
    loss, gradients = first_loss(rescaled(1.0))
    scaled_loss, scaled_gradients = first_loss(rescaled(factor))
    assert scaled_loss == pytest.approx(loss, rel=1e-3)  # the norms' eps is no part of the scale
    assert scaled_gradients == pytest.approx(gradients, rel=1e-3)


@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_a_draft_begins_at_the_scale_of_its_target_and_so_does_the_noise(factor, monkeypatch):
    model, taught = rescaled(factor), dialogue(4)[0]
    draft = build_draft(mode="text_only", model=model)
    lesson = Teacher(model)([taught])
    rms = float(lesson.features.square().mean().sqrt())
    features, enter = [], draft.enter
    monkeypatch.setattr(draft, "enter", lambda embeddings, before: features.append(before) or enter(embeddings, before))
    for amount in (0.0, 0.2):
        loss = DistillationLoss(Teacher(model), DistillationConfig(rollout=1, feature_noise=amount))
        with torch.no_grad():
            entries = loss._entries(draft, lesson, torch.Generator().manual_seed(0))
    noise, largest = features[1] - features[0], 0.1 * 512 / len(lesson.ids[0]) * rms
    assert 0.95 * largest < float(noise.abs().max()) <= largest
    with torch.no_grad():
        (estimated,) = loss._rollout(draft, entries)
    assert float(estimated.square().mean().sqrt()) == pytest.approx(rms, rel=0.1)


@pytest.mark.parametrize("mode", ["select", "weighted", "concat"])
def test_distillation_teaches(mode):
    """The loss falls, every part is trained, and what was learnt is accepted more often."""
    torch.manual_seed(0)
    dialogues = [dialogue(index, 16)[0] for index in range(6)]
    draft = build_draft(mode=mode, dtype=torch.float32)
    teacher = Teacher(replace(target(1), vlm=cast(copy.deepcopy(target().vlm), torch.float32)))
    loss_step = DistillationLoss(teacher, DistillationConfig(rollout=2))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    losses, generator = [], torch.Generator().manual_seed(0)
    touched: set[str] = set()
    for _ in range(80):
        terms = loss_step(draft.train(), dialogues, generator)
        optimizer.zero_grad()
        (terms.loss_sum / terms.normalizer).backward()
        gradients = {name: weight.grad for name, weight in draft.named_parameters() if weight.grad is not None}
        touched |= {name for name, gradient in gradients.items() if gradient.abs().sum() > 0}
        optimizer.step()
        losses.append(float(terms.loss_sum.detach()) / terms.normalizer)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert touched == {name for name, _ in draft.named_parameters()}
    asked = [dialogue(index, 16)[1] for index in range(6)]
    before, after = build(build_draft(mode=mode)), build(cast(draft, torch.float64))
    assert answers(before, asked) == answers(after, asked)
    assert after.stats().tokens_per_round > before.stats().tokens_per_round + 0.5
