"""Single operations: the words in which a graph is read.

``vocabulary`` tells what a node does (changes a value in place, preserves it, reads a size, may be a tail); ``sums``
has one spelling for all residual sums; ``joins`` tells where pieces of a value are put together again, by ``lengths``;
``gradients`` tells what differentiates, and if some nodes can do so alone; ``step_markers`` are the functions that mark
named steps. Imports ``ir``.
"""
