"""Everything that people do; importing this fills the table."""

from tests.promises.machine.actions import calls, changes, copies, hooks, weights

__all__ = ["calls", "changes", "copies", "hooks", "weights"]
