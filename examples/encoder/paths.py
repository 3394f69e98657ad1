"""Pictures of the Pathfinder kind: two dots, on one dashed path or on two, among other paths.

Both dots stand at ends of long paths, and for every picture there is one with the other label and
nearly the same distance between its dots: what has to be found is whether a path joins them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BACKGROUND, DASH, DOT = 0, 1, 2
# Headings a walk tries, in this order, when it would leave the picture or touch another path.
_TURNS = np.array([0, 0.5, -0.5, 1.0, -1.0, 1.6, -1.6])


@dataclass(frozen=True)
class Scene:
    """What a picture holds.

    Attributes
    ----------
    side : int
        The picture has side * side pixels.
    dashes : int
        Of each of the two long paths, at which the dots stand.
    distractors, short : int
        Further paths, and how many dashes each has.
    dash, gap : int
        Lengths in pixels along the path.
    radius : int
        Of a dot, in pixels: 0 for one pixel.
    curl : float
        Standard deviation of the turn at every pixel, in radians.

    Notes
    -----
    Linsley, Kim, Veerabadran, Serre, "Learning long-range spatial dependencies with horizontal gated
    recurrent units" (arXiv:1805.08315, 2018), section 3, for the task; Tay et al., "Long Range
    Arena" (arXiv:2011.04006, 2020), section 2.2.5, for pixels as a sequence (Pathfinder, Path-X).
    """

    side: int
    dashes: int
    distractors: int
    short: int = 2
    dash: int = 2
    gap: int = 1
    radius: int = 0
    curl: float = 0.25

    @property
    def reach(self) -> int:
        """Pixels at most so far apart, in each direction, belong to one path; others never are."""
        return self.gap + 1

    @property
    def separation(self) -> int:
        """Least distance in rows or columns between the middle lines of two paths."""
        return self.reach + 1 + 2 * self.radius

    def steps(self, dashes: int) -> int:
        """Pixels along a path that begins and ends with a dash."""
        return dashes * (self.dash + self.gap) - self.gap

    @property
    def tolerance(self) -> float:
        """Largest difference of the distances between the dots of the two labels."""
        return self.side / 32


SCENES = {
    16: Scene(side=16, dashes=5, distractors=2),
    32: Scene(side=32, dashes=8, distractors=6, short=3, dash=3),
    128: Scene(side=128, dashes=14, distractors=10, short=5, dash=6, gap=2, radius=2, curl=0.1),
    256: Scene(side=256, dashes=18, distractors=14, short=6, dash=9, gap=3, radius=3, curl=0.06),
}


def pictures(scene: Scene, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures, half of them with both dots on one path.

    Parameters
    ----------
    scene : Scene
    count : int
    rng : Generator

    Returns
    -------
    pixels : uint8 array (count, side, side)
        BACKGROUND, DASH or DOT.
    labels : int64 array (count,)
        1 where a path joins the dots.

    Examples
    --------
    >>> pixels, labels = pictures(SCENES[16], 3, np.random.default_rng(0))
    >>> pixels.shape, labels.shape
    ((3, 16, 16), (3,))
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    missing = count
    while missing > 0:
        pixels, labels = _some(scene, max(8, 2 * missing), rng)
        found.append((pixels[:missing], labels[:missing]))
        missing -= len(found[-1][0])
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


def _some(scene: Scene, tries: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As `pictures`; at most so many, since not every try finds room or fitting dots."""
    taken = np.zeros((tries, scene.side, scene.side), bool)
    drawn = np.zeros_like(taken)
    ends: list[np.ndarray] = []
    for number in range(2 + scene.distractors):
        steps = scene.steps(scene.dashes if number < 2 else scene.short)
        free = ~taken
        if number == 1:
            free &= _ring(ends[0], scene, rng)
        cells, good = _walk(free, taken, steps, scene, rng)
        if number < 2:
            keep = np.flatnonzero(good)
            taken, drawn, cells = taken[keep], drawn[keep], cells[keep]
            ends = [pair[keep] for pair in ends] + [cells[:, [0, -1]]]
            good = good[keep]
        _draw(drawn, taken, cells, good, scene)
    return _dots(drawn, np.stack(ends, axis=1), scene, rng)


