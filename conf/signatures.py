"""What a class or a function takes, read from its source: names and kinds of values, without importing anything."""

import ast
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PLAIN = {"int": "int", "float": "float", "bool": "bool", "str": "str", "Path": "str", "PathLike": "str"}
LISTS = ("Sequence", "list", "tuple", "Iterable", "List", "Tuple", "Collection", "Size")
MAPPINGS = ("Mapping", "dict", "Dict", "MutableMapping")
WORDS = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"},
    **{"list": "a list", "dict": "a mapping", "none": "null"},
}


class Kind(NamedTuple):
    """What a value may be: `int`, `float`, `bool`, `str`, `none`, `list`, `dict`; a few words; items of a list.

    anything: nobody knows.
    """

    words: frozenset[str] = frozenset()
    choices: frozenset[str] = frozenset()
    items: "Kind | None" = None
    anything: bool = False

    def __or__(self, other: "Kind") -> "Kind":
        items = (self.items or other.items) if None in (self.items, other.items) else self.items | other.items
        return Kind(self.words | other.words, self.choices | other.choices, items, self.anything or other.anything)

    def takes(self, value: Any) -> bool:
        """Whether a value out of YAML is of this kind; a whole number is a number, true is none."""
        if self.anything or (isinstance(value, dict) and "_target_" in value):
            return True
        if isinstance(value, list | tuple):
            return "list" in self.words and (self.items is None or all(map(self.items.takes, value)))
        if isinstance(value, str):
            return "str" in self.words or value in self.choices
        if value is None or isinstance(value, bool | dict):
            return {type(None): "none", bool: "bool", dict: "dict"}[type(value)] in self.words
        return "float" in self.words or ("int" in self.words and isinstance(value, int))

    def __str__(self) -> str:
        plain = self.words - {"int"} if "float" in self.words else self.words
        named = [WORDS[word] for word in WORDS if word in plain]
        if self.items is not None and not self.items.anything and self.items.words:
            named = [f"a list, each {self.items}" if name == "a list" else name for name in named]
        return " or ".join([*sorted(self.choices), *named])


ANY = Kind(anything=True)


class Signature(NamedTuple):
    """The parameters of something, and whether it takes others as well."""

    parameters: dict[str, Kind]
    others: bool


@cache
def signature(target: str) -> Signature | None:
    """Of a `_target_`; None where its source is not found."""
    module, _, name = target.rpartition(".")
    found = _definition(module, name)
    if found is None:
        return None
    place, node = found
    if isinstance(node, ast.ClassDef):
        return _of_class(place, node)
    return _of_function(place, node) if isinstance(node, ast.FunctionDef) else None


def _of_class(place: str, node: ast.ClassDef) -> Signature | None:
    """Of its `__init__`, and where that hands on what it does not know, of that of its base."""
    own = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    found = _of_function(place, own, method=True) if own is not None else None
    if found is not None and not found.others:
        return found
    for base in node.bases:
        inherited = _definition(place, base.id) if isinstance(base, ast.Name) else None
        if inherited is not None and isinstance(inherited[1], ast.ClassDef):
            above = _of_class(inherited[0], inherited[1])
            if above is not None:
                return Signature(above.parameters | (found.parameters if found else {}), above.others)
    return found


def _of_function(place: str, node: ast.FunctionDef, method: bool = False) -> Signature:
    arguments = node.args
    listed = [*arguments.posonlyargs, *arguments.args][int(method) :]
    first = len(listed) - len(arguments.defaults)
    defaults = {argument.arg: value for argument, value in zip(listed[first:], arguments.defaults, strict=True)}
    defaults |= {a.arg: value for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value}
    kinds = {}
    for argument in [*listed, *arguments.kwonlyargs]:
        kind = kind_of(argument.annotation, place) if argument.annotation is not None else ANY
        default = defaults.get(argument.arg)
        if isinstance(default, ast.Constant) and default.value is None:
            kind |= Kind(frozenset({"none"}))
        kinds[argument.arg] = kind
    return Signature(kinds, arguments.kwarg is not None)


def kind_of(node: ast.expr, place: str = "") -> Kind:
    """The kind of values that an annotation in a module means."""
    if isinstance(node, ast.Constant):
        return kind_of(ast.parse(node.value, mode="eval").body, place) if isinstance(node.value, str) else _NONE
    if isinstance(node, ast.BinOp):
        return _either([node.left, node.right], place)
    if isinstance(node, ast.Subscript):
        return _subscripted(node, place)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    if name in PLAIN:
        return Kind(frozenset({PLAIN[name]}))
    if name in LISTS:
        return Kind(frozenset({"list"}))
    if name in MAPPINGS:
        return Kind(frozenset({"dict"}))
    found = _definition(place, name) if isinstance(node, ast.Name) and place else None
    if found is None:
        return ANY
    return _OBJECT if isinstance(found[1], ast.ClassDef) else kind_of(found[1], found[0])


_NONE, _OBJECT = Kind(frozenset({"none"})), Kind()


def _either(nodes: list[ast.expr], place: str) -> Kind:
    found = _OBJECT
    for node in nodes:
        found |= kind_of(node, place)
    return found


def _subscripted(node: ast.Subscript, place: str) -> Kind:
    name = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name in ("Union", "Optional"):
        return _either(inner, place) | (_NONE if name == "Optional" else _OBJECT)
    if name == "Literal":
        words = {part.value for part in inner if isinstance(part, ast.Constant)}
        numbers = {"int"} if any(type(word) is int for word in words) else set()
        return Kind(frozenset(numbers), frozenset(word for word in words if isinstance(word, str)))
    if name in LISTS:
        items = [part for part in inner if not (isinstance(part, ast.Constant) and part.value is ...)]
        return Kind(frozenset({"list"}), items=_either(items, place))
    return Kind(frozenset({"dict"})) if name in MAPPINGS else ANY


def _definition(module: str, name: str, depth: int = 8) -> tuple[str, Any] | None:
    """Where a name is defined, imports followed: the module, and the class, the function or the alias of a type."""
    tree = _tree(module) if depth else None
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(at, ast.Name) and at.id == name for at in node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name, depth - 1)
    return None


@cache
def _tree(module: str) -> ast.Module | None:
    """The source of a module of ours or of Lightning; what Python itself has needs none."""
    top, *parts = module.split(".")
    if top in ("typing", "collections", "os", "pathlib", "torch", "numpy", *sys.builtin_module_names):
        return None
    if (ROOT / top).is_dir():
        base = ROOT / top
    else:
        spec = find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            return None
        base = Path(spec.submodule_search_locations[0])
    path = base.joinpath(*parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None
