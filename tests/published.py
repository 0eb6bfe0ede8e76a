"""Small random models of every family, written by transformers itself."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB, IMAGE, START, END, VIDEO = 64, 60, 61, 62, 63
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "vocab_size": VOCAB, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 14}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def _llava(kind: str, text: Any, **more: Any) -> Any:
    import transformers as t

    config_class, model_class = {
        "llava": (t.LlavaConfig, t.LlavaForConditionalGeneration),
        "llava_next": (t.LlavaNextConfig, t.LlavaNextForConditionalGeneration),
    }[kind]
    clip = t.CLIPVisionConfig(**VIT, image_size=28, projection_dim=16)
    return model_class(config_class(vision_config=clip, text_config=text, image_token_index=IMAGE, **more))


def _llama(**more: Any) -> Any:
    import transformers as t

    return t.LlamaConfig(**TEXT, **more)


def llama() -> Any:
    import transformers as t

    return t.LlamaForCausalLM(_llama(rope_scaling=dict(LLAMA3), rope_theta=500.0, attention_bias=True, mlp_bias=True))


def llama_linear() -> Any:
    import transformers as t

    return t.LlamaForCausalLM(_llama(rope_scaling={"rope_type": "linear", "factor": 4.0}, head_dim=16, tie_word_embeddings=True))


def mistral() -> Any:
    import transformers as t

    return t.MistralForCausalLM(t.MistralConfig(**TEXT, sliding_window=4, head_dim=16))


def qwen2() -> Any:
    import transformers as t

    return t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, tie_word_embeddings=True))


def qwen3() -> Any:
    import transformers as t

    return t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=16))


def gemma() -> Any:
    import transformers as t

    return t.GemmaForCausalLM(t.GemmaConfig(**TEXT, head_dim=16))


def llava() -> Any:
    return _llava("llava", _llama())


def llava_next() -> Any:
    import transformers as t

    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
    return _llava("llava_next", t.MistralConfig(**TEXT, sliding_window=None), image_grid_pinpoints=pinpoints)


def _idefics3(kind: str) -> Any:
    import transformers as t

    config_class, model_class = {
        "smolvlm": (t.SmolVLMConfig, t.SmolVLMForConditionalGeneration),
        "idefics3": (t.Idefics3Config, t.Idefics3ForConditionalGeneration),
    }[kind]
    vision = {**VIT, "image_size": 56}
    return model_class(
        config_class(vision_config=vision, text_config=_llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    )


def smolvlm() -> Any:
    return _idefics3("smolvlm")


def idefics3() -> Any:
    return _idefics3("idefics3")


def _qwen(kind: str, **vision: Any) -> Any:
    import transformers as t

    config_class, model_class = {
        "qwen2_vl": (t.Qwen2VLConfig, t.Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (t.Qwen2_5_VLConfig, t.Qwen2_5_VLForConditionalGeneration),
    }[kind]
    text = {**TEXT, "rope_theta": 10_000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    return model_class(
        config_class(
            text_config=text, vision_config={"num_heads": 2, "patch_size": 14, "depth": 2, **vision}, image_token_id=IMAGE,
            video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        )
    )  # fmt: skip


def qwen2_vl() -> Any:
    return _qwen("qwen2_vl", embed_dim=16, hidden_size=32, mlp_ratio=2)


def qwen2_5_vl() -> Any:
    return _qwen(
        "qwen2_5_vl", hidden_size=16, out_hidden_size=32, intermediate_size=24, window_size=56, fullatt_block_indexes=[1]
    )


def paligemma() -> Any:
    import transformers as t

    vision = {**VIT, "model_type": "siglip_vision_model", "image_size": 28, "vision_use_head": False}
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    config = t.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32)
    return t.PaliGemmaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    each.__name__: each
    for each in (
        llama, llama_linear, mistral, qwen2, qwen3, gemma, llava, llava_next, smolvlm, idefics3, qwen2_vl, qwen2_5_vl, paligemma,
    )
}  # fmt: skip


def save_model(name: str, folder: Path, *, sharded: bool = False, seed: int = 0) -> Any:
    """Write a random model of that family and return it, in float32, evaluating."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # norms and biases must not hide behind their ones and zeros
        noise = 0.3 if parameter.ndim == 1 else 1.5 * math.sqrt(1 / parameter.shape[-1])
        parameter.data.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder, max_shard_size="8KB" if sharded else "1GB")
    return model


def write_words(folder: Path) -> None:
    """A tokenizer of VOCAB words for a model of `save_model`: <s> leads, </s> pads, id IMAGE is an image."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", "<unk>", "ASSISTANT:", "USER:", "pick", "up", "the", "cup"]
    words += [f"word{index}" for index in range(len(words), VOCAB)]
    words[IMAGE] = "<image>"
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}')
