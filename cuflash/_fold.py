"""One query per head and several heads per head of k and v: the same as several queries of one head.

The heads of a group read the same keys. With a single query each (the next token of a sequence),
they become the rows of one tile: every key is read once instead of once per query head. Only
metadata changes; addresses and memory stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cuflash._problem import Problem
from cuflash._views import View

# Arrays with a row per query head; the others have none or belong to heads of k and v.
_ROWS = ("q", "out")


def folded(problem: Problem) -> Problem:
    """The Problem with a group's heads as rows, or the Problem itself where that changes meaning.

    Rows of one tile differ in their position and in what options give each head; so there may be no
    such option, and the one position must see all keys. Where q is broadcast along its heads there are no
    rows to step along, which tensor maps cannot say.
    """
    plain = not (problem.has_options or problem.alibi)
    group = problem.heads // max(1, problem.heads_kv)
    if not plain or problem.len_q != 1 or group < 2 or problem.direction != "forward":
        return problem
    if any(name == "q" and operand.strides[-3] == 0 for name, operand in problem.operands):
        return problem
    sees_first = problem.left is None or problem.q_offset <= problem.left
    sees_last = problem.right is None or problem.q_offset + problem.right >= problem.len_k - 1
    if not (sees_first and sees_last):
        return problem
    return replace(problem, heads=problem.heads_kv, len_q=group, left=None, right=None, q_offset=0)


def folded_views(views: Mapping[str, View], group: int) -> dict[str, View]:
    """The views (..., H, 1, D) as (..., Hkv, group, D)."""
    return dict(views) | {name: _folded_view(views[name], group) for name in _ROWS}


def _folded_view(view: View, group: int) -> View:
    *batch, heads, _, columns = view.shape
    *steps, head, _, column = view.strides
    shape = (*batch, heads // group, group, columns)
    return View(shape, (*steps, group * head, head, column), view.copied)
