"""Recomputation of a chain's activations in the backward pass: runners run the steps, frames recompute them.

A tape walks states back to a step's input, an environment restores what else its branch depends on. May import
`mfx.modules`, `mfx.options`, `mfx.compat` and the rest of `mfx.engine` but for `mfx.engine.chain`.
"""
