"""Pictures with captions: the rows of stage C, its retrieval metrics, and zero-shot classification."""

# B pictures and as many captions, T tokens of a caption, E width of the common space

import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resized_crop

from omni.common.errors import BadRow, UserError
from omni.common.files import file_sha256, parse_json, read_text
from omni.common.media import quoted
from omni.common.text import visible
from omni.data.images import load_image, normalise
from omni.data.manifest import Manifest, ManifestDataset
from omni.data.measure import measure_rows
from omni.data.tokenizer import Tokenizer
from omni.models.picture_text import PictureTextModel, contrastive_loss, similarities
from omni.stages.vision import VisionConfig
from omni.train.run import Run

GROUP = 64  # candidate captions of a picture
PROMPTS = 512  # captions that are embedded at a time
OPEN_GROUPS = 64  # groups filled at a time: many equal captions must not make this quadratic
CLASSES_SUFFIX = ".classes.json"
MAX_SHIFT = 1 / 32  # of the picture's side, either way
MAX_BRIGHTER = 0.1
LOADED = 4 / 3  # side of a picture that is cropped, over that of the crop
OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}
SIDES = re.compile(r"(\b)(left|right|Left|Right|LEFT|RIGHT)((?:most)?\b)")  # not "upright", not "rights"

# ---------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Classes:
    """The candidates of zero-shot classification: captions with their classes of one or more attributes.

    They are a JSON list beside the manifest, ``pictures.classes.json`` for ``pictures.json``:

        [{"caption": "one red circle", "colour": "red", "shape": "circle"}, ...]

    A row of the manifest has the label of an attribute if it has a column of that name: ``"colour": "red"``.
    """

    captions: list[str]
    names: dict[str, list[str]]  # attribute -> classes, in the order in which they first appear
    labels: dict[str, Tensor]  # attribute -> (captions,) class of each caption, -1: none
    sha256: str  # of the file

    @classmethod
    def beside(cls, manifest: str | Path) -> Self | None:
        """The classes of a manifest; None if there is no such file.

        Raises:
            UserError: the file is damaged or has another form.
        """
        path = Path(manifest).with_suffix(CLASSES_SUFFIX)
        return cls.read(path) if path.exists() else None

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            rows = parse_json(read_text(path, "list of classes"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{path}: expected a JSON list of captions with their classes")
        names: dict[str, dict[str, int]] = {}
        for number, row in enumerate(rows, 1):
            attributes = {name: v for name, v in row.items() if name != "caption"} if isinstance(row, dict) else {}
            valid = all(isinstance(value, str | int) for value in attributes.values())
            if not attributes or not valid or not isinstance(row.get("caption"), str):
                found = quoted(json.dumps(row))
                raise UserError(f'{path}: entry {number}: expected a "caption" and its classes, found {found}')
            for name, value in attributes.items():
                names.setdefault(name, {}).setdefault(str(value), len(names[name]) if name in names else 0)
        labels = {
            name: torch.tensor([classes.get(str(row.get(name)), -1) for row in rows]) for name, classes in names.items()
        }
        classes = {name: list(classes) for name, classes in names.items()}
        return cls([row["caption"] for row in rows], classes, labels, file_sha256(path))

    def of_row(self, row: dict) -> list[int]:
        """The class of each attribute, -1 where the row has none."""
        values = {name: str(row.get(name)) for name in self.names}
        return [names.index(values[name]) if values[name] in names else -1 for name, names in self.names.items()]


class CaptionRows(ManifestDataset):
    """Rows with ``image``, ``caption`` and optional classes as samples.

    Args:
        tokenizer, config: how captions and pictures are encoded. Under ``use_compile`` every caption is padded to
            ``ctx_len``, so that shapes never change.
        classes: labels of the rows.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        tokenizer: Tokenizer,
        config: VisionConfig,
        *,
        training: bool,
        classes: Classes | None = None,
    ) -> None:
        super().__init__(manifest, rows, seed=config.seed, training=training)
        self.tokenizer, self.config, self.classes = tokenizer, config, classes

    def read(self, row: dict, rng: np.random.Generator | None) -> dict:
        size, caption = self.config.img_size, row["caption"]
        crops = rng is not None and self.config.crop_scale < 1
        loaded = round(size * LOADED) if crops else size  # more pixels, since the crop is enlarged
        image = load_image(self.manifest.file(row, "image", self.config.image_root), loaded, loaded)
        if crops:
            image = random_crop(image, size, self.config.crop_scale, rng)
        if rng is not None and self.config.mirror and rng.random() < 0.5:
            image, caption = image.flip(-1), exchange_sides(caption)
        if rng is not None and self.config.augment:
            image = augment(image, rng)
        return {
            "image": image,
            "ids": encode_caption(self.tokenizer, caption, self.config.ctx_len),
            "same": (zlib.crc32(row["image"].encode()), zlib.crc32(visible(row["caption"]).encode())),
            "labels": self.classes.of_row(row) if self.classes else [],
        }

    def collate(self, samples: list[dict]) -> dict:
        """``images`` (B, 3, H, W) uint8; ``tokens`` (B, T) and ``ends`` (B,), see ``pad_captions``; ``same`` (B, B)
        bool, pairs with an equal picture or caption; ``labels`` (B, attributes), see ``Classes``."""
        tokens, ends = pad_captions(
            [sample["ids"] for sample in samples], self.config.ctx_len if self.config.use_compile else None
        )
        keys = torch.tensor([sample["same"] for sample in samples])  # (B, 2)
        return {
            "images": torch.stack([sample["image"] for sample in samples]),
            "tokens": tokens,
            "ends": ends,
            "same": (keys[:, None] == keys[None]).any(dim=-1),
            "labels": torch.tensor([sample["labels"] for sample in samples], dtype=torch.int64),
            "n_targets": len(samples),
        }


def encode_caption(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[int]:
    """Token ids of a caption and the end-of-text token, cut to ``max_tokens`` in all."""
    return tokenizer.encode(visible(text), allow_special=False)[: max_tokens - 1] + [tokenizer.eos_id]


def report_cut_captions(run: Run, manifest: Manifest, rows: np.ndarray, tokenizer: Tokenizer, ctx_len: int) -> None:
    """Log how many captions ``encode_caption`` cuts, and the longest. Measured once, cached beside the index."""

    def tokens_if_cut(manifest: Manifest, row: int) -> int:
        text = visible(manifest[row]["caption"])
        if len(text.encode()) < ctx_len:  # a token has at least a byte
            return 0
        tokens = len(tokenizer.encode(text, allow_special=False)) + 1
        return tokens if tokens > ctx_len else 0

    name = f"cut-{tokenizer.fingerprint[:12]}-{ctx_len}"
    tokens = measure_rows(run, manifest, name, tokens_if_cut, np.uint32)[rows]
    if cut := np.count_nonzero(tokens):
        run.log(
            f"{manifest.path}: {cut} of {len(rows)} captions are cut to ctx_len {ctx_len} tokens, the longest has "
            f"{tokens.max()}"
        )


def pad_captions(captions: list[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids as (B, T) int64, and the index of each caption's last token (B,). T: ``length``, or the longest."""
    tokens = torch.zeros(len(captions), length or max(map(len, captions)), dtype=torch.int64)
    for line, ids in zip(tokens, captions, strict=True):
        line[: len(ids)] = torch.tensor(ids)
    return tokens, torch.tensor([len(ids) - 1 for ids in captions])


def augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift a picture (3, H, W) a little, its edge repeated, and make it a little brighter or darker.

    No other colours: captions say "red".
    """
    pixels = image.numpy()
    margin = max(1, round(MAX_SHIFT * max(pixels.shape[1:])))
    top, left = rng.integers(0, 2 * margin, size=2, endpoint=True)
    padded = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)), mode="edge")
    shifted = padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]]
    factor = 1 + MAX_BRIGHTER * rng.uniform(-1, 1)
    return torch.from_numpy(np.clip(shifted * factor, 0, 255).astype(np.uint8))


def random_crop(image: Tensor, size: int, smallest: float, rng: np.random.Generator) -> Tensor:
    """A random part of a picture (3, H, W), from ``smallest`` of its area to all of it, as (3, size, size).

    Its sides differ by up to 4 to 3, as in Szegedy et al. 2015, "Going Deeper with Convolutions".
    """
    H, W = image.shape[1:]
    share, sides = rng.uniform(smallest, 1), np.exp(rng.uniform(-1, 1) * np.log(4 / 3) / 2)
    height, width = (min(side, round(side * np.sqrt(share) * ratio)) for side, ratio in ((H, sides), (W, 1 / sides)))
    top, left = int(rng.integers(H - height + 1)), int(rng.integers(W - width + 1))
    return resized_crop(image, top, left, int(height), int(width), [size, size], antialias=True)


def exchange_sides(caption: str) -> str:
    """The caption of a mirrored picture: "left" and "right" change places."""
    return SIDES.sub(lambda found: found[1] + OTHER_SIDE[found[2]] + found[3], caption)


def in_distinct_groups(manifest: Manifest, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """``rows``, reordered into groups of 64 with distinct pictures and captions, and the size of the largest group.

    Rows that fill no such group, and unreadable rows, come last. If the largest group is of one row, every row has the
    picture or the caption of every other one.
    """
    full, open_groups, rest = [], [], []
    for row in rows.tolist():
        try:
            keys = {("image", manifest[row]["image"]), ("caption", manifest[row]["caption"])}
        except BadRow:
            rest.append(row)
            continue
        group = next((group for group in open_groups if group["keys"].isdisjoint(keys)), None)
        if group is None:
            if len(open_groups) == OPEN_GROUPS:
                rest.append(row)
                continue
            open_groups.append(group := {"keys": set(), "rows": []})
        group["keys"] |= keys
        group["rows"].append(row)
        if len(group["rows"]) == GROUP:
            full += group["rows"]
            open_groups.remove(group)
    largest = GROUP if full else max((len(group["rows"]) for group in open_groups), default=0)
    return np.array(full + [row for group in open_groups for row in group["rows"]] + rest, dtype=np.int64), largest


def check_candidates(path: Path, largest: int, log: Callable[[str], None]) -> None:
    """Log if retrieval is measured among fewer than 64 captions.

    Args:
        largest: see ``in_distinct_groups``.

    Raises:
        UserError: there is no other caption that a picture could find.
    """
    if largest < 2:
        raise UserError(
            f"{path}: expected at least 2 different pictures with different captions to tell apart, found "
            f"{largest or 'none'}"
        )
    if largest < GROUP:
        log(
            f"{path}: of its held-out rows, {largest} have different pictures and different captions: top-1 among "
            f"{GROUP} is not measured, and the loss is lower than among {GROUP}"
        )


# ---------------------------------------------------------------------------------------------------------------
# Metrics


class CaptionRanking:
    """Metrics of retrieval and zero-shot classification: the ``sums`` and ``metrics`` of a ``Validation``.

    ``loss``: contrastive loss in nats, over groups of up to 64; a guess has log(64) in a full one.

    ``top1_of_64``: share of pictures whose own caption, among 64 distinct ones, is the nearest; and the same from
    captions to pictures. Only batches of 64 distinct pairs count.

    ``zero_shot_*``: share of labelled pictures whose class of an attribute is the likeliest. The probability of a class
    is the sum over its captions (Radford et al. 2021, with probabilities added instead of embeddings averaged: an
    average of captions that have only the class in common is near none of them). Absent without ``classes``.
    """

    def __init__(self, tokenizer: Tokenizer, ctx_len: int, classes: Classes | None = None) -> None:
        self.classes, self._made_with, self._cache = classes, None, None
        if classes is not None:
            ids = [encode_caption(tokenizer, text, ctx_len) for text in classes.captions]
            self.tokens, self.ends = pad_captions(ids)

    def sums(self, model: PictureTextModel, batch: dict) -> dict[str, Tensor]:
        """Sums over one batch on the device."""
        same, labels, B = batch["same"], batch["labels"], len(batch["same"])
        pictures, captions, scale = model(normalise(batch["images"]), batch["tokens"], batch["ends"])
        loss = contrastive_loss(pictures, captions, scale, same)
        nearest = similarities(pictures, captions)  # (B, B)
        own = torch.arange(B, device=same.device)
        ranked = (same.sum() == B) * (B == GROUP)
        sums = {
            "loss": loss * B,
            # without those that share a picture or a caption with every other row, whose loss is always 0
            "rows": (~same).any(dim=1).sum(),
            "ranked": ranked * B,
            "caption_found": ranked * (nearest.argmax(dim=1) == own).sum(),
            "picture_found": ranked * (nearest.argmax(dim=0) == own).sum(),
        }
        if (labels >= 0).any():
            logits = scale * similarities(pictures, self._prompts(model))  # (B, prompts)
            for i, (name, names) in enumerate(self.classes.names.items()):
                of_caption = self.classes.labels[name]
                likely = [logits[:, of_caption == c].logsumexp(dim=1) for c in range(len(names))]
                found = torch.stack(likely, dim=1).argmax(dim=1)  # (B,)
                sums[f"{name}_asked"] = (labels[:, i] >= 0).sum()
                sums[f"{name}_found"] = (found == labels[:, i]).sum()
        return sums

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        metrics = {"loss": totals["loss"] / totals["rows"] if totals["rows"] else math.nan}
        if totals["ranked"]:
            metrics["top1_of_64"] = totals["caption_found"] / totals["ranked"]
            metrics["top1_of_64_pictures"] = totals["picture_found"] / totals["ranked"]
        asked = [name for name in (self.classes.names if self.classes else ()) if totals.get(f"{name}_asked")]
        if asked:
            each = {f"zero_shot_{name}": totals[f"{name}_found"] / totals[f"{name}_asked"] for name in asked}
            metrics |= {"zero_shot": sum(each.values()) / len(each)} | each
        return metrics

    def _prompts(self, model: PictureTextModel) -> Tensor:
        """The classes' captions in the common space, (prompts, E); computed again only after an update."""
        weight = model.text_proj.weight  # every update changes it
        if self._made_with is None or not torch.equal(self._made_with, weight):
            parts = zip(*(tensor.to(weight.device).split(PROMPTS) for tensor in (self.tokens, self.ends)), strict=True)
            self._cache = torch.cat([model.embed_captions(*part) for part in parts])
            self._made_with = weight.detach().clone()
        return self._cache
