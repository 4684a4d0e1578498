"""A captured graph, rewritten by ``mfx_passes`` and made runnable.

`rewritten` holds a rewritten graph with its conditions; `assembly` makes one function of it, from its momentum calls
(`chain_call`) and the segments between them (`segments`, `between_chains`); `codegen` turns graphs into functions,
plain or compiled; `memory_plans` shares one memory budget among the chains of a net; `shapes` finds shapes without
running the model. Imports `mfx.capture`, `mfx.engine` and the packages below them.
"""
