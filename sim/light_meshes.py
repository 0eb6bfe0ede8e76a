"""Lighter meshes for a software renderer: fewer triangles drawn, same model, same physics.

A software renderer's time goes into triangles, and scanned objects have tens of thousands each, of which a small picture
shows a few hundred. `lighten` replaces what a GL context draws for a mesh; the MuJoCo model is left as it is. Edges are
collapsed by their quadric error (Garland and Heckbert 1997, in the fast_simplification package), positions only; normals
and texture coordinates are then taken from the nearest corner of the original that lies in the same texture chart and looks
the same way.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_FACES = 800  # smaller meshes are drawn as they are
CANDIDATES = 32  # original corners among which a new corner finds its normal and texture coordinates
SAME_SIDE = 0.5  # cosine from which two normals belong to the same side of a wall
LISTS_PER_MESH = 2  # MuJoCo's display lists: the mesh, its convex hull
KEPT = 256  # simplified meshes in memory, 0.2 MB each or so


def check_mesh_detail(detail: float) -> None:
    """Raise ValueError unless it is a share of triangles."""
    if not 0 < detail <= 1:
        raise ValueError(f"mesh_detail is {detail}; allowed: above 0, up to 1 (meshes as they are).")


@dataclass(frozen=True)
class Triangles:
    """F triangles: positions [F, 3, 3] m in the mesh's frame, unit normals [F, 3, 3], texture coordinates [F, 3, 2] or None."""

    positions: np.ndarray
    normals: np.ndarray
    texture: np.ndarray | None


def mesh_triangles(model: Any, mesh: int) -> Triangles:
    """What MuJoCo draws for one of the model's meshes."""
    first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    faces = slice(first, first + count)

    def corners(values: np.ndarray, offset: int, index: np.ndarray) -> np.ndarray:
        return values[offset + index[faces]].astype(np.float32)

    textured = model.mesh_texcoordadr[mesh] >= 0
    return Triangles(
        corners(model.mesh_vert, model.mesh_vertadr[mesh], model.mesh_face),
        corners(model.mesh_normal, model.mesh_normaladr[mesh], model.mesh_facenormal),
        corners(model.mesh_texcoord, model.mesh_texcoordadr[mesh], model.mesh_facetexcoord) if textured else None,
    )


def simplified(triangles: Triangles, detail: float) -> Triangles:
    """At most max(MIN_FACES, detail * F) of the F triangles' shape. detail: (0, 1]."""
    from fast_simplification import simplify

    count = len(triangles.positions)
    target = max(MIN_FACES, int(detail * count))
    if target >= count:
        return triangles
    points, welded = np.unique(triangles.positions.reshape(-1, 3), axis=0, return_inverse=True)
    points, faces = simplify(points, welded.reshape(-1, 3).astype(np.int32), target_count=target)[:2]
    positions = points[faces].astype(np.float32)
    source = _nearest_corners(triangles, positions)
    texture = None if triangles.texture is None else triangles.texture.reshape(-1, 2)[source]
    return Triangles(positions, triangles.normals.reshape(-1, 3)[source], texture)


_kept: OrderedDict[bytes, Triangles] = OrderedDict()


