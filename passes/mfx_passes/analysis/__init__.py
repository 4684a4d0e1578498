"""Facts about a whole graph, computed in one walk, and a view of it for people.

``ancestry`` tells what a value is computed from, ``mutations`` whose memory in-place operations change, ``sizes`` which
sizes all states share; ``networkx_view`` is the graph as a ``networkx.DiGraph``. Imports ``ops`` and ``ir``.
"""
