"""The architecture of the omni model: the architectures of its parts, and how they are joined."""

from typing import Self

from pydantic import Field, model_validator

from omni.models.architectures import Architecture, AudioEncoderArchitecture, ThinkerArchitecture, VisionArchitecture
from omni.models.speech_architectures import TalkerArchitecture


class OmniArchitecture(Architecture):
    """The parts of the omni model; a part that no task needs is None."""

    thinker: ThinkerArchitecture
    audio_encoder: AudioEncoderArchitecture | None = None  # ctc_vocab_size: number of tokens of its CTC head
    max_mel_length: int | None = Field(None, ge=1, description="mel frames of the longest recording")
    vision_encoder: VisionArchitecture | None = None
    n_words: int = Field(0, ge=0, description="words of the word head, stage C's vocabulary; 0: no word head")
    talker: TalkerArchitecture | None = None
    max_codes: int | None = Field(None, ge=1, description="codes of the longest speech that the talker was trained on")
    duration_weight: float = Field(0.3, ge=0, description="weight of the duration loss in the talker's loss")
    proj_d_ff: int = Field(512, ge=8, le=1_000_000, description="inner width of the projections into the Thinker")
    image_stack: int = Field(1, ge=1, le=64, description="side of the square of patches that share one position")
    drop_blanks: bool = Field(True, description="audio frames with a blank or repeated CTC token are left out")

    @property
    def parts(self) -> dict[str, dict]:
        """Prefix in the state dict -> sizes of a part that another stage has trained."""
        names = ("thinker", "audio_encoder", "vision_encoder", "talker")
        return {name: sizes for name, sizes in self.model_dump(include={*names}).items() if sizes is not None}

    @property
    def image_side(self) -> int:
        """Number of an image's positions along each side."""
        return self.vision_encoder.img_size // self.vision_encoder.patch // self.image_stack

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        side = self.vision_encoder.img_size // self.vision_encoder.patch if self.vision_encoder else self.image_stack
        if side % self.image_stack:
            raise ValueError(f'key "image_stack": expected a divisor of {side} patches, found {self.image_stack}')
        return self
