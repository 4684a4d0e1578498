"""Read off the bytecode of running code whether it asserts, unpacks or formats a traced value, or asks for its class.

Of 236 models of the zoo that are captured symbolically, 17 are so only by this (16 of 44 of vit_pytorch, 1 of 97 of
timm, none of torchvision); TorchDynamo captures 16 of these. Without it, `mfx.trace` refuses them, and their nets have
no chains before the first call.
"""

from __future__ import annotations

import dis
from bisect import bisect_left
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import pairwise
from types import CodeType, FrameType

# Instructions that may stand between the items of ``*value, more`` and their unpacking.
_WITHIN_LISTS = ("LIST_APPEND", "LIST_TO_TUPLE", "LOAD_", "BINARY_", "CACHE", "EXTENDED_ARG", "CALL_INTRINSIC_1", "NOP")

_MAKE_TEXT = ("BUILD_STRING", "BINARY_", "FORMAT_")
_ENDS = ("POP_TOP", "STORE_", "DELETE_", "RETURN_", "YIELD_", "RESUME", "RAISE_")  # of statements


def unpacked_indices(frame: FrameType) -> list[int | None] | None:
    """Return the indices that ``a, b, c = *value, more`` or ``*_, h, w = value`` unpack from a value.

    None stands for items that go into a name that is never read.
    """
    code = _instructions(frame.f_code)
    at = _position(frame, code)
    more = 0
    if code[at].opname == "LIST_EXTEND":
        at += 1
        while code[at].opname.startswith(_WITHIN_LISTS):
            more += code[at].opname == "LIST_APPEND"
            at += 1
    if code[at].opname == "UNPACK_SEQUENCE":
        return list(range(int(code[at].argval) - more))
    if code[at].opname == "UNPACK_EX":
        first, last = code[at].argval & 0xFF, (code[at].argval >> 8) - more
        if last >= 0 and _is_never_read(first, code[at + 1 :], code):
            return [*range(first), None, *range(-last, 0)]
    return None


def _is_never_read(position: int, stores: Sequence[dis.Instruction], code: Sequence[dis.Instruction]) -> bool:
    """True if the local name that the code stores as number ``position`` is never read."""
    names: list[str] = []
    for instruction in stores:
        if not instruction.opname.startswith("STORE_FAST") or "LOAD" in instruction.opname:
            break
        names += [instruction.argval] if isinstance(instruction.argval, str) else instruction.argval
    if position >= len(names):
        return False
    reads = (i.argval for i in code if "LOAD_FAST" in i.opname)
    return not any(names[position] in ((read,) if isinstance(read, str) else read) for read in reads)


def asserted(frame: FrameType) -> bool | None:
    """Return the truth value that an ``assert`` wants; None if the running code is not an ``assert``."""
    code = _instructions(frame.f_code)
    at = _position(frame, code)
    if code[at].opname == "TO_BOOL":
        at += 1
    jump = code[at]
    if "JUMP" not in jump.opname or "_IF_" not in jump.opname or "NONE" in jump.opname:
        return None
    wanted = jump.opname.endswith("TRUE")  # what is jumped upon; the other way, execution falls through
    if _raises_assertion(code[at + 1]):
        return wanted
    target = next((i for i in code if i.offset == jump.argval), None)
    return not wanted if target is not None and _raises_assertion(target) else None


def is_plain_access(frame: FrameType) -> bool:
    """True if the running code says ``value.name``, not ``hasattr(value, name)`` or the like."""
    code = _instructions(frame.f_code)
    return code[_position(frame, code)].opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))


def is_compared_with_truth(frame: FrameType) -> bool:
    """True if the running function has ``value is True``, ``case False:`` or the like, for any value."""
    code = _instructions(frame.f_code)
    return any(
        before.opname == "LOAD_CONST" and isinstance(before.argval, bool) and instruction.opname == "IS_OP"
        for before, instruction in pairwise(code)
    )


def asks_for_class(frame: FrameType) -> bool:
    """True if the running code says ``isinstance(value, ...)``, ``value.__class__`` or ``case Tensor():``."""
    code = _instructions(frame.f_code)
    at = _position(frame, code)
    if code[at].opname == "MATCH_CLASS" or code[at].argval == "__class__":
        return True
    at += code[at].opname == "PRECALL"
    return any(
        code[start].argval == "isinstance" and code[start].opname.startswith("LOAD_") and _end_of(code, start) == at
        for start in reversed(range(at))
    )


def _end_of(code: Sequence[dis.Instruction], start: int) -> int | None:
    """Return the position of the call of the function that is loaded at ``start``."""
    depth = 0  # values on the stack: the function, its arguments, then the result alone
    for at in range(start, len(code)):
        instruction = code[at]
        argument = instruction.arg if instruction.opcode >= dis.HAVE_ARGUMENT else None
        depth += dis.stack_effect(instruction.opcode, argument)
        if at > start and depth == 1:
            return at
    return None


def is_text_for(frame: FrameType, names: Collection[str]) -> bool:
    """True if the text that the running code makes becomes an argument of a call, and nothing else.

    The call is a statement of its own that has one of the names in it, ``torch._assert(condition, f"... {size} ...")``
    or ``print(f"... {x}")``.
    """
    code = _instructions(frame.f_code)
    at = _position(frame, code)
    at += code[at].opname == "PRECALL"  # of a str() that Python has made one instruction
    depth = 1  # values on the stack, from the text on
    for i in range(at + 1, len(code)):
        name, argument = code[i].opname, code[i].arg if code[i].opcode >= dis.HAVE_ARGUMENT else None
        if "JUMP" in name or name.startswith(_ENDS):
            return False
        depth += dis.stack_effect(code[i].opcode, argument)
        if depth > 0:
            continue
        if name.startswith(_MAKE_TEXT):
            depth = 1  # the text is a part of this one
            continue
        calls = [i.opname for i in code[i : i + 3] if i.opname != "CACHE"]
        return name.startswith(("PRECALL", "CALL")) and "POP_TOP" in calls and _has_name(code, at, names)
    return False


def _has_name(code: Sequence[dis.Instruction], at: int, names: Collection[str]) -> bool:
    """True if the statement up to a position has one of the names in it."""
    while at and not code[at - 1].opname.startswith(_ENDS) and "JUMP" not in code[at - 1].opname:
        if code[at - 1].argval in names:
            return True
        at -= 1
    return False


def raises(code: CodeType, offset: int) -> bool:
    """True if the instruction at an offset is a ``raise``."""
    at = bisect_left(instructions := _instructions(code), offset, key=lambda instruction: instruction.offset)
    return instructions[at].opname == "RAISE_VARARGS"


def _raises_assertion(instruction: dis.Instruction) -> bool:
    name = "AssertionError"  # LOAD_COMMON_CONSTANT since Python 3.14
    return instruction.opname == "LOAD_ASSERTION_ERROR" or (
        instruction.opname == "LOAD_COMMON_CONSTANT" and name in instruction.argrepr
    )


@lru_cache(maxsize=128)
def _instructions(code: CodeType) -> Sequence[dis.Instruction]:
    return tuple(dis.get_instructions(code))


def _position(frame: FrameType, code: Sequence[dis.Instruction]) -> int:
    return bisect_left(code, frame.f_lasti, key=lambda instruction: instruction.offset)
