"""Objectives on embeddings, scores and whole sequences: retrieval, redundancy, mutual information, data quality."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.kernels.statistics import accumulation_dtype


def symmetric_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Between a student and a moving-average teacher (RMT, CVPR 2023): -1/2 sum q log p - 1/2 sum p log q. [..., K] -> [...].

    p student, q teacher; the gradient flows where the inputs ask for it."""
    log_p, log_q = _wide(logits).log_softmax(-1), _wide(teacher_logits).log_softmax(-1)
    return -0.5 * (log_q.exp() * log_p).sum(-1) - 0.5 * (log_p.exp() * log_q).sum(-1)


def mann_whitney(positive_scores: Tensor, negative_scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Smooth 1 - AUC over all pairs (arXiv 2510.00137): mean_ij softplus(-(s+_i - s-_j) / temperature). [P], [N] -> scalar.

    One threshold for all queries: pairs cross queries, which InfoNCE never compares. O(P N) memory."""
    if not positive_scores.numel() or not negative_scores.numel():
        raise ValueError(
            f"mann_whitney got {positive_scores.numel()} positive and {negative_scores.numel()} negative scores; expected one of each at least."
        )
    gap = _wide(positive_scores).reshape(-1, 1) - _wide(negative_scores).reshape(1, -1)
    return F.softplus(-gap / temperature).mean()


def barlow_twins(first: Tensor, second: Tensor, *, redundancy_weight: float = 5e-3) -> Tensor:
    """Redundancy reduction (arXiv 2103.03230): sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2. [B, D] views -> scalar.

    C is the cross-correlation of the batch-standardised embeddings; B >= 2."""
    if first.shape != second.shape or first.dim() != 2 or first.shape[0] < 2:
        raise ValueError(f"barlow_twins got {list(first.shape)} and {list(second.shape)}; expected equal shapes [B, D] with B >= 2.")

    def standardised(view: Tensor) -> Tensor:
        view = _wide(view)
        return (view - view.mean(0)) / (view.var(0, unbiased=False) + 1e-5).sqrt()

    correlation = standardised(first).T @ standardised(second) / first.shape[0]
    on_diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - on_diagonal.square().sum()
    return (1 - on_diagonal).square().sum() + redundancy_weight * off_diagonal


def mi_alpha(scores: Tensor, *, alpha: float = 0.9, independent: Tensor | None = None) -> Tensor:
    """Negative MI-alpha bound (arXiv 2109.11105, Distiller): scores [B, B], pairs on the diagonal -> scalar.

    1 + E_i log(e^{f_ii} / n_i) - E_ij (e^{f_ij} / n_i) with n_i = alpha mean_j e^{f_ij} + (1 - alpha) e^{q_i}. alpha = 1 is InfoNCE
    (at most log B); a smaller one trades that ceiling for variance. independent: log q [B], a baseline that sees one side
    only; zeros if None."""
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"mi_alpha got scores {list(scores.shape)}; expected [B, B] with the true pairs on the diagonal.")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a number in (0, 1].")
    scores = _wide(scores)
    log_mean = scores.logsumexp(1) - math.log(scores.shape[0])
    log_norm = log_mean + math.log(alpha)
    if alpha < 1:
        baseline = torch.zeros_like(log_mean) if independent is None else independent
        log_norm = torch.logaddexp(log_norm, baseline + math.log(1 - alpha))
    return -(1 + (scores.diagonal() - log_norm).mean() - (log_mean - log_norm).exp().mean())


def data_quality(sequence_nll: Tensor, reference_nll: Tensor) -> Tensor:
    """PoFT (arXiv 2412.12865): -log sigmoid(r - r_ref) of mean token log-probabilities. Mean nlls [B], [B] -> [B].

    The gradient of a sample shrinks once the model is surer of it than aligned reference models were, so samples that
    those find unlikely (noisy labels) weigh less. reference_nll takes no gradient: average it over the references beforehand."""
    return F.softplus(sequence_nll - reference_nll.detach())


def data_quality_weight(sequence_nll: Tensor, reference_nll: Tensor) -> Tensor:
    """The same as a factor of each sample's cross-entropy: sigmoid(nll - reference_nll), without gradient. [B] -> [B]."""
    return torch.sigmoid(sequence_nll - reference_nll).detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))
