"""Are the gradients right? Finite differences in float64, through attention with every option and a transformer.

A scalar loss is moved along a random direction of one argument at a time; how fast it changes, by
central differences at two steps, must be the product of that direction with the gradient that the
pullback returned. Inputs: q, k, v, bias, alibi_slopes, sinks, arrays of score expressions, each
through both results, out and lse; then all weights of a two-layer transformer in plain NumPy/CuPy.

    python examples/gradcheck.py     # --device cupy on a GPU; a second or two on a CPU

`relative_error` is the helper to use for a loss of one's own. Prints a line per case with its worst
gradient; the largest error of all is 2e-09 on NumPy. Exit status 1 when one is 1e-7 or more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import cuflash
from gpt.layers import gelu, layer_norm, linear, namespace

ALLOWED = 1e-7
STEP = 4e-3  # in the norm of an argument whose elements are of order 1; see relative_error

Arrays = Mapping[str, Any]


def relative_error(
    loss: Callable[[Arrays], Any],
    arguments: Arrays,
    name: str,
    gradient: Any,
    *,
    seed: int = 0,
    step: float = STEP,
) -> float:
    """How far the gradient of one argument is from what finite differences say, along one direction.

    Parameters
    ----------
    loss : callable
        Arguments by name -> float64 scalar.
    arguments : mapping of str to float64 arrays
        Where; they are not changed.
    name : str
        The one that moves.
    gradient : array
        Of loss with respect to `arguments[name]`.
    seed : int
        Of the direction.
    step : float
        Length of the larger of two steps.

    Returns
    -------
    float
        |differences - product| over the larger of the two; inf where one of them is no finite number
        or both are 0, since then nothing was compared.

    Notes
    -----
    Central differences of two steps cancel each other's error of second order (Richardson, 1911):
    what is left is step**4 times a fifth derivative, 1e-10 here, and the rounding of the loss
    over the step, 1e-13. A direction has a part in every element, so a single wrong element is
    seen when it is wrong by 1e-7 of the whole gradient's norm.

    Examples
    --------
    >>> x = np.array([1.0, 2.0])
    >>> cube = lambda arguments: (arguments["x"] ** 3).sum()
    >>> relative_error(cube, {"x": x}, "x", 3 * x**2) < 1e-9
    True
    >>> relative_error(cube, {"x": x}, "x", 3.001 * x**2) > 1e-7
    True
    """
    xp, x = namespace(arguments[name]), arguments[name]
    direction = np.random.default_rng(seed).standard_normal(x.shape)
    direction = xp.asarray(direction / np.linalg.norm(direction))

    def slope(length: float) -> float:
        ends = [
            float(loss({**arguments, name: x + signed * direction})) for signed in (length, -length)
        ]
        return (ends[0] - ends[1]) / (2 * length)

    differences = (4 * slope(step / 2) - slope(step)) / 3
    product = float((gradient * direction).sum())
    size = max(abs(differences), abs(product))
    compared = size > 0 and np.isfinite(differences) and np.isfinite(product)
    return abs(differences - product) / size if compared else np.inf


# ---- attention


@dataclass(frozen=True)
class Case:
    """One kind of call.

    Attributes
    ----------
    name : str
        Printed.
    arrays : mapping
        What is differentiated: q, k, v, bias, alibi_slopes, sinks, and arrays of the score.
    options : mapping
        The other options.
    score : str
        Code of a score expression, or "".
    ends : tuple of arrays
        Cumulative lengths of queries and keys, for packed sequences.
    out : bool
        Whether the loss looks at out, or at lse alone.
    """

    name: str
    arrays: Arrays
    options: Mapping[str, Any] = field(default_factory=dict)
    score: str = ""
    ends: tuple[Any, ...] = ()
    out: bool = True

    @property
    def wrt(self) -> tuple[str, ...]:
        """What the loss depends on: lse does not on v."""
        return tuple(self.arrays) if self.out else ("q", "k")

    def vjp(self, arrays: Arrays) -> Any:
        """((out, lse), pullback)."""
        given = {**arrays, **self.options}
        if self.score:
            inside = {name: given.pop(name) for name in ("table", "decay")}
            given["score_mod"] = cuflash.ScoreMod(self.score, inside)
        places = [given.pop(name) for name in ("q", "k", "v")]
        run = cuflash.attention_varlen_vjp if self.ends else cuflash.attention_vjp
        return run(*places, *self.ends, **given, wrt=self.wrt, return_lse=True)

    def errors(self, xp: Any = np, seed: int = 0) -> dict[str, float]:
        """Relative error of each gradient by name."""
        case = replace(self, ends=tuple(map(xp.asarray, self.ends)), options=dict(self.options))
        for name, value in case.options.items():
            if isinstance(value, np.ndarray):
                case.options[name] = xp.asarray(value)
        arrays = {name: xp.asarray(x) for name, x in self.arrays.items()}
        (out, lse), pullback = case.vjp(arrays)
        rng = np.random.default_rng(seed)
        dout = xp.asarray(self.out * rng.standard_normal(out.shape))
        # A row that sees no key has lse = -inf whatever its query is: nothing to differentiate.
        weight = xp.asarray(rng.standard_normal(lse.shape))
        dlse = xp.where(xp.isfinite(lse), weight, 0)

        def loss(moved: Arrays) -> Any:
            (y, logs), _ = case.vjp(moved)
            return (y * dout).sum() + (xp.where(dlse == 0, 0, logs) * dlse).sum()

        found = pullback(dout, dlse)
        gradients = {**found._asdict(), **(found.score_params or {})}
        return {
            name: relative_error(loss, arrays, name, gradients[name], seed=seed)
            for name in self.wrt
        }


def cases(seed: int = 0, queries: int = 11, keys: int = 19) -> Iterator[Case]:
    """Every option once, most of them together at the end; 4 heads of queries on 2 of keys.

    Examples
    --------
    >>> max(next(cases()).errors().values()) < 1e-7
    True
    """
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    q, k, v = normal((2, 4, queries, 8)), normal((2, 2, keys, 8)), normal((2, 2, keys, 6))
    base = {"q": q, "k": k, "v": v}
    dense = rng.random((4, queries, keys)) < 0.6
    dense[0, 3] = False  # a row that sees nothing
    blocks = cuflash.BlockMask.sliding_window((7, 2), shape=(queries, keys), block_size=16)
    slopes, sinks = {"alibi_slopes": 0.1 + rng.random(4)}, {"sinks": normal(4)}
    bias = {"bias": normal((1, 4, queries, keys))}
    inside = {"table": normal((4, queries + keys)), "decay": rng.random(4)}
    score = f"s * (1 + 0.1f * tanh(s)) + table[h][j - i + {queries}] - decay[h] * log1p(abs(i - j))"
    kept = {"dropout_p": 0.3, "seed": 5}

    yield Case("plain", base)
    yield Case("lse alone", base, out=False)
    yield Case("causal, some rows see nothing", base, {"causal": True, "q_offset": -3})
    yield Case("window", base, {"window": (4, 1)})
    yield Case("bool mask", base, {"mask": dense})
    yield Case("BlockMask", base, {"mask": blocks})
    yield Case("bias of every logit", {**base, **bias})
    yield Case("bias of the keys", {**base, "bias": normal((2, 1, 1, keys))}, {"causal": True})
    yield Case("softcap", base, {"softcap": 1.5})
    yield Case("ALiBi", {**base, **slopes}, {"causal": True})
    yield Case("sinks", {**base, **sinks})
    yield Case("negative scale", base, {"scale": -0.7})
    yield Case("dropout", base, kept)
    swapped = {name: np.ascontiguousarray(x.swapaxes(-2, -3)) for name, x in base.items()}
    yield Case("layout LHD", swapped, {"layout": "LHD", "deterministic": True})
    packed = {
        name: x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3]) for name, x in base.items()
    }
    ends = np.array([0, 5, 5, 2 * queries]), np.array([0, 8, 20, 2 * keys - 1])
    yield Case("packed sequences", {**packed, **sinks}, {"causal": True}, ends=ends)
    most: dict[str, Any] = {"causal": True, "mask": dense, "softcap": 2.0, **kept}
    yield Case("all but score_mod", {**base, **bias, **slopes, **sinks}, most)
    yield Case("score_mod", {**base, **inside}, score=score)
    yield Case("everything", {**base, **bias, **slopes, **sinks, **inside}, most, score)


# ---- a transformer


def initial(seed: int = 0, layers: int = 2, heads: int = 2, width: int = 8) -> dict[str, Any]:
    """Input and weights of a small transformer, all of order 1 so that nothing hides."""
    normal = np.random.default_rng(seed).standard_normal
    shapes = {
        **{"norm1": (2, width), "qkv": (width, 3 * width), "qkv_bias": (3 * width,)},
        **{"slopes": (heads,), "sinks": (heads,), "proj": (width, width), "proj_bias": (width,)},
        **{"norm2": (2, width), "fc": (width, 4 * width), "fc_bias": (4 * width,)},
        **{"out": (4 * width, width), "out_bias": (width,)},
    }
    found: dict[str, Any] = {"x": normal((3, 10, width))}
    for layer in range(layers):
        for name, shape in shapes.items():
            # Projections keep the size of what they project.
            spread = shape[0] ** -0.5 if len(shape) == 2 and shape[0] > 2 else 0.5
            found[f"{layer}.{name}"] = spread * normal(shape)
        found[f"{layer}.norm1"][0] += 1
        found[f"{layer}.norm2"][0] += 1
    return found


def block(x: Any, weight: Callable[[str], Any]) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """x + attention(norm(x)), then + mlp(norm of that); the pullback gives gradients by name."""
    xp, heads = namespace(x), len(weight("sinks"))
    n1, back_n1 = layer_norm(x, *weight("norm1"))
    qkv, back_qkv = linear(n1, weight("qkv"), weight("qkv_bias"))
    parts = qkv.reshape(*x.shape[:2], 3, heads, -1)
    y, back_y = cuflash.attention_vjp(
        *(parts[:, :, n] for n in range(3)),
        layout="LHD",
        causal=True,
        alibi_slopes=weight("slopes"),
        sinks=weight("sinks"),
        wrt=("q", "k", "v", "alibi_slopes", "sinks"),
    )
    proj, back_proj = linear(y.reshape(x.shape), weight("proj"), weight("proj_bias"))
    middle = x + proj
    n2, back_n2 = layer_norm(middle, *weight("norm2"))
    wide, back_fc = linear(n2, weight("fc"), weight("fc_bias"))
    act, back_act = gelu(wide)
    add, back_out = linear(act, weight("out"), weight("out_bias"))

    def pullback(dz: Any) -> dict[str, Any]:
        d: dict[str, Any] = {}
        dact, d["out"], d["out_bias"] = back_out(dz)
        dn2, d["fc"], d["fc_bias"] = back_fc(back_act(dact))
        dmiddle, dgain, dshift = back_n2(dn2)
        d["norm2"] = xp.stack([dgain, dshift])
        dmiddle = dmiddle + dz
        dy, d["proj"], d["proj_bias"] = back_proj(dmiddle)
        grads = back_y(dy.reshape(y.shape))
        d["slopes"], d["sinks"] = grads.alibi_slopes, grads.sinks
        dqkv = xp.stack([grads.q, grads.k, grads.v], axis=2)
        dn1, d["qkv"], d["qkv_bias"] = back_qkv(dqkv.reshape(qkv.shape))
        dx, dgain, dshift = back_n1(dn1)
        d["norm1"], d["x"] = xp.stack([dgain, dshift]), dx + dmiddle
        return d

    return middle + add, pullback


def transformer(arrays: Arrays) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Half the squares of what the blocks make of x, per element; loss and pullback."""
    x, pullbacks = arrays["x"], []
    layers = 1 + max(int(name.split(".")[0]) for name in arrays if name != "x")
    for layer in range(layers):
        x, back = block(x, lambda name, layer=layer: arrays[f"{layer}.{name}"])
        pullbacks.append(back)

    def pullback() -> dict[str, Any]:
        found, dx = {}, x / x.size
        for layer in reversed(range(layers)):
            d = pullbacks[layer](dx)
            dx = d.pop("x")
            found |= {f"{layer}.{name}": gradient for name, gradient in d.items()}
        return {**found, "x": dx}

    return (x * x).sum() / (2 * x.size), pullback


