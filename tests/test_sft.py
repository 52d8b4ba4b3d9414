"""Stage E: attachments stand where the user put them, only answers have a loss, tasks come as their weights say."""

import itertools
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from harness import Training, differences
from stages import OMNI, write_csv
from test_config import only_error

import omni.stages.tasks
from omni.common.errors import BadRow, UserError
from omni.data.order import ResumableDataset
from omni.data.tokenizer import IGNORE_INDEX, Tokenizer
from omni.models import packing
from omni.models.aligner import text_symbols
from omni.models.answering import greedy_answers
from omni.models.ctc import CtcTokenizer
from omni.models.layers import KVCache
from omni.models.omni_architecture import OmniArchitecture
from omni.models.omni_model import OmniModel
from omni.models.ops import round_up
from omni.models.projector import Projection
from omni.stages import STAGES as TABLE
from omni.stages.omni import SftConfig
from omni.stages.omni_parts import assemble, embeddings_of, processor_of
from omni.stages.talker import Utterance
from omni.stages.tasks import TASKS
from omni.stages.tasks.base import SftTask
from omni.stages.tasks.dialogue import parse_dialogue
from omni.stages.tasks.measures import MEASURES, References, normalise_answer
from omni.stages.tasks.mixture import AnswerScore, EvalItems, TaskMixture
from omni.stages.tasks.pictures import Captions
from omni.stages.tasks.prepare import prepare_tasks
from omni.stages.tasks.processor import Encoded, Processor, speech_bytes
from omni.train import checkpoint
from omni.train.checkpoint import load_weights, save
from omni.train.optim import build_adamw
from omni.train.run import Run
from omni.train.stage import Stage, load

