"""The language side of the model: heads, image positions, and the naive decoder against an incremental one."""

from dataclasses import replace

import pytest
import torch

from multimodal.attention import causal_mask, prefix_mask
from multimodal.config import get_preset
from multimodal.decoder import arange_positions
from multimodal.pretrained.load import load_published
from multimodal.sampling import SamplingConfig, choose
from multimodal.sequences import read
from multimodal.vlm import IMAGE, VLM, generate, image_runs
from multimodal.vocabulary import grow_vocabulary
from tests.published import IMAGE as PUBLISHED_IMAGE
from tests.published import save_model
from tests.tiny_vlm import target


def build(**changes) -> VLM:
    torch.manual_seed(0)
    return VLM(replace(get_preset("debug"), vocab_size=20, **changes)).double().eval()


def test_a_tied_head_adds_no_weights_and_an_untied_one_adds_one():
    tied, untied = build(), build(tie_embeddings=False, logit_scale=0.5)
    assert untied.state_dict().keys() - tied.state_dict().keys() == {"head.weight"}
    hidden = torch.randn(3, 32, dtype=torch.float64)
    assert torch.equal(tied.logits(hidden), hidden @ tied.text_embedding.weight.T)
    torch.testing.assert_close(untied.logits(hidden), 0.5 * hidden @ untied.head.weight.T)


def test_image_positions_stand_where_the_prompt_puts_them():
    model = build(image_token_id=5)
    per_image = model.vision.tokens_per_image
    assert model.expand_prompt([1, 2], 2) == [IMAGE] * (2 * per_image) + [1, 2]
    once = model.expand_prompt([1, 5, 2, 5], 2)
    assert once == [1, *[IMAGE] * per_image, 2, *[IMAGE] * per_image]
    assert model.expand_prompt([1, *[5] * per_image, 2, *[5] * per_image], 2) == once
    for ids, images in (([1, 5], 2), ([5, 5, 5], 1), ([1], 3)):
        with pytest.raises(ValueError, match="image"):
            model.expand_prompt(ids, images)


def test_a_prompts_embeddings_are_its_words_and_its_images():
    model = build()
    images = torch.randn(1, 2, 3, 32, 32, dtype=torch.float64)
    features = model.image_features(images[0])
    ids = [3, *[IMAGE] * features.shape[1], 4, *[IMAGE] * features.shape[1]]
    embedded = model.embed_prompt(ids, features)
    both = model.embed_images(images)[0].split(features.shape[1])
    words = model.embed_text(torch.tensor([[3, 4]]))[0]
    torch.testing.assert_close(embedded, torch.cat([words[:1], both[0], words[1:], both[1]]))
    assert torch.equal(model.embed_prompt([3, 4], None), words)


def test_image_tokens_that_stand_together_see_each_other_and_nothing_later():
    model, causal = build(image_token_id=5), build(image_token_id=5, bidirectional_images=False)
    prefix = model.expand_prompt([3, 4], 2)
    assert torch.equal(model.sequence_mask(prefix), prefix_mask(len(prefix) - 2, len(prefix)))
    assert torch.equal(causal.sequence_mask(prefix), causal_mask(len(prefix), len(prefix)))
    apart = [IMAGE, IMAGE, 3, IMAGE, IMAGE]
    expected = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(model.sequence_mask(apart), expected) and torch.equal(model.sequence_mask(apart, 3), expected[3:])
    assert image_runs(apart) == [(0, 2), (3, 5)] and image_runs([3, IMAGE]) == [(1, 2)] and image_runs([3]) == []


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0, seed=3, repetition_penalty=1.2)])
def test_naive_generation_equals_incremental_decoding(sampling):
    model = target().vlm
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prompt = model.expand_prompt([9, 8, 12], 2)
    answer = generate(model, prompt, images, sampling=sampling, max_tokens=12)
    cache, said = model.decoder.new_cache(), []
    embeddings = model.embed_prompt(prompt, model.image_features(images))[None]
    with torch.no_grad():
        while len(said) < 12:
            count, start = embeddings.shape[1], cache.length
            positions = arange_positions(1, start, count, embeddings.device)
            hidden = model.decoder(embeddings, model.sequence_mask([*prompt, *said], start), positions, cache)
            logits = model.logits(hidden[0, -1]).numpy()
            said.append(choose(logits, sampling, len(prompt) + len(said), prompt, said))
            embeddings = model.embed_text(torch.tensor([[said[-1]]]))
    assert said == answer


def test_generation_ends_at_a_stop_id_which_it_includes():
    model = target().vlm
    answer = generate(model, [9, 10], max_tokens=8)
    assert len(answer) == 8
    third = answer[2]
    assert generate(model, [9, 10], max_tokens=8, stop_ids={third}) == answer[: answer.index(third) + 1]


@torch.no_grad()
def test_a_published_model_is_read_by_the_prompt_as_by_the_batch(tmp_path):
    save_model("llava", tmp_path)
    vlm = load_published(tmp_path, dtype=torch.float64).vlm
    features = vlm.image_features(torch.randn(2, 3, 28, 28, dtype=torch.float64))
    marked = [5, *[PUBLISHED_IMAGE] * 4, 6, *[PUBLISHED_IMAGE] * 4, 7, 8]
    once = vlm.expand_prompt([5, PUBLISHED_IMAGE, 6, PUBLISHED_IMAGE, 7, 8], 2)  # it has no places to run out of
    hidden = vlm.hidden(vlm.embed_prompt(once, features)[None], [once])
    ids = torch.tensor([marked])
    torch.testing.assert_close(hidden, read(vlm, ids, torch.ones_like(ids, dtype=torch.bool), list(features)).hidden)


@pytest.mark.parametrize("name", ["qwen2_vl", "paligemma"])
def test_a_model_whose_masks_the_ids_do_not_tell_is_refused(name, tmp_path):
    save_model(name, tmp_path)
    with pytest.raises(ValueError, match="sequences.read"):
        generate(load_published(tmp_path).vlm, [5, 6])


def test_a_model_without_a_tower_talks_but_takes_no_images():
    model = build(vision=None)
    assert model.expand_prompt([3, 4], 0) == [3, 4] and len(generate(model, [3, 4], max_tokens=3)) == 3
    with pytest.raises(ValueError, match="no image tower"):
        model.expand_prompt([3, 4], 1)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_grown_rows_are_rows_of_the_head(tie_embeddings):
    model = grow_vocabulary(build(tie_embeddings=tie_embeddings), 3)
    hidden = torch.randn(2, 32, dtype=torch.float64)
    assert model.head_weight.shape == (23, 32)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.head_weight.T)
    grown = model.embed_prompt([3, 22], None)[1]
    assert torch.equal(grown, model.new_embedding.weight[2])