def _ring(ends: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Pixels as far from one of two ends (n, 2, 2) as that is from the other.

    Where the second path begins, so that few tries are lost because no two distances agree.
    """
    rows, grid = np.arange(len(ends)), np.arange(scene.side)
    far = np.hypot(*(ends[:, 0] - ends[:, 1]).T)
    at = ends[rows, rng.integers(0, 2, len(ends))][:, :, None, None]
    return abs(np.hypot(grid[:, None] - at[:, 0], grid - at[:, 1]) - far[:, None, None]) <= (
        scene.tolerance
    )


def _walk(
    free: np.ndarray, taken: np.ndarray, steps: int, scene: Scene, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, steps, 2) of a smooth path per picture that begins where it is free, and whether
    it found room.
    """
    count, side = len(taken), scene.side
    free = free.reshape(count, -1)
    good = np.asarray(free.any(axis=1))
    start = np.argmax(free * rng.random(free.shape, np.float32), axis=1)
    places = np.stack(np.divmod(start, side), axis=1).astype(np.float64)
    heading = rng.uniform(0, 2 * math.pi, count)
    cells = np.empty((count, steps, 2), np.int64)
    cells[:, 0] = places
    rows = np.arange(count)
    for step in range(1, steps):
        heading = heading + scene.curl * rng.standard_normal(count)
        sign = rng.choice([-1, 1], count)[:, None]
        headings = heading[:, None] + sign * _TURNS
        ahead = places[:, None] + np.stack([np.sin(headings), np.cos(headings)], axis=-1)
        pixel = np.floor(ahead + 0.5).astype(np.int64)
        inside = ((pixel >= 0) & (pixel < side)).all(axis=-1)
        pixel = pixel.clip(0, side - 1)
        possible = inside & ~taken[rows[:, None], pixel[..., 0], pixel[..., 1]]
        first = possible.argmax(axis=1)
        good &= possible[rows, first]
        heading, places = headings[rows, first], ahead[rows, first].clip(0, side - 1)
        cells[:, step] = pixel[rows, first]
    return cells, good


def _draw(
    drawn: np.ndarray, taken: np.ndarray, cells: np.ndarray, good: np.ndarray, scene: Scene
) -> None:
    """Add the paths that found room, and what is too near to them, in place."""
    rows = np.flatnonzero(good)
    dashed = np.arange(cells.shape[1]) % (scene.dash + scene.gap) < scene.dash
    on = cells[rows][:, dashed]
    drawn[rows[:, None], on[..., 0], on[..., 1]] = True
    near = np.zeros((len(rows), *drawn.shape[1:]), bool)
    near[np.arange(len(rows))[:, None], cells[rows, :, 0], cells[rows, :, 1]] = True
    for axis in (1, 2):
        near = _spread(near, axis, scene.separation - 1)
    taken[rows] |= near


def _spread(marked: np.ndarray, axis: int, distance: int) -> np.ndarray:
    """What is at most so far from a mark along an axis."""
    marked = np.moveaxis(marked, axis, -1)
    result = marked.copy()
    for shift in range(1, distance + 1):
        result[..., shift:] |= marked[..., :-shift]
        result[..., :-shift] |= marked[..., shift:]
    return np.moveaxis(result, -1, axis)


def _dots(
    drawn: np.ndarray, ends: np.ndarray, scene: Scene, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Dots at two of the four ends (n, path, end, 2), where both labels have a like distance."""
    one = np.array([[[0, 0], [0, 1]], [[1, 0], [1, 1]]])
    two = np.array([[[0, a], [1, b]] for a in (0, 1) for b in (0, 1)])

    def pairs(choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = ends[:, choices[..., 0], choices[..., 1]]  # (n, choices, 2, 2)
        return places, np.hypot(*np.moveaxis(places[:, :, 0] - places[:, :, 1], -1, 0))

    (joined, near), (apart, far) = pairs(one), pairs(two)
    difference = abs(near[:, :, None] - far[:, None, :]).reshape(len(ends), -1)
    fits = difference <= scene.tolerance
    choice = np.argmax(fits * rng.random(fits.shape), axis=1)
    keep = np.flatnonzero(fits.any(axis=1))
    labels = rng.integers(0, 2, len(keep))
    which = np.divmod(choice[keep], far.shape[1])
    dots = np.where(labels[:, None, None] == 1, joined[keep, which[0]], apart[keep, which[1]])
    pixels = np.where(drawn[keep], DASH, BACKGROUND).astype(np.uint8)
    grid = np.arange(scene.side)
    for dot in (dots[:, 0], dots[:, 1]):
        square = (grid[:, None] - dot[:, 0, None, None]) ** 2 + (grid - dot[:, 1, None, None]) ** 2
        pixels[square <= scene.radius**2] = DOT
    return pixels, labels