def simplified_once(triangles: Triangles, detail: float) -> Triangles:
    """`simplified`, remembered by content: a scene is built anew for most starts, from the same meshes (a sixth of the time
    of collecting libero_spatial).
    """
    digest = hashlib.blake2b(repr((detail, triangles.positions.shape, triangles.texture is None)).encode())
    for values in (triangles.positions, triangles.normals, triangles.texture):
        if values is not None:
            digest.update(np.ascontiguousarray(values))
    key = digest.digest()
    if key not in _kept:
        _kept[key] = simplified(triangles, detail)
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def _nearest_corners(triangles: Triangles, positions: np.ndarray) -> np.ndarray:
    """For each corner of new triangles [F', 3, 3] the number of an original corner: [F', 3] into [3 F]."""
    from scipy.spatial import cKDTree

    corners, normals = triangles.positions.reshape(-1, 3), triangles.normals.reshape(-1, 3)
    facing, facing_new = _facing(triangles.positions), _facing(positions)
    near = cKDTree(triangles.positions.mean(axis=1)).query(positions.mean(axis=1), k=min(CANDIDATES, len(facing)))[1]
    agrees = np.einsum("fkd,fd->fk", facing[near], facing_new) > SAME_SIDE  # a thin wall's other side is as near
    charts = _texture_charts(triangles)
    chart = charts[np.take_along_axis(near, agrees.argmax(axis=1)[:, None], axis=1)]  # [F', 1]
    distance, candidates = cKDTree(corners).query(positions, k=min(CANDIDATES, len(corners)))  # [F', 3, K]
    away = np.einsum("fckd,fd->fck", normals[candidates], facing_new) < SAME_SIDE
    elsewhere = charts[candidates // 3] != chart[..., None]
    size = np.linalg.norm(np.ptp(corners, axis=0))
    best = (distance / size + away + 2.0 * elsewhere).argmin(axis=-1)
    return np.take_along_axis(candidates, best[..., None], axis=-1)[..., 0]


def _facing(positions: np.ndarray) -> np.ndarray:
    """Unit normals [F, 3] of the planes of triangles [F, 3, 3]."""
    edges = positions[:, 1:] - positions[:, :1]
    facing = np.cross(edges[:, 0], edges[:, 1])
    return facing / (np.linalg.norm(facing, axis=-1, keepdims=True) + 1e-12)


def _texture_charts(triangles: Triangles) -> np.ndarray:
    """Number [F] of the connected piece of texture that each triangle lies in; all zero without texture."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(triangles.positions)
    if triangles.texture is None:
        return np.zeros(count, int)
    keys = np.concatenate([triangles.positions.reshape(-1, 3), triangles.texture.reshape(-1, 2)], axis=1)
    vertices = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    owner = np.repeat(np.arange(count), 3)
    size = count + vertices.max() + 1
    graph = coo_matrix((np.ones(len(owner), bool), (owner, count + vertices)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:count]


def lighten(model: Any, context: Any, detail: float) -> None:
    """Let the current GL context draw the model's meshes with a share `detail`, below 1, of their triangles."""
    for mesh in np.flatnonzero(model.mesh_facenum > MIN_FACES):
        light = simplified_once(mesh_triangles(model, mesh), detail)
        _compile_list(context.baseMesh + LISTS_PER_MESH * int(mesh), light)


def _compile_list(number: int, triangles: Triangles) -> None:
    """Make the GL display list `number` draw these triangles."""
    from OpenGL import GL

    flat = {GL.GL_VERTEX_ARRAY: triangles.positions.reshape(-1, 3), GL.GL_NORMAL_ARRAY: triangles.normals.reshape(-1, 3)}
    if triangles.texture is not None:
        flat[GL.GL_TEXTURE_COORD_ARRAY] = triangles.texture.reshape(-1, 2)
    arrays = {kind: np.ascontiguousarray(values, np.float32) for kind, values in flat.items()}
    for kind in arrays:
        GL.glEnableClientState(kind)
    GL.glVertexPointer(3, GL.GL_FLOAT, 0, arrays[GL.GL_VERTEX_ARRAY])
    GL.glNormalPointer(GL.GL_FLOAT, 0, arrays[GL.GL_NORMAL_ARRAY])
    if triangles.texture is not None:
        GL.glTexCoordPointer(2, GL.GL_FLOAT, 0, arrays[GL.GL_TEXTURE_COORD_ARRAY])
    GL.glNewList(number, GL.GL_COMPILE)
    GL.glDrawArrays(GL.GL_TRIANGLES, 0, len(arrays[GL.GL_VERTEX_ARRAY]))
    GL.glEndList()
    for kind in arrays:
        GL.glDisableClientState(kind)
