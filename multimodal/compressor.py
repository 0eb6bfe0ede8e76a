"""The elastic visual compressor: few tokens for many, by one of five primitives or a mixture, picked per input.

After SpecVLM (arXiv 2509.11815, section 3.4): pruning, pooling, convolution, a one-layer resampler and text-only, combined as a
weighted sum, as a concatenation or by selection. What the paper leaves open is decided here: pruning is seeded by the image (so
a repeated image is pruned alike) or guided by attention; the convolution is depthwise separable; the gate reads a question
vector and the image's mean; its loss has a cost term, without which nothing favours a cheap branch, and a load balance.

It serves a draft, whose quality changes the speed and not the answer; before a policy's prefix (vla/model.py) the same module
is lossy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import attend
from multimodal.config import check_choice

BRANCHES = ("prune", "pool", "conv", "resample", "text_only")  # the order of the gate's outputs
MODES = (*BRANCHES, "none", "weighted", "concat", "select")
ALIKE = ("none", "prune", "pool", "conv", "resample", "concat")  # no gate; of every image as many tokens, never 0
_MIXED = ("prune", "pool", "conv")  # of the weighted sum, all with `weighted_ratio`


@dataclass(frozen=True)
class CompressorConfig:
    """Ratios are image tokens before to after."""

    mode: str = "select"  # a branch's name, none (keep all), weighted, concat, select
    prune_ratio: float = 8.0
    prune: str = "uniform"  # uniform: evenly spaced from a start that the image's seed gives; guided: those attended to most
    pool_ratio: float = 8.0
    pool: str = "2d"  # 1d | 2d (needs a square number of tokens)
    conv_ratio: int = 3  # kernel and stride
    queries: int = 2  # of the resampler
    weighted_ratio: int = 3
    gate_size: int = 64  # hidden units of the gate
    gate_temperature: float = 1.0  # of the Gumbel softmax
    cost_weight: float = 0.05  # on the expected share of tokens kept
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        check_choice("CompressorConfig", "mode", self.mode, MODES)
        check_choice("CompressorConfig", "prune", self.prune, ("uniform", "guided"))
        check_choice("CompressorConfig", "pool", self.pool, ("1d", "2d"))
        for name in ("prune_ratio", "pool_ratio", "conv_ratio", "queries", "weighted_ratio", "gate_size"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"CompressorConfig.{name} is {getattr(self, name)}; it must be finite and at least 1.")
        for name in ("conv_ratio", "queries", "weighted_ratio", "gate_size"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"CompressorConfig.{name} is {getattr(self, name)}; it must be a whole number.")
        if not 0 < self.gate_temperature < math.inf:
            raise ValueError(f"CompressorConfig.gate_temperature is {self.gate_temperature}; it must be finite and positive.")

    @property
    def needs_gate(self) -> bool:
        return self.mode in ("weighted", "select")


KEEP_ALL = CompressorConfig(mode="none")


@dataclass(frozen=True)
class Compressed:
    """Tokens [m, width] of each image, m differing if each picked its own branch; and what the gate thought."""

    tokens: list[Tensor]
    gate: Tensor | None  # probabilities [B, branches of the mode]
    chosen: tuple[str, ...]  # branch (or mode) of each image


class VisualCompressor(nn.Module):
    """Image tokens [B, P, width] -> fewer."""

    def __init__(self, config: CompressorConfig, width: int, tokens_per_image: int) -> None:
        super().__init__()
        self.config, self.tokens_per_image = config, tokens_per_image
        used = self.branches
        pools_a_grid = "pool" in used and config.pool == "2d" and config.mode != "weighted"
        if pools_a_grid and math.isqrt(tokens_per_image) ** 2 != tokens_per_image:
            raise ValueError(f"{tokens_per_image} image tokens form no square, which pool='2d' needs; use pool='1d'.")
        stride = config.weighted_ratio if config.mode == "weighted" else config.conv_ratio
        self.conv = _SeparableConv(width, stride) if "conv" in used else None
        self.resampler = _Resampler(width, config.queries) if "resample" in used else None
        self.gate = None
        if config.needs_gate:
            self.gate = nn.Sequential(nn.Linear(2 * width, config.gate_size), nn.SiLU(), nn.Linear(config.gate_size, len(used)))
            nn.init.zeros_(self.gate[2].weight)  # every branch alike at the start
            nn.init.zeros_(self.gate[2].bias)

    @property
    def branches(self) -> tuple[str, ...]:
        """What the mode is made of."""
        mixtures = {"select": BRANCHES, "weighted": _MIXED, "concat": BRANCHES[:4], "none": ()}
        return mixtures.get(self.config.mode, (self.config.mode,))

    def num_tokens(self, branch: str) -> int:
        """Tokens of an image after a branch or mode."""
        config, count = self.config, self.tokens_per_image
        if branch == "concat":
            return sum(self.num_tokens(part) for part in self.branches)
        side = max(1, round(math.sqrt(count / config.pool_ratio)))
        return {
            "none": count,
            "prune": math.ceil(count / config.prune_ratio),
            "pool": side * side if config.pool == "2d" else math.ceil(count / config.pool_ratio),
            "conv": math.ceil(count / config.conv_ratio),
            "resample": config.queries,
            "text_only": 0,
            "weighted": math.ceil(count / config.weighted_ratio),
        }[branch]

    def forward(
        self, tokens: Tensor, question: Tensor | None = None, *, seeds: Sequence[int] | None = None,
        scores: Tensor | None = None, branch: str | None = None, generator: torch.Generator | None = None,
    ) -> Compressed:  # fmt: skip
        """tokens [B, P, width]; question [B, width], what the gate goes by (modes weighted and select).

        seeds: one per image, for uniform pruning; scores [B, P]: attention, for guided pruning. branch: use this one instead of
        the gate (training: a random one per batch). With a generator the choice is a Gumbel sample with a straight-through
        gradient, without one it is the argmax. Raises ValueError if the mode needs what is not given.
        """
        mode = self.config.mode if branch is None else branch
        seeds = [0] * len(tokens) if seeds is None else seeds
        if mode == "weighted":
            weights = self._gate(tokens, question).exp()
            ratio = self.config.weighted_ratio
            pruned = _prune(tokens, math.ceil(tokens.shape[1] / ratio), seeds, scores)
            parts = [pruned, _pool_1d(tokens, ratio), self.conv(tokens)]
            mixed = sum(weights[:, index, None, None] * part for index, part in enumerate(parts))
            return Compressed(list(mixed), weights, (mode,) * len(tokens))
        if mode != "select":
            return Compressed(list(self._branch(mode, tokens, seeds, scores)), None, (mode,) * len(tokens))
        logits = self._gate(tokens, question)
        weights = logits.exp()
        if generator is None:
            chosen = logits.argmax(1)
            passed = torch.ones_like(weights)
        else:
            uniform = torch.rand(logits.shape, generator=generator, device=generator.device).to(logits)
            noise = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
            soft = ((logits + noise) / self.config.gate_temperature).softmax(1)
            chosen = soft.argmax(1)
            passed = 1 + soft - soft.detach()  # value 1, gradient of the soft choice
        picked: list[Tensor] = []
        for row, index in enumerate(chosen.tolist()):
            own = slice(row, row + 1)
            part = self._branch(BRANCHES[index], tokens[own], seeds[own], None if scores is None else scores[own])
            picked.append(part[0] * passed[row, index].to(part.dtype))
        return Compressed(picked, weights, tuple(BRANCHES[index] for index in chosen.tolist()))

    def alike(self, tokens: Tensor, seed: int = 0) -> Tensor:
        """[B, P, width] -> [B, m, width] by a mode of `ALIKE`; uniform pruning keeps the same places of every image."""
        return self._branch(self.config.mode, tokens, [seed], None)

    def gate_loss(self, gate: Tensor) -> Tensor:
        """cost_weight * expected share of tokens kept + balance_weight * (branches * sum of squared mean probabilities - 1).

        gate [B, branches]. The second term is 0 when the batch uses all branches alike (Shazeer et al. 2017). Summed over
        nothing: a mean.
        """
        names = self.branches
        kept = gate.new_tensor([self.num_tokens(name) for name in names]) / self.tokens_per_image
        balance = len(names) * gate.mean(0).square().sum() - 1
        return self.config.cost_weight * (gate @ kept).mean() + self.config.balance_weight * balance

    def _gate(self, tokens: Tensor, question: Tensor | None) -> Tensor:
        """Log-probabilities [B, branches], finite where a probability's own logarithm would not be.

        In float32 at least: in bfloat16 one uniform draw in 500 rounds to 1, and its Gumbel noise is infinite.
        """
        if question is None:
            mode = self.config.mode
            raise ValueError(f"Compressor mode {mode!r} has a gate, which needs a question vector [B, width]; got None.")
        seen = torch.cat([F.normalize(question, dim=-1), F.normalize(tokens.mean(1), dim=-1)], dim=-1) * tokens.shape[-1] ** 0.5
        logits = self.gate(seen)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _branch(self, name: str, tokens: Tensor, seeds: Sequence[int], scores: Tensor | None) -> Tensor:
        """[B, P, width] -> [B, m, width]."""
        if name == "concat":
            return torch.cat([self._branch(part, tokens, seeds, scores) for part in self.branches], dim=1)
        if name == "none":
            return tokens
        if name == "text_only":
            return tokens[:, :0]
        if name == "prune":
            if self.config.prune == "guided" and scores is None:
                raise ValueError("Guided pruning needs attention scores [B, P]; got None.")
            return _prune(tokens, self.num_tokens(name), seeds, scores if self.config.prune == "guided" else None)
        if name == "pool":
            is_flat = self.config.pool == "1d"
            return _pool_1d(tokens, self.config.pool_ratio) if is_flat else _pool_2d(tokens, self.num_tokens(name))
        return (self.conv if name == "conv" else self.resampler)(tokens)


def _prune(tokens: Tensor, count: int, seeds: Sequence[int], scores: Tensor | None) -> Tensor:
    """Keep `count` tokens in their order: the best by score, or evenly spaced from a start in [0, 1) spacings given by the
    seed, one an image or one for all.
    """
    batch, total, width = tokens.shape
    if scores is not None:
        kept = scores.topk(count, dim=1).indices.sort(dim=1).values
    else:
        starts = torch.tensor([(seed * 0x9E3779B97F4A7C15 % 2**64) / 2**64 for seed in seeds], dtype=torch.float64)
        places = (torch.arange(count, dtype=torch.float64) + starts[:, None]) * (total / count)
        kept = places.long().clamp(max=total - 1).to(tokens.device)
    return tokens.gather(1, kept[..., None].expand(batch, count, width))


def _pool_1d(tokens: Tensor, ratio: float) -> Tensor:
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), math.ceil(tokens.shape[1] / ratio)).transpose(1, 2)


def _pool_2d(tokens: Tensor, count: int) -> Tensor:
    side, small = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(grid, small).flatten(2).transpose(1, 2)


class _SeparableConv(nn.Module):
    """Depthwise over `stride` neighbours, then pointwise; starts as mean pooling. A dense one has `stride` times the weights.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Parameter(torch.full((width, stride), 1 / stride))
        self.pointwise = nn.Linear(width, width)
        nn.init.eye_(self.pointwise.weight)
        nn.init.zeros_(self.pointwise.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, P, width] -> [B, ceil(P / stride), width]; the last window repeats the last token."""
        missing = -tokens.shape[1] % self.stride
        padded = torch.cat([tokens, tokens[:, -1:].expand(-1, missing, -1)], dim=1)
        windows = padded.unflatten(1, (-1, self.stride))  # [B, m, stride, width]
        return self.pointwise((windows * self.depthwise.T).sum(2))


class _Resampler(nn.Module):
    """Learned queries in one cross-attention over the tokens."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
        for layer in (self.key, self.value, self.output):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, P, width] -> [B, queries, width]."""
        queries = self.queries.expand(tokens.shape[0], 1, -1, -1)
        seen = attend(queries, self.key(tokens)[:, None], self.value(tokens)[:, None], None)
        return self.output(seen[:, 0])
