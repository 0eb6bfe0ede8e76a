"""OpenAI's API by OpenAI's client: answers equal the engine's in this process, streamed or whole; and the page's box."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from unittest.mock import AsyncMock

import numpy as np
import openai
import pytest

pytest.importorskip("serve.engine")

from multimodal.sampling import SamplingConfig
from serve.chat import ChatRequest
from serve.chat_process import ChatProcess, ChatSource
from serve.engine import Engine
from serve.metrics import Metrics
from serve.protocol.limits import Limits
from serve.protocol.refusal import Refusal
from serve.request import Finished, Request
from serve.server import ServeConfig
from serve.worker_process import WorkerProcess
from tests.browser import Browser, find_browser
from tests.chat_engine import CONTEXT, build
from tests.serving import WEB, FakeWorker, Running, running

QUESTION = "how many bowls?"
SOURCE = ChatSource(factory="tests.chat_engine:build", name="tiny")
URL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServeConfig(vlm=SOURCE, grpc_port=None, limits=Limits(chat_timeout_s=30))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none is needed", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build()


def here(engine: Engine, **changes) -> Finished:
    (finished,) = engine.run([Request(**{"prompt": QUESTION, "max_tokens": 24} | changes)])
    return finished


def ask(client: openai.OpenAI, content=QUESTION, **changes):
    options = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0.0}
    return client.chat.completions.create(**options | changes)


def png(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
REMOTE_IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
PICTURE = [{"type": "image_url", "image_url": {"url": png(PIXELS)}}, {"type": "text", "text": QUESTION}]


def test_the_model_is_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "remask"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found" and "'tiny'" in str(caught.value)


def test_a_greedy_answer_is_the_engines(client: openai.OpenAI, engine: Engine):
    answer, want = ask(client), here(engine)
    assert answer.choices[0].message.content == want.text and answer.choices[0].finish_reason == want.reason
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (
        want.usage.prompt_tokens, want.usage.completion_tokens, want.usage.prompt_tokens + want.usage.completion_tokens
    )
    assert answer.usage.remask["rounds"] == want.usage.rounds and answer.system_fingerprint == "tiny-0"


def test_a_sampled_answer_is_the_engines_and_n_choices_are_its_next_seeds(client: openai.OpenAI, engine: Engine):
    answer = ask(client, temperature=0.9, top_p=0.9, seed=5, n=3)
    wanted = [here(engine, sampling=SamplingConfig(temperature=0.9, top_p=0.9, seed=5 + index)).text for index in range(3)]
    assert [choice.message.content for choice in answer.choices] == wanted and len(set(wanted)) == 3
    assert answer.usage.completion_tokens > 3


def test_an_image_is_seen(client: openai.OpenAI, engine: Engine):
    want = here(engine, images=(PIXELS,))
    assert ask(client, PICTURE).choices[0].message.content == want.text != here(engine).text
    assert ask(client, PICTURE).usage.prompt_tokens == want.usage.prompt_tokens


def test_pieces_are_the_answer_round_by_round(client: openai.OpenAI, engine: Engine):
    want = here(engine, max_tokens=40)
    chunks = list(ask(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == want.text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == want.reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == want.usage.completion_tokens
    rounds = [chunk.remask for chunk in chunks if getattr(chunk, "remask", None)]
    assert sum(told["tokens"] for told in rounds) == want.usage.completion_tokens
    assert sum(told["accepted"] for told in rounds) == want.usage.accepted_tokens
    assert all(told["accepted"] < told["tokens"] or told["tokens"] == 0 or told["accepted"] == 0 or told is rounds[
        -1
    ] for told in rounds)


def test_the_answer_does_not_depend_on_speculation(client: openai.OpenAI):
    plain = ask(client, max_tokens=40, extra_body={"remask": {"speculate": False}})
    assert plain.choices[0].message.content == ask(client, max_tokens=40).choices[0].message.content
    assert plain.usage.remask["drafted_tokens"] == 0


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, engine: Engine):
    text = here(engine).text
    stop = text[6:8]
    want = here(engine, stop=(stop,))
    for given in (stop, [stop, "never in there"]):
        answer = ask(client, stop=given)
        assert answer.choices[0].message.content == want.text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_the_engines(client: openai.OpenAI, engine: Engine):
    answer = ask(client, max_tokens=6, logprobs=True, top_logprobs=2)
    request_id = engine.submit(Request(QUESTION, max_tokens=6, top_logprobs=2))
    entries = []
    while engine.has_work:
        for event in engine.step():
            if event.request_id == request_id and getattr(event, "logprobs", None):
                entries += event.logprobs
    got = answer.choices[0].logprobs.content
    np.testing.assert_allclose([token.logprob for token in got], [entry.logprob for entry in entries], rtol=1e-4)
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in got)
    decode = engine.target.tokenizer.decode
    assert [[top.token for top in token.top_logprobs] for token in got] == [
        [decode([i]) for i, _ in entry.top] for entry in entries
    ]


def test_penalties_and_biases_reach_the_engine(client: openai.OpenAI, engine: Engine):
    sampling = SamplingConfig(presence_penalty=1.5, frequency_penalty=0.5, logit_bias={20: 3.0})
    answer = ask(client, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={"20": 3.0})
    assert answer.choices[0].message.content == here(engine, sampling=sampling).text


def test_requests_in_parallel_are_answered_as_alone(client: openai.OpenAI, engine: Engine):
    answers: dict[int, str] = {}

    def one(index: int) -> None:
        answers[index] = ask(client, f"question {index}?", temperature=0.7, seed=index).choices[0].message.content

    threads = [threading.Thread(target=one, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index in range(8):
        want = here(engine, prompt=f"question {index}?", sampling=SamplingConfig(temperature=0.7, seed=index))
        assert answers[index] == want.text


def test_several_turns_are_one_prompt(client: openai.OpenAI, engine: Engine):
    turns = [("system", "be brief"), ("user", "a cup?"), ("assistant", "yes"), ("user", QUESTION)]
    messages = [{"role": role, "content": text} for role, text in turns]
    want = here(engine, prompt="\n".join(f"{role}: {text}" for role, text in turns))
    assert ask(client, messages=messages).choices[0].message.content == want.text


@pytest.mark.parametrize(
    ("changes", "says", "code"),
    [
        ({"temperature": 3.0}, "temperature", "invalid_request"),
        ({"top_p": 0.0}, "top_p", "invalid_request"),
        ({"n": 0}, "n:", "invalid_request"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role", "invalid_request"),
        ({"max_tokens": CONTEXT}, "context", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": PICTURE * 3}]}, "images", "too_many_images"),
        ({"messages": [{"role": "user", "content": [REMOTE_IMAGE]}]}, "fetches nothing", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "Tools are not supported", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"logit_bias": {"99999": 1.0}}, "99999", "invalid_request"),
        ({"top_logprobs": 2}, "logprobs: true", "invalid_request"),
        ({"stop": [""]}, "stop", "invalid_request"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_a_bad_request_that_names_the_field(
    client: openai.OpenAI, changes: dict, says: str, code, stream: bool
):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, stream=stream, **changes)
    assert re.search(says, str(caught.value)) and (code is None or caught.value.code == code)


def test_text_that_is_not_unicode_is_refused(server: Running):
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'
    answer = WEB.post(f"{server.http}{URL}", content=body)
    assert answer.status_code == 400 and "Unicode" in answer.json()["error"]["message"]


def test_a_wrong_model_is_not_found(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        ask(client, model="gpt")


def wait_until(condition, timeout_s: float = 30.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_hanging_up_ends_the_generation(server: Running, client: openai.OpenAI):
    chat = server.server.chat
    before = server.server.metrics.registry.get_sample_value("remask_chat_tokens_total", {"kind": "completion"}) or 0
    stream = ask(client, max_tokens=200, stream=True, extra_body={"remask": {"speculate": False}})
    next(iter(stream))
    assert len(chat._streams) == 1
    stream.close()
    wait_until(lambda: not chat._streams)
    ask(client, max_tokens=2)
    after = server.server.metrics.registry.get_sample_value("remask_chat_tokens_total", {"kind": "completion"})
    assert after - before < 200, "the rest was not generated"


def test_metrics_count_tokens_and_acceptance(server: Running, client: openai.OpenAI):
    ask(client, max_tokens=40)
    text = WEB.get(f"{server.http}/metrics").text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values['remask_chat_tokens_total{kind="completion"}'] >= 40
    assert values['remask_chat_tokens_total{kind="accepted"}'] <= values['remask_chat_tokens_total{kind="drafted"}']
    assert values["remask_chat_tokens_per_round_sum"] >= values["remask_chat_tokens_per_round_count"] > 0
    assert values['remask_image_cache_total{result="hits"}'] >= 1, "the same picture was asked about twice"


def test_a_server_without_a_policy_says_so(server: Running):
    answer = WEB.get(f"{server.http}/v2/models/policy")
    assert answer.status_code == 404 and "--policy.path" in answer.json()["error"]


def test_overload_is_a_retryable_error():
    limits = Limits(chat_timeout_s=60)
    source = ChatSource(factory="tests.chat_engine:build", arguments={"max_batch": 1, "max_waiting": 1}, name="tiny")
    with running(ServeConfig(vlm=source, grpc_port=None, limits=limits)) as server:
        with openai.OpenAI(base_url=f"{server.http}/v1", api_key="x", max_retries=0, timeout=60) as client:
            outcomes: list[openai.InternalServerError | str] = []

            def one() -> None:
                try:
                    outcomes.append(
                        ask(client, max_tokens=200, extra_body={"remask": {"speculate": False}}).choices[0].finish_reason
                    )
                except openai.InternalServerError as error:
                    outcomes.append(error)

            threads = [threading.Thread(target=one) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            refused = [outcome for outcome in outcomes if not isinstance(outcome, str)]
            assert 0 < len(refused) < 6, "one is running and one waits; there is no room for the rest"
            assert all(error.status_code == 503 and error.code == "queue_full" for error in refused)
            assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
        with openai.OpenAI(base_url=f"{server.http}/v1", api_key="x", max_retries=5, timeout=60) as patient:
            assert ask(patient, max_tokens=2).choices


def test_an_answer_ends_with_the_process_it_comes_from(monkeypatch):
    """Which a swap has put out of service meanwhile."""

    async def scenario() -> None:
        workers = [FakeWorker(checkpoint="old"), FakeWorker(checkpoint="new")]
        monkeypatch.setattr(WorkerProcess, "start", AsyncMock(side_effect=workers))
        chat = ChatProcess(SOURCE, "", Metrics())
        await chat.start()
        answer = asyncio.ensure_future(anext(chat.stream(ChatRequest((("user", QUESTION),)))))
        await asyncio.sleep(0)
        swap = asyncio.ensure_future(chat.swap(await chat.load()))
        await asyncio.sleep(0)
        workers[0].died.set_result("killed by SIGKILL")
        with pytest.raises(Refusal, match="SIGKILL"):
            await asyncio.wait_for(answer, 5)
        assert await swap == ("old", "new")
        await chat.close()

    asyncio.run(scenario())


PROGRAM = find_browser()


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome; apt-get install chromium")
def test_the_pages_box_streams_the_answer_with_its_rounds_coloured(server: Running, engine: Engine, tmp_path):
    event = {"kind": "frame", "run": "r", "task": 0, "episode": 0, "image": png(PIXELS).partition(",")[2]}
    assert WEB.post(f"{server.http}/watch", json={"events": [event]}).status_code == 200
    want = here(engine, images=(PIXELS,), max_tokens=128)
    with Browser(PROGRAM, tmp_path) as browser:
        browser.open(server.http)
        browser.wait_for("document.getElementById('frame')?.dataset.frames >= 1")
        browser.evaluate(f"document.getElementById('question').value = {json.dumps(QUESTION)}")
        browser.evaluate("document.getElementById('ask').requestSubmit()")
        facts = browser.wait_for("document.getElementById('answer-facts').textContent")
        assert facts == f"{want.usage.completion_tokens} tokens in {want.usage.rounds} rounds"
        assert browser.evaluate("document.getElementById('answer').textContent") == want.text
        drafted = browser.evaluate("document.querySelectorAll('#answer .drafted').length")
        assert (drafted > 0) == (want.usage.accepted_tokens > 0)


def test_killing_the_engine_ends_running_answers_with_an_error_and_it_comes_back(server: Running, client: openai.OpenAI):
    stream = ask(client, max_tokens=220, stream=True, extra_body={"remask": {"speculate": False}})
    next(iter(stream))
    os.kill(server.server.chat.worker_pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="SIGKILL"):
        for _ in stream:
            pass
    wait_until(lambda: server.server.chat.ready, 120)
    assert ask(client, max_tokens=2).choices[0].message.content is not None
    assert WEB.get(f"{server.http}/readyz").status_code == 200
