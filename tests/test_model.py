"""The backbone under its masks and cache: cached equals uncached, one decoder class, heads that decode lawfully."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from multimodal.attention import KVCache, block_mask, causal_mask, prefix_mask, tree_mask
from multimodal.config import DecoderConfig, get_preset
from multimodal.decoder import Decoder, arange_positions
from multimodal.losses import build_objective
from vla.action_head import HEAD_TYPES, ActionBatch, HeadConfig, KnownActions, draw_known_steps
from vla.action_tokenizer import ActionTokenizer
from vla.continuous_heads import draw_times
from vla.decoding import DecodeConfig
from vla.heads import HEADS, build_head
from vla.model import VLA, VLAConfig

TOKENIZER = ActionTokenizer(low=(-1.0, -0.5, 0.0), high=(1.0, 0.25, 0.0), bins=(15, 15, 15), binary=(2,))
FAMILIES = {
    "llama": DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48),
    "qwen3": DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, head_size=12, mlp_size=48, qk_norm=True),
    "qwen2": DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, mlp_size=48, qkv_bias=True),
    "gemma": DecoderConfig(
        hidden_size=32, num_layers=2, num_heads=4, mlp_size=48, activation="geglu", norm_offset=1.0, embedding_scale=5.7
    ),
    "gpt2": DecoderConfig(
        hidden_size=32, num_layers=2, num_heads=4, mlp_size=48, norm="layer", activation="gelu", positions="learned",
        max_positions=32, qkv_bias=True, output_bias=True, mlp_bias=True,
    ),
}  # fmt: skip


def build_model(seed: int = 0, slots: str = "tokens") -> VLA:
    torch.manual_seed(seed)
    vlm = replace(get_preset("debug"), vocab_size=20)
    config = VLAConfig(
        vlm=vlm, text_length=6, action_horizon=4, action_dim=3, num_action_ids=TOKENIZER.vocab_size, slots=slots
    )
    model = VLA(config).eval()
    for parameter in model.parameters():  # away from the tame initialisation, so that an error shows
        parameter.data.mul_(2.0)
    return model


def inputs(batch: int = 3, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 2, 3, 32, 32, generator=generator)
    state = torch.randn(batch, 8, generator=generator)
    text_mask = torch.arange(6) < torch.tensor([6, 3, 1, 4, 5])[:batch, None]
    text = torch.randint(0, 20, (batch, 6), generator=generator) * text_mask
    return images, state, text, text_mask


@pytest.mark.parametrize("family", FAMILIES)
def test_incremental_decoding_equals_one_causal_pass(family):
    torch.manual_seed(0)
    decoder = Decoder(FAMILIES[family]).eval()
    x = torch.randn(2, 9, 32)
    whole = decoder(x, causal_mask(9, 9), arange_positions(2, 0, 9, x.device))
    cache, parts = decoder.new_cache(), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        positions = arange_positions(2, start, stop - start, x.device)
        parts.append(decoder(x[:, start:stop], causal_mask(stop - start, stop), positions, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_commit_keeps_a_path_as_if_only_it_had_been_run():
    torch.manual_seed(0)
    decoder = Decoder(FAMILIES["llama"]).eval()
    prompt, tree = torch.randn(1, 5, 32), torch.randn(1, 4, 32)
    parents, depth = [-1, -1, 1, 0], torch.tensor([[0, 0, 1, 1]])
    cache = decoder.new_cache()
    decoder(prompt, causal_mask(5, 5), arange_positions(1, 0, 5, prompt.device), cache)
    mask = torch.cat([torch.ones(4, 5, dtype=torch.bool), tree_mask(parents)], dim=1)
    hidden = decoder(tree, mask, 5 + depth, cache)
    cache.commit(5, torch.tensor([1, 2]))
    straight = decoder.new_cache()
    sequence = torch.cat([prompt, tree[:, [1, 2]]], dim=1)
    expected = decoder(sequence, causal_mask(7, 7), arange_positions(1, 0, 7, prompt.device), straight)
    torch.testing.assert_close(hidden[:, [1, 2]], expected[:, 5:], atol=1e-5, rtol=1e-5)
    for layer in range(2):
        torch.testing.assert_close(cache.keys[layer], straight.keys[layer], atol=1e-5, rtol=1e-5)


def test_rollback_forgets_exactly_the_tail_and_refuses_the_future():
    cache = KVCache(1)
    keys = torch.randn(1, 2, 5, 4)
    cache.append(0, keys[:, :, :3], keys[:, :, :3])
    cache.append(0, keys[:, :, 3:], keys[:, :, 3:])
    cache.rollback(3)
    assert cache.length == 3 and torch.equal(cache.keys[0], keys[:, :, :3])
    with pytest.raises(ValueError, match="holds 3"):
        cache.rollback(4)


def test_masks_are_what_their_names_say():
    assert prefix_mask(2, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert block_mask(torch.tensor([0, 0, 1])).int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert tree_mask([-1, 0, 0, 1]).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


def test_cached_action_rounds_equal_the_uncached_path():
    model = build_model()
    embeddings, is_real = model.embed_prefix(*inputs())
    prefix = model.prefill(embeddings, is_real)
    for seed in range(3):  # several rounds on one cache: a round leaves it as it was
        tokens = torch.randint(0, 18, (3, 12), generator=torch.Generator().manual_seed(seed))
        cached = model.action_hidden(tokens, prefix)
        torch.testing.assert_close(cached, model.action_hidden_uncached(tokens, embeddings, is_real), atol=1e-5, rtol=1e-4)
    assert prefix.cache.length == is_real.shape[1]


def test_padding_of_a_whole_batch_is_cut_off_exactly():
    model = build_model()
    embeddings, is_real = model.embed_prefix(*(part[1:3] for part in inputs()))  # texts of 3 and 1 words of 6
    tokens = torch.full((2, 12), model.config.mask_id)
    prefix = model.prefill(embeddings, is_real)
    assert prefix.cache.length == is_real.shape[1] - 3
    expected = model.action_hidden_uncached(tokens, embeddings, is_real)
    torch.testing.assert_close(model.action_hidden(tokens, prefix), expected, atol=1e-5, rtol=1e-4)


def test_padding_text_changes_nothing():
    model = build_model()
    images, state, text, text_mask = inputs()
    other = torch.where(text_mask, text, (text + 7) % 20)
    tokens = torch.full((3, 12), model.config.mask_id)
    hidden = [
        model.action_hidden(tokens, model.prefill(*model.embed_prefix(images, state, ids, text_mask))) for ids in (text, other)
    ]
    torch.testing.assert_close(*hidden)


def test_gradients_through_the_cache_equal_those_of_the_uncached_path():
    model, tokens = build_model(), torch.full((3, 12), 17)
    grads = []
    for cached in (True, False):
        model.zero_grad()
        embeddings, is_real = model.embed_prefix(*inputs())
        hidden = (
            model.action_hidden(tokens, model.prefill(embeddings, is_real))
            if cached
            else model.action_hidden_uncached(tokens, embeddings, is_real)
        )
        hidden.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.vlm.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("head_type", ["discrete_diffusion", "parallel", "autoregressive"])
def test_a_token_head_refuses_an_objective_over_sequences_when_it_is_built(head_type):
    with pytest.raises(ValueError, match="edit_invariant.*hl_gauss"):
        build_head(HeadConfig(type=head_type), TOKENIZER, build_objective({"type": "edit_invariant"}))


def action_batch(actions: np.ndarray, is_pad: torch.Tensor) -> ActionBatch:
    encoders = (TOKENIZER.encode, TOKENIZER.coordinates, TOKENIZER.to_unit)
    return ActionBatch(*(torch.as_tensor(encode(actions)) for encode in encoders), is_pad)


@pytest.mark.parametrize("head_type", HEADS)
def test_every_head_trains_and_its_chunks_lie_within_the_data_and_continue_known_actions(head_type):
    model = build_model(slots=HEADS[head_type].slots).train()
    head = build_head(HeadConfig(type=head_type, mask_draws=3), TOKENIZER)
    actions = np.random.default_rng(0).uniform([-1.0, -0.5, -1.0], [1.0, 0.25, 1.0], size=(3, 4, 3)) * [0.5, 0.5, 1.0]
    is_pad = torch.zeros(3, 4, dtype=torch.bool)
    is_pad[0, 2:] = True
    batch = action_batch(actions, is_pad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        loss = head.loss(model, model.prefill(*model.embed_prefix(*inputs())), batch, generator)
        optimizer.zero_grad()
        (loss.loss_sum / loss.normalizer).backward()
        optimizer.step()
        losses.append(float(loss.loss_sum.detach()) / loss.normalizer)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model.eval()
    is_known = np.zeros((3, 4), dtype=bool)
    is_known[1, :2] = True
    known = KnownActions(actions.astype(np.float32) * is_known[..., None], is_known)
    with torch.no_grad():
        prefix = model.prefill(*model.embed_prefix(*inputs()))
        decision = head.act(model, prefix, known, DecodeConfig(rounds=3), [0, 0, 0])
        again = head.act(model, prefix, known, DecodeConfig(rounds=3), [0, 0, 0])
    assert (decision.actions >= np.array(TOKENIZER.low) - [0, 0, 1]).all()
    assert (decision.actions <= np.array(TOKENIZER.high) + [0, 0, 1]).all()
    assert set(np.unique(decision.actions[..., 2])) <= {-1.0, 1.0}
    half_bin = np.array([*(TOKENIZER.width[:2] / 2), 0.0])
    assert (np.abs(decision.actions - TOKENIZER.from_unit(TOKENIZER.to_unit(actions)))[is_known] <= half_bin + 1e-6).all()
    np.testing.assert_array_equal(decision.actions, again.actions)


@pytest.mark.parametrize("head_type", HEADS)
def test_padded_steps_do_not_reach_the_loss(head_type):
    model = build_model(slots=HEADS[head_type].slots)
    head = build_head(HeadConfig(type=head_type, mask_draws=2, replace_visible=0.0, known_prefix=0.0), TOKENIZER)
    is_pad = torch.ones(3, 4, dtype=torch.bool)
    is_pad[:2, :2] = False  # row 2 is padding altogether
    prefix = model.prefill(*model.embed_prefix(*inputs()))
    actions = np.zeros((3, 4, 3))
    loss = head.loss(model, prefix, action_batch(actions, is_pad), torch.Generator().manual_seed(0))
    loss.loss_sum.backward()
    assert torch.isfinite(loss.loss_sum) and loss.normalizer <= 4
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head_type", HEADS)
def test_what_padded_steps_hold_changes_nothing(head_type):
    """They repeat the action before, so a head that is shown them learns to copy it: of DAgger's windows most are padding."""
    model = build_model(slots=HEADS[head_type].slots)
    head = build_head(HeadConfig(type=head_type, known_prefix=0.0), TOKENIZER)
    is_pad = torch.arange(4).expand(3, 4) >= 2
    prefix = model.prefill(*model.embed_prefix(*inputs()))
    actions = np.random.default_rng(0).uniform(-0.5, 0.2, size=(3, 4, 3)) * [1, 1, 0]
    changed = np.where(is_pad.numpy()[..., None], 0.1, actions)
    losses = [
        head.loss(model, prefix, action_batch(values, is_pad), torch.Generator().manual_seed(0)).loss_sum
        for values in (actions, changed)
    ]
    torch.testing.assert_close(*losses)


