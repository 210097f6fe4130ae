"""Scenes of coloured shapes with captions: a text-to-image task whose pictures can be judged exactly.

Its six tasks are GenEval's (arXiv 2310.11513): one object, two objects, counting, colours, position, and which of two
objects has which colour.
"""
