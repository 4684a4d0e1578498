"""The momentumized ``nn.Module``: the graph that serves a call, its submodules, its γ, its ``state_dict``.

`build` makes a net of a model. The `graph_table` of its `forward` finds graphs, or has a route capture them;
`views` answers which graphs a model has. Imports `mfx.compiler`, `mfx.program`, `mfx.capture` and the packages below.
"""
