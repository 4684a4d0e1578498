"""The one exception type of mfx."""


class MfxError(Exception):
    """An error whose message tells what is wrong, where in the user's model, and what to do about it."""
