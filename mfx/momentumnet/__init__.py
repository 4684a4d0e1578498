"""The API of the momentumnet package on mfx's engine: `mfx.MomentumNet` and `mfx.transform_to_momentumnet`.

Imports `mfx.net` and the packages below it.
"""
