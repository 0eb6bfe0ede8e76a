"""A vision-language model -> a folder of ONNX graphs that answers without torch, behind a gate (`vla export --vlm.path`)."""

from dataclasses import asdict, replace
from pathlib import Path

from multimodal.checkpoint import replaced_folder
from multimodal.onnx_compare import export_versions, print_graphs, write_graphs
from multimodal.onnx_folder import TOKENIZER, check_new_folder, file_hashes
from multimodal.onnx_vlm import VLMManifest, load_onnx_vlm
from multimodal.onnx_vlm_graphs import vlm_graphs
from multimodal.onnx_vlm_parity import VLMParity, measure, real_questions
from multimodal.onnx_writer import OPSET, check_packages, halved
from multimodal.vlm_folder import AskableVLM, check_answers, open_vlm


def export_vlm(source: str, output: Path, precision: str, corpus: Path | None, questions: int) -> VLMParity:
    """Write the folder if the gate passes; corpus: real questions for it, None: graphs only.

    Raises ValueError saying what failed, and then leaves what was there.
    """
    check_packages()
    check_new_folder(output)
    model = open_vlm(source)
    try:
        check_answers(model.model.config)
    except ValueError as error:
        raise ValueError(f"{source} cannot be exported: {error}") from error
    asked = [] if corpus is None else real_questions(corpus, questions, model.places)
    with replaced_folder(output) as folder:
        manifest = write_vlm(model, folder, precision)
        parity = measure(model, load_onnx_vlm(folder), asked)
        print_vlm_parity(parity)
        if parity.failures:
            raise ValueError(f"the {precision} export of {source} is not the model: {'; '.join(parity.failures)}.")
        replace(manifest, parity=parity.to_dict()).save(folder)
    return parity


def write_vlm(model: AskableVLM, folder: Path, precision: str) -> VLMManifest:
    """Graphs, tokenizer and a manifest without parity; the folder exists."""
    (folder / TOKENIZER).write_text(model.tokenizer.to_json())
    vlm = halved(model.model) if precision == "float16" else model.model
    graphs = write_graphs(vlm_graphs(vlm), folder, precision)
    manifest = VLMManifest(
        precision=precision,
        opset=OPSET,
        vocab_size=vlm.config.vocab_size + vlm.config.num_new_tokens,
        tokens_per_image=vlm.tokens_per_image,
        places=model.places,
        image_id=vlm.config.image_token_id,
        eos_ids=list(model.eos_ids),
        images=asdict(model.images),
        frame_size=model.frame_size,
        prompt=None if model.prompt is None else asdict(model.prompt),
        graphs=graphs,
        files=file_hashes(folder),
        source={"checkpoint": model.content_hash, "provenance": model.provenance},
        versions=export_versions(),
        parity={},
    )
    manifest.save(folder)
    return manifest


def print_vlm_parity(parity: VLMParity) -> None:
    """The worst output of every graph, and the answers."""
    print_graphs(parity.graphs, parity.precision)
    if parity.answers is not None:
        answers = parity.answers
        print(
            f"{answers.prompts} real questions: {answers.identical} greedy answers identical; {answers.agreeing:.2%} of "
            f"{answers.tokens} next ids are torch's"
        )
