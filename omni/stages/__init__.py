"""The table of stages: what each of them adds to the rest stands in its own module, and here one row.

``omni.train.stage.load(STAGES["text"], folder)`` opens what a stage has left.
"""

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
