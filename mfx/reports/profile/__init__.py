"""Training steps of a model, measured in several variants for `mfx.profile`.

The variants of a model are built, each runs the same step on copies of the inputs, and the rows of the result are shown
as a table and a plot. The package imports nothing above ``mfx.api``, and of the other reports only what all share.
"""
