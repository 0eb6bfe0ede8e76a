"""`vla eval` over each wire equals the policy in this process, and a page sees the episodes as they run."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import sim.evaluate
from serve.client import RemotePolicy
from serve.server import ServeConfig
from sim.evaluate import EvaluateConfig, evaluate
from sim.policy_source import PolicySource, load_source
from tests.point_world import PointPolicy, build_point_world
from tests.serving import FAKE_POLICY, WEB, Running, running
from tests.test_evaluate import TIMES

EPISODES = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    with running(ServeConfig(policy=FAKE_POLICY, runs=tmp_path_factory.mktemp("runs"))) as server:
        yield server


@pytest.fixture(autouse=True)
def three_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = replace(sim.evaluate.get_suite("libero_object"), num_tasks=3)
    monkeypatch.setattr(sim.evaluate, "get_suite", lambda name: suite)


def rows_of(folder: Path, policy, **changes) -> list[dict]:
    settings = dict(
        suite="libero_object", output_dir=folder, episodes=EPISODES, workers=1, max_steps=40, execution_horizon=3, num_known=1
    )
    rows = evaluate(EvaluateConfig(**settings | changes), policy, "the same checkpoint", build=build_point_world)
    return [{key: value for key, value in asdict(row).items() if key not in TIMES} for row in rows]


def test_an_evaluation_over_each_wire_equals_one_in_process(tmp_path: Path, server: Running):
    here = rows_of(tmp_path / "here", PointPolicy())
    assert 0 < sum(row["success"] for row in here) and not any(row["error"] for row in here)
    for wire in ("http", "grpc", "ws"):
        with load_source(PolicySource(url=getattr(server, wire)), workers=1) as remote:
            assert rows_of(tmp_path / wire, remote) == here


def test_a_policy_is_a_checkpoint_or_a_url_and_a_server_decodes_its_own_way(server: Running):
    for source in (PolicySource(), PolicySource(path="x", url=server.http)):
        with pytest.raises(ValueError, match="Which policy"):
            load_source(source, workers=1)
    with pytest.raises(ValueError, match="server's to choose"):
        load_source(PolicySource(url=server.http, decode={"rounds": 1}), workers=1)
    with pytest.raises(OSError, match="connection failed"):
        load_source(PolicySource(url="http://127.0.0.1:9", timeout_s=0.3), workers=1)
    with pytest.raises(ValueError, match="no address"):
        load_source(PolicySource(url="ftp://127.0.0.1"), workers=1)


def test_an_evaluation_does_not_go_on_with_a_swapped_checkpoint(server: Running):
    with RemotePolicy(server.http, same_checkpoint=True) as remote:
        remote.content_hash = "the one before"
        with pytest.raises(ConnectionError, match="swapped checkpoint the one before"):
            remote.act([observation()])


def observation():
    from tests.odd_policy import odd_observation

    return odd_observation()


def test_a_page_sees_the_episodes_as_they_run(tmp_path: Path, server: Running):
    """Starts, every frame, every chunk with its confidences where the policy has them, and how it ended."""
    events: list[dict] = []

    async def collect() -> None:
        async for event in server.server.services.events.subscribe(server.server.gate.closed):
            if event is not None:
                events.append(event)

    task = asyncio.run_coroutine_threadsafe(collect(), server.loop)
    watched = rows_of(tmp_path / "watched", PointPolicy(), episodes=1, tasks=[0, 1], watch=server.http, video_size=32)
    task.cancel()
    assert watched == rows_of(tmp_path / "alone", PointPolicy(), episodes=1, tasks=[0, 1]), "watching changes no row"
    for row in watched:
        mine = [event for event in events if event["task"] == row["task"]]
        kinds = [event["kind"] for event in mine]
        assert kinds[0] == "start" and kinds[-1] == "end" and mine[0]["instruction"] == row["instruction"]
        assert kinds.count("frame") == row["steps"] + 1 and kinds.count("chunk") == row["chunks"]
        assert mine[-1]["success"] == row["success"]
        assert np.shape(mine[kinds.index("chunk")]["actions"]) == (4, 7)


def test_a_page_that_is_gone_changes_nothing(tmp_path: Path, capfd):
    rows = rows_of(tmp_path / "watched", PointPolicy(), episodes=1, tasks=[0], watch="http://127.0.0.1:9")
    assert not rows[0]["error"]
    assert "does not take frames" in capfd.readouterr().err


def test_events_that_are_no_moments_of_an_episode_are_refused(server: Running):
    good = {"kind": "frame", "run": "r", "task": 0, "episode": 0, "image": "AAAA"}
    assert WEB.post(f"{server.http}/watch", json={"events": [good]}).json() == {"accepted": 1}
    for change in ({"kind": "x"}, {"task": -1}, {"task": "0"}, {"image": '"><script>'}, {"actions": [["a"]]}, {"run": ""}):
        answer = WEB.post(f"{server.http}/watch", json={"events": [good | change]})
        assert answer.status_code == 400 and next(iter(change)) in answer.json()["error"]
    assert WEB.post(f"{server.http}/watch", content=json.dumps({"events": [good] * 100})).status_code == 400