def test_an_euler_step_of_the_true_velocity_lands_on_the_actions():
    head = build_head(HeadConfig(type="flow"), TOKENIZER)
    target = torch.rand(2, 4, 3) * 2 - 1

    class Oracle:
        """Knows where the straight path leads: from x at time t, the velocity is (a - x) / (1 - t)."""

        def predict_steps(self, values, times, prefix):
            return (target - values) / (1 - times[..., None]).clamp_min(1e-6)

    none = torch.zeros(2, 4, dtype=torch.bool)
    values, rounds = head.predict(Oracle(), None, torch.zeros(2, 4, 3), none, DecodeConfig(rounds=1, euler_steps=5), [0, 1])
    torch.testing.assert_close(values, target, atol=1e-5, rtol=1e-5)
    assert rounds == 5


def test_a_chunk_that_has_no_room_for_known_steps_is_given_none():
    for horizon, most in ((1, 4), (4, 0)):
        config = HeadConfig(known_prefix=1.0, max_known_steps=most)
        assert not draw_known_steps(torch.zeros(3, horizon, dtype=torch.bool), config, torch.Generator()).any()
    real = torch.arange(1, 9)
    known = draw_known_steps(torch.arange(8) >= real[:, None], HeadConfig(known_prefix=1.0, max_known_steps=7), torch.Generator())
    assert (known.sum(1) < real).all() and known[1:].any(), "one real step at least is left to predict"
    with pytest.raises(ValueError, match="known_prefix is 1.5"):
        HeadConfig(known_prefix=1.5)
    with pytest.raises(ValueError, match="max_known_steps is -1"):
        HeadConfig(max_known_steps=-1)


def test_flow_times_favour_noise_as_pi0_does():
    noise_level = 1 - draw_times(20_000, torch.Generator().manual_seed(0))
    assert abs(float(noise_level.mean()) - 0.6) < 0.01  # mean of Beta(1.5, 1)
    assert 0 <= float(noise_level.min()) and float(noise_level.max()) <= 1


def test_the_names_of_heads_are_those_the_config_allows():
    assert tuple(HEADS) == HEAD_TYPES


def test_a_config_survives_its_dictionary():
    config = build_model().config
    assert VLAConfig.from_dict(config.to_dict()) == config
