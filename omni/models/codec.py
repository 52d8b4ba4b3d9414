"""The speech codec: log-mels to a few small integers every 80 ms, and back.

An encoder makes one latent of every ``frame_ms`` of log-mel, a residual vector quantiser (RVQ) writes each latent as
one code from each of its codebooks, and a decoder makes log-mels of the codes. The talker learns to write codes.
"""

# B clips, T mel frames, M mel channels, N = T / frames_per_code latents, C latent width, D model width
# Q codebooks, K codes in each, R latents of a batch that count

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.common.caches import require_finite
from omni.common.host import Host
from omni.common.numerics import true_float32
from omni.data.audio import MelSpec, load_speech, log_mel, mel_statistics
from omni.data.manifest import Manifest, ManifestDataset, read_some, spread
from omni.data.measure import files_digest
from omni.data.recordings import measure_samples, static_lengths
from omni.models.architectures import CodecArchitecture, SpeechFrames
from omni.models.layers import RMSNorm
from omni.stages.talker import AlignerConfig, CodecConfig, TalkerConfig
from omni.train.checkpoint import build, load_stage, saved_config
from omni.train.precompute import RaggedArray, precompute

SILENCE = -11.5  # log-mel of digital silence, see omni.data.audio
STATISTICS_CLIPS = 256
_DEAD = 0.05  # a code used less than this share of the average is moved to where there are latents


