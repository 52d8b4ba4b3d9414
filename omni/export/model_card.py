"""model_info.json and the README.md of an export: parts, origins, metrics, and how to run it."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from omni.common.numerics import weights_sha256
from omni.data.tokenizer import Tokenizer
from omni.export.bundle import PARTS, rounded
from omni.export.folder import CONFIG, PROGRAM
from omni.export.program import LEAST_FRAMES
from omni.models.thinker import Thinker

ANSWER_TOKENS = 32  # per question, to measure --dtype bfloat16
QUESTIONS = ("What is your name?", "What is the opposite of big?", "Three red circles and two blue stars.")

OPENS_WITH = {  # a file: the classes of transformers that its folder is for, and the lines that open it
    f"thinker/{CONFIG}": (
        "AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("merged_model/thinker")\n'
        'tokenizer = AutoTokenizer.from_pretrained("merged_model/thinker")\n'
        'chat = [{"role": "user", "content": "What is your name?"}]\n'
        'how = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_tensors": "pt"}\n'
        "prompt = tokenizer.apply_chat_template(chat, return_dict=True, **how)\n"
        'answer = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ),
    f"vision_encoder/{CONFIG}": (
        "ViTModel",
        'vit = ViTModel.from_pretrained("merged_model/vision_encoder", add_pooling_layer=False)',
    ),
    f"audio_encoder/{CONFIG}": (
        "ParakeetForCTC",
        'recogniser = ParakeetForCTC.from_pretrained("merged_model/audio_encoder")',
    ),
    f"vocoder/{CONFIG}": (
        "SpeechT5HifiGan",
        'vocoder = SpeechT5HifiGan.from_pretrained("merged_model/vocoder")',
    ),
    f"vocoder/{PROGRAM}": (
        "",
        f'vocoder = torch.export.load("merged_model/vocoder/{PROGRAM}").module()  # on the CPU, in float32\n'
        f"# vocoder(log_mel): log-mels (clips, at least {LEAST_FRAMES} frames, channels) to waveforms",
    ),
}


@dataclass
class Part:
    """A trained part and its origin."""

    module: nn.Module
    sizes: dict  # for config.json
    stage: str
    file: str
    step: int
    metrics: dict[str, float]
    notes: list[str] = field(default_factory=list)
    config: dict = field(default_factory=dict)  # keys of its training
    tokenizer: Any = None  # of the Thinker, and of stage B


def describe(name: str, part: Part) -> dict:
    """A part's entry in model_info.json."""
    return {
        "purpose": PARTS[name].purpose,
        "parameters": sum(parameter.numel() for parameter in part.module.parameters()),
        "stage": part.stage,
        "source": part.file,
        "step": part.step,
        "metrics": part.metrics,
        "source_weights_sha256": weights_sha256(part.module),
        "notes": part.notes,
    }


@torch.no_grad()
def loss_of_quality(thinker: Thinker, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """The effect of rounding the Thinker's weights: logits on fixed questions and on their answers in float32.

    Both models compute in float32, as infer_chat.py does; a tool that computes in ``dtype`` differs more."""
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
    """``wer 0.1235, cer 0.04567``: the figures of the part's row that were measured."""
    wanted = [
        key
        for pattern in PARTS[name].figures
        for key in metrics
        if key == pattern or (pattern.endswith("*") and key.startswith(pattern[:-1]))
    ]
    return ", ".join(f"{key} {metrics[key]:.4g}" for key in wanted)


def model_card(info: dict, files: set[str]) -> str:
    """README.md of the folder.

    Args:
        info: model_info.json.
        files: names of its files, from the folder on.
    """
    components = info["components"]
    total = sum(facts["parameters"] for facts in components.values())
    lines = [
        "# A model of μOmni",
        "",
        f"{total:,} parameters in {info['dtype']}, all trained from scratch. This folder is all that running it needs.",
        "",
        "| part | what it does | parameters | from | on held-out data |",
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
            f"most likely token at {100 * cost['greedy_agreement']:.1f} % of all positions. Of the Thinker alone."
        )
    lines += ["", *notes] if notes else []
    lines += ["", "## Run it", "", "In μOmni's repository:", "", "```bash"]
    lines += [part.command for part in PARTS.values() if part.command and part.name in components]
    opened = [OPENS_WITH[file] for file in OPENS_WITH if file in files]
    lines += ["```", "", "## Other tools", "", "In Python:", "", "```python"]
    lines.append(f"from transformers import {', '.join(filter(None, (classes for classes, _ in opened)))}\n")
    if f"vocoder/{PROGRAM}" in files:
        lines.insert(-1, "import torch")
    lines += [line for _, line in opened]
    lines += [
        "```",
        "",
        "`preprocessor_config.json` says how log-mels and pictures are made, `model_info.json` has the SHA-256 of each "
        "file. `sanitize_control_tokens` escapes special tokens in messages, as `infer_chat.py` does, so that no "
        "text can pass for a role.",
        "",
    ]
    if f"vocoder/{PROGRAM}" in files:
        lines += [f"`torch.export.load` unpickles: open a `{PROGRAM}` only if you trust where it comes from.", ""]
    return "\n".join(lines)
