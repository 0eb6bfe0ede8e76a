"""The table of action heads: five ways to turn an encoded prefix into a chunk, on one backbone."""

from collections.abc import Callable

from multimodal.losses import CrossEntropy, Objective
from vla.action_head import ActionHead, HeadConfig
from vla.action_tokenizer import ActionTokenizer
from vla.continuous_heads import FlowHead, L1Head
from vla.token_heads import AutoregressiveHead, DiscreteDiffusionHead, ParallelHead

HEADS: dict[str, Callable[[HeadConfig, ActionTokenizer, Objective], ActionHead]] = {
    "discrete_diffusion": DiscreteDiffusionHead,
    "parallel": ParallelHead,
    "autoregressive": AutoregressiveHead,
    "l1": L1Head,
    "flow": FlowHead,
}


def build_head(config: HeadConfig, tokenizer: ActionTokenizer, objective: Objective = CrossEntropy()) -> ActionHead:
    """The head of that type. The objective is read in training, by the token heads; l1 and flow have losses of their own."""
    return HEADS[config.type](config, tokenizer, objective)
