"""Laws of published checkpoints: written by transformers, read by us, the same logits, with images, padding and a cache."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from multimodal.pretrained.load import Published, load_published
from multimodal.sequences import Sequences, go_on, read
from multimodal.tiles import choose_canvas, pack_tiles
from tests.published import END, IMAGE, MODELS, START, save_model

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # largest difference of logits of order one
ERRORS: dict[tuple[str, str], float] = {}  # what the tests measured, printed at the end


class Float64Throughout(TorchFunctionMode):
    """transformers computes norms and rotations in float32 whatever the weights are (then float64 logits differ by 4e-6); here
    its casts leave float64 alone, so that the rest is compared to the last digits."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        first = arguments[0] if arguments else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if function is Tensor.float or (function is Tensor.to and torch.float32 in arguments[1:]):
                return first
            if options.get("dtype") is torch.float32:
                options["dtype"] = torch.float64
        return function(*arguments, **options)


@dataclass(frozen=True)
class Case:
    """One batch for both sides."""

    ids: Tensor  # int64 [B, T], without padding
    inputs: dict[str, Any] = field(default_factory=dict)  # pixels for transformers
    images: tuple[Tensor, ...] = ()  # features for us
    grids: tuple[tuple[int, int], ...] = ()


@cache
def models(name: str, dtype: torch.dtype, folder: Path) -> tuple[Any, Published]:
    save_model(name, folder / name, sharded=True)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForCausalLM if name in TEXT_ONLY else AutoModelForImageTextToText
    theirs = loader.from_pretrained(folder / name, torch_dtype=dtype, attn_implementation="sdpa").eval()
    return theirs, load_published(folder / name, dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("published")
    models.cache_clear()
    for feature in sorted({feature for _, feature in ERRORS}):  # pytest -s shows it
        cells = [f"{name} {ERRORS[name, feature]:.1e}" for name in MODELS if (name, feature) in ERRORS]
        print(f"\n{feature}: {', '.join(cells)}", end="")


TEXT_ONLY = ("llama", "llama_linear", "mistral", "qwen2", "qwen3", "gemma")
SEEING = tuple(name for name in MODELS if name not in TEXT_ONLY)


def text_case() -> Case:
    return Case(torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1)))


def marked(rows: list[list[int]]) -> Tensor:
    """Rows with two words before and four behind what they hold."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(3, 50, (len(rows), 6), generator=generator).tolist()
    return torch.tensor([[*word[:2], *row, *word[2:]] for word, row in zip(words, rows, strict=True)])


@torch.no_grad()
def image_case(name: str, ours: Published, dtype: torch.dtype) -> Case:
    """Two prompts with images, as the family takes them."""
    generator, vlm = torch.Generator().manual_seed(3), ours.vlm
    pixels = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    if name in ("llava", "paligemma"):
        images = pixels(2, 3, 28, 28)
        return Case(marked([[IMAGE] * 4] * 2), {"pixel_values": images}, tuple(vlm.image_features(images)))
    if name in ("smolvlm", "idefics3"):
        images = pixels(2, 2, 3, 56, 56)
        return Case(marked([[IMAGE] * 4 + [END] + [IMAGE] * 4] * 2), {"pixel_values": images}, tuple(vlm.image_features(images.flatten(0, 1))))
    if name == "llava_next":
        sizes, canvases = ((20, 90), (40, 40)), [(28, 56), (56, 28), (56, 56), (28, 84)]
        images = pixels(2, 5, 3, 28, 28)
        packed = []
        for tiles, size in zip(images, sizes, strict=True):
            canvas = choose_canvas(size, canvases)
            count = 1 + canvas[0] * canvas[1] // 28**2
            packed.append(pack_tiles(vlm.patch_features(tiles[:count]), size, canvas, 28, vlm.image_newline))
        rows = [[IMAGE] * len(tokens) for tokens in packed]
        width = max(map(len, rows))
        return Case(
            marked([row + [7] * (width - len(row)) for row in rows]),
            {"pixel_values": images, "image_sizes": torch.tensor(sizes)},
            tuple(packed),
        )
    return qwen_case(ours, dtype)


def qwen_case(ours: Published, dtype: torch.dtype) -> Case:
    """Images of two sizes, cut into patches by transformers' own processor."""
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(do_resize=False, do_normalize=False, patch_size=14, merge_size=2)
    generator = torch.Generator().manual_seed(3)
    frames = [torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8) for height, width in ((84, 140), (112, 56))]
    found = processor([frame.numpy() for frame in frames], return_tensors="pt")
    images = [(frame.float() * (1 / 255)).to(dtype).permute(2, 0, 1)[None] for frame in frames]
    features = tuple(ours.vlm.image_features(image)[0] for image in images)
    grids = tuple(ours.vlm.image_grid(*image.shape[2:]) for image in images)
    rows = [[START, *[IMAGE] * len(tokens), END] for tokens in features]
    width = max(map(len, rows))
    ids = marked([row + [7] * (width - len(row)) for row in rows])
    inputs = {"pixel_values": found["pixel_values"].to(dtype), "image_grid_thw": found["image_grid_thw"]}
    return Case(ids, inputs, features, grids)


