"""Laws of the lighter meshes: fewer triangles, the same surface, texture from the same place, nearly the same frame."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from sim.light_meshes import MIN_FACES, Triangles, simplified, simplified_once


def sphere(rings: int = 48) -> Triangles:
    """The unit sphere with two texture charts: the upper half shows the left of the texture, the lower half the right."""
    polar, around = np.meshgrid(np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, 2 * rings), indexing="ij")
    points = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], axis=-1)
    a, b, c, d = points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]
    faces = np.concatenate([np.stack([a, b, c], axis=2).reshape(-1, 3, 3), np.stack([a, c, d], axis=2).reshape(-1, 3, 3)])
    faces = faces[np.linalg.norm(np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0]), axis=-1) > 1e-9]
    upper = faces.mean(axis=1)[:, 2] > 0
    texture = 0.2 + 0.05 * faces[..., :2] + np.where(upper, 0.0, 0.5)[:, None, None]
    return Triangles(faces.astype(np.float32), faces.astype(np.float32), texture.astype(np.float32))


def test_a_lighter_mesh_has_the_triangles_asked_for_on_the_same_surface():
    whole = sphere()
    light = simplified(whole, 0.1)
    assert len(light.positions) <= max(MIN_FACES, 0.1 * len(whole.positions)) * 1.02
    radius = np.linalg.norm(light.positions.reshape(-1, 3), axis=-1)
    assert abs(radius - 1).max() < 0.03
    reach, _ = cKDTree(light.positions.reshape(-1, 3)).query(whole.positions.reshape(-1, 3))
    assert reach.max() < 0.35, "no hole"


def test_normals_and_texture_come_from_the_same_side_and_chart():
    light = simplified(sphere(), 0.1)
    centre = light.positions.mean(axis=1)
    assert (np.einsum("fcd,fd->fc", light.normals, centre) > 0.5).all()
    clear = abs(centre[:, 2]) > 0.2
    assert ((light.texture[clear][..., 0] < 0.45) == (centre[clear][:, 2] > 0)[:, None]).all()


def test_small_meshes_and_full_detail_stay_as_they_are():
    whole = sphere()
    assert simplified(whole, 1.0) is whole
    small = Triangles(whole.positions[:MIN_FACES], whole.normals[:MIN_FACES], None)
    assert simplified(small, 0.01) is small


def test_what_is_remembered_is_what_would_be_made_and_depends_on_all_of_a_mesh():
    whole = sphere()
    light = simplified_once(whole, 0.1)
    again = simplified_once(sphere(), 0.1)
    assert again is light
    for mine, right in zip(vars(light).values(), vars(simplified(whole, 0.1)).values(), strict=True):
        np.testing.assert_array_equal(mine, right)
    others = [
        simplified_once(whole, 0.2),
        simplified_once(Triangles(whole.positions, whole.normals, None), 0.1),
        simplified_once(Triangles(whole.positions, whole.normals, whole.texture + 0.01), 0.1),
        simplified_once(Triangles(whole.positions, -whole.normals, whole.texture), 0.1),
    ]
    assert all(other is not light for other in others)


def test_frames_are_nearly_equal_and_the_motion_is_the_same():
    from sim.seeds import start
    from sim.suites import build_environment

    states, frames = [], []
    for detail in (1.0, 0.15):
        environment = build_environment("robosuite_lift", image_size=64, mesh_detail=detail)
        environment.reset(0, start("validation", 0))
        for step in range(5):
            environment.step(np.array([0.3, -0.2, 0.1 * step, 0, 0, 0.1, -1.0]))
        observation = environment.observe()
        states.append(observation.state)
        frames.append(np.stack(list(observation.images.values())).astype(int))
    assert np.array_equal(*states)
    difference = abs(frames[0] - frames[1])
    assert 0 < difference.mean() < 4, "another drawing of the same scene"
    assert np.median(difference) == 0


@pytest.mark.parametrize("detail", [0.0, -1.0, 1.5])
def test_a_share_that_makes_no_sense_is_refused(detail: float):
    from sim.rendering import Renderer

    with pytest.raises(ValueError, match="mesh_detail"):
        Renderer(None, None, detail)
