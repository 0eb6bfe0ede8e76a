"""Laws of packed texts: attention without padding is masked attention, gradients included."""

import pytest
import torch

from multimodal.attention import attend
from multimodal.packed_texts import PackedTexts

SEGMENTS = {
    "one text": [[0, 0, 0]],
    "ragged": [[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 2], [0, 0, -1, -1, -1, -1, -1, -1]],
    "many": [[index // 2 for index in range(26)], [*[0] * 7, *range(1, 15), *[-1] * 5]],  # more than one group
}


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_packed_attention_is_masked_attention(name: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    segment, prefix = torch.tensor(SEGMENTS[name]), 3
    texts = PackedTexts(segment, prefix)
    count = texts.num_positions
    shapes = ((1, 4, count, 6), *[(1, kv_heads, len(segment) * prefix + count, 6)] * 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    real = len(texts.places)
    mask = texts.dense()
    mask[:, :, real:, 0] = True  # softmax over nothing is not a number
    packed, masked = attend(*inputs, texts), attend(*inputs, mask)
    torch.testing.assert_close(packed[:, :, :real], masked[:, :, :real])
    assert not packed[:, :, real:].any() and real < count
    masked_gradient = torch.autograd.grad(masked[:, :, :real], inputs, upstream[:, :, :real])
    for mine, right in zip(torch.autograd.grad(packed, inputs, upstream), masked_gradient, strict=True):
        torch.testing.assert_close(mine, right)


def test_gradients_flow_where_autocast_makes_a_softmax_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: its autocast does so, that of the CPU does not; backward runs outside it."""
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda scores, dim: softmax(scores.float(), dim))
    texts = PackedTexts(torch.tensor(SEGMENTS["ragged"]), 3)
    shapes = [(1, 2, texts.num_positions, 8), *[(1, 2, texts.num_image_positions + texts.num_positions, 8)] * 2]
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = texts.attend(*inputs)
    gradients = torch.autograd.grad(mixed.float().square().sum(), inputs)
    assert mixed.dtype == torch.bfloat16 and all(each.dtype == torch.bfloat16 and each.any() for each in gradients)


def test_the_dense_mask_shows_a_text_its_scene_and_its_own_past() -> None:
    segment, prefix = torch.tensor(SEGMENTS["ragged"]), 3
    texts = PackedTexts(segment, prefix)
    scene, place = texts.places // segment.shape[1], texts.places % segment.shape[1]
    number = segment[scene, place]
    assert sorted(texts.places.tolist()) == (segment.flatten() >= 0).nonzero()[:, 0].tolist()
    images = torch.arange(len(segment)).repeat_interleave(prefix)
    same = (scene[:, None] == scene) & (number[:, None] == number) & (place[:, None] >= place)
    expected = torch.cat([scene[:, None] == images, same], dim=1)
    count = len(expected)
    mask = texts.dense()[0, 0]
    assert torch.equal(torch.cat([mask[:count, : len(images)], mask[:count, len(images) :][:, :count]], dim=1), expected)
    assert not mask[count:].any() and not mask[:, len(images) + count :].any()
