"""Names of measures, such as 'RR(rel=2)@10', and what ir_measures computes by them."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=256)
def usable(name: str, min_relevance: int) -> Any:
    """The ir_measures object of a name, after a trial on one query with two passages.

    min_relevance: the lowest relevant grade of a binary measure whose name gives none. Raises
    ValueError for an unknown measure, and for one that no library which is here can take.
    """
    import ir_measures

    measure = _measure(name, min_relevance)
    able = [p for p in ir_measures.DefaultPipeline.providers if p.supports(measure)]
    here = [p for p in able if p.is_available()]
    if here and here[0].NAME == "gdeval":
        reason = "gdeval takes it, which asks for query ids that are whole numbers"
    elif not here:
        wanted = [f"{p.NAME} ({p.install_instructions()})" for p in able]
        reason = f"it needs {' or '.join(wanted)}" if wanted else "no library takes it in this form"
    else:
        try:
            grades, ranks = {"query": {"a": 1, "b": 0}}, {"query": {"a": -1.0, "b": -2.0}}
            list(ir_measures.iter_calc([measure], grades, ranks))
            return measure
        except Exception as error:  # a library may fail in any way
            reason = f"{here[0].NAME} refuses it ({type(error).__name__}: {_first_line(error)})"
    raise ValueError(
        f"measure {name!r} cannot be taken: {reason}; expected another one, such as 'RR@10' or "
        "'nDCG@10'; set `measures`"
    )


def _measure(name: str, min_relevance: int) -> Any:
    """The ir_measures object of a name; raises ValueError for a wrong name or cutoff."""
    if min_relevance < 1:
        raise ValueError(f"min_relevance must be at least 1; got {min_relevance}")
    try:
        measure = _read(name)
        if "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
            measure = measure(rel=min_relevance)
        measure.validate_params()
        if measure.params.get("cutoff", 1) < 1:
            raise ValueError("a cutoff below 1")
    except (ValueError, AssertionError) as error:
        # In the library's message, an object without a name stands for a parameter that is missing.
        reason = re.sub(r"invalid param (\w+)=<object .*>", r"it needs \1", _first_line(error))
        raise ValueError(
            f"unknown measure {name!r} ({reason}): expected a name of ir_measures such as "
            "'Success@5', 'RR@10', 'nDCG@10', 'R@100', or 'AnswerHits@5'; set `measures`"
        ) from error
    return measure


def _read(name: str) -> Any:
    """The ir_measures object of NAME, NAME@k or NAME(setting=value, ...)@k.

    ir_measures.parse_measure reads the same, but up to 0.4.3 it fails where Python has no ast.Num,
    which is gone from 3.14 on.
    """
    from ir_measures.measures import registry

    settings: list[ast.keyword] = []
    try:
        node: ast.expr = ast.parse(name, mode="eval").body
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            settings, node = [ast.keyword("@", node.right)], node.left
        if isinstance(node, ast.Call) and not node.args:
            settings, node = node.keywords + settings, node.func
        if not isinstance(node, ast.Name):
            raise ValueError(f"{ast.unparse(node)} is no name")
        values = {str(setting.arg): ast.literal_eval(setting.value) for setting in settings}
    except (SyntaxError, ValueError) as error:
        raise ValueError("a measure is written as RR, RR@10 or RR(rel=2)@10") from error
    if node.id not in registry:
        raise ValueError(f"measure not found: {node.id}")
    measure = registry[node.id]
    return measure(**{measure.AT_PARAM if key == "@" else key: values[key] for key in values})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
