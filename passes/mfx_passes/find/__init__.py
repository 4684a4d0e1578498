"""Find the chains of a graph without changing it: prepare, string residual adds together, assemble steps, check, nest.

It may import the packages below: `ir`, `paths`, `errors`, `ops`, `analysis` and `named_steps`.
"""
