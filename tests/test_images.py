"""Laws of the image path: one path for training and inference, equal to its definition, deterministic, cheap."""

import time

import numpy as np
import pytest
import torch

from multimodal import numpy_images
from multimodal.images import ImageConfig, cut, prepare_images, recolour, recolour_reference

CONFIG = ImageConfig(crop=24)


def frames(*leading: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*leading, size, size, 3), dtype=torch.uint8, generator=generator)


def test_leading_dimensions_pass_through() -> None:
    images = frames(4, 2)
    result = prepare_images(images, CONFIG)
    assert result.shape == (4, 2, 3, 24, 24) and result.dtype == torch.float32
    assert torch.equal(result[3, 1], prepare_images(images[3, 1], CONFIG))


def test_evaluation_is_the_normalised_centre_crop() -> None:
    images = frames(5)
    expected = (images[:, 4:28, 4:28].permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(prepare_images(images, CONFIG).double(), expected, atol=1e-6, rtol=0)


def test_values_stay_in_model_range() -> None:
    config = ImageConfig(crop=24, brightness=0.9, contrast=0.9, saturation=0.9)
    result = prepare_images(frames(16), config, torch.Generator().manual_seed(1))
    assert result.min() >= -1 and result.max() <= 1


def test_recolour_equals_its_definition() -> None:
    pixels = frames(8).permute(0, 3, 1, 2).float()
    factors = torch.rand(8, 3, generator=torch.Generator().manual_seed(2)) + 0.5
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    exact = recolour_reference(pixels.double(), factors, mean, std)
    torch.testing.assert_close(recolour(pixels, factors, mean, std).double(), exact, atol=1e-5, rtol=0)


def test_each_image_is_cut_at_its_own_corner() -> None:
    images = frames(6)
    corners = torch.tensor([[0, 0], [8, 8], [3, 5], [5, 3], [0, 8], [8, 0]])
    result = cut(images, corners, 24)
    for image, (top, left), piece in zip(images, corners.tolist(), result, strict=True):
        assert torch.equal(piece, image[top : top + 24, left : left + 24].permute(2, 0, 1))


def test_equal_seeds_give_equal_images_and_other_seeds_do_not() -> None:
    images = frames(4)
    first, again, other = (prepare_images(images, CONFIG, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_augmentation_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prepare_images(frames(2), CONFIG, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_every_corner_is_drawn() -> None:
    config = ImageConfig(crop=31, brightness=0, contrast=0, saturation=0)
    image = torch.zeros(32, 32, 3, dtype=torch.uint8)
    image[0, 0, 0], image[31, 31, 1] = 255, 255
    result = prepare_images(image.expand(64, 32, 32, 3), config, torch.Generator().manual_seed(6))
    assert {(bool(r[0].max() > 0), bool(r[1].max() > 0)) for r in result} == {(True, False), (False, True), (False, False)}


def test_resizing_gives_the_size_asked_for() -> None:
    result = prepare_images(frames(2), ImageConfig(crop=24, size=48))
    assert result.shape == (2, 3, 48, 48)


def test_errors_name_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"float32 \[2, 32, 32, 3\]; expected uint8"):
        prepare_images(frames(2).float(), CONFIG)
    with pytest.raises(ValueError, match="32 x 32 pixels are smaller than the crop of 40"):
        prepare_images(frames(2), ImageConfig(crop=40))
    with pytest.raises(ValueError, match="jitter"):
        ImageConfig(brightness=1.0)


def test_a_frame_costs_at_most_a_millisecond() -> None:
    images, generator = frames(32, 2, size=128), torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(6):
            start = time.process_time()
            prepare_images(images, ImageConfig(crop=112), generator)
            times.append((time.process_time() - start) / 64 * 1e3)
    finally:
        torch.set_num_threads(threads)
    print(f"\n128-pixel frame with augmentation: {min(times):.3f} ms on one core")
    assert min(times) < 1.0  # three times what a busy core takes


@pytest.mark.parametrize(("crop", "size"), [(40, None), (33, None), (33, 48), (40, 17), (31, 31), (37, 1)])
@pytest.mark.parametrize("normal", [{}, {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}])
def test_numpy_prepares_what_torch_prepares(crop: int, size: int | None, normal: dict) -> None:
    images = frames(3, 2, size=40)[:, :, :, :38] if crop < 38 else frames(3, 2, size=40)
    config = ImageConfig(crop=crop, size=size, **normal)
    wanted, got = prepare_images(images, config).numpy(), numpy_images.prepare_images(images.numpy(), config)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.flags.c_contiguous
    np.testing.assert_allclose(got, wanted, atol=3e-7 if size in (None, crop) else 3e-5, rtol=0)


def test_numpy_refuses_what_torch_refuses() -> None:
    for images, config in ((frames(2), ImageConfig(crop=40)), (frames(2).float(), CONFIG), (frames(2)[..., :2], CONFIG)):
        with pytest.raises(ValueError) as wanted:
            prepare_images(images, config)
        with pytest.raises(ValueError) as got:
            numpy_images.prepare_images(images.numpy(), config)
        assert str(got.value).split(" ", 3)[0] == str(wanted.value).split(" ", 3)[0] == "Images"
