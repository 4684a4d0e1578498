"""Public names say in words what they are, take and raise."""

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import mfx
import mfx_passes

MODULES = (mfx, mfx.schedule, mfx_passes)
PUBLIC = {f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in module.__all__}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = {
    f"{name}.{attribute}": value
    for name, cls in CLASSES.items()
    for attribute, value in vars(cls).items()
    if inspect.isfunction(value) and not attribute.startswith("_")
}
FUNCTIONS = {name: value for name, value in {**PUBLIC, **METHODS}.items() if inspect.isfunction(value)}


def section(thing, *headings):
    """The names that a section of a docstring explains."""
    texts = re.findall(rf"\n(?:{'|'.join(headings)}):\n((?:    .*\n|\n)*)", f"{inspect.getdoc(thing)}\n")
    lines = [line for text in texts for line in text.splitlines() if re.match(r"    \S", line)]
    return {name.strip("* ") for line in lines for name in line.partition(":")[0].split(",")}


def undocumented_arguments(function):
    names = {name for name in inspect.signature(function).parameters if name not in ("self", "cls")}
    return names - section(function, "Args")


def raises_unsaid(function):
    """True if an MfxError is raised in the function's own body and its docstring does not say so."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = any(isinstance(node, ast.Raise) and "MfxError" in ast.unparse(node) for node in ast.walk(tree))
    return raised and "MfxError" not in section(function, "Raises")


@pytest.mark.parametrize("thing", {**CLASSES, **FUNCTIONS}.values(), ids={**CLASSES, **FUNCTIONS})
def test_it_says_what_it_is_in_one_sentence(thing):
    assert thing.__doc__, "inherits what another says of itself"
    first, *rest = inspect.getdoc(thing).splitlines()
    assert first.endswith("."), first
    assert not rest or not rest[0]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_say_what_they_take_and_raise(function):
    assert undocumented_arguments(function) <= {"step"}, "a step's number is what it is called"
    assert not raises_unsaid(function)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_classes_say_what_they_are_made_of(cls):
    if dataclasses.is_dataclass(cls):
        fields = {field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")}
        assert fields <= section(cls, "Args", "Attributes")
    elif "__init__" in vars(cls):
        names = set(inspect.signature(cls.__init__).parameters) - {"self"}
        assert names <= section(cls, "Args")


def test_the_checks_can_fail():
    def silent(x, *, y):
        """Say nothing.

        Args:
            x: a number.

        Raises:
            ValueError: never.
        """
        raise mfx.MfxError("something")

    assert section(silent, "Args") == {"x"}
    assert undocumented_arguments(silent) == {"y"}
    assert raises_unsaid(silent)


def docstrings(path):
    """Yield the first line of every docstring in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield text.splitlines()[0]


@pytest.mark.parametrize("folder", ["mfx", "passes", "tests", "examples"])
def test_no_docstring_opens_with_a_question_word(folder):
    asking = re.compile(r"(What|Whether|How|Who|Whoever|Where|Which|When|Why)\b")
    files = (Path(__file__).parents[1] / folder).rglob("*.py")
    assert not [f"{file}: {line}" for file in files for line in docstrings(file) if asking.match(line)]
