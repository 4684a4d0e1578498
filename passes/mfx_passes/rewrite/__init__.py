"""Changes of a graph, once its chains are known.

``fold`` makes module calls of their nodes again, ``extract`` and ``outline`` cut steps out as graphs of their own,
``rewrite`` puts one momentum call in the place of each chain, and ``portable_graph`` is a graph that pickles at any
size. Imports ``find`` and what is below it.
"""
