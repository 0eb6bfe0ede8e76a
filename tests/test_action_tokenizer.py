"""Laws of the action tokens and of normalisation: exact zero, half a bin, exact gripper, no id out of range."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.action_tokenizer import ActionTokenizer
from vla.normalization import CLIP, Statistics, denormalize, normalize

# symmetric, lopsided, all positive, all negative, constant, constant zero, binary
TOKENIZER = ActionTokenizer(
    low=(-1.0, -0.31, 0.2, -0.9, 0.4, 0.0, -1.0),
    high=(1.0, 0.87, 0.7, -0.1, 0.4, 0.0, 1.0),
    bins=(255, 255, 127, 255, 255, 255, 255),
    binary=(6,),
)
RANDOM = np.random.default_rng(0)


def sample(shape: tuple[int, ...], stretch: float = 1.0) -> np.ndarray:
    """Actions [..., 7] over the ranges, stretched about their middles; gripper -1 or +1."""
    low, high = np.array(TOKENIZER.low), np.array(TOKENIZER.high)
    actions = (low + high) / 2 + stretch * (high - low) / 2 * RANDOM.uniform(-1, 1, (*shape, 7))
    actions[..., 6] = RANDOM.choice([-1.0, 1.0], shape)
    return actions


def test_roundtrip_error_is_at_most_half_a_bin():
    actions = sample((200, 8))
    error = np.abs(TOKENIZER.decode_ids(TOKENIZER.encode(actions)) - actions)
    assert (error <= TOKENIZER.width / 2 + 1e-7).all()


def test_unit_values_lie_in_their_range_and_come_back():
    actions = sample((200, 8))
    unit = TOKENIZER.to_unit(actions)
    assert np.abs(unit).max() <= 1.0 + 1e-6 and (np.abs(unit[..., 6]) == 1.0).all()
    np.testing.assert_allclose(TOKENIZER.from_unit(unit), actions, atol=1e-6)
    assert (TOKENIZER.to_unit(np.zeros(7))[[0, 1, 5]] == 0.0).all()
    outside = TOKENIZER.from_unit(np.full(7, 9.0))
    np.testing.assert_allclose(outside, np.array(TOKENIZER.high), atol=1e-6)


def test_zero_motion_is_exactly_zero_and_the_middle_id():
    ids = TOKENIZER.encode(np.zeros(7))
    decoded = TOKENIZER.decode_ids(ids)
    for dim in (0, 1, 5):  # 0 lies in the range
        assert ids[dim] == 127 and decoded[dim] == 0.0


def test_gripper_and_saturated_actions_are_exact():
    for gripper in (-1.0, 1.0):
        action = np.array([1.0, 0.87, 0.7, -0.9, 0.4, 0.0, gripper])
        np.testing.assert_array_equal(TOKENIZER.decode_ids(TOKENIZER.encode(action)), action.astype(np.float32))


@given(st.floats(-1e6, 1e6))
def test_values_outside_the_range_take_the_extreme(value):
    action = np.full(7, value)
    clipped = np.clip(action, TOKENIZER.low, TOKENIZER.high)
    np.testing.assert_array_equal(TOKENIZER.encode(action)[:6], TOKENIZER.encode(clipped)[:6])


def test_every_encoded_id_is_allowed_and_within_its_valid_range():
    ids = TOKENIZER.encode(sample((500,), stretch=3.0))
    assert TOKENIZER.allowed.shape == (7, TOKENIZER.vocab_size)
    assert TOKENIZER.allowed[np.arange(7), ids].all()
    for dim in range(7):
        start, end = TOKENIZER.valid_range(dim)
        assert TOKENIZER.allowed[dim].sum() == end - start
        assert TOKENIZER.allowed[dim, start:end].all()


def test_edges_enclose_the_centers_of_the_valid_ids():
    for dim in range(4):
        start, end = TOKENIZER.valid_range(dim)
        edges, centers = TOKENIZER.edges(dim), TOKENIZER.centers[dim, start:end]
        np.testing.assert_allclose((edges[1:] + edges[:-1]) / 2, centers, atol=1e-12)
        assert edges[0] <= TOKENIZER.low[dim] and TOKENIZER.high[dim] <= edges[-1]
    with pytest.raises(ValueError, match="binary"):
        TOKENIZER.edges(6)


def test_expectation_of_one_hot_probs_is_the_center():
    ids = TOKENIZER.encode(sample((5, 8)))
    probs = np.eye(TOKENIZER.vocab_size)[ids]
    np.testing.assert_array_equal(TOKENIZER.decode_expectation(probs, ids), TOKENIZER.decode_ids(ids))


def test_expectation_is_the_mean_of_the_window_and_ignores_what_lies_outside():
    ids = np.full(7, 127)
    ids[6] = TOKENIZER.num_bins
    probs = np.zeros((7, TOKENIZER.vocab_size))
    probs[:, 127], probs[:, 128], probs[:, 140] = 0.3, 0.1, 0.6
    probs[6, -2:] = (0.6, 0.4)
    value = TOKENIZER.decode_expectation(probs, ids)
    assert value[0] == pytest.approx(0.25 * TOKENIZER.width[0])
    assert value[4] == pytest.approx(0.4) and value[6] == -1.0


def test_expectation_without_probability_in_the_window_is_the_center():
    ids = TOKENIZER.encode(sample((3,)))
    probs = np.zeros((3, 7, TOKENIZER.vocab_size))
    np.testing.assert_array_equal(TOKENIZER.decode_expectation(probs, ids), TOKENIZER.decode_ids(ids))


def test_torch_tensors_and_numpy_arrays_decode_alike():
    torch = pytest.importorskip("torch")
    ids = TOKENIZER.encode(sample((4, 8)))
    probs = RANDOM.dirichlet(np.ones(TOKENIZER.vocab_size + 1), (4, 8, 7))  # the mask's column is ignored
    expected = TOKENIZER.decode_expectation(probs, ids)
    got = TOKENIZER.decode_expectation(torch.from_numpy(probs).requires_grad_(), torch.from_numpy(ids))
    np.testing.assert_array_equal(got, expected)


def test_mask_and_foreign_ids_are_refused():
    ids = TOKENIZER.encode(np.zeros(7))
    ids[2] = TOKENIZER.mask_id
    with pytest.raises(ValueError, match="the mask.*dimension 2"):
        TOKENIZER.decode_ids(ids)
    ids[2] = TOKENIZER.num_bins  # a gripper id
    with pytest.raises(ValueError, match="dimension 2"):
        TOKENIZER.decode_ids(ids)


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match="odd"):
        ActionTokenizer((-1.0,), (1.0,), (256,))
    with pytest.raises(ValueError, match=r"\[..., 7\]"):
        TOKENIZER.encode(np.zeros(6))
    with pytest.raises(ValueError, match="not finite"):
        TOKENIZER.encode(np.full(7, np.nan))


def test_tokenizer_survives_json():
    assert ActionTokenizer.from_dict(json.loads(json.dumps(TOKENIZER.to_dict()))) == TOKENIZER


def test_tokenizer_from_statistics_spans_the_quantiles():
    frames = sample((2000,))
    tokenizer = ActionTokenizer.from_statistics(Statistics.of(frames), binary=(6,), num_bins=63)
    low, high = np.quantile(frames, [0.01, 0.99], axis=0)
    np.testing.assert_array_equal(tokenizer.low, low)
    np.testing.assert_array_equal(tokenizer.high, high)
    assert tokenizer.vocab_size == 65


# --------------------------------------------------------------------------------------------------------- normalisation


def test_quantiles_are_those_of_all_frames_whatever_the_episodes():
    frames = RANDOM.normal(size=(1000, 3))
    statistics = Statistics.of(frames)
    np.testing.assert_array_equal(statistics.q99, np.quantile(frames, 0.99, axis=0))
    per_episode = np.mean([np.quantile(part, 0.99, axis=0) for part in np.split(frames, 100)], axis=0)
    assert (np.abs(per_episode - statistics.q99) > 0.1).all()  # what averaging episodes would have given


def test_statistics_survive_json_exactly():
    statistics = Statistics.of(RANDOM.normal(size=(50, 4)))
    assert Statistics.from_json(statistics.to_json()).to_dict() == statistics.to_dict()


def test_denormalize_inverts_normalize_where_it_did_not_clip():
    frames = RANDOM.normal(size=(1000, 4)) * [1, 10, 0.01, 0] + [0, 5, -3, 7]
    statistics = Statistics.of(frames)
    normalized = normalize(frames, statistics)
    inside = np.abs(normalized) < CLIP
    assert np.abs(normalized).max() <= CLIP and inside.mean() > 0.98
    np.testing.assert_allclose(denormalize(normalized, statistics)[inside], frames[inside], rtol=1e-5, atol=1e-5)


def test_constant_dimension_normalizes_to_zero_and_comes_back():
    statistics = Statistics.of(np.full((10, 1), 7.0))
    assert normalize(np.array([7.5]), statistics) == 0.0
    assert denormalize(np.array([0.3]), statistics) == 7.0


def test_statistics_refuse_nan():
    with pytest.raises(ValueError, match="1 frames hold NaN"):
        Statistics.of(np.array([[0.0], [np.nan]]))
