"""Low-rank adapters (Hu et al. 2021): injected by peft to train, merged by us to act."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names
DOWN, UP = ".lora_a", ".lora_b"  # ours, behind the name of the layer
LoraPair = tuple[Tensor, Tensor]  # down [rank, in], up [out, rank]


def inject(vlm: nn.Module, parts: tuple[str, ...], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze `vlm` and put an adapter beside every linear layer of its `parts`, in float32, in place.

    Each adds alpha / rank * up(down(x)); up starts at zero, so nothing changes yet. Raises ValueError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--policy.backbone.tune=lora needs peft: pip install 'peft>=0.14' (or the extra: pip install -e .[train]).") from error
    targets = [
        name
        for name, module in vlm.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in parts
    ]
    vlm.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets), vlm)
    for name, parameter in vlm.named_parameters():
        if "lora_" in name:  # peft makes them in the layer's dtype; half precision would swallow the optimiser's steps
            parameter.data = parameter.data.float()


def to_our_name(name: str) -> str:
    """A name of an injected model's state as we save it: adapters behind their layer's name, the layer's own unchanged."""
    return name.replace(_DOWN, DOWN).replace(_UP, UP).replace(".base_layer.", ".")


def split_adapters(weights: Mapping[str, Tensor]) -> tuple[dict[str, LoraPair], dict[str, Tensor]]:
    """Adapters by the weight that they change ("x.query.weight"), and the rest. Raises ValueError if one lacks its other half."""
    downs = {name.removesuffix(DOWN): value for name, value in weights.items() if name.endswith(DOWN)}
    ups = {name.removesuffix(UP): value for name, value in weights.items() if name.endswith(UP)}
    if downs.keys() != ups.keys():
        raise ValueError(f"Adapters without their other half: {sorted(downs.keys() ^ ups.keys())[:4]}. Restore the checkpoint.")
    rest = {name: value for name, value in weights.items() if not name.endswith((DOWN, UP))}
    return {f"{layer}.weight": (down, ups[layer]) for layer, down in downs.items()}, rest


def merged(weight: Tensor, pair: LoraPair, rank: int, alpha: float) -> Tensor:
    """weight [out, in] + alpha / rank * up @ down, summed in float32 and rounded once to the weight's dtype."""
    down, up = (half.float() for half in pair)
    return torch.addmm(weight.float(), up, down, alpha=alpha / rank).to(weight.dtype)
