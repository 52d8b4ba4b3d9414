"""What model_info.json and the README.md of an export say of it: parts, origins, figures, and how to run it."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from omni.data.tokenizer import Tokenizer
from omni.export.bundle import PURPOSE, rounded, weights_sha256
from omni.models.thinker import Thinker

ANSWER_TOKENS = 32  # of each question that --dtype bfloat16 is judged by
QUESTIONS = ("What is your name?", "What is the opposite of big?", "Three red circles and two blue stars.")

# part -> the figures of its stage, all on held-out data, that the model card names; a name ending in * is a beginning
FIGURES = {
    "thinker": ("accuracy*", "perplexity", "bits_per_byte"),
    "audio_encoder": ("wer", "wer_unseen_voices", "cer"),
    "vision_encoder": ("top1_of_64", "zero_shot"),
    "proj_a": (),
    "proj_v": (),
    "talker": ("code_perplexity", "wer_talker", "wer_recordings"),
    "rvq": ("reconstruction_mse",),
    "vocoder": ("mel_l1", "mel_l1_griffin_lim"),
    "ocr": ("cer", "exact"),
}
RUNS = {  # what a part makes possible
    "thinker": 'python infer_chat.py --ckpt_dir merged_model --text "What is your name?"',
    "proj_v": 'python infer_chat.py --ckpt_dir merged_model --image picture.png --text "What is in the picture?"',
    "proj_a": "python infer_chat.py --ckpt_dir merged_model --audio_in question.wav",
    "talker": 'python infer_chat.py --ckpt_dir merged_model --text "What is your name?" --audio_out answer.wav',
    "ocr": "python infer_chat.py --ckpt_dir merged_model --ocr --image sign.png",
}
OPENS_WITH = {  # a sub-folder
    "thinker": (
        'model = AutoModelForCausalLM.from_pretrained("merged_model/thinker")\n'
        'tokenizer = AutoTokenizer.from_pretrained("merged_model/thinker")\n'
        'chat = [{"role": "user", "content": "What is your name?"}]\n'
        'how = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_tensors": "pt"}\n'
        "prompt = tokenizer.apply_chat_template(chat, return_dict=True, **how)\n"
        'print(tokenizer.decode(model.generate(**prompt)[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))'
    ),
    "vision_encoder": 'vit = ViTModel.from_pretrained("merged_model/vision_encoder", add_pooling_layer=False)',
    "audio_encoder": 'recogniser = ParakeetForCTC.from_pretrained("merged_model/audio_encoder")',
    "vocoder": 'vocoder = SpeechT5HifiGan.from_pretrained("merged_model/vocoder")',
}


@dataclass
class Part:
    """A trained part, and where it comes from."""

    module: nn.Module
    sizes: dict  # what config.json says of it
    stage: str
    file: str
    step: int
    metrics: dict[str, float]
    notes: list[str] = field(default_factory=list)


def describe(name: str, part: Part) -> dict:
    """A part in model_info.json."""
    return {
        "purpose": PURPOSE[name][0],
        "parameters": sum(parameter.numel() for parameter in part.module.parameters()),
        "stage": part.stage,
        "source": part.file,
        "step": part.step,
        "metrics": part.metrics,
        "source_weights_sha256": weights_sha256(part.module.state_dict()),
        "notes": part.notes,
    }


@torch.no_grad()
def loss_of_quality(thinker: Thinker, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """What rounding its weights costs the Thinker: logits on fixed questions, and on the answers that it gives in
    float32. Both compute in float32, as infer_chat.py does; a tool that computes in ``dtype``, too, adds to it."""
    coarse = copy.deepcopy(thinker)
    coarse.load_state_dict(rounded(thinker.state_dict(), dtype, exact=()))
    stop_ids, gaps, logits, agreed, same = (tokenizer.end_id, tokenizer.eos_id), [], [], [], 0
    for question in QUESTIONS:
        prompt = tokenizer.chat_prompt([{"role": "user", "content": question}])[-(thinker.architecture.ctx_len // 2) :]
        answers = [
            list(model.generate(prompt, max_new_tokens=ANSWER_TOKENS, stop_ids=stop_ids)) for model in (thinker, coarse)
        ]
        same += answers[0] == answers[1]
        fine, rough = (model(torch.tensor([prompt + answers[0]])) for model in (thinker, coarse))  # (1, T, V)
        logits.append(fine.flatten())
        gaps.append((fine - rough).abs().flatten())
        agreed.append((fine.argmax(dim=-1) == rough.argmax(dim=-1)).flatten().float())
    return {
        "questions": list(QUESTIONS),
        "logit_difference_max": float(torch.cat(gaps).max()),
        "logit_difference_mean": float(torch.cat(gaps).mean()),
        "logit_standard_deviation": float(torch.cat(logits).std()),
        "greedy_agreement": float(torch.cat(agreed).mean()),
        "same_answers": f"{same} of {len(QUESTIONS)}",
    }


def figures(name: str, metrics: dict[str, float]) -> str:
    """``wer 0.1235, cer 0.04567``: those of ``FIGURES`` that were measured."""
    wanted = [
        key
        for pattern in FIGURES[name]
        for key in metrics
        if key == pattern or (pattern.endswith("*") and key.startswith(pattern[:-1]))
    ]
    return ", ".join(f"{key} {metrics[key]:.4g}" for key in wanted)


def model_card(info: dict, subfolders: set[str]) -> str:
    """README.md of the folder.

    Args:
        info: model_info.json; subfolders: names of those for other tools.
    """
    components = info["components"]
    total = sum(facts["parameters"] for facts in components.values())
    lines = [
        "# A model of μOmni",
        "",
        f"{total:,} parameters in {info['dtype']}, all trained from scratch. This folder is all that running it needs.",
        "",
        "| part | what it does | parameters | from | measured on held-out data |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, facts in components.items():
        origin, measured = f"{facts['source']}, step {facts['step']}", figures(name, facts["metrics"])
        lines.append(f"| {name} | {facts['purpose']} | {facts['parameters']:,} | {origin} | {measured} |")
    notes = [f"- {name}: {note}." for name, facts in components.items() for note in facts["notes"]]
    if "loss_of_quality" in info:
        cost = info["loss_of_quality"]
        notes.append(
            f"- Rounding the weights to {info['dtype']} moves the Thinker's logits, whose standard deviation is "
            f"{cost['logit_standard_deviation']:.3g}, by {cost['logit_difference_mean']:.2g} on average and by "
            f"{cost['logit_difference_max']:.2g} at most. {cost['same_answers']} answers stay the same; so does the "
            f"likeliest token at {100 * cost['greedy_agreement']:.1f} % of all positions. Not measured of other parts."
        )
    lines += ["", *notes] if notes else []
    lines += ["", "## Run it", "", "In μOmni's repository:", "", "```bash"]
    lines += [line for part, line in RUNS.items() if part in components]
    lines += ["```", "", "## Other tools", "", "In Python, with `transformers`:", "", "```python"]
    lines.append(
        "from transformers import AutoModelForCausalLM, AutoTokenizer, ParakeetForCTC, SpeechT5HifiGan, ViTModel\n"
    )
    lines += [line for part, line in OPENS_WITH.items() if part in subfolders]
    lines += [
        "```",
        "",
        "`preprocessor_config.json` says how log-mels and pictures are made, `model_info.json` has the SHA-256 of each "
        "file. `sanitize_control_tokens` spells out what looks like a special token in a message, as `infer_chat.py` "
        "does: what a stranger types can then never pass for a role.",
        "",
    ]
    return "\n".join(lines)