class ConvNeXtBlock(nn.Module):
    """(B, N, D) -> (B, N, D): a depthwise convolution in time, then an MLP per frame, on a residual branch.

    Liu et al. 2022, "A ConvNet for the 2020s", in one dimension as in Siuzdak 2023, "Vocos". Departures: RMSNorm for
    LayerNorm, no layer scale; the branch starts at zero instead.
    """

    def __init__(self, width: int, inner: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = RMSNorm(width)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` (B, N, 1): 1 for frames, 0 for padding, which looks like what lies beyond the ends; None: no
        padding."""
        y = x if mask is None else x * mask
        y = self.conv(y.transpose(1, 2)).transpose(1, 2)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm(y))))


class ResidualQuantizer(nn.Module):
    """Each latent as a sum of one vector from each codebook, chosen one codebook after the other: codes (..., Q).

    Zeghidour et al. 2021, "SoundStream": each codebook quantises what the ones before it leave over. The codebooks are
    no parameters but follow the latents that choose them by exponential moving averages (van den Oord et al. 2017,
    appendix A.1). A code that hardly any latent chooses is moved onto one of the batch's latents (Dhariwal et al.
    2020, "Jukebox"). In training, some clips use only the first few codebooks ("quantizer dropout" of SoundStream),
    so that k of Q codebooks are a coarser picture and not a broken one.

    Args:
        dropout: share of the clips that use fewer codebooks in training.
        decay: of the moving averages, per optimizer update.
    """

    def __init__(self, codebooks: int, codebook_size: int, width: int, dropout: float, decay: float):
        super().__init__()
        self.dropout, self.decay = dropout, decay
        self.register_buffer("codebooks", torch.randn(codebooks, codebook_size, width))  # (Q, K, C)
        self.register_buffer("counts", torch.zeros(codebooks, codebook_size))  # (Q, K) moving average of choices
        self._step: dict[str, Tensor] = {}  # what this step's micro-batches have seen; gone with a step given up

    def forward(self, latents: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            latents: (B, N, C) float32.
            mask: (B, N), true where there is a latent.

        Returns:
            The quantised latents (B, N, C), whose gradient goes to the latents as if nothing had been rounded
            (straight-through); codes (B, N, Q) int64; and the commitment loss, (), which pulls the latents to the
            vectors that they chose.
        """
        Q, K, _ = self.codebooks.shape
        B = latents.shape[0]
        used = torch.full((B,), Q, device=latents.device)
        if self.training and self.dropout:
            fewer = torch.rand(B, device=latents.device) < self.dropout
            used = torch.where(fewer, torch.randint(1, Q + 1, (B,), device=latents.device), used)
        residual, quantised = latents, torch.zeros_like(latents)
        codes, commitment = [], latents.new_zeros(())
        counts, sums, samples, drawn = [], [], [], []
        for level, codebook in enumerate(self.codebooks):
            chosen = nearest(residual.detach(), codebook)  # (B, N)
            vectors = F.embedding(chosen, codebook)  # (B, N, C)
            active = mask & (level < used)[:, None]  # (B, N)
            codes.append(chosen)
            commitment = commitment + masked_mean((residual - vectors).square(), active)
            if self.training:
                with torch.no_grad():
                    # a product with 0s and 1s, and not index_add: the same bits in every run on a GPU
                    one_hot = F.one_hot(chosen[active], K).to(residual.dtype)  # (R, K)
                    rows = residual[active]  # (R, C)
                    counts.append(one_hot.sum(dim=0))
                    sums.append(one_hot.T @ rows)
                    samples.append(_draw(rows, K))
                    drawn.append(samples[-1].new_tensor(float(len(rows) > 0)))
            vectors = vectors * active[..., None]
            residual, quantised = residual - vectors, quantised + vectors
        if self.training:
            self._collect(torch.stack(counts), torch.stack(sums), torch.stack(samples), torch.stack(drawn))
        return latents + (quantised - latents).detach(), torch.stack(codes, dim=-1), commitment

    def _collect(self, counts: Tensor, sums: Tensor, samples: Tensor, drawn: Tensor) -> None:
        if not self._step:
            self._step = {"counts": counts, "sums": sums, "samples": samples, "drawn": drawn}
        else:
            self._step["counts"] = self._step["counts"] + counts
            self._step["sums"] = self._step["sums"] + sums

    @torch.no_grad()
    def update(self, ok: Tensor, sum_over_ranks: Callable[[Tensor], Tensor], is_main: bool) -> None:
        """Move the codebooks by what the step's micro-batches have chosen, the same way in every process.

        Args:
            ok: () 1.0, or 0.0 if the step's update was not made: then nothing moves.
        """
        step, self._step = self._step, {}
        batch_counts, sums = sum_over_ranks(step["counts"]), sum_over_ranks(step["sums"])
        samples = sum_over_ranks(step["samples"] * float(is_main))  # those of the first process
        drawn = sum_over_ranks(step["drawn"] * float(is_main))  # (Q,) 0 where there were no latents to draw from
        counts = self.decay * self.counts + (1 - self.decay) * batch_counts
        weighted = self.decay * self.counts[..., None] * self.codebooks + (1 - self.decay) * sums
        average = counts.mean(dim=-1, keepdim=True)  # (Q, 1)
        dead = (counts < _DEAD * average) & (drawn > 0)[:, None]
        codebooks = torch.where(dead[..., None], samples, weighted / counts.clamp(min=1e-12)[..., None])
        counts = torch.where(dead, average, counts)  # as long as the others to find its place
        self.codebooks.copy_(torch.where(ok > 0, codebooks, self.codebooks))
        self.counts.copy_(torch.where(ok > 0, counts, self.counts))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., k) of the first k codebooks -> quantised latents (..., C)."""
        return sum(F.embedding(codes[..., level], self.codebooks[level]) for level in range(codes.shape[-1]))


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(..., C) and (K, C) -> (...) index of the closest row, in float32."""
    with true_float32(vectors.device):
        return (codebook.square().sum(dim=-1) - 2 * vectors @ codebook.T).argmin(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, N, C) over all channels of the (B, N) frames that count; 0 if there are none."""
    return (values * mask[..., None]).sum() / (mask.sum() * values.shape[-1]).clamp(min=1)


def _draw(rows: Tensor, count: int) -> Tensor:
    """``count`` of the rows (R, C), at random, with repetition; zeros if there are none."""
    if not len(rows):
        return rows.new_zeros(count, rows.shape[1])
    return rows[torch.randint(len(rows), (count,), device=rows.device)]


class Codec(nn.Module):
    """Log-mels -> codes -> log-mels.

    Frames are put together by ``frames_per_code`` and all of the network runs on the slow rate, 12.5 frames/s; a few
    layers at the mels' own rate smooth the seams in the end.

    Args:
        arch: the sizes.
    """

    def __init__(self, arch: CodecArchitecture):
        super().__init__()
        self.arch = arch
        width, inner, kernel = arch.codec_d_model, arch.codec_d_ff, arch.codec_kernel_size
        patch = arch.frames_per_code * arch.n_mels

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(ConvNeXtBlock(width, inner, kernel) for _ in range(count))

        # log-mels are normalised by these, so that errors are in units of their standard deviation
        self.register_buffer("mel_mean", torch.zeros(arch.n_mels))
        self.register_buffer("mel_std", torch.ones(arch.n_mels))
        self.patch_in = nn.Linear(patch, width)
        self.encoder = blocks(arch.codec_layers)
        self.encoder_norm = RMSNorm(width)
        self.to_latent = nn.Linear(width, arch.codec_latent)
        self.quantizer = ResidualQuantizer(
            arch.codebooks, arch.codebook_size, arch.codec_latent, arch.quantizer_dropout, arch.ema_decay
        )
        self.from_latent = nn.Linear(arch.codec_latent, width)
        self.decoder = blocks(arch.codec_layers)
        self.decoder_norm = RMSNorm(width)
        self.patch_out = nn.Linear(width, patch)
        self.smoother = nn.ModuleList(
            ConvNeXtBlock(arch.n_mels, 2 * arch.n_mels, kernel) for _ in range(arch.codec_smoother_layers)
        )

    @property
    def context(self) -> int:
        """Codes on either side that a decoded mel frame depends on."""
        half = self.arch.codec_kernel_size // 2
        smoothed = -(-half * self.arch.codec_smoother_layers // self.arch.frames_per_code)
        return half * self.arch.codec_layers + smoothed

    def forward(self, log_mels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            log_mels: (B, T, M), T a multiple of ``frames_per_code``.
            lengths: (B,) frames of each clip; what follows is ignored.

        Returns:
            Input and output, normalised, (B, T, M); codes (B, N, Q); and the commitment loss, ().
        """
        normalised = self.normalise(log_mels)
        latents, mask = self.latents(normalised, lengths)
        with torch.autocast(latents.device.type, enabled=False):
            quantised, codes, commitment = self.quantizer(latents.float(), mask)
        return normalised, self.reconstruct(quantised, mask), codes, commitment

    def normalise(self, log_mels: Tensor) -> Tensor:
        return (log_mels - self.mel_mean) / self.mel_std

    def latents(self, normalised: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M) -> latents (B, N, C), and which of them are of the clips, (B, N)."""
        per_code = self.arch.frames_per_code
        frame = torch.arange(normalised.shape[1], device=lengths.device) < lengths[:, None]  # (B, T)
        # beyond its end, a clip goes on in silence up to the next whole code
        silence = self.normalise(torch.full_like(self.mel_mean, SILENCE))
        normalised = torch.where(frame[..., None], normalised, silence.to(normalised.dtype))
        mask = frame.unflatten(1, (-1, per_code)).any(dim=-1)  # (B, N)
        x = self.patch_in(normalised.unflatten(1, (-1, per_code)).flatten(2))  # (B, N, D)
        for block in self.encoder:
            x = block(x, mask[..., None].to(x.dtype))
        return self.to_latent(self.encoder_norm(x)), mask

    def reconstruct(self, quantised: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C), of which ``mask`` (B, N) count -> normalised log-mels (B, T, M)."""
        x = self.from_latent(quantised)
        mask = None if mask is None else mask[..., None].to(x.dtype)
        for block in self.decoder:
            x = block(x, mask)
        per_code = self.arch.frames_per_code
        x = self.patch_out(self.decoder_norm(x)).unflatten(2, (per_code, -1)).flatten(1, 2)  # (B, T, M)
        mask = None if mask is None else mask.repeat_interleave(per_code, dim=1)
        for block in self.smoother:
            x = block(x, mask)
        return x

    @torch.no_grad()
    def encode(self, log_mels: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, M) log-mels of ``lengths`` (B,) frames -> codes (B, N, Q)."""
        latents, mask = self.latents(self.normalise(log_mels), lengths)
        return self.quantizer(latents.float(), mask)[1]

    @torch.no_grad()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, N, k) of the first k codebooks -> log-mels (B, T, M).

        Args:
            lengths: (B,) codes of each clip; None: N.
        """
        mask = None if lengths is None else torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
        return self.reconstruct(self.quantizer.decode(codes), mask).float() * self.mel_std + self.mel_mean

    def encode_one(self, log_mels: Tensor) -> Tensor:
        """The codes (N, Q) of one clip (T, M)."""
        T, device = len(log_mels), log_mels.device
        padded = F.pad(log_mels, (0, 0, 0, -T % self.arch.frames_per_code))
        return self.encode(padded[None], torch.tensor([T], device=device))[0]

    def resynthesise(self, log_mels: Tensor) -> Tensor:
        """What is left of log-mels (..., T, M), without padding, after coding; the same shape."""
        T = log_mels.shape[-2]
        clips = log_mels.reshape(-1, *log_mels.shape[-2:])
        coded = [self.decode(self.encode_one(clip)[None])[0, :T] for clip in clips]
        return torch.stack(coded).view(log_mels.shape)


# ---------------------------------------------------------------------------------------------------------------
# Learning and judging


def codec_loss(model: nn.Module, batch: dict, commitment_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the normalised log-mels, plus the weighted commitment loss."""
    lengths = batch["lengths"] if batch["n_targets"] else torch.zeros_like(batch["lengths"])  # a filler teaches nothing
    truth, decoded, _, commitment = model(batch["log_mels"], lengths)
    frame = torch.arange(truth.shape[1], device=truth.device) < lengths[:, None]
    mse = masked_mean((decoded.float() - truth).square(), frame)
    return mse + commitment_weight * commitment, {"mse": mse, "commitment": commitment}


def codec_sums(model: Codec, batch: dict) -> dict[str, Tensor]:
    """Sums over a batch: squared errors by the number of codebooks used, and how often each code was chosen."""
    lengths, arch = batch["lengths"], model.arch
    truth, decoded, codes, _ = model(batch["log_mels"], lengths)
    frame = torch.arange(truth.shape[1], device=truth.device) < lengths[:, None]
    code = frame.unflatten(1, (-1, arch.frames_per_code)).any(dim=-1)  # (B, N)

    def squared_error(decoded: Tensor) -> Tensor:
        return ((decoded.float() - truth).square() * frame[..., None]).sum()

    sums = {
        "values": frame.sum() * arch.n_mels,
        "squared_error": squared_error(decoded),
        "chosen": torch.stack(
            [codes[..., q][code].bincount(minlength=arch.codebook_size) for q in range(arch.codebooks)]
        ),
    }
    for k in range(1, arch.codebooks):
        sums[f"squared_error_{k}"] = squared_error(model.reconstruct(model.quantizer.decode(codes[..., :k]), code))
    return sums


def codec_metrics(totals: dict[str, Tensor]) -> dict[str, float]:
    """``reconstruction_mse`` in units of the log-mels' variance, also with the first k codebooks only; ``code_usage``,
    the share of codes ever chosen; ``codebook_perplexity``, how many equally frequent codes would be as varied."""
    chosen = totals["chosen"]  # (Q, K)
    shares = chosen / chosen.sum(dim=1, keepdim=True)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=1)  # (Q,)
    metrics = {"reconstruction_mse": float(totals["squared_error"] / totals["values"])}
    for k in range(1, len(chosen)):
        metrics[f"reconstruction_mse_{k}"] = float(totals[f"squared_error_{k}"] / totals["values"])
    metrics["code_usage"] = float((chosen > 0).double().mean())
    metrics["code_usage_least"] = float((chosen > 0).double().mean(dim=1).min())
    metrics["codebook_perplexity"] = float(entropy.exp().mean())
    return metrics


def load_codec(folder: str | Path, device: torch.device | str) -> Codec:
    """The codec that stage D left in ``folder``, in evaluation mode, its weights frozen.

    Raises:
        UserError: nothing there, or damaged.
    """
    saved = load_stage(folder, "codec", "rvq_codec", "rvq_codec.pt")
    config = saved_config(CodecConfig, saved)
    codec = build(lambda: Codec(config), saved["model"], saved["path"])
    return codec.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# Data


def mel_spec(arch: SpeechFrames) -> MelSpec:
    return MelSpec(
        sample_rate=arch.sample_rate,
        n_fft=arch.n_fft,
        win_length=arch.frame_win,
        hop_length=arch.frame_hop,
        n_mels=arch.n_mels,
        f_max=arch.sample_rate / 2,
    )


class SpeechClips(ManifestDataset):
    """Recordings as log-mels, from a manifest with the columns text and wav. A sample is a (T, M) tensor."""

    def __init__(
        self, manifest: Manifest, rows: np.ndarray, config: CodecConfig | AlignerConfig | TalkerConfig, **others
    ) -> None:
        super().__init__(manifest, rows, **others)
        self.config, self.mel = config, mel_spec(config)
        self.per_code, self.alignment_frames_per_code = config.frames_per_code, config.alignment_frames_per_code
        self.max_frames = config.max_mel_length * self.per_code

    def read(self, row: dict, rng: np.random.Generator | None) -> Tensor:
        waveform = load_speech(self.manifest.file(row["wav"]), self.mel, self.max_frames)
        return log_mel(torch.from_numpy(waveform), self.mel)

    def collate(self, samples: list[Tensor]) -> dict:
        """``log_mels`` (B, T, M), zero beyond ``lengths`` (B,); T is a multiple of ``frames_per_code``."""
        lengths = [len(sample) for sample in samples]
        n_codes = padded_codes(-(-max(lengths) // self.per_code), self.config)
        log_mels = torch.zeros(len(samples), n_codes * self.per_code, self.mel.n_mels)
        for index, sample in enumerate(samples):
            log_mels[index, : lengths[index]] = sample
        return {"log_mels": log_mels, "lengths": torch.tensor(lengths), "n_targets": sum(lengths)}


def padded_codes(longest: int, config: CodecConfig | AlignerConfig | TalkerConfig) -> int:
    """What a batch is padded to, in codes: its longest, or under ``use_compile`` the next of a few static lengths."""
    if not config.use_compile:
        return longest
    return next(length for length in static_lengths(config.max_mel_length) if length >= longest)


def count_codes(run: Host, manifest: Manifest, config: SpeechFrames) -> np.ndarray:
    """Codes in time of every recording; 0 for one that cannot be read."""
    frames = mel_spec(config).frames(measure_samples(run, manifest, config.sample_rate))
    return -(-frames // config.frames_per_code)


def leave_out_long(
    run: Host, manifest: Manifest, rows: np.ndarray, lengths: np.ndarray, max_mel_length: int
) -> np.ndarray:
    """``rows`` without recordings of more than ``max_mel_length`` codes. Unreadable ones stay: reading says why."""
    long = lengths[rows] > max_mel_length
    return manifest.leave_out(rows, long, f"longer than max_mel_length {max_mel_length}", run.log)


def prepare_mel_statistics(run: Host, clips: SpeechClips) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each mel channel over some of the training clips, kept in ``save_dir``."""
    read = partial(clips.read, rng=None)
    return mel_statistics_of(run, clips.manifest, clips.row_numbers, clips.mel, read, STATISTICS_CLIPS)


def mel_statistics_of(
    run: Host, manifest: Manifest, rows: np.ndarray, spec: MelSpec, read: Callable[[dict], Tensor], count: int
) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each mel channel over ``count`` of the ``rows``, kept in ``save_dir``.

    Args:
        read: gives the log-mels (T, M) of a row.
    """

    def read_finite(row: dict) -> Tensor:
        return require_finite(read(row), row["wav"])

    def make() -> dict[str, list[float]]:
        return mel_statistics(read_some(manifest, rows, count, read_finite, run.check_stop))

    some = spread(rows, count)
    belongs_to = {"data": manifest.sha256, "mel": asdict(spec), "clips": len(rows)}
    return run.cached_json("mel_statistics.json", belongs_to | {"files": files_digest(manifest, some, "wav")}, make)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights: codes mean nothing to another codec."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def prepare_codes(run: Host, codec: Codec, clips: SpeechClips, name: str) -> RaggedArray:
    """The codes (N, Q) uint16 of all recordings, computed once and kept in ``save_dir`` under ``name``.

    Args:
        clips: those to code, of similar length one after the other; ``training`` is false.
    """

    def make(batch: dict) -> list[np.ndarray]:
        codes = codec.encode(batch["log_mels"].to(run.device), batch["lengths"].to(run.device)).cpu().numpy()
        lengths = -(-batch["lengths"].numpy() // codec.arch.frames_per_code)
        return [one[:length].astype(np.uint16) for length, one in zip(lengths, codes, strict=True)]

    return precompute(run, f"{name}.codes", clips, "wav", {"codec": fingerprint(codec)}, make, note="coding")
