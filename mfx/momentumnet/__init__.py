"""The API of the momentumnet package on mfx's engine: `mfx.MomentumNet` and `mfx.transform_to_momentumnet`.

Weights go both ways: `to_package_names` and `from_package_names`. Imports `mfx.net` and the packages below it.
"""

from mfx.momentumnet.package_names import from_package_names, to_package_names

__all__ = ["from_package_names", "to_package_names"]
