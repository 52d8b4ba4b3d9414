"""A small world that text, speech, pictures and signs share, and the English that describes it.

A `scenes.Scene` is what a picture shows: one to four groups of coloured shapes, perhaps a sign with a word. A
`stories.Story` is a few sentences about people, places and animals. Both come with questions whose answers follow from
them, so that a small model can learn to answer by reading (or by looking, or by listening) and not by guessing.

Every function is pure: equal arguments and an equal `random.Random` state give equal text on every machine.
"""
