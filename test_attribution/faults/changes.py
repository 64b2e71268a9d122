"""How a fault is made: a function of the package is patched, or a line inside one is edited.

A patch is a function around the original one. It names the arguments that it needs, and calls ``original`` for the
result, with other arguments where it likes::

    @FAULTS.patch("every norm has the same epsilon", "frozen_scale")
    def _(original, norm):
        return original(norm=replace(norm, eps=1e-6))

Nothing in it depends on how the function is written, where it is defined, or which other arguments it takes. An edit
replaces a part of a function's source, for slips that neither its arguments nor its result can show.

Both replace the code of the function object and leave the object itself where it is. Every importer sees the change,
and so does whatever holds the function: the table of methods, a partial, a property, a class.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

PACKAGE = "attribution"


class BrokenFaultError(Exception):
    """A fault that cannot be injected."""


def modules() -> Iterator[ModuleType]:
    """Import and yield every module of the package."""
    package = import_module(PACKAGE)
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if not found.name.endswith(".__main__"):
            yield import_module(found.name)


def locate(where: str) -> FunctionType:
    """Return the function that a fault changes, without what decorates it.

    Args:
        where: Its name in the module that defines it: ``"rerun"``, ``"Edits.first"``, ``'METHODS["random"].score'``.
            Where several modules define it, the end of the module's name comes first: ``"gradients:_log_prob"``.

    Raises:
        BrokenFaultError: If no module of the package defines it, or several do.
    """
    home, _, path = where.rpartition(":")
    first = re.split(r"\W", path, maxsplit=1)[0]
    found: dict[int, tuple[str, Any]] = {}
    for module in modules():
        value = vars(module).get(first)
        if value is None or isinstance(value, ModuleType) or not f".{module.__name__}".endswith(home and f".{home}"):
            continue
        # Functions and classes belong to one module; other values are the same object wherever they are imported.
        if getattr(value, "__module__", module.__name__) == module.__name__:
            found[id(value)] = (module.__name__, value)
    if len(found) != 1:
        homes = ", ".join(name for name, _ in found.values()) or "none"
        raise BrokenFaultError(f"{where} is defined in {len(found)} modules of the package, not in one: {homes}")
    ((_, value),) = found.values()
    for attribute, key in re.findall(r'\.(\w+)|\["([^"]+)"\]', path[len(first) :]):
        try:
            value = inspect.getattr_static(value, attribute) if attribute else value[key]
        except (AttributeError, KeyError):
            raise BrokenFaultError(f"{where} does not exist: there is no {attribute or key!r}") from None
    return behind(value)


def behind(value: Any) -> FunctionType:
    """Return the function of a property, of a method, or behind decorators."""
    if isinstance(value, cached_property):
        value = value.func
    elif isinstance(value, property):
        value = value.fget
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(function, FunctionType):
        raise BrokenFaultError(f"{value!r} is not a function; name one")
    return function


@dataclass(frozen=True)
class Patch:
    """A function around a function of the package.

    Attributes:
        where: What is patched, see :func:`locate`.
        change: Called instead of it, with ``original`` and those of its arguments that it names. ``original()`` is the
            result without the fault; ``original(norm=other)`` that with another argument.
    """

    where: str
    change: Callable[..., Any]

    def __str__(self) -> str:
        source = textwrap.dedent(inspect.getsource(self.change))
        lines = [ast.get_source_segment(source, each) or "" for each in self._definition().body]
        return f"{self.where}: {_shown('; '.join(lines))}"

    def check(self) -> tuple[FunctionType, inspect.Signature, list[str]]:
        """Return the function, its signature, and which of its arguments the patch is given; change nothing.

        Raises:
            BrokenFaultError: If the function does not exist, or lacks an argument that the patch names.
        """
        function = locate(self.where)
        signature = inspect.signature(function)
        given = list(inspect.signature(self.change).parameters)[1:]
        calls = [each for each in ast.walk(self._definition()) if isinstance(each, ast.Call)]
        replaced = [word.arg for call in calls if ast.unparse(call.func) == "original" for word in call.keywords]
        unknown = sorted({str(name) for name in (*given, *replaced)} - set(signature.parameters))
        if unknown:
            raise BrokenFaultError(f"{self.where}{signature} has no argument {', '.join(unknown)}")
        if function.__closure__:
            raise BrokenFaultError(f"{self.where} uses names of the function around it; patch that one")
        return function, signature, given

    def apply(self) -> None:
        """Patch the function; raises what :meth:`check` does."""
        function, signature, given = self.check()
        pristine = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        pristine.__kwdefaults__ = function.__kwdefaults__
        change = self.change

        def run(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()

            def original(**others: Any) -> Any:
                asked = inspect.BoundArguments(signature, bound.arguments | others)  # type: ignore[arg-type]
                return pristine(*asked.args, **asked.kwargs)

            return change(original, **{name: bound.arguments[name] for name in given})

        function.__code__ = _trampoline.__code__
        function.__defaults__, function.__kwdefaults__ = None, {"_run": run}
        function.__signature__ = signature  # type: ignore[attr-defined]

    def _definition(self) -> ast.FunctionDef:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(self.change))).body
        assert isinstance(definition, ast.FunctionDef)
        return definition


def _trampoline(*arguments: Any, _run: Callable[..., Any], **options: Any) -> Any:
    # Its code becomes that of a patched function, whose own default for _run is then what runs.
    return _run(*arguments, **options)


@dataclass(frozen=True)
class Edit:
    """A change of a function's source.

    Attributes:
        where: What is edited, see :func:`locate`.
        old: A part of its source that occurs in it once.
        new: What replaces it.
    """

    where: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.where}: {_shown(self.old)} → {_shown(self.new)}"

    def check(self) -> tuple[FunctionType, CodeType]:
        """Return the function and its code behind the edit; change nothing.

        Raises:
            BrokenFaultError: If the function does not exist, or does not hold the text once.
        """
        function = locate(self.where)
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise BrokenFaultError(f"{self.old!r} occurs {source.count(self.old)} times in {self.where}, not once")
        tree = ast.parse(source.replace(self.old, self.new))
        (definition,) = tree.body
        assert isinstance(definition, ast.FunctionDef)
        definition.decorator_list.clear()
        flags = __future__.annotations.compiler_flag
        compiled = compile(tree, f"<fault in {self.where}>", "exec", flags=flags, dont_inherit=True)
        (code,) = (
            each for each in compiled.co_consts if isinstance(each, CodeType) and each.co_name == definition.name
        )
        if code.co_freevars != function.__code__.co_freevars:
            raise BrokenFaultError(f"{self.where} uses names of the function around it; edit that one")
        return function, code

    def apply(self) -> None:
        """Edit the function; raises what :meth:`check` does."""
        function, code = self.check()
        function.__code__ = code


Change: TypeAlias = Patch | Edit


def _shown(code: str) -> str:
    """Return code on one line, as a table shows it."""
    line = re.sub(r"(?<=[(\[{]) |,? (?=[)\]}])", "", " ".join(code.split()))
    return f"`{line}`" if line else "nothing"
