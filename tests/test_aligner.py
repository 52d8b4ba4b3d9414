"""The aligner: monotonic, blind to padding, and right about which letter sounds when."""

import itertools

import numpy as np
import pytest
import torch

from omni.common.errors import BadRow
from omni.models.aligner import (
    TEXT_END,
    Aligner,
    aligner_nats,
    check_fits,
    diagonal_prior,
    likeliest_durations,
    text_symbols,
)
from omni.models.speech_architectures import AlignerArchitecture
from omni.stages.aligner import aligner_metrics, aligner_sums

KEYS = {"n_mels": 8, "aligner_d_model": 32}


def small(*, mixing: bool = False, **keys) -> Aligner:
    """An untrained aligner; ``mixing``: its layers, which begin as identities, do something."""
    torch.manual_seed(1)
    aligner = Aligner(AlignerArchitecture(**(KEYS | keys))).eval()
    if mixing:
        for parameter in aligner.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return aligner


def spelled(texts: list[str], seed: int = 0) -> tuple[dict, list[list[int]]]:
    """Every letter has a picture of its own, shown for two to five alignment_frames; and how long each was shown."""
    rng = np.random.default_rng(seed)
    pictures = np.random.default_rng(9).standard_normal((TEXT_END + 1, 8)).astype(np.float32)
    clips, durations = [], []
    for text in texts:
        symbols = text_symbols(text)
        alignment_frames = rng.integers(2, 6, len(symbols))
        alignment_frames[-1] += -alignment_frames.sum() % 4  # whole codes
        durations.append(alignment_frames.tolist())
        clips.append(torch.from_numpy(np.repeat(pictures[symbols], 2 * alignment_frames, axis=0)))
    symbols = [torch.tensor(text_symbols(text)) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "symbols": pad(symbols, batch_first=True),
        "text_lengths": torch.tensor([len(one) for one in symbols]),
        "log_mels": pad(clips, batch_first=True),
        "lengths": torch.tensor([len(clip) for clip in clips]),
    }
    return batch, durations


def test_text_symbols_are_bytes_and_an_end():
    assert text_symbols("  a \n é") == [97, 32, 0xC3, 0xA9, TEXT_END]


@pytest.mark.parametrize(
    "frame_ms, alignment_frames", [(80, 4), (40, 4), (20, 2), (10, 1), (50, 5), (120, 4), (70, 7), (100, 5)]
)
def test_slots_are_whole_mel_frames(frame_ms, alignment_frames):
    assert AlignerArchitecture(**KEYS, frame_ms=frame_ms).alignment_frames_per_code == alignment_frames


def test_padding_changes_nothing():
    aligner = small(mixing=True)
    batch, _ = spelled(["a red cat", "no"])
    L, T = int(batch["text_lengths"][1]), int(batch["lengths"][1])
    batch["lengths"][1] -= 3  # a code begun counts as a whole one, and is silent where the recording has ended
    batch["symbols"][1, L:] = 7
    batch["log_mels"][1, T - 3 :] = 100.0
    together = aligner(*batch.values())
    short = {"symbols": batch["symbols"][:, :L], "log_mels": batch["log_mels"][:, :T].clone()}
    short["log_mels"][1, T - 3 :] = -100.0
    alone = aligner(*(value[1:] for value in (batch | short).values()))
    torch.testing.assert_close(together[1, : T // 2, :L], alone[0], rtol=1e-4, atol=1e-4)
    chosen = together[1].softmax(dim=-1)
    assert chosen[:, :L].sum(dim=-1).allclose(torch.ones(len(chosen))), "nothing is left for what is no byte"


def test_a_code_begun_has_its_slots():
    assert small().alignment_frames(torch.tensor([1, 8, 9])).tolist() == [4, 4, 8]


def test_the_likeliest_way_is_the_best_of_all():
    torch.manual_seed(3)
    scores = torch.randn(2, 7, 4)
    alignment_frames, lengths = torch.tensor([7, 5]), torch.tensor([4, 3])
    found = likeliest_durations(scores, alignment_frames, lengths)
    log_probs = scores.log_softmax(dim=-1)
    for row, (S, L) in enumerate(zip(alignment_frames.tolist(), lengths.tolist(), strict=True)):

        def worth(cuts, row=row, S=S, L=L) -> float:
            edges = [0, *cuts, S]
            return sum(log_probs[row, edges[n] : edges[n + 1], n].sum().item() for n in range(L))

        best = max(itertools.combinations(range(1, S), L - 1), key=worth)
        assert found[row].tolist() == np.diff([0, *best, S]).tolist()


def test_one_letter_takes_all_and_as_many_letters_as_slots_take_one_each():
    scores = torch.randn(2, 4, 4)
    durations = likeliest_durations(scores, torch.tensor([4, 4]), torch.tensor([1, 4]))
    assert [one.tolist() for one in durations] == [[4], [1, 1, 1, 1]]


def test_it_learns_which_letter_sounds_when():
    aligner = small()
    batch, true = spelled(["third canto", "be at the gate"], seed=1000)

    def slots_off() -> float:
        with torch.no_grad():
            scores = aligner.eval()(*batch.values())
        found = likeliest_durations(scores, aligner.alignment_frames(batch["lengths"]), batch["text_lengths"])
        return np.abs(np.concatenate([np.cumsum(a) - np.cumsum(b) for a, b in zip(found, true, strict=True)])).mean()

    before = slots_off()
    optimizer, rng = torch.optim.AdamW(aligner.train().parameters(), lr=5e-3), np.random.default_rng(0)
    for step in range(120):
        texts = ["".join(rng.choice(list("abcdeghinort "), 12)) for _ in range(8)]
        learned, _ = spelled(texts, seed=step)
        nats = aligner_nats(aligner, aligner.alignment_frames(learned["lengths"]), learned)
        loss = nats.sum() / learned["text_lengths"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert slots_off() < 0.5 < before, "between where a letter ends and where it was found to end"


def test_one_text_is_aligned_as_in_a_batch():
    aligner = small()
    batch, _ = spelled(["a red cat", "no"])
    scores = aligner(*batch.values())
    together = likeliest_durations(scores.detach(), aligner.alignment_frames(batch["lengths"]), batch["text_lengths"])
    alone = aligner.align_one(text_symbols("no"), batch["log_mels"][1, : batch["lengths"][1]])
    assert alone.tolist() == together[1].tolist()


def test_a_text_that_cannot_fit_is_refused():
    check_fits([1, 2, TEXT_END], 3, 0.06)
    with pytest.raises(BadRow, match="at most 1 bytes for 0.04 s, found 2"):
        check_fits([1, 2, TEXT_END], 2, 0.04)


def test_validation_is_the_mean_over_bytes():
    aligner = small()
    batch, _ = spelled(["a red cat", "no"])
    sums = {name: value.item() for name, value in aligner_sums(aligner, batch).items()}
    nats = aligner_nats(aligner, aligner.alignment_frames(batch["lengths"]), batch)
    assert aligner_metrics(sums)["nats_per_byte"] == pytest.approx(nats.sum().item() / 13)


def test_the_prior_is_highest_on_the_diagonal():
    prior = diagonal_prior(torch.tensor([10, 5]), torch.tensor([10, 5]), 10, 10)
    assert prior[0].argmax(dim=1).tolist() == list(range(10)) and prior[1, :5].argmax(dim=1).tolist() == list(range(5))
    assert prior[0, 0, 0] == 0 and prior[0, 0, 1] == pytest.approx(-0.5), "a tenth of the whole is a standard deviation"
