"""What strangers hand over: pictures, keys, names of files; and how refusals are written."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from serve.protocol.images import decode_data_url, decode_image, encode_jpeg, fit_image
from serve.protocol.refusal import Code, Refusal, parse_line
from serve.recordings import film, list_episodes, list_runs
from serve.security import Keys, SecurityConfig, check_binding


def png_header_of(width: int, height: int) -> bytes:
    """A small PNG that says it is huge."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"\0" * 10_000)) + block(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header():
    with pytest.raises(Refusal, match="pixels") as caught:
        decode_image(png_header_of(60_000, 60_000), max_pixels=1 << 22)
    assert caught.value.code is Code.TOO_LARGE


def test_other_formats_and_damaged_files_are_refused():
    from PIL import Image

    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, format="GIF")
    jpeg = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    for data in (b"", b"x" * 100, gif.getvalue(), jpeg[:100], png_header_of(64, 64)):
        with pytest.raises(Refusal) as caught:
            decode_image(data, max_pixels=1 << 22)
        assert caught.value.code is Code.INVALID


OTHER_URLS = ["http://169.254.169.254/latest", "file:///etc/passwd", "data:text/html;base64,AAAA", "data:image/png,AAAA", ""]


@pytest.mark.parametrize("url", [*OTHER_URLS, "data:image/png;base64,@@@@"])
def test_only_data_urls_are_images(url: str):
    with pytest.raises(Refusal):
        decode_data_url(url, max_bytes=1000, max_pixels=1000)


def test_an_image_in_a_data_url_is_that_image():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert np.array_equal(decode_data_url(url, max_bytes=10_000, max_pixels=63), pixels)


def test_fitting_pads_to_a_square_and_leaves_a_fitting_image_alone():
    wide = np.full((40, 80, 3), 200, np.uint8)
    fitted = fit_image(wide, 36)
    assert fitted.shape == (36, 36, 3) and (fitted[:9] == 0).all() and (fitted[10:26] == 200).all()
    assert fit_image(fitted, 36) is fitted


# ------------------------------------------------------------------------------------------------ refusals, keys, files


@pytest.mark.parametrize("code", Code)
def test_a_refusal_comes_back_from_its_line(code: Code):
    for after in (None, 0.25):
        refusal = Refusal(code, "what: where, next move.", retry_after_s=after)
        back = parse_line(refusal.line)
        assert (back.code, back.message, back.retry_after_s) == (code, refusal.message, refusal.retry_after_s)
    assert parse_line("some traceback").code is Code.INTERNAL


def test_keys_are_accepted_in_both_schemes_and_nothing_else_is():
    keys = Keys(("correct horse battery", "another key of ours"))
    assert keys.accept("Bearer correct horse battery") and keys.accept("Api-Key another key of ours")
    wrong = (None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic correct horse battery", "correct horse battery")
    for header in (*wrong, "Bearer corr\udce9ct"):
        assert not keys.accept(header)
    assert Keys().accept(None) and not Keys()
    with pytest.raises(ValueError, match="16"):
        Keys(("short",))


@pytest.mark.parametrize(("host", "allowed"), [
    ("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False), ("10.0.0.1", False)
])
def test_a_server_without_key_or_tls_stays_on_this_machine(host: str, allowed: bool):
    if allowed:
        check_binding(host, SecurityConfig(), Keys())
    else:
        with pytest.raises(ValueError, match="key"):
            check_binding(host, SecurityConfig(), Keys())
        check_binding(host, SecurityConfig(), Keys(("correct horse battery",)))


def test_a_key_file_may_hold_comments_and_must_hold_a_key(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("REMASK_API_KEY", raising=False)
    (tmp_path / "keys").write_text("# robots\ncorrect horse battery\n\n")
    assert Keys.load(SecurityConfig(key_file=tmp_path / "keys")).accept("Bearer correct horse battery")
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys.load(SecurityConfig(key_file=tmp_path / "keys"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "lift"
    (run / "videos").mkdir(parents=True)
    (run / "videos" / "e.mp4").write_bytes(b"film")
    row = {"suite": "robosuite_lift", "task": 0, "episode": 1, "instruction": "lift", "success": True, "steps": 9}
    row |= {"error": None, "rounds": 2.5, "policy_ms": 3.0, "video": "videos/e.mp4"}
    (run / "episodes.jsonl").write_text(json.dumps(row) + '\n{"torn": \n' + '{"other": 1}\n')
    (tmp_path / "secret.mp4").write_text("secret")
    (run / "videos" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    return tmp_path / "runs"


def test_recordings_are_listed_and_their_films_found(runs: Path):
    (run,) = list_runs(runs)
    assert (run.name, run.suite, run.films) == ("lift", "robosuite_lift", 1)
    (episode,) = list_episodes(runs, "lift")
    assert episode.success and film(runs, "lift", episode.video).read_bytes() == b"film"


OUTSIDE = ["../episodes.jsonl", "videos/../../secret.mp4", "/etc/passwd", "videos/link.mp4", "episodes.jsonl"]


@pytest.mark.parametrize("path", [*OUTSIDE, "videos", "videos/none.mp4"])
def test_nothing_outside_a_runs_films_is_ever_opened(runs: Path, path: str):
    with pytest.raises(Refusal) as caught:
        film(runs, "lift", path)
    assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("name", ["..", ".", "", "../runs/lift", "none", "li\0ft", "lift/"])
def test_a_run_is_a_folder_of_the_root(runs: Path, name: str):
    with pytest.raises(Refusal):
        list_episodes(runs, name)
