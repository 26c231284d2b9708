"""Filters of samples by the fields of their `key.json`: `--filter "aesthetic >= 5.5 and watermark < 0.5"`.

In the order of the code:

1. Interface. `Filter.parse` reads an expression in Python's syntax and splits it at its top-level `and` into
   conditions; `Filter.refusal` gives the first one that a sample fails. The width and height of the picture are known
   only once it is decoded, so `before` holds the conditions that can drop a sample without that and `after` the others.
2. Grammar. Nothing is compiled or run: Python's parser makes a tree, in which only these nodes are allowed:

       condition   A and B, A or B, not A, and comparisons of values, also chained: < <= > >= == !=
                   VALUE in (CONSTANT, ...), also not in, [ ] and { }
       value       numbers, strings, True, False; fields by name, or field("clip score") where the name is no plain
                   word; + - * / of values

3. Evaluation. As in Python, but for missing values: a field that is absent, null, NaN, a list or an object,
   a text beside a number, a division by zero. They make a comparison neither true nor false. A condition that can be
   decided without it is (`a > 1 or b > 1` with a = 2 and no b); any other refuses the sample. A text that is a number
   ("5.6", as in csv files) counts as the number, except where two texts are compared by == or !=.
"""

import ast
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

# ---- 1. interface ----

MAX_LENGTH = 2000  # characters of an expression
MAX_DEPTH = 50  # levels of its tree
MAX_DETAIL = 200  # characters of a refusal's detail

# Sizes are the decoded picture's; width and height in `key.json` are those after img2dataset's own resizing.
SIZES = frozenset({"width", "height", "pixels", "aspect"})

