"""Find the chains of a graph without changing it.

Prepare it, string residual adds together, make updates of them, find streams that read each other, order their updates
into steps, check, cut, nest.

It may import the packages below: `ir`, `paths`, `errors`, `ops`, `analysis` and `named_steps`.
"""
