"""The table of stages, one row each; ``omni.train.stage.load(STAGES["text"], folder)`` opens a stage's model."""

from omni.stages import aligner, audio_encoder, codec, ocr, omni, talker, text, vision, vocoder

# In the order in which they build on each other. Stage D trains three models.
STAGES = {
    stage.name: stage
    for stage in (
        text.STAGE,
        audio_encoder.STAGE,
        vision.STAGE,
        codec.STAGE,
        aligner.STAGE,
        talker.STAGE,
        omni.STAGE,
        vocoder.STAGE,
        ocr.STAGE,
    )
}