# Short names, and the names of the same field in known data sets: LAION (capitals, p...), COYO-700M, DataComp. The first one
# with a value is taken, beginning with the name as written. Scales of scores differ between data sets: see what yours holds.
ALIASES: dict[str, tuple[str, ...]] = {
    "aesthetic": ("aesthetic_score", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
    "watermark": ("pwatermark", "watermark_score", "watermark_prob", "WATERMARK_PROB"),
    "similarity": (
        *("clip_similarity", "clip_similarity_vitl14", "clip_similarity_vitb32"),
        *("clip_score", "clip_l14_similarity_score", "clip_b32_similarity_score"),
    ),
    "unsafe": ("punsafe", "unsafe_score", "unsafe_prob", "UNSAFE_PROB"),
}


@dataclass(frozen=True)
class Refusal:
    """Reason why a sample is not kept, one of few so that they can be counted, and for people the values found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Condition:
    """Condition of a filter: its canonical text, its tree, and the fields that it reads."""

    text: str
    tree: ast.expr = dataclasses.field(compare=False, repr=False)
    names: tuple[str, ...] = dataclasses.field(compare=False, repr=False)


@dataclass(frozen=True)
class Filter:
    """Conditions that a sample must all meet; without any, all samples are kept."""

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Reads an expression. Raises ValueError, in one line, where it is not a condition of the grammar above."""
        return cls(tuple(Condition(ast.unparse(tree), tree, _names(tree)) for tree in _conjuncts(_parse(text))))

    @property
    def before(self) -> "Filter":
        """Filter of the conditions that need no picture size."""
        return Filter(tuple(c for c in self.conditions if SIZES.isdisjoint(c.names)))

    @property
    def after(self) -> "Filter":
        """Filter of the conditions on the size of the decoded picture, for fields from `add_sizes`."""
        return Filter(tuple(c for c in self.conditions if not SIZES.isdisjoint(c.names)))

    def refusal(self, fields: Mapping[str, Any]) -> Refusal | None:
        """Returns why a sample with these fields is refused, None where it is kept. Never raises, whatever the values."""
        for condition in self.conditions:
            answer = _evaluate(condition.tree, fields)
            if isinstance(answer, Refusal):
                return Refusal(answer.reason, _truncate(answer.detail, MAX_DETAIL))
            if not answer:
                found = [_look_up(name, fields) for name in condition.names]
                detail = ", ".join(f"{name} = {_shortened(value)}" for name, value in found if name in fields)
                return Refusal(f"filtered by {condition.text}", _truncate(detail, MAX_DETAIL))
        return None

    def __str__(self) -> str:
        """Returns the expression in a canonical form, without regard to spaces, quotes and brackets; `parse` takes it."""
        if len(self.conditions) == 1:
            return self.conditions[0].text
        return " and ".join(f"({c.text})" if isinstance(c.tree, ast.BoolOp) else c.text for c in self.conditions)


def add_sizes(fields: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    """Returns a sample's fields with the sizes of its decoded picture, in pixels."""
    aspect = width / height if height else math.nan
    return {**fields, "width": width, "height": height, "pixels": width * height, "aspect": aspect}


# ---- 2. grammar ----

_ALLOWED = (
    "allowed are and, or, not, < <= > >= == !=, in (constants), + - * /, brackets, numbers, strings, True, False, "
    'field names, and field("a name") for one that is no plain word'
)
_SLIPS = {  # likely causes of a syntax error: a pattern in the expression, and the mend
    r"=>|=<|<>": "write >=, <= or !=",
    r"(?<![=<>!:])=(?!=)": "equality is written ==",
    r"&|\||!(?!=)|\b(AND|OR|NOT)\b": "write and, or, not",
    r"\n": "write it in one line",
}
_MENDS: dict[type[ast.expr], str] = {  # for expressions that Python parses but that are not allowed
    ast.Attribute: 'a name with a dot is written field("a.b")',
    ast.Subscript: "compare a field of the json itself, none within it",
    ast.Call: 'the only function is field("a name")',
    ast.Compare: "join conditions by and, or, not alone",
    ast.BoolOp: "join conditions by and, or, not alone",
    ast.Constant: "compare with a number, a text, True or False; a sample without the field is refused anyway",
}
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_COMPARISONS |= {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
_ARITHMETIC: dict[type, Callable[..., float]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}  # of floats: none can grow
_ARITHMETIC |= {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _mistake(text: str, what: str, mend: str) -> ValueError:
    return ValueError(f"filter {_shortened(text, 120)}: {what}; {mend}; {_ALLOWED}")


def _parse(text: str) -> ast.expr:
    """Parses an expression to a tree of allowed nodes, no deeper than MAX_DEPTH."""
    text = text.strip()
    if not text:
        raise _mistake(text, "is empty", "write a condition such as aesthetic >= 5.5")
    if len(text) > MAX_LENGTH:
        raise _mistake(text, f"is {len(text)} characters long", f"write at most {MAX_LENGTH}")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        place = f" at {_shortened(error.text[error.offset - 1 :], 30)}" if error.text and error.offset else ""
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
        mend = next((mend for slip, mend in _SLIPS.items() if re.search(slip, bare)), "write it as in Python")
        raise _mistake(text, f"{error.msg}{place}", mend) from error
    except (ValueError, RecursionError, MemoryError) as error:  # text that is not UTF-8; null bytes; nesting
        raise _mistake(text, f"cannot be parsed ({type(error).__name__})", "write plain text, less nested") from error
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise _mistake(text, f"is nested over {MAX_DEPTH} deep", "write it in fewer steps")
    _check_condition(tree, text)
    return tree


def _check_condition(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check_condition(value, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_condition(node.operand, text)
    elif isinstance(node, ast.Compare):
        for left, op, right in _pairs(node):
            rights = [right]
            if isinstance(op, (ast.In, ast.NotIn)):
                rights = getattr(right, "elts", [])
                if not rights or _names(right):
                    mend = 'write it as in license in ("cc0", "mit")'
                    raise _mistake(text, f"{_source(right)} is no list of constants", mend)
            elif type(op) not in _COMPARISONS:
                raise _mistake(text, f"{_source(node)} compares by is", "write == or !=")
            for value in (left, *rights):
                _check_value(value, text)
        if not _names(node):
            raise _mistake(text, f"{_source(node)} names no field", "compare a field, as in aesthetic >= 5.5")
    else:
        _check_value(node, text)
        mend = "compare it, as in aesthetic >= 5.5 or nsfw == False"
        raise _mistake(text, f"{_source(node)} is a value and no condition", mend)


def _check_value(node: ast.expr, text: str) -> None:
    if isinstance(node, (ast.BinOp, ast.UnaryOp)) and type(node.op) in _ARITHMETIC:
        for operand in _operands(node):
            _check_value(operand, text)
    elif _field_name(node) is None and not (isinstance(node, ast.Constant) and _usable(node.value)):
        mend = _MENDS.get(type(node), "write conditions such as aesthetic >= 5.5")
        raise _mistake(text, f"{_source(node)} is not allowed here", mend)


def _field_name(node: ast.AST) -> str | None:
    """Returns the field that a node stands for: `aesthetic`, or `field("clip score")`; None for any other node."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Name(id="field"), args=[ast.Constant(value=str(name))], keywords=[]):
            return name if name.strip() and name.isprintable() else None
    return None


def _names(node: ast.AST) -> tuple[str, ...]:
    """Returns the fields that a tree reads, in order."""
    if (name := _field_name(node)) is not None:
        return (name,)
    return tuple(dict.fromkeys(name for child in ast.iter_child_nodes(node) for name in _names(child)))


def _conjuncts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return [part for value in node.values for part in _conjuncts(value)]
    return [node]


def _operands(node: ast.BinOp | ast.UnaryOp) -> list[ast.expr]:
    return [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]


def _pairs(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """Splits a chain of comparisons: `0.5 < a <= 2` into `0.5 < a` and `a <= 2`."""
    return zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)


# ---- 3. evaluation ----


def _evaluate(node: ast.expr, fields: Mapping[str, Any]) -> bool | Refusal:
    """Evaluates a condition in Kleene's logic; a `Refusal` stands for unknown, and is returned where nothing else decides."""
    if isinstance(node, ast.UnaryOp):
        answer = _evaluate(node.operand, fields)
        return answer if isinstance(answer, Refusal) else not answer
    if isinstance(node, ast.BoolOp):
        answers = (_evaluate(value, fields) for value in node.values)
    else:
        assert isinstance(node, ast.Compare)
        answers = (_compare(left, op, right, fields) for left, op, right in _pairs(node))
    decisive = isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or)
    missing = None
    for answer in answers:
        if answer is decisive:
            return decisive
        if isinstance(answer, Refusal):
            missing = missing or answer
    return missing or not decisive


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, fields: Mapping[str, Any]) -> bool | Refusal:
    if isinstance(
        right, (ast.Tuple, ast.List, ast.Set)
    ):  # a number is compared with the numbers only, a text with the texts
        equal = [_compare(left, ast.Eq(), constant, fields) for constant in right.elts]
        known = [answer for answer in equal if not isinstance(answer, Refusal)]
        return any(known) == isinstance(op, ast.In) if known else equal[0]
    a, b = _value(left, fields), _value(right, fields)
    if isinstance(a, Refusal) or isinstance(b, Refusal):
        return a if isinstance(a, Refusal) else b
    texts = isinstance(a, str) and isinstance(b, str)
    x, y = _number(a), _number(b)
    if x is not None and y is not None and not (texts and isinstance(op, (ast.Eq, ast.NotEq))):
        a, b = x, y
    elif not texts:
        culprit, other = (left, right) if x is None else (right, left)
        culprit = other if isinstance(culprit, ast.Constant) else culprit
        return Refusal(
            _missing(culprit), f"a text and a number, {_shortened(a)} and {_shortened(b)}, cannot be compared"
        )
    return _COMPARISONS[type(op)](a, b)


def _value(node: ast.expr, fields: Mapping[str, Any]) -> Any:
    """Returns a bool, int, float or str; a `Refusal` where there is no value."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.BinOp, ast.UnaryOp)):
        values = [_value(operand, fields) for operand in _operands(node)]
        for operand, value in zip(_operands(node), values, strict=True):
            if isinstance(value, Refusal):
                return value
            if _number(value) is None:
                return Refusal(_missing(operand), f"{_shortened(value)} cannot be calculated with")
        try:
            result = _ARITHMETIC[type(node.op)](*(float(_number(value)) for value in values))
        except ArithmeticError:  # a division by zero, or an integer beyond all floats
            result = math.nan
        if _usable(result):
            return result
        return Refusal(_missing(node), f"{_source(node)} with {' and '.join(map(_shortened, values))} is no number")
    name, value = _look_up(_field_name(node) or "", fields)
    if _usable(value):
        return value
    if name in fields:
        return Refusal(_missing(node), f"{name} = {_shortened(value)}")
    return Refusal(
        _missing(node), f"the sample has {', '.join(_shortened(other, 20) for other in islice(fields, 8)) or 'none'}"
    )


def _missing(node: ast.expr) -> str:
    name = _field_name(node)
    return f"no value of {ast.unparse(node)}" if name is None else f"no field {name}"


def _look_up(name: str, fields: Mapping[str, Any]) -> tuple[str, Any]:
    """Looks a field up by its name, or else by an alias that has a value; returns the name found and the value."""
    for candidate in (name, *ALIASES.get(name, ())):
        if _usable(fields.get(candidate)):
            return candidate, fields[candidate]
    return name, fields.get(name)


def _usable(value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) and value == value  # NaN is not itself


def _number(value: Any) -> Any:
    """Returns a number unchanged, and a text that is one as a number; None for any other text."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            number = kind(value[:64])
        except ValueError:
            continue
        return number if len(value) <= 64 and number == number else None
    return None


def _shortened(value: object, limit: int = 60) -> str:
    if isinstance(value, str):
        return repr(value[:limit]) + "…" * (len(value) > limit)
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or _usable(value) or isinstance(value, float):
        return "null" if value is None else repr(value)
    return f"a {type(value).__name__}"


def _source(node: ast.expr) -> str:
    return _truncate(ast.unparse(node), 60)


def _truncate(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
