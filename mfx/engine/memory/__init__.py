"""Memory of chains: what a step costs, what a chain stores, and which steps keep their activations under a budget.

Plans and cuts are pure functions of measured costs. May import `mfx.engine.arithmetic`, `mfx.options` and `mfx.compat`.
"""
