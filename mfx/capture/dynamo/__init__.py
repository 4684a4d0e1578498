"""Capture of one call by TorchDynamo, whose `graph` is put into the form of a symbolic trace.

Imports what `mfx.capture` may import; `call` imports TorchDynamo, which takes a second.
"""