def transformer_errors(
    xp: Any = np, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Relative error of the gradient of the input and every weight, or of those in `names`."""
    arrays = {name: xp.asarray(x) for name, x in initial(seed).items()}
    gradients = transformer(arrays)[1]()
    loss = lambda moved: transformer(moved)[0]  # noqa: E731
    return {
        name: relative_error(loss, arrays, name, gradients[name], seed=seed)
        for name in (names or arrays)
    }


# ---- the table


def row(name: str, errors: Mapping[str, float]) -> str:
    """One line: the worst of a case's gradients first."""
    worst = max(errors, key=errors.__getitem__)
    verdict = "ok" if errors[worst] < ALLOWED else "WRONG"
    return f"{name:30} {errors[worst]:7.0e}  {verdict:5}  {len(errors):2} gradients, worst {worst}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per case; 0 when all gradients are right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["numpy", "cupy"], default="numpy")
    parser.add_argument("--seed", type=int, default=0, help="of data and directions (0)")
    options = parser.parse_args(arguments)
    xp: Any = np
    if options.device == "cupy":
        import cupy as xp
    print(
        f"relative error of directional derivatives in float64, {options.device}; below {ALLOWED}"
    )
    worst = 0.0
    for case in cases(options.seed):
        errors = case.errors(xp, options.seed)
        print(row(case.name, errors), flush=True)
        worst = max(worst, *errors.values())
    errors = transformer_errors(xp, options.seed)
    print(row("transformer of two layers", errors))
    worst = max(worst, *errors.values())
    print(f"largest {worst:.0e}")
    return 0 if worst < ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
