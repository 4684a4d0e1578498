"""Capture by symbolic tracing: the `tracer`, its `proxies`, and what a trace has to refuse.

Imports what `mfx.capture` may import.
"""
