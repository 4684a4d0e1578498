"""Read off bytecode whether it asserts, unpacks, formats or compares a traced value, or asks for its class.

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
from typing import Any, NamedTuple

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
    """True if the running code says ``isinstance(value, ...)``, ``value.__class__`` or ``case Tensor():``.

    It may say ``getattr(value, "__class__")``, too.
    """
    code = _instructions(frame.f_code)
    at = _position(frame, code)
    if code[at].opname == "MATCH_CLASS" or code[at].argval == "__class__":
        return True
    at += code[at].opname == "PRECALL"
    calls = [start for start in range(at) if code[start].argval in ("isinstance", "getattr")]
    return any(code[start].opname.startswith("LOAD_") and _end_of(code, start) == at for start in reversed(calls))


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


class IdentityCheck(NamedTuple):
    """An ``a is b`` in code, where both may be any values.

    Attributes:
        line: the number of its line.
        paths: of each operand the attributes and items that lead to it from the first argument; empty for others.
        variables: the operands that are local variables, by name.
    """

    line: int | None
    paths: tuple[tuple[Any, ...], tuple[Any, ...]]
    variables: tuple[str, ...]


@lru_cache(maxsize=4096)
def identity_checks(code: CodeType) -> Sequence[IdentityCheck]:
    """Return where code asks whether two values are one object, functions inside of it included.

    Not where one of them is a constant, a global variable or an attribute of one, a truth value or a class.
    """
    found = [check for inner in code.co_consts if isinstance(inner, CodeType) for check in identity_checks(inner)]
    if dis.opmap["IS_OP"] not in code.co_code[::2]:
        return tuple(found)
    steps = _steps(code)
    for at, step in enumerate(steps):
        if step.name == "IS_OP":
            start = _start_of_operand(steps, at)
            right = steps[start:at] if start is not None else []
            before = _start_of_operand(steps, start) if start is not None else None
            left = steps[before:start] if before is not None else []
            if not (_is_no_value(left) or _is_no_value(right)):
                line = next((line for first, end, line in code.co_lines() if first <= step.offset < end), None)
                paths = _path_from_first(left, code), _path_from_first(right, code)
                local = [side[0] for side in (left, right) if len(side) == 1 and side[0].name.startswith("LOAD_FAST")]
                found.append(IdentityCheck(line, paths, tuple(step.argument for step in local)))
    return tuple(found)


class _Step(NamedTuple):
    """An instruction, or a half of one that loads or stores two local variables."""

    name: str
    argument: Any
    effect: int  # on the depth of the stack
    offset: int
    is_target: bool  # of a jump


_NO_STEPS = ("CACHE", "EXTENDED_ARG", "NOP")  # which leave the stack as it is


def _steps(code: CodeType) -> Sequence[_Step]:
    steps = []
    for i in dis.get_instructions(code):
        if isinstance(i.argval, tuple) and "FAST" in i.opname:  # LOAD_FAST_LOAD_FAST and the like, since Python 3.13
            kinds = [part for part in i.opname.split("_") if part in ("LOAD", "STORE")]
            for kind, name in zip(kinds, i.argval, strict=True):
                steps.append(_Step(f"{kind}_FAST", name, 1 if kind == "LOAD" else -1, i.offset, i.is_jump_target))
        elif i.opname not in _NO_STEPS or i.is_jump_target:
            argument = i.arg if i.opcode >= dis.HAVE_ARGUMENT else None
            effect = dis.stack_effect(i.opcode, argument, jump=False)
            steps.append(_Step(i.opname, i.argval, effect, i.offset, i.is_jump_target))
    return steps


def _start_of_operand(steps: Sequence[_Step], end: int) -> int | None:
    """Return the first of the steps that push the value on top of the stack; None if a jump may lead in between."""
    pushed = 0
    for at in reversed(range(end)):
        if steps[at + 1].is_target or "JUMP" in steps[at].name:
            return None
        pushed += steps[at].effect
        if pushed > 0:
            return at
    return None


def _is_no_value(pushing: Sequence[_Step]) -> bool:
    """True if steps push what is no traced value: none are known to, for an operand that was not found."""
    if not pushing:
        return False
    first, *more = pushing
    if pushing[-1].name in ("IS_OP", "CONTAINS_OP", "UNARY_NOT") or pushing[-1].argument == "__class__":
        return True
    if first.name.startswith(("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_NAME")) and _are_attributes(more):
        return True
    depth = first.effect
    for at, step in enumerate(more):
        depth += step.effect
        if depth == 1:  # of a call of type(), which leaves its result alone
            is_class = first.argument == "type" and first.name.startswith("LOAD_")
            return is_class and _are_attributes(more[at + 1 :])
    return False


def _path_from_first(pushing: Sequence[_Step], code: CodeType) -> tuple[Any, ...]:
    if not pushing or not code.co_argcount or pushing[0].argument != code.co_varnames[0]:
        return ()
    path = [step for step in pushing[1:] if not step.name.startswith("BINARY_")]  # of a subscript, or its own index
    names = ("LOAD_ATTR", "LOAD_CONST", "LOAD_SMALL_INT")
    return tuple(step.argument for step in path) if all(step.name.startswith(names) for step in path) else ()


def _are_attributes(steps: Sequence[_Step]) -> bool:
    return all(step.name.startswith(("LOAD_ATTR", "LOAD_METHOD")) for step in steps)


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
