"""Single operations: the words in which a graph is read.

``vocabulary`` tells what a node does (changes a value in place, preserves it, reads a size, may be a tail); ``sums``
has one spelling for all residual sums; ``step_markers`` are the functions that mark named steps. Imports ``ir``.
"""
