"""The process that owns the speculative engine: `python -m serve.chat_worker FD`, started by serve/chat_process.py.

One loop: take what came in, run one round, send what became final. Requests come and go at round boundaries.
"""

import logging
import sys
import time
import traceback
from typing import Any

from serve.chat import prompt_of
from serve.engine import Engine, EngineConfig
from serve.errors import QueueFull, RequestError
from serve.generate import load_engine
from serve.request import Delta, Finished, Request, SpeculationConfig, sampling_of
from serve.worker_process import ServerLink, resolve

STATS_SECONDS = 0.25
logger = logging.getLogger(__name__)


def build(settings: dict[str, Any]) -> Engine:
    """The engine of a VLM's folder, or the one that a factory makes."""
    if settings["factory"]:
        return resolve(settings["factory"])(**settings["arguments"])
    if settings["threads"] is not None:
        import torch

        torch.set_num_threads(settings["threads"])
    return load_engine(
        settings["path"],
        settings["draft"] or None,
        config=EngineConfig(**settings["engine"]),
        dtype=settings["dtype"],
        device=settings["device"],
    )


def warm_up(engine: Engine) -> None:
    """One short answer, so that nobody waits for first-time allocations."""
    for _ in engine.stream(Request("hello", max_tokens=4, ignore_eos=True)):
        pass


class ChatLoop:
    """The engine and who asked it what."""

    def __init__(self, engine: Engine, link: ServerLink) -> None:
        self._engine, self._link = engine, link
        self._asked: dict[int, int] = {}  # engine's id -> server's id
        self._ids: dict[int, int] = {}  # and back
        self._stats_due = 0.0

    def run(self) -> None:
        """Until the server hangs up, which ends the process."""
        while True:
            message = self._link.next_message(wait=not self._engine.has_work)
            while message is not None:
                self._take(message)
                message = self._link.next_message(wait=False)
            events = [row for event in self._engine.step() if (row := self._row(event)) is not None]
            if events:
                self._link.send({"events": events, "stats": self._stats()})

    def _take(self, message: dict[str, Any]) -> None:
        if "cancel" in message:
            if message["cancel"] in self._ids:
                self._engine.cancel(self._ids[message["cancel"]])
            return
        number = message["ask"]
        try:
            asked = self._engine.submit(request_of(message))
        except QueueFull as error:
            self._link.send({"events": [{"number": number, "overloaded": str(error), "retry_after": error.retry_after}]})
        except RequestError as error:
            self._link.send({"events": [{"number": number, "refused": str(error), "field": error.field, "code": error.code}]})
        else:
            self._asked[asked], self._ids[number] = number, asked

    def _row(self, event: Delta | Finished) -> dict[str, Any] | None:
        """An event as the server reads it."""
        number = self._asked.get(event.request_id)
        if number is None:
            return None
        if isinstance(event, Delta):
            row = {"number": number, "text": event.text, "tokens": len(event.token_ids), "accepted": event.num_accepted}
            if event.logprobs is not None:
                decode = self._engine.target.tokenizer.decode
                row["logprobs"] = [
                    [decode([token]), entry.logprob, [[decode([other]), logprob] for other, logprob in entry.top]]
                    for token, entry in zip(event.token_ids, event.logprobs, strict=True)
                ]
            return row
        del self._asked[event.request_id], self._ids[number]
        usage = {name: value for name, value in vars(event.usage).items()}
        return {"number": number, "reason": event.reason, "usage": usage, "error": event.error}

    def _stats(self) -> dict[str, Any] | None:
        """Counters for the metrics, now and then."""
        now = time.monotonic()
        if now < self._stats_due and self._engine.has_work:
            return None
        self._stats_due = now + STATS_SECONDS
        stats = self._engine.stats()
        return {
            "rounds": stats.rounds,
            "prompt": stats.prompt_tokens,
            "completion": stats.generation_tokens,
            "drafted": stats.spec_decode_num_draft_tokens,
            "accepted": stats.spec_decode_num_accepted_tokens,
            "accepted_per_position": list(stats.spec_decode_num_accepted_tokens_per_pos),
            "image_cache_hits": stats.image_cache_hits,
            "image_cache_misses": stats.image_cache_misses,
        }


def request_of(message: dict[str, Any]) -> Request:
    """The engine's request. Raises InvalidRequest for sampling settings out of range."""
    return Request(
        prompt=prompt_of(tuple((role, text) for role, text in message["messages"])),
        images=tuple(message["images"]),
        sampling=sampling_of(
            temperature=message["temperature"],
            top_p=message["top_p"],
            seed=message["seed"],
            presence_penalty=message["presence_penalty"],
            frequency_penalty=message["frequency_penalty"],
            logit_bias={int(token): bias for token, bias in message["logit_bias"]},
        ),
        max_tokens=message["max_tokens"],
        stop=tuple(message["stop"]),
        top_logprobs=message["top_logprobs"],
        speculation=SpeculationConfig(enabled=message["speculate"]),
    )


def main() -> None:
    """Load, warm up, say hello, answer until the server hangs up."""
    logging.basicConfig(format="chat worker %(process)d: %(levelname)s %(message)s")
    link = ServerLink(int(sys.argv[1]))
    try:
        engine = build(link.settings)
        warm_up(engine)
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        if not isinstance(error, ValueError | OSError):  # those explain themselves
            logger.error("%s", traceback.format_exc())
        link.send({"failed": f"The language model could not be loaded: {error}"})
        return
    link.send({
        "checkpoint": engine.target.name or "unknown", "context": engine.limits.context, "max_images": engine.limits.max_images
    })
    ChatLoop(engine, link).run()


if __name__ == "__main__":
    main()
