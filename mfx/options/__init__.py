"""The options of `mfx.momentumize`, checked when they are made: γ as a fraction, memory budgets, chains by name.

May import ``mfx_passes``, `mfx.compat` and `mfx.text`.
"""
