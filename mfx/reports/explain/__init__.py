"""The data of `mfx.explain`: chains of a model, memory of a training step, refused sums with reasons.

The views of a model (`mfx.net.views`) become data here, the data become tables, and a terminal and a notebook lay these
out. The package imports nothing above ``mfx.net``, and of the other reports only what all share.
"""
