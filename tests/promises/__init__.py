"""The promises of mfx, by number, in the words of its public API alone.

1 any architecture · 2 same weights · 3 γ = 0 is the model · 4 exact gradients · 5 recomputation is invisible ·
6 memory · 7 speed on a GPU (nothing to test before there is a GPU path) · 8 errors.
"""
