"""The user's tree of modules: copied with the same tensors, marked as momentumized, and put back as it was.

``tree_copy`` copies it; ``overlay`` is what mfx adds to a copy; ``restore`` and ``random_state`` undo what a capture
does to it; ``uninterrupted`` marks code of it that recomputation must not stop early. May import ``mfx.compat``,
``mfx.text`` and ``mfx_passes``.
"""
