"""A small world that text, speech, pictures and signs share, and the English that describes it.

A `scenes.Scene` is the content of a picture: one to four groups of coloured shapes, perhaps a sign with a word. A
`stories.Story` is a few sentences about people, places and animals. Both have questions whose answers follow from them,
so that a small model can learn to answer from the text, picture or speech and not by guessing.

Every function is pure: equal arguments and an equal `random.Random` state give equal text on every machine.
"""
