"""The page in headless Chromium: a running evaluation, the chunk round by round, a recorded run, a key."""

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serve.protocol.images import encode_jpeg
from serve.security import SecurityConfig
from serve.server import ServeConfig
from tests.browser import Browser, find_browser
from tests.serving import FAKE_POLICY, WEB, Running, running

KEY = "correct horse battery staple"
PROGRAM = find_browser()
if PROGRAM is None and os.environ.get("REMASK_REQUIRE_BROWSER") == "1":
    pytest.fail("REMASK_REQUIRE_BROWSER=1, but there is no Chromium: apt-get install chromium", pytrace=False)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome; apt-get install chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run folder with one film of 8 frames."""
    import imageio.v2 as imageio

    root = tmp_path_factory.mktemp("runs")
    (root / "lift" / "videos").mkdir(parents=True)
    frames = [np.full((64, 64, 3), 30 * index, np.uint8) for index in range(8)]
    imageio.mimwrite(root / "lift" / "videos" / "e.mp4", frames, fps=20, codec="libx264", macro_block_size=2)
    row = {"suite": "robosuite_lift", "task": 0, "episode": 3, "instruction": "lift the cube", "success": True, "steps": 7}
    row |= {"error": None, "rounds": 2.5, "policy_ms": 3.0, "video": "videos/e.mp4"}
    (root / "lift" / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    return root


@pytest.fixture(scope="module")
def server(runs: Path, tmp_path_factory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with running(ServeConfig(policy=FAKE_POLICY, runs=runs, security=SecurityConfig(key_file=keys))) as server:
        yield server


@pytest.fixture(scope="module")
def browser(server: Running, tmp_path_factory) -> Iterator[Browser]:
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def push(server: Running, *events: dict) -> None:
    identity = {"run": "evaluation", "task": 2, "episode": 5}
    body = {"events": [identity | event for event in events]}
    answer = WEB.post(f"{server.http}/watch", json=body, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200, answer.text


CHUNK = {
    "kind": "chunk",
    "step": 1,
    "actions": [[0.1 * step + dim for dim in range(3)] for step in range(4)],
    "confidence": [[0.1, 0.5, 0.9]] * 4,
    "committed": [[0, 0, 0], [1, 1, 2], [2, 2, 3], [3, 3, 3]],
    "rounds": 3,
    "milliseconds": 12.5,
}


def test_the_page_asks_for_the_key_and_goes_live_with_it(server: Running, browser: Browser):
    browser.open(server.http)
    browser.wait_for("document.getElementById('status')?.textContent === 'needs a key'")
    browser.evaluate(f"document.getElementById('key').value = '{KEY}'; document.getElementById('key-form').requestSubmit()")
    browser.wait_for("document.getElementById('status').textContent === 'live'")


def test_frames_of_a_running_episode_appear_upright_and_in_colour(server: Running, browser: Browser):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :, 0] = 255  # red above
    picture[24:, :, 2] = 255  # blue below
    image = base64.b64encode(encode_jpeg(picture)).decode()
    push(server, {"kind": "start", "instruction": "put the soup in the basket"}, {"kind": "frame", "step": 4, "image": image})
    browser.wait_for("document.getElementById('frame').dataset.frames >= 1")
    assert browser.evaluate("document.getElementById('instruction').textContent") == "put the soup in the basket"
    assert "task 2, episode 5, step 4" in browser.evaluate("document.getElementById('episode-facts').textContent")
    read = "[...document.getElementById('frame').getContext('2d').getImageData(32, {}, 1, 1).data]"
    top, bottom = browser.evaluate(read.format(6)), browser.evaluate(read.format(42))
    assert top[0] > 200 > top[2] and bottom[2] > 200 > bottom[0]
    assert browser.evaluate("document.getElementById('frame').width") == 64


def test_the_chunk_is_unmasked_round_by_round_with_its_confidences(server: Running, browser: Browser):
    browser.evaluate("document.getElementById('play').textContent === 'Pause' && document.getElementById('play').click()")
    push(server, CHUNK)
    browser.wait_for("document.getElementById('chunk-facts').textContent.includes('of 12 slots')")
    seen = []
    for number in range(4):
        browser.evaluate(f"const r{number} = document.getElementById('round'); r{number}.value = {number}; r{number}.oninput()")
        seen.append(browser.evaluate("document.getElementById('chunk-facts').textContent"))
    committed = np.array(CHUNK["committed"])
    assert [int(text.split()[0]) for text in seen] == [int((committed <= number).sum()) for number in range(4)]
    assert "3 rounds, 12.5 ms" in seen[0] and browser.evaluate(
        "document.getElementById('round-text').textContent"
    ) == "round 3 of 3"
    colours = browser.evaluate("""(() => { const canvas = document.getElementById('chunk'), pen = canvas.getContext('2d');
        const [width, height] = [canvas.width / 4, canvas.height / 3];
        const at = (step, dim) => [...pen.getImageData((step + 0.1) * width, (dim + 0.1) * height, 1, 1).data].join();
        return [at(1, 0), at(1, 1), at(1, 2), at(0, 0)]; })()""")
    assert len(set(colours)) == 4, "three confidences and a known slot look different"


def test_playing_shows_every_round_by_itself(server: Running, browser: Browser):
    browser.evaluate("document.getElementById('play').textContent === 'Play' && document.getElementById('play').click()")
    push(server, CHUNK)
    browser.wait_for("document.getElementById('round-text').textContent === 'round 3 of 3'", 10)


def test_the_end_of_an_episode_is_told(server: Running, browser: Browser):
    push(server, {"kind": "end", "step": 41, "success": True})
    browser.wait_for("document.getElementById('episode-facts').textContent.includes('solved after 41')")


def test_a_recorded_run_is_replayed_from_its_folder(server: Running, browser: Browser):
    browser.wait_for("document.getElementById('source').options.length === 2")
    browser.evaluate("const s = document.getElementById('source'); s.value = 'lift'; s.onchange()")
    browser.wait_for("document.getElementById('film').readyState >= 1")
    assert browser.evaluate("document.getElementById('film').videoWidth") == 64
    assert browser.evaluate("document.getElementById('instruction').textContent") == "lift the cube"
    facts = browser.evaluate("document.getElementById('episode-facts').textContent")
    assert facts == "7 steps, 2.5 rounds a chunk, 3.0 ms a chunk"
    browser.evaluate("s.value = ''; s.onchange()")


def test_served_requests_are_shown_when_somebody_looks(server: Running, browser: Browser):
    from serve.client import RemotePolicy
    from tests.odd_policy import odd_observation

    with RemotePolicy(server.grpc, key=KEY) as remote:
        remote.act([odd_observation("hold the line")])
    browser.wait_for("document.getElementById('instruction').textContent === 'hold the line'")


def test_without_a_language_model_the_box_says_so(browser: Browser):
    browser.evaluate("document.getElementById('ask').requestSubmit()")
    browser.wait_for("document.getElementById('answer-facts').textContent.includes('--vlm.path')")


def test_the_page_loads_nothing_from_elsewhere_and_logs_no_error(server: Running, browser: Browser):
    urls = browser.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert urls and all(url.startswith((server.http, "data:", "blob:")) for url in urls)
    wrong = [message for message in browser.messages if "401" not in message and not message.startswith("warning")]
    assert not wrong, wrong


def test_the_picture_of_a_page_can_be_taken(browser: Browser, tmp_path: Path):
    from PIL import Image

    browser.screenshot(tmp_path / "page.png")
    with Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 50