CPU = torch.device("cpu")
SHAPES = {"single": {}, "stacked": {"image_stack": 2, "drop_blanks": False}, "prompted": {"prompt": "one two"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    OMNI.make_data(folder)
    return folder


def small_config(folder: Path, **keys) -> SftConfig:
    keys = {"save_dir": str(folder / "run"), "max_steps": 1, "proj_d_ff": 16} | OMNI.make_data(folder) | keys
    return SftConfig.model_validate(keys)


def small_model(folder: Path, **keys) -> tuple[OmniModel, Processor, SftConfig]:
    """A tiny model whose every weight matters, in evaluation mode."""
    torch.manual_seed(0)
    config, model, tokenizer = assemble(small_config(folder, **keys))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval(), processor_of(tokenizer, model.architecture, config), config


def generate(model: OmniModel, processor: Processor, messages: list[dict], **sampling):
    """The ids of an answer, one by one."""
    stop_ids = (processor.tokenizer.end_id, processor.tokenizer.eos_id)
    embeds = model.embed_prompt(processor.collate([processor.encode(messages)]))
    return model.thinker.generate(inputs_embeds=embeds, stop_ids=stop_ids, **sampling)


def right_answers(references: References) -> set[str]:
    return {normalise_answer(answer) for answer in references.accepted}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def says(words: str) -> dict:
    return {"role": "assistant", "content": words}


def conversations(processor: Processor, folder: Path) -> list[list[dict]]:
    """Of unequal length, with attachments in several orders; the last message is always an answer."""
    image, sound = (
        (lambda i: processor.image(folder / f"{i}.png")),
        (lambda i: processor.recording(folder / f"{i}.wav")),
    )
    return [
        [user(text("red cat")), says("big")],
        [user(image(0), text("what")), says("small dog")],
        [user(sound(0)), says("one two three")],
        [user(text("near"), sound(1), image(1), image(2), text("or"), sound(2)), says("a"), user(text("b")), says("c")],
        [user(image(1), sound(1), text("green")), says("round"), user(image(0)), says("blue square runs")],
    ]


# ---------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_attachments_stand_at_their_placeholders(folder, shape):
    model, processor, config = small_model(folder, **SHAPES[shape] | {"drop_blanks": False})
    encoded = [processor.encode(messages) for messages in conversations(processor, folder)]
    batch = processor.collate(encoded)
    x, plain = model.embed(batch).embeds, model.thinker.embed_tokens(batch["tokens"])
    image_id, audio_id = (processor.tokenizer.token_id(name) for name in ("<|image|>", "<|audio|>"))
    places = (batch["tokens"] == image_id) | (batch["tokens"] == audio_id)
    assert torch.equal(x[~places], plain[~places]) and (x[places] != plain[places]).any(dim=-1).all()
    for row, sample in enumerate(encoded):
        # each attachment alone, by the encoders themselves
        for start, image in sample.images:
            patches = model.vision_encoder(image[None].float() / 127.5 - 1)[0, 1:]
            assert len(patches) == 4
            if config.image_stack == 2:
                patches = patches.view(1, -1)
            each = patches.view(len(patches), -1, model.proj_v.word_head.in_features)  # all patches of a position
            expected = model.proj_v(patches, 1 - (1 - model.proj_v.word_head(each).sigmoid()).prod(dim=1))
            torch.testing.assert_close(x[row, start : start + len(expected)], expected)
        for start, sound in sample.recordings:
            frames, lengths = model.audio_encoder.encode(sound[None], torch.tensor([len(sound)]))
            units = model.audio_encoder.ctc_head(frames[0, : int(lengths)]).softmax(dim=-1)
            expected = model.proj_a(frames[0, : int(lengths)], units)
            torch.testing.assert_close(x[row, start : start + len(expected)], expected, rtol=1e-4, atol=1e-4)
            assert len(expected) == processor.recording_positions(sound)
    assert processor.tokenizer.token_id("<|system|>") in encoded[0].ids or shape != "prompted"


@pytest.mark.parametrize("blanks", [False, True])
@torch.no_grad()
def test_of_a_recording_only_frames_stay_in_which_something_new_is_heard(folder, blanks):
    model, processor, _ = small_model(folder)
    encoded = [processor.encode(messages) for messages in conversations(processor, folder)]
    batch = processor.collate(encoded)
    encoder = model.audio_encoder
    frames, _ = encoder.encode(batch["features"], batch["lengths"])
    logits = encoder.ctc_head(frames)
    if blanks:  # half of the frames
        encoder.ctc_head.bias[-1] += (logits.amax(dim=-1) - logits[..., -1]).median()
    model.drop_blanks = False
    whole = model.embed(batch)
    model.drop_blanks = True
    short, left_out = model.embed(batch), 0
    for row, sample in enumerate(encoded):
        kept = torch.ones(len(sample.ids), dtype=torch.bool)
        for start, sound in sample.recordings:
            frames, _ = model.audio_encoder.encode(sound[None], torch.tensor([len(sound)]))
            heard = [
                model.audio_encoder.architecture.ctc_vocab_size,
                *model.audio_encoder.ctc_head(frames)[0].argmax(dim=-1).tolist(),
            ]
            for at, (before, now) in enumerate(itertools.pairwise(heard)):
                kept[start + at] = now not in (before, heard[0])
        left_out += int((~kept).sum())
        assert short.dropped[row] == (~kept).sum()
        for one, other in ((short.embeds, whole.embeds), (short.targets, whole.targets)):
            torch.testing.assert_close(one[row, : int(kept.sum())], other[row, : len(kept)][kept])
        assert (short.targets[row, int(kept.sum()) :] == IGNORE_INDEX).all()
    longest = int((batch["sizes"] - short.dropped).max())
    assert 0 < left_out < len(batch["audio_at"])
    assert short.embeds.shape[1] == min(round_up(longest), whole.embeds.shape[1])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_padding_and_company_change_nothing(folder, shape):
    model, processor, _ = small_model(folder, **SHAPES[shape])
    encoded = [processor.encode(messages) for messages in conversations(processor, folder)]
    together = model.thinker(inputs_embeds=model.embed(processor.collate(encoded)).embeds)
    for row, sample in enumerate(encoded):
        alone = model.thinker(inputs_embeds=model.embed_prompt(processor.collate([sample])))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_answers_equal_the_full_forward_and_those_of_a_batch(folder, shape):
    model, processor, _ = small_model(folder, **SHAPES[shape])
    asked = [messages[:-1] for messages in conversations(processor, folder)]
    encoded = [processor.encode(messages) for messages in asked]
    stops = (processor.tokenizer.end_id, processor.tokenizer.eos_id)
    batch = processor.collate(encoded)
    embeds, _, dropped, *_ = model.embed(batch)
    prompts = batch["prompts"] - dropped
    one_by_one = []
    for messages, sample in zip(asked, encoded, strict=True):
        cached = list(generate(model, processor, messages, max_new_tokens=6))
        x, full = model.embed_prompt(processor.collate([sample])), []
        while len(full) < 6:
            token = int(model.thinker(inputs_embeds=x)[0, -1].argmax())
            if token in stops:
                break
            full.append(token)
            x = torch.cat((x, model.thinker.embed_tokens(torch.tensor([[token]]))), dim=1)
        assert cached == full
        one_by_one.append(cached)
    assert greedy_answers(model.thinker, embeds, prompts, 6, stops) == one_by_one
    # where the context ends, too: prompts that leave less room are answered as if alone
    room = model.thinker.architecture.ctx_len
    limits = [list(generate(model, processor, messages, max_new_tokens=room)) for messages in asked]
    assert greedy_answers(model.thinker, embeds, prompts, room - 20, stops) == [a[: room - 20] for a in limits]
    assert max(map(len, one_by_one)) > 0


def test_sampling_follows_its_seed(folder):
    model, processor, _ = small_model(folder)
    messages = conversations(processor, folder)[4][:-1]
    draws = [list(generate(model, processor, messages, max_new_tokens=9, temperature=1.5, seed=s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_the_thinker_takes_a_mask_of_its_own(folder):
    model, processor, _ = small_model(folder)
    x = torch.randn(2, 5, 16)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        plain = model.thinker.hidden_states(inputs_embeds=x)
        torch.testing.assert_close(model.thinker.hidden_states(inputs_embeds=x, mask=causal), plain)
        hidden = causal.clone()
        hidden[..., 1:, 0] = False
        assert not torch.allclose(model.thinker.hidden_states(inputs_embeds=x, mask=hidden)[:, 4], plain[:, 4])
        cache = KVCache(model.thinker.architecture, 2, 5, CPU, torch.float32)
        model.thinker.hidden_states(inputs_embeds=x[:, :4], cache=cache)
        last = model.thinker.hidden_states(inputs_embeds=x[:, 4:], cache=cache, mask=causal[..., 4:, :])
        torch.testing.assert_close(last, plain[:, 4:])


# Loss ---------------------------------------------------------------------------------------------------------------


def test_only_answers_have_a_loss(folder, monkeypatch):
    model, processor, _ = small_model(folder, prompt="one")
    for messages in conversations(processor, folder):
        encoded = processor.encode(messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        learnt = [target for target in encoded.targets if target != IGNORE_INDEX]
        assert processor.tokenizer.decode(learnt) == "".join(f"{answer}<|end|>" for answer in answers)
        assert len(encoded.ids) == len(encoded.targets)
        for position, target in enumerate(encoded.targets[:-1]):
            assert target in (IGNORE_INDEX, encoded.ids[position + 1])
        prompt = processor.encode(messages[:-1])
        assert prompt.ids == encoded.ids[: encoded.prompt] and prompt.prompt == len(prompt.ids) == encoded.prompt
        assert set(prompt.targets[encoded.prompt - 1 :]) == {IGNORE_INDEX}
    batch = processor.collate([processor.encode(messages) for messages in conversations(processor, folder)])
    with torch.no_grad():
        embeds, targets, *_ = model.embed(batch)
        logits = model.thinker(inputs_embeds=embeds)
        nats, *_ = model(batch)
        monkeypatch.setattr(packing, "ROWS_TOGETHER", 2)
        torch.testing.assert_close(model(batch)[0], nats)
    counted = targets != IGNORE_INDEX
    expected = F.cross_entropy(logits[counted], targets[counted])
    torch.testing.assert_close(nats, expected)
    assert batch["n_targets"] == int(counted.sum())


def test_recordings_are_drawn_to_the_tokens_of_their_text(folder):
    """A position that is a token's embedding spells that token, and one that is <|audio|>'s spells nothing."""
    model, processor, _ = small_model(folder)
    sounds = [
        processor.recording(folder / f"{i}.wav", words) for i, words in enumerate(("cat", "dog one", "", "red " * 9))
    ]
    batch = processor.collate([processor.encode([user(sound), says("a")]) for sound in sounds])
    spoken = [processor.tokenizer.encode(words) for words in ("cat", "dog one")]
    assert batch["transcript_lengths"].tolist() == [*map(len, spoken), 0, 0], (
        "not known, and too much for its positions"
    )
    table, blank = model.thinker.embed_tokens.weight, model.audio_id
    used = sorted({blank, *spoken[0], *spoken[1]})
    with torch.no_grad():  # few channels: make the tokens that count as different as can be
        table.fill_(-1.0)
        table[used] = torch.eye(16)[: len(used)]
    positions = torch.full((4, 12), blank)
    for row, ids in enumerate(spoken):
        positions[row, : len(ids)] = torch.tensor(ids)
    fits = {key: batch[key] for key in ("n_frames", "transcript_ids", "transcript_lengths")}
    with torch.no_grad():
        spelled = model._ctc_alignment_loss(table[positions], fits)
        wrong = model._ctc_alignment_loss(table[torch.full((4, 12), blank)], fits)
    assert spelled < 1 and wrong > 5 * len(spoken)
    ctc_alignment_loss = model.train()(batch).ctc_alignment_loss
    ctc_alignment_loss.backward()
    assert ctc_alignment_loss > 0 and table.grad is None and model.proj_a.fc2.weight.grad.abs().sum() > 0


def test_before_training_what_is_heard_already_reads_like_text(folder):
    _, model, tokenizer = assemble(small_config(folder))
    units = CtcTokenizer.load(folder / "audio_enc" / "tokenizer.json").units
    frames = torch.randn(len(units) + 1, model.proj_a.norm.weight.shape[0])
    sure = torch.eye(len(units) + 1)  # each unit, and last the blank, without a doubt
    read, table = model.proj_a(frames, sure), model.thinker.embed_tokens.weight
    for row, unit in zip(read, units, strict=False):
        spellings = (unit, unit.title(), unit.strip().title())
        means = [table[tokenizer.encode(text)].mean(dim=0) for text in spellings if text]
        assert any(torch.allclose(row, mean, atol=1e-6) for mean in means), unit
    torch.testing.assert_close(read[-1], table[model.audio_id])
    unsure = model.proj_a(frames[:1], torch.full((1, len(units) + 1), 1 / (len(units) + 1)))
    torch.testing.assert_close(unsure[0], read.mean(dim=0))


def test_units_are_spelled_as_the_thinker_knows_them():
    class Words:  # a tokenizer with a token for Anna and for the, letters for all else
        def encode(self, text, allow_special):
            return {" Anna": [0], " the": [1]}.get(text, [2] * len(text.strip()) if text.strip() else [3])

    table = torch.eye(5)
    found = embeddings_of([" anna", " the", " cat", "s"], Words(), table)
    assert found.argmax(dim=1).tolist() == [0, 1, 2, 2]


def test_before_training_what_is_seen_already_reads_like_its_names(folder):
    """The patches of a position name a word of stage C's captions; the Thinker reads that word's embedding."""
    _, model, tokenizer = assemble(small_config(folder))
    words, table = Tokenizer.load(folder / "vision" / "tokenizer.json"), model.thinker.embed_tokens.weight
    torch.testing.assert_close(
        model.proj_v.word_head.weight, checkpoint.load(folder / "vision/vision.pt")["model"]["word_head.weight"]
    )
    shown = words.encode(" dog")
    word_head = model.proj_v.word_head
    with torch.no_grad():
        word_head.weight.zero_()
        word_head.bias.fill_(-100.0)
        word_head.bias[shown[0]] = 100.0
        seen = model._images({"images": torch.zeros(1, 3, *model.vision_encoder.img_size, dtype=torch.uint8)})
    expected = table[tokenizer.encode(words.decode(shown[:1]))].mean(dim=0)
    torch.testing.assert_close(seen, (expected + model.proj_v.position_embeddings).expand_as(seen))


def test_before_training_a_place_reads_like_the_words_for_it(folder):
    projection = Projection(8, 8, 6, side=3)
    left, right, top, bottom, *_ = torch.eye(6)
    projection.start_from_positions(left, right, top, bottom)
    places = 2 * projection.position_embeddings.detach().view(3, 3, 6)  # row by row
    torch.testing.assert_close(places[0, 0], top + left)
    torch.testing.assert_close(places[0, 2], top + right)
    torch.testing.assert_close(places[2, 0], bottom + left)
    torch.testing.assert_close(places[1, 1], torch.tensor([0.5, 0.5, 0.5, 0.5, 0, 0]))
    _, model, tokenizer = assemble(small_config(folder))
    table, found = model.thinker.embed_tokens.weight, model.proj_v.position_embeddings.view(2, 2, -1)
    left, right = embeddings_of([" left", " right"], tokenizer, table)
    torch.testing.assert_close(found[0, 0] - found[0, 1], (left - right) / 2)


def test_an_encoder_without_word_loss_is_projected_only(folder, tmp_path):
    saved = checkpoint.load(folder / "vision" / "vision.pt")
    saved["model"] = {name: weight for name, weight in saved["model"].items() if "word_head" not in name}
    shutil.copytree(folder / "vision", tmp_path / "vision")
    save(tmp_path / "vision" / "vision.pt", saved)
    config, model, _ = assemble(small_config(folder, vision_ckpt=str(tmp_path / "vision")))
    assert model.proj_v.word_head is None and model.proj_v.units is None and model.architecture.n_words == 0
    seen = model._images({"images": torch.zeros(1, 3, *model.vision_encoder.img_size, dtype=torch.uint8)})
    assert 0.1 < seen.square().mean() / model.thinker.embed_tokens.weight.square().mean() < 10


def spoken_answer(processor: Processor, answer: str, codes: int = 20) -> Encoded:
    """To a question in text; that it sounds like this is chance."""
    symbols = text_symbols(answer, processor.talker.text_language)
    spread = torch.randint(1, 3, (len(symbols),))
    sound = Utterance(answer, symbols, torch.randint(0, processor.talker.codebook_size, (codes, 2)), spread)
    return processor.encode_spoken([user(text("cat runs")), says(answer)], sound)


def test_the_words_of_a_number_have_the_number_s_token(folder):
    _, processor, _ = small_model(folder)
    processor.talker = processor.talker.model_copy(update={"text_language": "en"})
    encoded = spoken_answer(processor, "a 7 b")
    a, seven, b = (encoded.speech_token_index[at] for at in (0, 2, len("a seven ")))
    assert encoded.speech_token_index[2:7] == [seven] * 5 and a <= seven <= b
    assert len(encoded.speech_token_index) == len(text_symbols("a seven b"))


@pytest.mark.parametrize("answer", ["big cat", "  big   cat\n dog ", "grün ist’s – 你好!", "x"])
def test_the_talker_reads_each_byte_with_its_token(folder, answer):
    _, processor, _ = small_model(folder)
    encoded, read = spoken_answer(processor, answer), answer.encode()
    assert bytes(read[byte] for byte in speech_bytes(answer)).split() == answer.encode().split()
    assert len(encoded.speech_token_index) == len(text_symbols(answer)) and encoded.speech_token_index[-1] == -1
    found: dict[int, list[int]] = {}
    for position, symbol in zip(encoded.speech_token_index[:-1], text_symbols(answer), strict=False):
        found.setdefault(position, []).append(symbol)
    for position, symbols in found.items():
        token = processor.tokenizer._tokenizer.id_to_token(encoded.ids[position])
        assert len(symbols) <= len(token), "no more bytes than the token has"
    assert sorted(found) == list(found) and set(found) <= set(range(encoded.prompt, len(encoded.ids)))


@torch.no_grad()
def test_the_talker_hears_what_the_thinker_thinks_while_it_answers(folder):
    """At the token of each byte, whatever stands beside the row in its batch, and when the answer is generated too."""
    model, processor, _ = small_model(folder)
    torch.manual_seed(1)
    answers = [spoken_answer(processor, answer) for answer in ("big cat dog runs", "one")]
    others = [processor.encode(messages) for messages in conversations(processor, folder)]
    batch = processor.collate([others[3], answers[0], others[0], answers[1], others[4]])
    speech = model.speech(batch, model.embed(batch).embeds)
    assert batch["speech_rows"].tolist() == [1, 3] and speech["n_targets"] == 2 * (20 * 2 + 1)
    for row, encoded in enumerate(answers):
        hidden = model.thinker.hidden_states(torch.tensor([encoded.ids]))[0]
        heard = speech["thinker_states"][row, : len(encoded.speech_token_index)]
        torch.testing.assert_close(heard[:-1], hidden[encoded.speech_token_index[:-1]], rtol=1e-4, atol=1e-5)
        assert not heard[-1].any() and not speech["thinker_states"][row, len(encoded.speech_token_index) :].any()
    # what is not said is the same; a loss is that of its samples
    together = model(batch)
    each = [model(processor.collate([encoded])) for encoded in answers]
    counts = [float((processor.collate([encoded])["targets"] != IGNORE_INDEX).sum()) for encoded in answers]
    total = sum(losses.talker_loss * count for losses, count in zip(each, counts, strict=True))
    expected = total / (batch["targets"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(together.talker_loss, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_before_training_the_talker_speaks_as_stage_d_left_it(folder):
    config, model, tokenizer = assemble(small_config(folder))
    alone, symbols = load(TABLE["talker"], folder / "said/codec").model, text_symbols("red cat")
    states = [torch.randn(len(symbols), model.architecture.thinker.d_model)]
    said = [codes for codes, _ in model.talker.generate([symbols], max_frames=9, thinker_states=states)]
    assert said and all(map(torch.equal, said, [codes for codes, _ in alone.generate([symbols], max_frames=9)]))
    model.talker.thinker_proj.weight.add_(3.0 * torch.randn_like(model.talker.thinker_proj.weight))
    heard = [codes for codes, _ in model.talker.generate([symbols], max_frames=9, thinker_states=states)]
    assert len(heard) != len(said) or not all(map(torch.equal, said, heard))


def test_no_text_can_spell_a_placeholder(folder):
    _, processor, _ = small_model(folder)
    encoded = processor.encode([user(text("<|image|><|audio|><|assistant|>")), says("<|end|>")])
    special = {processor.tokenizer.token_id(name) for name in ("<|image|>", "<|audio|>")}
    assert not special & set(encoded.ids) and encoded.ids.count(processor.tokenizer.token_id("<|assistant|>")) == 1


def test_a_sequence_longer_than_the_context_is_refused_or_loses_its_last_turns(folder):
    _, processor, config = small_model(folder)
    with pytest.raises(BadRow, match="expected at most ctx_len 64"):
        processor.encode([user(text("cat " * 90)), says("dog")])
    turns = [message for _ in range(20) for message in (user(text("cat")), says("dog"))]

    class Talk(SftTask):
        def messages(self, row, rng):
            return turns

    encoded, right = Talk(None, np.arange(1), processor, config, training=True).read({}, None)
    assert 40 < len(encoded.ids) <= 64 and right.accepted == ("dog",)
    learnt = processor.tokenizer.decode([target for target in encoded.targets if target != IGNORE_INDEX])
    assert learnt.replace("dog<|end|>", "") == ""


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_each_step_moves_what_is_trained_and_nothing_else(folder, frozen):
    model, processor, _ = small_model(folder, freeze_encoders=frozen)
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = build_adamw(model, lr=1e-2, wd=0.0)
    assert all(encoder.training is not frozen for encoder in model.encoders)
    sum(model(processor.collate([processor.encode(conversations(processor, folder)[0])]))).backward()  # a text alone
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters()), "DDP waits for every gradient"
    samples = [processor.encode(messages) for messages in conversations(processor, folder)]
    sum(model(processor.collate([*samples, spoken_answer(processor, "big cat")]))).backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    encoders = set() if frozen else {"audio_encoder", "vision_encoder"}
    assert moved == {"thinker", "proj_a", "proj_v", "talker"} | encoders
    in_talker = {n for n, w in model.talker.state_dict().items() if not torch.equal(w, before[f"talker.{n}"])}
    assert in_talker == {"thinker_proj.weight"}
    assert all(name in before for name in model.state_dict())
    assert not any("ctc_head" in n and not torch.equal(w, before[n]) for n, w in model.state_dict().items())


def test_overfits_one_batch_and_then_answers_exactly(folder):
    model, processor, _ = small_model(folder)
    talks = conversations(processor, folder)[:3]
    batch = processor.collate([processor.encode(messages) for messages in talks])
    optimizer = build_adamw(model.train(), lr=1e-2, wd=0.0)
    for _ in range(150):
        loss, *_ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.eval()
    score = AnswerScore(processor, max_answer_tokens=12, tasks={})
    accepted = [("big",), ("small dog",), ("one two four",)]
    judged = batch | {"task": ("text", "sign", "sign"), "references": [References(texts) for texts in accepted]}
    judged["candidates"] = [()] * 3
    with torch.no_grad():
        metrics = score.metrics({name: value.item() for name, value in score.sums(model, judged).items()})
    assert (metrics["accuracy_text"], metrics["accuracy_sign"]) == (1, 0.5)
    assert metrics["accuracy"] == pytest.approx(3 / 4), "the mean of the tasks, not of the items"
    assert metrics["loss"] == pytest.approx(loss.item(), rel=0.5)
    # which picture is seen, and what is heard, decides
    other = [talks[1][0] | {"content": [processor.image(folder / "5.png"), text("what")]}]
    assert not torch.allclose(
        *(model.embed_prompt(processor.collate([processor.encode(m)])) for m in (other, talks[1][:1]))
    )


# ---------------------------------------------------------------------------------------------------------------
# Tasks


class FakeTask:
    """Rows that say which one they are."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, []

    def __len__(self) -> int:
        return self.count

    def sample(self, row, epoch, bad):
        self.read.append(row)
        return Encoded([row], [row]), References()


class FakeInputs:
    def collate(self, samples):
        return {"ids": [sample.ids[0] for sample in samples], "n_targets": len(samples)}


def mixed(seed: int = 3) -> TaskMixture:
    tasks = {"text": FakeTask(10), "caption": FakeTask(40), "sign": FakeTask(7)}
    return TaskMixture(tasks, {"caption": 0.5, "sign": 1.5}, FakeInputs(), seed)


def test_weights_hold_in_every_epoch_and_each_task_goes_through_its_rows():
    mix = mixed()
    assert len(mix) == 57 and mix.counts == [19, 9, 29]  # 1 : 0.5 : 1.5, in whole slots
    places = [[mix.place(slot, epoch) for slot in range(57)] for epoch in range(40)]
    for epoch in places:
        assert np.bincount([task for task, _, _ in epoch]).tolist() == mix.counts
    for task, rows in enumerate(len(task) for task in mix.tasks):
        order = [(row, passed) for epoch in places for found, row, passed in epoch if found == task]
        passes = [[row for row, passed in order if passed == number] for number in range(order[-1][1])]
        assert len(passes) > 5 and all(sorted(one) == list(range(rows)) for one in passes)
        assert passes[0] != passes[1] != passes[2]
    tiny = TaskMixture({"text": FakeTask(1000), "sign": FakeTask(5)}, {"sign": 1e-6}, FakeInputs(), 0)
    assert tiny.counts[1] == 1 and len(tiny) == sum(tiny.counts)


def test_the_order_is_pure_and_resumes_anywhere_without_reading_what_it_skips():
    def batches(skip: int, mix: TaskMixture) -> list[list[int]]:
        dataset = ResumableDataset(mix, seed=5, batch_size=4, drop_last=False)
        dataset.skip_samples = skip * 4
        return [batch["ids"] for batch in dataset]

    whole = batches(15, mixed())  # the second epoch
    assert batches(15, pickle.loads(pickle.dumps(mixed()))) == whole != batches(15, mixed(seed=4))
    for step in (1, 7, 14):
        mix = mixed()
        rest = batches(15 + step, mix)
        assert rest == whole[step:]
        assert sum(len(task.read) for task in mix.tasks) == sum(map(len, rest))


def prepared(config: SftConfig, **keys):
    with Run(config, Stage("omni", "omni", "omni_final.pt", "tokens", "loss"), [], "cpu") as run:
        run.config, model, tokenizer = assemble(config)
        processor = processor_of(tokenizer, model.architecture, run.config)
        return *prepare_tasks(run, run.config, processor), processor


def test_the_tasks_and_what_is_held_out_of_them(tmp_path):
    """Questions about pictures, spoken ones, and answers to both."""
    data = OMNI.make_data(tmp_path)
    rng, rows, spoken = random.Random(0), json.loads(Path(data["image_manifest"]).read_text()), []
    things = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("cat", "dog", "square")]
    for row in rows:
        row["caption"], other = rng.sample(things, 2)
        row["accepted_answers"] = [row["caption"], f"A {row['caption']}."]
        row["questions"] = [[f"Is there a {thing}?", "Yes." if thing == row["caption"] else "No."] for thing in things]
        rng.shuffle(row["questions"])
    Path(data["image_manifest"]).write_text(json.dumps(rows))
    asked = [f"Is there a {thing}?" for thing in things]
    known = [f"What is {i} plus one?" for i in range(20)]
    for i, words in enumerate(asked + known):
        shutil.copy(tmp_path / f"{i % 4}.wav", tmp_path / f"asked{i}.wav")
        answer = f"It is {i}." if words in known else ""
        spoken.append({"wav": f"asked{i}.wav", "text": words, "answer": answer})
    write_csv(tmp_path / "asked.csv", spoken)
    config = small_config(tmp_path, question_csv=str(tmp_path / "asked.csv"), val_split=0.3, ctx_len=300)
    tasks, val_tasks, digests, processor = prepared(config)
    assert set(tasks) == {*TASKS} - {"sign", "conversation"} and len(set(digests.values())) == 1

    def questions(task: SftTask) -> set[str]:
        return {task.manifest[int(row)]["text"] for row in task.row_numbers}

    heard, held_out = questions(tasks["spoken_question"]), questions(val_tasks["spoken_question"])
    assert heard and held_out and not heard & held_out and heard | held_out >= set(known)
    for side in (tasks, val_tasks):
        recordings = side["spoken_image_question"].recordings
        own = {row["text"] for row in spoken if row["text"] in recordings}
        assert held_out.isdisjoint(own) if side is tasks else heard.isdisjoint(own)
        for name, task in side.items():
            encoded, right = task.sample(0, 0, bad := {})
            assert bad == {} and bool(right.accepted) == (name != "caption" or side is val_tasks), name
            words = processor.tokenizer.decode(encoded.ids)
            seen, is_heard = "image" in name or name == "caption", "spoken_" in name or name == "transcription"
            is_heard = is_heard and name != "spoken_answer"
            assert bool(encoded.images) == seen == ("<|image|>" in words)
            assert bool(encoded.recordings) == is_heard == ("<|audio|>" in words)
    turns = [tasks["image_question"].sample(i, 0, {})[0].ids.count(processor.tokenizer.end_id) for i in range(8)]
    assert set(turns) == {2}, "three questions, of which the last answer's end is predicted and not read"
    encoded = tasks["spoken_image_question"].sample(0, 0, {})[0]
    first_answer = encoded.ids.index(processor.tokenizer.token_id("<|assistant|>"))
    assert encoded.ids.count(processor.tokenizer.end_id) == 2 and len(encoded.recordings) == 1, "the others are written"
    assert encoded.recordings[0][0] < first_answer
    for name in ("image_question", "spoken_image_question"):
        assert val_tasks[name].sample(0, 0, {})[0].ids.count(processor.tokenizer.end_id) == 0
    # in another epoch other questions, in the same the same
    draws = [tasks["image_question"].sample(0, epoch, {})[0].ids for epoch in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len({tuple(ids) for ids in draws}) > 1
    task = val_tasks["caption"]
    right = right_answers(task.sample(0, 0, {})[1])
    caption = task.manifest[int(task.row_numbers[0])]["caption"]
    assert right == {caption, f"a {caption}"}
    # held-out rows: all of them up to the limit, evenly spread beyond it
    items = EvalItems(val_tasks, processor, 2)
    assert len(items) == sum(min(2, len(task)) for task in val_tasks.values())
    assert len(EvalItems(val_tasks, processor, 10**6)) == sum(map(len, val_tasks.values()))
    batch = items.batch(np.arange(len(items)), 0)
    assert len(batch["references"]) == len(batch["task"]) == len(batch["tokens"])


def test_a_question_without_an_answer_is_left_out_and_counted(tmp_path, capsys):
    data = OMNI.make_data(tmp_path)
    rows = [{"wav": "0.wav", "text": "who knows", "answer": "Nobody."}, {"wav": "1.wav", "text": "why", "answer": " "}]
    write_csv(tmp_path / "asked.csv", rows)
    config = small_config(tmp_path, question_csv=str(tmp_path / "asked.csv"), val_split=0.0, task_weights={"text": 0})
    tasks, val_tasks, _, _ = prepared(config)
    assert "text" not in tasks and val_tasks == {} and data["text_path"]
    bad: dict[str, str] = {}
    assert tasks["spoken_question"].row_numbers.tolist() == [0]
    assert right_answers(tasks["spoken_question"].sample(0, 0, bad)[1]) == {"nobody"} and bad == {}
    assert "asked.csv: 1 of 2 rows have no answer: not asked by themselves" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_spoken_answer_follows_one_of_its_questions(tmp_path, ending):
    """In a CSV, several stand as a JSON list; without any, the text is asked for."""
    OMNI.make_data(tmp_path)
    listed = ["who is it", "what is it"]
    questions = ["who knows", json.dumps(listed) if ending == "csv" else listed, "", '["who"']
    rows = [{"text": f"cat {i}", "wav": "said/0.wav", "question": asked} for i, asked in enumerate(questions)]
    path = write_rows(tmp_path / f"said.{ending}", rows)
    tasks, *_ = prepared(small_config(tmp_path, speech_csv=str(path), val_split=0.0))
    task = tasks["spoken_answer"]

    def asked(row: int) -> set[str]:
        messages = [task.messages(rows[row], np.random.default_rng(seed)) for seed in range(20)]
        return {message[0]["content"][0]["text"] for message in messages}

    assert asked(0) == {"who knows"} and asked(1) == set(listed)
    assert asked(2) == {wording.format("cat 2") for wording in task.wordings}
    with pytest.raises(BadRow, match='list of texts in "question"'):
        asked(3)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """As the name's ending says."""
    if path.suffix == ".csv":
        write_csv(path, rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))
    return path


def test_the_same_rows_are_the_same_samples_in_every_format(tmp_path):
    OMNI.make_data(tmp_path)
    texts = ["Who are you?", "who knows", "who is it", "what now"]
    recordings = [{"wav": f"{i}.wav", "text": words} for i, words in enumerate(texts)]
    answered = [row | {"answer": f"It is {i}."} for i, row in enumerate(recordings)]
    pictures = [{"image": f"{i}.png", "caption": f"a cat {i}"} for i in range(4)]
    signs = [{"image": f"{i}.png", "text": f"stop {i}"} for i in range(4)]
    said = [{"text": "red cat", "wav": "said/0.wav"}, {"text": "dog", "wav": "said/1.wav"}]
    found = {}
    for ending in ("csv", "json", "jsonl"):
        files = {
            "question_csv": answered, "asr_csv": recordings, "image_manifest": pictures, "ocr_csv": signs,
            "speech_csv": said,
        }  # fmt: skip
        paths = {key: str(write_rows(tmp_path / f"{key}.{ending}", rows)) for key, rows in files.items()}
        config = small_config(tmp_path, **paths, image_root=None, val_split=0.0, save_dir=str(tmp_path / ending))
        tasks, _, _, _ = prepared(config)
        found[ending] = {name: [task.sample(i, 0, {}) for i in range(len(task))] for name, task in tasks.items()}
    assert [len(found["csv"][name]) for name in ("spoken_question", "transcription", "caption", "sign")] == [4] * 4
    assert [right_answers(right) for _, right in found["csv"]["spoken_question"]] == [{f"it is {i}"} for i in range(4)]
    for ending in ("json", "jsonl"):
        assert found[ending].keys() == found["csv"].keys()
        for name, samples in found["csv"].items():
            for (one, right), (other, other_right) in zip(samples, found[ending][name], strict=True):
                assert (one.ids, one.targets, right) == (other.ids, other.targets, other_right), name


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_an_answer_belongs_to_its_row_whatever_other_rows_have(tmp_path, ending, capsys):
    OMNI.make_data(tmp_path)
    rows = [
        {"wav": "0.wav", "text": "who knows"},
        {"wav": "1.wav", "text": "who is it", "answer": "A cat."},
        {"wav": "2.wav", "text": "why", "answer": "So."},
        {"wav": "3.wav", "text": "why", "answer": "My own."},
        {"wav": "0.wav", "text": "what now", "answer": 7},
    ]
    path = write_rows(tmp_path / f"asked.{ending}", rows)
    config = small_config(tmp_path, question_csv=str(path), val_split=0.0)
    task = prepared(config)[0]["spoken_question"]
    bad: dict[str, str] = {}
    right = [right_answers(task.sample(i, 0, bad)[1]) for i in range(3)]
    assert right == [{"a cat"}, {"so"}, {"my own"}] and bad == {}
    assert (
        task.row_numbers.tolist() == [1, 2, 3, 4] and f"{path}: 1 of 5 rows have no answer" in capsys.readouterr().out
    )
    task.sample(3, 0, bad)
    assert list(bad) == [f"{path}: row 5"]


LONG = "cat " * 70


@pytest.mark.parametrize("val_split", [0.0, 0.99])
def test_rows_that_are_too_long_are_left_out_at_the_start_in_every_task(tmp_path, capsys, val_split):
    """Of each file the first row fits and the second does not; held-out rows likewise."""
    data = OMNI.make_data(tmp_path)
    pictures = [
        {"image": f"{i}.png", "caption": LONG * i + "cat", "questions": [["what", LONG * i + "a"]]} for i in (0, 1)
    ]
    files = {
        "image_manifest": pictures,
        "asr_csv": [{"wav": f"{i}.wav", "text": LONG * i + "cat"} for i in (0, 1)],
        "question_csv": [{"wav": f"{i}.wav", "text": f"who {i}", "answer": LONG * i + "cat"} for i in (0, 1)],
        "ocr_csv": [{"image": f"{i}.png", "text": LONG * i + "cat"} for i in (0, 1)],
        "jsonl_path": [{"messages": [user(text(LONG * i + "cat")), says("dog")]} for i in (0, 1)],
    }
    keys = {key: str(write_rows(tmp_path / f"{key}.jsonl", rows)) for key, rows in files.items()}
    chat = tmp_path / "mine.txt"
    chat.write_text("".join(f"<|user|>{LONG * i}cat<|assistant|>dog {i}<|end|>\n" for i in (0, 1)))
    keys |= {f"val_{key}": path for key, path in keys.items() if key != "question_csv"}
    keys |= {"text_path": str(chat), "val_text_path": str(chat), "image_root": None, "speech_csv": None}
    config = small_config(tmp_path, **data | keys, val_split=0.0)
    tasks, val_tasks, _, _ = prepared(config)
    for side in (tasks, val_tasks):
        assert set(side) >= {"text", "caption", "image_question", "transcription", "sign", "conversation"}
        for name, task in side.items():
            assert task.row_numbers.tolist() == [0], name
            task.sample(0, 0, bad := {})
            assert bad == {}, name
    printed = capsys.readouterr().out
    for name, task in tasks.items():
        assert (
            f"task {name}: {task.manifest.path}: 1 of 2 rows left out, longer than ctx_len 64: rows 2\n" in printed
        ), name
    # measured once: a second run looks at no row
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.index-*/room-*.npy")}
    prepared(config)
    assert before and before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.index-*/room-*.npy")}


def test_lines_that_are_no_dialogues_and_dialogues_that_lose_turns(tmp_path, capsys):
    OMNI.make_data(tmp_path)
    path = tmp_path / "mine.txt"
    path.write_text(f"cat\n\n{LONG}\ndog\n")
    alone = {
        "text_path": str(path),
        "val_split": 0.0,
        "task_weights": dict.fromkeys(TASKS, 0.0) | {"text": 1.0},
    }
    tasks, _, _, _ = prepared(small_config(tmp_path, **alone))
    assert tasks["text"].row_numbers.tolist() == [0, 2]
    assert "1 of 3 rows left out, longer than ctx_len 64: rows 3\n" in capsys.readouterr().out
    turns = "<|user|>cat<|assistant|>dog<|end|>"
    path.write_text(f"{turns}\n{turns * 20}\n{turns[:8]}{LONG}{turns[8:]}{turns}\n")
    tasks, _, _, _ = prepared(small_config(tmp_path, **alone))
    printed = capsys.readouterr().out
    assert tasks["text"].row_numbers.tolist() == [0, 1] and "rows 3\n" in printed
    assert "1 of 3 rows lose their last turns" in printed
    path.write_text(f"{LONG}\n{LONG}\n")
    with pytest.raises(UserError, match=r"mine.txt \(text\): not one row fits ctx_len 64"):
        prepared(small_config(tmp_path, **alone))


def test_a_picture_is_asked_the_questions_that_fit(tmp_path):
    OMNI.make_data(tmp_path)
    pairs = [["what", LONG], *([f"who {i}", f"cat {i}"] for i in range(3)), [LONG, "dog"]]
    path = write_rows(
        tmp_path / "seen.json", [{"image": f"{i}.png", "caption": "cat", "questions": pairs} for i in range(4)]
    )
    recordings = [{"wav": f"{i}.wav", "text": question} for i, question in enumerate(("what", "who 1", "who 2"))]
    asked = write_rows(tmp_path / "asked.jsonl", recordings)
    config = small_config(
        tmp_path,
        image_manifest=str(path),
        image_root=None,
        question_csv=str(asked),
        val_split=0.0,
        questions_per_picture=1,
    )
    tasks, _, _, processor = prepared(config)
    for name, fitting in (
        ("image_question", {"cat 0", "cat 1", "cat 2"}),
        ("spoken_image_question", {"cat 1", "cat 2"}),
    ):
        bad: dict[str, str] = {}
        samples = [tasks[name].sample(row, epoch, bad) for row in range(4) for epoch in range(6)]
        assert set.union(*(right_answers(right) for _, right in samples)) == fitting and bad == {}
        assert right_answers(tasks[name].read(tasks[name].manifest[0], None)[1]) <= fitting


def test_a_wording_that_does_not_fit_gives_way_to_the_first(tmp_path, monkeypatch):
    OMNI.make_data(tmp_path)
    tasks, _, _, processor = prepared(small_config(tmp_path, val_split=0.0))
    task, room = tasks["caption"], []
    monkeypatch.setattr(Captions, "wordings", ("What?", "What do you see here?", "Describe what you see."))
    for prompt in Captions.wordings:
        messages = [user({"type": "image"}, text(prompt)), says("")]
        room.append(next(n for n in range(1, 64) if not processor.fits([messages[0], says("a" * n)], None)) - 1)
    assert room[0] > max(room[1:])
    row = {"image": "0.png", "caption": "a" * room[0]}
    for seed in range(9):
        encoded, _ = task.read(row, np.random.default_rng(seed))
        assert len(encoded.ids) == processor.ctx_len


NEW_TASK = '''
from omni.stages.tasks.base import SftTask, one_of, sft_task, turn
from omni.stages.tasks.measures import Points, answer_measure

@answer_measure("always a quarter")
def quarter(answer, accepted):
    return Points(0.25)

@sft_task
class Translations(SftTask):
    """Sentences to translate."""

    name, file_key, columns, split_by = "translation", "translation_csv", ("english", "german"), "english"
    wordings, measure = ("Translate: {}", "In German: {}"), "quarter"

    def messages(self, row, rng):
        return turn(row["german"], one_of(self.wordings, rng).format(row["english"]))
'''


def test_a_new_task_is_one_new_file(tmp_path, monkeypatch):
    """Its file is a key of task_files; its weight, rows, held-out rows and metric are those of every task."""
    data = OMNI.make_data(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "translation.py").write_text(NEW_TASK)
    monkeypatch.setattr(omni.stages.tasks, "__path__", [*omni.stages.tasks.__path__, str(tmp_path / "tasks")])
    write_csv(tmp_path / "german.csv", [{"english": f"cat {i}", "german": f"Katze {i}"} for i in range(40)])
    keys = {"task_files": {"translation_csv": str(tmp_path / "german.csv")}, "task_weights": {"translation": 3.0}}
    with pytest.raises(ValueError, match='"task_files": .* found "translation_csv"'):
        small_config(tmp_path, **keys)
    before = dict(TASKS)
    try:
        omni.stages.tasks.import_tasks()
        tasks, val_tasks, _, processor = prepared(small_config(tmp_path, **keys, val_split=0.3))
        assert list(tasks)[-1] == "translation" and len(tasks["translation"]) + len(val_tasks["translation"]) == 40
        encoded, right = val_tasks["translation"].sample(0, 0, {})
        assert "Translate: cat" in processor.tokenizer.decode(encoded.ids) and right.accepted[0].startswith("Katze")
        assert right.measures == ("quarter",) and MEASURES["quarter"].points("x", ["y"]).score == 0.25 and data
    finally:
        TASKS.clear()
        TASKS.update(before)
        MEASURES.pop("quarter", None)


def test_the_model_is_built_from_its_architecture_alone(folder):
    model, _, _ = small_model(folder)
    again = OmniModel(OmniArchitecture.model_validate(model.architecture.model_dump()))
    assert {n: w.shape for n, w in again.state_dict().items()} == {n: w.shape for n, w in model.state_dict().items()}
    assert set(OmniModel(OmniArchitecture(thinker=model.architecture.thinker)).state_dict()) < set(model.state_dict())
    with pytest.raises(ValueError, match="image_stack"):
        OmniArchitecture.model_validate(model.architecture.model_dump() | {"image_stack": 3})


def test_signs_and_conversations(tmp_path):
    OMNI.make_data(tmp_path)
    write_csv(tmp_path / "ocr.csv", [{"image": "3.png", "text": "  STOP  here"}])
    talk = [user(text("hear"), {"type": "audio", "audio": "0.wav"}, {"type": "image", "image": "1.png"}), says("Yes.")]
    bad = [
        ([], "expected a list of objects"),
        ([user(text("a"))], "assistant's answer as the last"),
        ([{"role": "robot", "content": "a"}, says("b")], "expected the roles"),
        ([user({"type": "video", "video": "x"}), says("b")], "text, image or audio"),
        ([user({"type": "image", "image": "nowhere.png"}), says("b")], "found none at"),
        ([user({"type": "image", "image": "../1.png"}), says("b")], "leaves the folder"),
        ([user({"type": "audio", "audio": 7}), says("b")], "file name"),
        ([user({"type": "image"}), says("b")], "file name"),
        ([user(), says("b")], "expected text"),
        ([user(text("a")), says("")], "expected text"),
    ]
    lines = [{"messages": messages} for messages in (talk, *(messages for messages, _ in bad))]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"ocr_csv": str(tmp_path / "ocr.csv"), "jsonl_path": str(tmp_path / "talk.jsonl")}
    tasks, _, _, processor = prepared(small_config(tmp_path, val_split=0.0, **files))
    encoded, right = tasks["sign"].sample(0, 0, {})
    assert right_answers(right) == {"stop here"} and len(encoded.images) == 1
    encoded, right = tasks["conversation"].sample(0, 0, {})
    assert right_answers(right) == {"yes"} and encoded.recordings[0][0] < encoded.images[0][0]
    for row, (_, why) in enumerate(bad, start=1):
        with pytest.raises(BadRow, match=why):
            tasks["conversation"].read(tasks["conversation"].manifest[row], None)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("<|user|>a<|assistant|>b", "an answer and"),
        ("<|user|>a<|assistant|><|end|>", "an answer and"),
        ("<|user|>a", "expected <|user|>"),
        ("hello <|user|>a<|assistant|>b<|end|>", "expected <|user|>"),
        ("<|user|>a<|assistant|>b<|end|>c", "expected a role"),
    ],
)
def test_damaged_dialogues_are_named(line, why):
    with pytest.raises(BadRow, match=why):
        parse_dialogue(line)


def test_dialogues_and_plain_lines_of_a_text_file(tmp_path):
    OMNI.make_data(tmp_path)
    path = tmp_path / "mine.txt"
    lines = ["plain text", "", "<|system|>s<|user|>cat<|assistant|>dog<|end|>", "<|user|>one<|assistant|>two", "more"]
    path.write_text("\r\n".join(lines))
    config = small_config(tmp_path, text_path=str(path), val_split=0.0, cache_dir=str(tmp_path / "cache"))
    tasks, _, digests, processor = prepared(config)
    assert len(tasks["text"]) == 2
    found = [right_answers(tasks["text"].sample(i, 0, bad := {})[1]) for i in range(2)]
    assert found == [{"dog"}] * 2 and list(bad) == [f"{path}: row 4"]
    assert pickle.loads(pickle.dumps(tasks["text"].manifest))[0] == {"text": lines[2]}
    # a file without dialogues is learnt as text, and not judged
    path.write_text("plain text\nmore\n")
    tasks, _, changed, processor = prepared(config)
    encoded, right = tasks["text"].sample(1, 0, {})
    assert right == References() and changed["train"] != digests["train"]
    assert processor.tokenizer.decode(encoded.targets) == "more<|endoftext|>"
    path.write_text("\n")
    with pytest.raises(UserError, match="mine.txt: expected lines of text"):
        prepared(config)


def test_recordings_longer_than_the_encoder_knows_are_left_out(tmp_path, capsys):
    OMNI.make_data(tmp_path)
    soundfile.write(tmp_path / "0.wav", np.zeros(21 * 16_000), 16_000)
    tasks, _, _, _ = prepared(small_config(tmp_path, val_split=0.0))
    assert len(tasks["transcription"]) == 3
    assert "asr.csv: 1 of 4 rows left out, longer than 2048 mel frames" in capsys.readouterr().out


def test_texts_too_long_for_the_alignment_loss_are_learnt_without_it_and_counted(tmp_path, capsys):
    OMNI.make_data(tmp_path)
    soundfile.write(tmp_path / "0.wav", np.zeros(8000), 16_000)  # half a second
    rows = [{"wav": "0.wav", "text": "HE IS IN THE RED HOUSE"}, {"wav": "0.wav", "text": "cat"}]
    write_csv(tmp_path / "loud.csv", rows)
    keys = {"val_split": 0.0, "ctx_len": 128, "speech_csv": None}
    tasks, _, _, processor = prepared(small_config(tmp_path, asr_csv=str(tmp_path / "loud.csv"), **keys))
    (long, _), (short, _) = (tasks["transcription"].sample(row, 0, {}) for row in (0, 1))
    assert long.transcript_ids == [[]] and short.transcript_ids == [processor.tokenizer.encode("cat")]
    found = capsys.readouterr().out
    assert "loud.csv: 1 of 2 texts have more tokens than their recording has positions" in found


# ---------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Training:
    folder = tmp_path_factory.mktemp("trained")
    training = OMNI.training(folder, max_steps=8, val_asr_csv=OMNI.make_data(folder)["asr_csv"])
    training.finish()
    return training


def test_the_final_file_needs_no_other_folder(trained, tmp_path):
    for name in ("omni_final.pt", "tokenizer.json"):
        shutil.copy(trained.save_dir / name, tmp_path / name)
    for name in ("thinker", "audio_enc", "vision", "said"):  # gone while it is loaded
        (trained.folder / name).rename(trained.folder / f"{name} elsewhere")
    try:
        opened = load(TABLE["omni"], tmp_path)
    finally:
        for name in ("thinker", "audio_enc", "vision", "said"):
            (trained.folder / f"{name} elsewhere").rename(trained.folder / name)
    model, config = opened.model, opened.config_as(SftConfig, cache_features=False)
    final = trained.final_file()
    assert final["stage"] == "omni" and differences(model.state_dict(), final["model"]) == []
    assert {key.split(".")[0] for key in final["model"]} == {
        "thinker", "audio_encoder", "vision_encoder", "proj_a", "proj_v", "talker"
    }  # fmt: skip
    assert (
        set(model.architecture.parts) == {"thinker", "audio_encoder", "vision_encoder", "talker"} and not model.training
    )
    # the encoders are those of their stages
    _, begun, _ = assemble(small_config(trained.folder))
    for name in ("audio_encoder", "vision_encoder"):
        assert differences(getattr(model, name).state_dict(), getattr(begun, name).state_dict()) == []
    processor = processor_of(opened.tokenizer, model.architecture, config)
    messages = [
        user(processor.image(trained.folder / "0.png"), processor.recording(trained.folder / "0.wav"), text("what?"))
    ]
    answer = list(generate(model, processor, messages, max_new_tokens=5))
    load_weights(begun, final["model"], tmp_path)
    assert list(generate(begun.eval(), processor, messages, max_new_tokens=5)) == answer
    shutil.copy(trained.step_path(trained.steps()[-1]), tmp_path)
    (tmp_path / "omni_final.pt").unlink()  # while it still trains
    assert load(TABLE["omni"], tmp_path).model.architecture == model.architecture


def test_accuracy_is_reported_for_each_task(trained):
    metrics = trained.final_file()["metrics"]
    tasks = {name.removeprefix("accuracy_") for name in metrics if name.startswith("accuracy_")}
    assert tasks == {"text", "caption", "transcription", "spoken_answer"}
    assert 0 <= metrics["accuracy"] <= 1 and metrics["loss"] > 0
    assert metrics["code_perplexity"] > 1 and metrics["code_perplexity_of_text"] > 1
    assert "task caption: " in (trained.save_dir / "training.log").read_text()


def test_another_tokenizer_beside_the_final_file_is_refused(trained, tmp_path):
    shutil.copy(trained.save_dir / "omni_final.pt", tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.json"):
        load(TABLE["omni"], tmp_path)
    with pytest.raises(UserError, match="expected omni_final.pt or omni_step_"):
        load(TABLE["omni"], trained.folder / "thinker")


def test_another_base_model_in_the_same_save_dir_is_refused(trained, tmp_path):
    other = OMNI.training(tmp_path)
    other.config |= {"save_dir": str(trained.save_dir), "max_steps": 12}
    files = ("text_path", "image_manifest", "image_root", "asr_csv", "val_asr_csv")
    other.config |= {key: trained.config[key] for key in files}
    path = tmp_path / "vision" / "vision.pt"
    payload = torch.load(path, weights_only=True)
    payload["model"]["vit.cls_token"] += 1
    from omni.train import checkpoint

    checkpoint.save(path, payload)
    only_error(other.run(), "data (vision_encoder)", "new save_dir")


def test_absent_and_mismatched_checkpoints_are_one_clear_error(tmp_path):
    training = OMNI.training(tmp_path, max_steps=1)
    for key, file in (
        ("thinker_ckpt", "thinker.pt"),
        ("audio_ckpt", "audio_enc.pt"),
        ("vision_ckpt", "vision.pt"),
        ("talker_ckpt", "talker.pt"),
    ):
        process = training.changed(**{key: str(tmp_path / "nowhere")}).run()
        only_error(process, f'"{key}"', f"a folder with {file}", "nowhere", "Train stage")
        assert not training.save_dir.exists()
    only_error(training.changed(vision_ckpt=None).run(), '"vision_ckpt"', "stage C", "image_manifest")
    only_error(training.changed(image_stack=3).run(), "vision", "2 x 2 patches", '"image_stack"')
    only_error(training.changed(sft_mix={"txt_path": "x"}).run(), 'unknown key "txt_path"', '"text_path"')
    only_error(training.changed(task_weights={"sing": 1}).run(), '"task_weights"', '"sing"', "transcription, ")
    only_error(training.changed(task_weights=dict.fromkeys(TASKS, 0.0)).run(), "no row to train on")
    wrong, vision = tmp_path / "wrong", tmp_path / "vision" / "vision.pt"
    wrong.mkdir()
    shutil.copy(tmp_path / "audio_enc" / "audio_enc.pt", wrong / "vision.pt")
    only_error(training.changed(vision_ckpt=str(wrong)).run(), "vision.pt", "stage vision, found audio_enc")
    (wrong / "vision.pt").write_bytes(vision.read_bytes()[:-7])
    only_error(training.changed(vision_ckpt=str(wrong)).run(), "vision.pt", "checksum")


def test_the_mix_as_an_object_and_a_mix_of_text_alone(tmp_path):
    training = OMNI.training(tmp_path, max_steps=2)
    files = ("text_path", "image_manifest", "image_root", "asr_csv", "speech_csv")
    mix = {key: training.config.pop(key) for key in files}
    training.config["sft_mix"] = {"text_path": mix["text_path"]}
    for key in ("audio_ckpt", "vision_ckpt"):
        del training.config[key]
    training.config["task_weights"] = {"sign": 1.0}
    assert "no file of the mix has rows for the task sign" in training.finish().stdout
    assert {key.split(".")[0] for key in training.final_file()["model"]} == {"thinker"}
    opened = load(TABLE["omni"], training.save_dir)
    model, processor = opened.model, Processor(opened.tokenizer, opened.architecture)
    for attach, file in ((processor.image, "0.png"), (processor.recording, "0.wav")):
        with pytest.raises(BadRow, match="has no"):
            attach(tmp_path / file)
    assert list(generate(model, processor, [user(text("cat"))], max_new_tokens=3)) is not None


def test_a_mix_that_cannot_be_read_leaves_no_tokenizer_behind(tmp_path):
    """Or a later try with another Thinker would be told to use a new folder."""
    (tmp_path / "empty.json").write_text("[]")
    training = OMNI.training(tmp_path, image_manifest=str(tmp_path / "empty.json"))
    assert training.run().returncode == 2
    assert not (training.save_dir / "tokenizer.json").exists()
