"""The engine says what the naive decoder says: whatever drafts, however batched, cut, cancelled. All: `vla bench lossless`."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from multimodal.sampling import SamplingConfig
from multimodal.vlm import IMAGE
from serve.controller import FixedController
from serve.drafters import DraftLimits, NgramDrafter, OracleDrafter, RandomDrafter
from serve.engine import Engine, EngineConfig
from serve.errors import QueueFull
from serve.request import Delta, Finished, Request, SpeculationConfig
from tests.drafting import AdversarialDrafter, Fickle, SelfDrafter
from tests.test_answer_text import stop_reference
from tests.tiny_vlm import VOCAB, naive, request, target, tokenizer

REQUESTS = [request(index) for index in range(24)]
TREES = {
    "chain": DraftLimits(max_nodes=3, max_depth=3, width=1),
    "bush": DraftLimits(max_nodes=12, max_depth=4, width=3),
    "wide": DraftLimits(max_nodes=8, max_depth=1, width=8),
}


@pytest.fixture(scope="module")
def truth() -> list[list[int]]:
    return [naive(target(), asked) for asked in REQUESTS]


def build(drafter=None, tree: str = "bush", **changes) -> Engine:
    config = EngineConfig(**{"max_batch": 3, "context": 64, "prefill_chunk": 7, "max_nodes": 16, **changes})
    return Engine(target(), config, drafter, FixedController(TREES[tree]))


def drafters(answers: list[list[int]]) -> dict:
    known = lambda generation: answers[generation.id]  # noqa: E731
    simple = {
        "none": None,
        "ngram": NgramDrafter(),
        "oracle": OracleDrafter(known),
        "random": RandomDrafter(VOCAB),
        "adversarial": AdversarialDrafter(known, VOCAB),
    }
    return simple | {"fickle": Fickle(list(simple.values())[1:])}


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["none", "ngram", "oracle", "random", "adversarial", "fickle"])
def test_output_equals_the_naive_decoder(truth, name, tree, max_batch):
    engine = build(drafters(truth)[name], tree, max_batch=max_batch)
    assert [list(finished.token_ids) for finished in engine.run(REQUESTS)] == truth


def test_a_target_that_drafts_for_itself_is_always_right():
    engine = build(SelfDrafter(target()), "chain")
    answers = engine.run([replace(asked, max_tokens=9, ignore_eos=True) for asked in REQUESTS[:8]])
    assert all(answer.usage.drafted_tokens == answer.usage.accepted_tokens > 0 for answer in answers)
    assert engine.stats().spec_decode_num_accepted_tokens_per_pos[0] == engine.stats().spec_decode_num_drafts


def test_batch_mates_and_order_change_nothing(truth):
    together = build(RandomDrafter(VOCAB), max_batch=5).run(REQUESTS[::-1])
    assert [list(finished.token_ids) for finished in together[::-1]] == truth
    alone = [build().run([asked])[0].token_ids for asked in REQUESTS[:6]]
    assert [list(ids) for ids in alone] == truth[:6]


def test_images_of_a_causal_model_may_be_read_in_parts():
    model = target(0, torch.float64, False)
    config = EngineConfig(max_batch=2, context=64, prefill_chunk=3, max_nodes=16)
    engine = Engine(model, config, NgramDrafter(), FixedController(TREES["bush"]))
    expected = [naive(model, asked) for asked in REQUESTS[:8]]
    assert [list(finished.token_ids) for finished in engine.run(REQUESTS[:8])] == expected


def test_penalties_see_the_path_of_each_node():
    sampling = SamplingConfig(temperature=0.7, seed=4, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3)
    asked = [replace(each, sampling=replace(sampling, seed=index), max_tokens=20) for index, each in enumerate(REQUESTS[:6])]
    answers = [naive(target(), each) for each in asked]
    for name in ("oracle", "adversarial", "random"):
        assert [list(finished.token_ids) for finished in build(drafters(answers)[name]).run(asked)] == answers


@pytest.mark.parametrize("size", range(1, 12))
def test_max_tokens_is_exact_inside_a_block(truth, size):
    asked = replace(REQUESTS[0], max_tokens=size, ignore_eos=True)
    answer = naive(target(), replace(asked, max_tokens=20))
    finished = build(OracleDrafter(lambda generation: answer), "chain").run([asked])[0]
    assert list(finished.token_ids) == answer[:size] and finished.reason == "length"


@pytest.mark.parametrize("place", range(10))
def test_a_stop_id_ends_the_answer_inside_a_block(place):
    asked = replace(REQUESTS[3], max_tokens=12, ignore_eos=True)
    answer = naive(target(), asked)
    stop = replace(asked, stop_ids=[answer[place]])
    finished = build(OracleDrafter(lambda generation: answer), "chain").run([stop])[0]
    assert list(finished.token_ids) == naive(target(), stop) == answer[: answer.index(answer[place]) + 1]
    assert finished.reason == "stop" and finished.text == tokenizer().decode(finished.token_ids[:-1])


@pytest.mark.parametrize("drafter", ["none", "oracle", "adversarial"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_the_text_wherever_it_falls(drafter, length):
    asked = replace(REQUESTS[3], max_tokens=20, ignore_eos=True)
    answer = naive(target(), asked)
    text = tokenizer().decode(answer)
    for start in range(0, len(text) - length, 2):
        stop = (text[start : start + length], "never")
        if "\ufffd" in stop[0]:
            continue
        events = list(build(drafters([answer])[drafter], "chain").stream(replace(asked, stop=stop)))
        finished = events[-1]
        expected, count = stop_reference(tokenizer(), answer, stop)
        assert (finished.text, len(finished.token_ids), finished.stop_string) == (expected, count, stop[0])
        assert "".join(event.text for event in events[:-1]) == finished.text


def test_deltas_add_up_and_say_what_was_drafted(truth):
    index = 9
    events = list(build(OracleDrafter(lambda generation: truth[index]), "chain").stream(REQUESTS[index]))
    deltas, finished = events[:-1], events[-1]
    assert isinstance(finished, Finished) and all(isinstance(delta, Delta) for delta in deltas)
    assert [token for delta in deltas for token in delta.token_ids] == list(finished.token_ids) == truth[index]
    assert sum(delta.num_accepted for delta in deltas) == finished.usage.accepted_tokens > 0
    assert finished.usage.completion_tokens == len(truth[index]) == finished.usage.rounds + finished.usage.accepted_tokens + 1


@pytest.mark.parametrize("place", [1, 2, 3, 4, 5])
def test_what_comes_after_the_end_is_not_counted(place):
    """A stop inside a block of right drafts: every counter knows the tokens of the answer, and no others."""
    asked = replace(REQUESTS[3], max_tokens=12, ignore_eos=True)
    answer = naive(target(), asked)
    engine = build(OracleDrafter(lambda generation: answer), "chain")
    events = list(engine.stream(replace(asked, stop_ids=[answer[place]])))
    usage, stats = events[-1].usage, engine.stats()
    assert usage.completion_tokens == stats.generation_tokens == answer.index(answer[place]) + 1
    accepted = sum(event.num_accepted for event in events[:-1])
    assert accepted == usage.accepted_tokens == stats.spec_decode_num_accepted_tokens < usage.completion_tokens
    assert accepted == sum(stats.spec_decode_num_accepted_tokens_per_pos)


def test_tokens_a_round_count_rounds_without_drafts(truth):
    asked = [replace(REQUESTS[9], speculation=SpeculationConfig(enabled=enabled)) for enabled in (True, False)]
    engine = build(OracleDrafter(lambda generation: truth[9]), "chain")
    usages = [finished.usage for finished in engine.run(asked)]
    rounds, accepted = sum(usage.rounds for usage in usages), sum(usage.accepted_tokens for usage in usages)
    assert engine.stats().request_rounds == rounds and engine.stats().tokens_per_round == 1 + accepted / rounds


def test_a_cancelled_request_leaves_and_resumes_where_it_was(truth):
    for name, drafter in drafters(truth).items():
        engine = build(drafter)
        ids = [engine.submit(asked) for asked in REQUESTS]
        events = [event for _ in range(6) for event in engine.step()]
        victim = min(set(ids) - {event.request_id for event in events if isinstance(event, Finished)})
        assert engine.cancel(victim) and not engine.cancel(victim) and engine.cancel(ids[-1]) and not engine.cancel(999)
        while engine.has_work:
            events += engine.step()
        ends = {event.request_id: event for event in events if isinstance(event, Finished)}
        assert {ends[victim].reason, ends[ids[-1]].reason} == {"cancelled"} and ends[ids[-1]].token_ids == ()
        for index in set(ids) - {victim, ids[-1]}:
            assert list(ends[index].token_ids) == truth[index], name
        said = list(ends[victim].token_ids)
        assert said == truth[victim][: len(said)]
        if len(said) < len(truth[victim]):
            asked = REQUESTS[victim]
            rest = replace(asked, prompt=[*asked.prompt, *said], max_tokens=asked.max_tokens - len(said))
            assert said + list(build().run([rest])[0].token_ids) == truth[victim]


def test_requests_wait_for_a_slot_and_a_full_queue_refuses(truth):
    engine = build(max_batch=2, max_waiting=3)
    before = engine.runner.cache.num_bytes
    ids = [engine.submit(asked) for asked in REQUESTS[:5]]
    with pytest.raises(QueueFull) as caught:
        engine.submit(REQUESTS[5])
    assert caught.value.retry_after > 0
    ends = {}
    while engine.has_work:
        ends |= {event.request_id: event for event in engine.step() if isinstance(event, Finished)}
        stats = engine.stats()
        assert stats.num_requests_running <= 2 and stats.kv_tokens_used <= stats.kv_tokens_capacity
    assert [list(ends[index].token_ids) for index in ids] == truth[:5]
    assert engine.runner.cache.num_bytes == before and engine.stats().kv_tokens_used == 0


def test_the_same_pixels_are_encoded_once(truth, monkeypatch):
    engine, calls = build(), []
    encode = engine.target.vlm.image_features
    monkeypatch.setattr(engine.target.vlm, "image_features", lambda images: calls.append(1) or encode(images))
    twice = [replace(REQUESTS[1], sampling=SamplingConfig()), REQUESTS[1]]
    engine.run(twice)
    assert len(calls) == len(REQUESTS[1].images) == 1 and engine.stats().image_cache_hits == 1
    engine.image_cache.clear()
    assert list(engine.run([REQUESTS[1]])[0].token_ids) == truth[1] and len(calls) == 2


def test_logprobs_are_the_targets_own():
    asked = Request([9, 10, 11], max_tokens=5, top_logprobs=3, ignore_eos=True)
    answer = naive(target(), asked)
    events = list(build(OracleDrafter(lambda generation: answer)).stream(asked))
    found = [entry for event in events[:-1] for entry in event.logprobs]
    with torch.no_grad():
        ids = [*asked.prompt, *answer]
        hidden = target().vlm.hidden(target().vlm.embed_prompt(ids, None)[None], [ids])
        logs = target().vlm.logits(hidden)[0, 2:-1].log_softmax(-1)
    for entry, token, row in zip(found, answer, logs, strict=True):
        assert entry.logprob == pytest.approx(float(row[token])) and entry.top[0] == (token, pytest.approx(entry.logprob))
        assert len(entry.top) == 3


def test_one_requests_nan_is_no_other_requests_business(truth):
    engine = build(RandomDrafter(VOCAB))
    weight = engine.target.vlm.text_embedding.weight
    kept = weight[300].clone()
    others = [asked for asked in REQUESTS if 300 not in asked.prompt]
    expected = [naive(target(), asked) for asked in others]
    others = [asked for asked, answer in zip(others, expected, strict=True) if 300 not in answer][:6]
    with torch.no_grad():
        weight[300] = torch.nan
        try:
            bad = Request([9, 300, 9], max_tokens=5)
            answers = engine.run([others[0], bad, *others[1:]])
        finally:
            weight[300] = kept
    assert answers[1].reason == "error" and "not finite" in answers[1].error
    assert [list(answer.token_ids) for answer in [answers[0], *answers[2:]]] == [naive(target(), asked) for asked in others]


def test_a_request_may_refuse_drafts_or_bound_them(truth):
    asked = replace(REQUESTS[9], speculation=SpeculationConfig(enabled=False))
    bounded = replace(REQUESTS[9], speculation=SpeculationConfig(max_nodes=1))
    plain, one = build(OracleDrafter(lambda generation: truth[9]), "chain").run([asked, bounded])
    assert plain.usage.drafted_tokens == 0 and list(plain.token_ids) == list(one.token_ids) == truth[9]
    assert one.usage.drafted_tokens <= one.usage.rounds and one.usage.accepted_tokens > 0


def test_requests_come_from_many_threads(truth):
    engine, ids = build(NgramDrafter(), max_waiting=64), {}

    def ask(index: int) -> None:
        ids[index] = engine.submit(REQUESTS[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    ends = {}
    while any(thread.is_alive() for thread in threads) or engine.has_work:
        ends |= {event.request_id: event for event in engine.step() if isinstance(event, Finished)}
    assert [list(ends[ids[index]].token_ids) for index in range(24)] == truth


def test_text_prompts_and_images_at_their_marks():
    asked = Request("the red cup", [np.full((32, 32, 3), 90, np.uint8)], max_tokens=6)
    assert list(build().run([asked])[0].token_ids) == naive(target(), asked)
    assert target().vlm.expand_prompt(tokenizer().encode("the red cup"), 1)[:4] == [IMAGE] * 4
