"""Laws of the mask schedule, of corruption and of the remasking rules."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.action_head import ActionBatch, HeadConfig
from vla.action_tokenizer import ActionTokenizer
from vla.heads import build_head
from vla.masked_diffusion import corrupt, mask_rate, num_masked, replace_visible, stratified_times, unmask_counts
from vla.unmasking import REMASK_RULES, DecodeConfig, RoundState

MASK = 99


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mask_rate_runs_from_zero_to_one_with_mean_two_over_pi():
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    assert mask_rate(t)[0] == pytest.approx(0, abs=1e-12) and mask_rate(t)[-1] == 1
    assert (mask_rate(t).diff() > 0).all()
    assert mask_rate(t).mean() == pytest.approx(2 / math.pi, abs=1e-3)


def test_unmask_counts_are_those_of_the_paper():
    assert unmask_counts(56, 12) == [1, 1, 3, 3, 4, 5, 5, 6, 7, 7, 7, 7]
    assert unmask_counts(56, 4) == [5, 12, 18, 21]


@given(st.integers(1, 80), st.integers(1, 20))
def test_unmask_counts_sum_to_the_slots(num_slots: int, rounds: int):
    counts = unmask_counts(num_slots, rounds)
    assert sum(counts) == num_slots and min(counts) >= 0 and len(counts) == rounds


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 10**6))
def test_corruption_masks_exactly_the_counted_slots_and_never_known_ones(num_slots: int, num_known: int, seed: int):
    num_known = min(num_known, num_slots - 1)
    clean = torch.arange(num_slots).expand(5, -1).clone()
    known = (torch.arange(num_slots) < num_known).expand(5, -1)
    t = torch.rand(5, generator=seeded(seed))
    corruption = corrupt(clean, t, MASK, generator=seeded(seed), is_known=known)
    assert torch.equal(corruption.is_masked.sum(1), num_masked(t, torch.tensor(num_slots - num_known)))
    assert not (corruption.is_masked & known).any()
    assert torch.equal(corruption.noisy_tokens == MASK, corruption.is_masked)
    assert torch.equal(torch.where(corruption.is_masked, clean, corruption.noisy_tokens), clean)


def test_every_slot_is_masked_equally_often():
    clean = torch.zeros(4000, 10, dtype=torch.long)
    masked = corrupt(clean, torch.full((4000,), 1 / 3), MASK, generator=seeded()).is_masked.float().mean(0)
    assert (masked - 0.5).abs().max() < 0.04  # mask_rate(1/3) = 0.5; 5 standard errors


def test_visible_tokens_are_suspect_and_a_share_of_them_is_replaced_by_allowed_ones():
    clean = torch.randint(10, 20, (50, 12), generator=seeded())
    first, last = torch.full((12,), 10), torch.full((12,), 19)
    corruption = corrupt(clean, torch.full((50,), 0.3), MASK, generator=seeded(1))
    replaced = replace_visible(corruption, clean, 0.5, first, last, generator=seeded(2))
    wrong = replaced.noisy_tokens != corruption.noisy_tokens
    assert torch.equal(replaced.is_suspect, ~corruption.is_masked) and not (wrong & replaced.is_masked).any()
    assert 0.3 < wrong.sum() / replaced.is_suspect.sum() <= 0.5  # the rest met the token that was there
    assert ((replaced.noisy_tokens[wrong] >= 10) & (replaced.noisy_tokens[wrong] <= 19)).all()


class SlotTable(torch.nn.Module):
    """Logits of a slot are looked up by the token that stands there: what a loss teaches can be read off."""

    tokenizer = ActionTokenizer(low=(-1.0, 0.0), high=(1.0, 0.0), bins=(3, 3), binary=(1,))
    horizon = 4

    def __init__(self) -> None:
        super().__init__()
        size, mask = self.tokenizer.vocab_size, self.tokenizer.mask_id
        self.config = SimpleNamespace(action_horizon=self.horizon, action_dim=2, mask_id=mask)
        self.table = torch.nn.Parameter(torch.zeros(self.horizon * 2, size + 1, size))
        self.action_head = torch.nn.Linear(size, size, bias=False)
        self.action_head.weight = torch.nn.Parameter(torch.eye(size), requires_grad=False)

    def action_hidden(self, tokens: torch.Tensor, prefix: None) -> torch.Tensor:
        return self.table[torch.arange(tokens.shape[1]), tokens]

    def loss(self, replace_visible: float, seed: int) -> torch.Tensor:
        """Of 256 chunks whose every action is drawn by itself."""
        head = build_head(HeadConfig(mask_draws=1, replace_visible=replace_visible, known_prefix=0.0), self.tokenizer)
        actions = torch.randint(0, 2, (256, self.horizon, 2), generator=seeded(seed)).numpy() * 2.0 - 1.0
        encoders = (self.tokenizer.encode, self.tokenizer.coordinates, self.tokenizer.to_unit)
        is_pad = torch.zeros(256, self.horizon, dtype=torch.bool)
        batch = ActionBatch(*(torch.as_tensor(encode(actions)) for encode in encoders), is_pad)
        loss = head.loss(self, None, batch, seeded(seed))
        return loss.loss_sum / loss.normalizer


def test_a_right_token_that_is_shown_is_believed_more_than_a_guess():
    model = SlotTable()
    optimizer = torch.optim.Adam([model.table], lr=0.2)
    for step in range(60):
        optimizer.zero_grad()
        model.loss(replace_visible=0.1, seed=step).backward()
        optimizer.step()
    down, up = model.tokenizer.vocab_size - 2, model.tokenizer.vocab_size - 1  # ids of the gripper
    probs = model.table.detach()[1::2, :, down:].softmax(-1)
    masked, shown = probs[:, model.tokenizer.mask_id], torch.stack([probs[:, down, 0], probs[:, up, 1]])
    assert (masked - 0.5).abs().max() < 0.1 and shown.min() > 0.85  # some 5 % of the shown ones are wrong


def test_suspect_slots_leave_the_masked_ones_their_gradient():
    gradients = []
    for share in (0.0, 0.5):
        model = SlotTable()
        model.loss(share, seed=0).backward()
        gradients.append(model.table.grad)
    torch.testing.assert_close(gradients[0][:, model.tokenizer.mask_id], gradients[1][:, model.tokenizer.mask_id])
    assert not gradients[0][:, : model.tokenizer.mask_id].any() and gradients[1][:, : model.tokenizer.mask_id].any()


def test_stratified_times_put_one_draw_into_each_stratum():
    t = stratified_times(100, 4, seeded())
    assert torch.equal((t * 4).floor().sort(dim=1).values, torch.arange(4.0).expand(100, 4))


def test_rules_doubt_what_their_definition_says():
    state = RoundState(
        confidence=torch.tensor([[0.9, 0.2, 0.5]]),
        committed_confidence=torch.tensor([[0.9, 0.3, 0.95]]),
        relative_doubt=3 * torch.softmax(-torch.tensor([[0.9, 0.3, 0.95]]), dim=1),
        progress=0.5,
        next_progress=0.75,
        noise=torch.tensor([[0.999, 0.999, 0.999]]),
    )
    doubted = {name: (rule(state) > 0)[0].tolist() for name, rule in REMASK_RULES.items()}
    assert doubted == {
        "none": [False, False, False],
        "threshold": [False, True, False],
        "residual_drop": [False, False, True],
        "remdm": [False, False, False],
    }


def test_remdm_remasks_at_its_rate_and_the_less_confident_more_often():
    committed = torch.tensor([[0.9, 0.3, 0.95, 0.6]])
    relative = 4 * torch.softmax(-committed, dim=1)
    draws = torch.rand(20_000, 4, generator=seeded())
    state = RoundState(committed, committed, relative, progress=0.5, next_progress=0.75, noise=draws)
    rates = (REMASK_RULES["remdm"](state) > 0).float().mean(0)
    alpha = [1 - math.cos(0.5 * math.pi * progress) for progress in (0.5, 0.75)]
    sigma = 0.2 * min(1.0, (1 - alpha[1]) / alpha[0])
    assert abs(float(rates.mean()) - sigma) < 0.01
    assert rates[1] > rates[3] > rates[0] > rates[2]


def test_a_decode_setting_that_there_is_not_is_named_with_those_there_are():
    assert DecodeConfig(threshold=0.5).changed({"rounds": 3}) == DecodeConfig(rounds=3, threshold=0.5)
    assert DecodeConfig(threshold=1).threshold == 1
    for name, value, wanted in (("rounds", "two", "int"), ("rounds", 2.5, "int"), ("threshold", "high", "float"), ("rounds", True, "int")):
        with pytest.raises(ValueError, match=f"DecodeConfig.{name} is {value!r}; it must be of type {wanted}"):
            DecodeConfig().changed({name: value})
    with pytest.raises(ValueError, match=r"decode has no setting 'round'; it has rounds, threshold, .*euler_steps"):
        DecodeConfig().changed({"round": 2})
    with pytest.raises(ValueError, match="euler_steps is 0; at least one is needed"):
        DecodeConfig().changed({"euler_steps": 0})
