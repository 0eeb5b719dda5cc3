"""The report of an evaluation grid: one HTML page, and the same as Markdown, CSV and JSON.

``grid`` reads the folder, ``significance`` tests, ``summary`` computes every number once,
``pictures`` draws, ``render`` writes. Only ``summary`` knows what a number means; the renderers
show what it holds.
"""