def padded(ids: Tensor, side: str, count: int = 3) -> tuple[Tensor, Tensor]:
    """The second row loses its last `count` words, which go to padding on that side: ids and is_real."""
    is_real = torch.ones_like(ids, dtype=torch.bool)
    if side == "none":
        return ids, is_real
    row = ids[1].roll(count) if side == "left" else ids[1]
    is_real[1, slice(0, count) if side == "left" else slice(-count, None)] = False
    return torch.stack([ids[0], row]).masked_fill(~is_real, 0), is_real


@torch.no_grad()
def theirs_of(model: Any, ids: Tensor, is_real: Tensor, inputs: dict[str, Any]) -> Tensor:
    with Float64Throughout():
        return model(input_ids=ids, attention_mask=is_real.long(), **told(model, ids, is_real, inputs), **inputs).logits


def told(model: Any, ids: Tensor, is_real: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What transformers' generate and processors would add: positions that count real tokens, kinds of tokens."""
    wanted = inspect.signature(model.forward).parameters
    extra = {}
    if "mm_token_type_ids" in wanted:
        extra["mm_token_type_ids"] = (ids == IMAGE).long()
    if "token_type_ids" in wanted:  # PaliGemma: 0 in the prompt
        extra["token_type_ids"] = torch.zeros_like(ids)
    if "image_grid_thw" not in inputs:  # with it Qwen2-VL finds its positions itself
        extra["position_ids"] = (is_real.long().cumsum(1) - 1).clamp(min=0)
    return extra


@torch.no_grad()
def ours_of(ours: Published, ids: Tensor, is_real: Tensor, case: Case) -> tuple[Tensor, Sequences]:
    found = read(ours.vlm, ids, is_real, case.images, case.grids)
    return ours.vlm.logits(found.hidden), found


def record(name: str, feature: str, dtype: torch.dtype, error: float) -> None:
    key = (name, f"{feature} {str(dtype).removeprefix('torch.')}")
    ERRORS[key] = max(error, ERRORS.get(key, 0.0))
    assert error <= TOLERANCE[dtype], f"{name}, {feature}, {dtype}: {error}"


def case_of(name: str, feature: str, ours: Published, dtype: torch.dtype) -> Case:
    with Float64Throughout():  # the towers are transformers' modules
        return image_case(name, ours, dtype) if feature == "images" else text_case()


WITH_IMAGES = [*((name, "text") for name in MODELS), *((name, "images") for name in SEEING)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("name", "feature"), WITH_IMAGES)
def test_logits_equal_those_of_transformers(folder: Path, name: str, feature: str, side: str, dtype: torch.dtype):
    theirs, ours = models(name, dtype, folder)
    case = case_of(name, feature, ours, dtype)
    ids, is_real = padded(case.ids, side)
    expected = theirs_of(theirs, ids, is_real, case.inputs)
    found, _ = ours_of(ours, ids, is_real, case)
    assert expected[is_real].std() > 0.5  # a difference would show
    suffix = "" if side == "none" else f", {side} padding"
    record(name, feature + suffix, dtype, (found - expected)[is_real].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "feature"), WITH_IMAGES)
def test_cached_decoding_equals_one_whole_pass_of_transformers(folder: Path, name: str, feature: str, dtype: torch.dtype):
    theirs, ours = models(name, dtype, folder)
    case = case_of(name, feature, ours, dtype)
    ids, is_real = padded(case.ids, "left")
    answer = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(4))
    _, state = ours_of(ours, ids, is_real, case)
    steps = []
    with torch.no_grad():
        for index in range(answer.shape[1]):
            state = go_on(ours.vlm, state, answer[:, index : index + 1])
            steps.append(ours.vlm.logits(state.hidden))
    found = torch.cat(steps, dim=1)
    expected = whole_pass(theirs, name, ids, is_real, answer, case.inputs)
    record(name, f"{feature}, cached", dtype, (found - expected).abs().max().item())


@torch.no_grad()
def whole_pass(model: Any, name: str, ids: Tensor, is_real: Tensor, answer: Tensor, inputs: dict[str, Any]) -> Tensor:
    """transformers' logits at the answer, prompt and answer in one pass; PaliGemma's prompt must come first, in a pass of its own."""
    all_real = torch.cat([is_real, torch.ones_like(answer, dtype=torch.bool)], dim=1)
    if name != "paligemma":
        whole = torch.cat([ids, answer], dim=1)
        return theirs_of(model, whole, all_real, inputs)[:, ids.shape[1] :]
    steps = []
    with Float64Throughout():
        cached = model(input_ids=ids, attention_mask=is_real.long(), use_cache=True, **told(model, ids, is_real, inputs), **inputs).past_key_values
        for index in range(answer.shape[1]):
            seen = all_real[:, : ids.shape[1] + index + 1].long()
            place = {"position_ids": is_real.sum(1, keepdim=True) + index}
            out = model(input_ids=answer[:, index : index + 1], attention_mask=seen, past_key_values=cached, use_cache=True, **place)
            steps.append(out.logits)
    return torch.cat(steps, dim=1)

