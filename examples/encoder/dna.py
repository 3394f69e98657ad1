"""A complete bacterial chromosome that pip can install, hidden bases, and tables of contexts.

Corynebacterium diphtheriae NCTC 11397 (RefSeq NZ_LN831026.1), 2,463,666 bases. The public sequence
databases put no restriction on its use. The package pyrodigal (3 MB, GPL-3.0-or-later) carries it
among its test data as 0.7 MB of compressed FASTA, which is read from where pip put it; nothing of
the package is imported or copied.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

BASES = "ACGT"
HIDDEN = 4  # the token in the place of a base that is to be guessed
_FILE = "tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"


def chromosome() -> np.ndarray:
    """The bases in order, as uint8 indices into BASES.

    Raises
    ------
    FileNotFoundError
        The package is not installed, or a version without the file.
    """
    found = importlib.util.find_spec("pyrodigal")
    path = Path() if found is None or found.origin is None else Path(found.origin).parent / _FILE
    if not path.is_file():
        raise FileNotFoundError(
            "pyrodigal's test data, which holds the chromosome, is not installed.\n"
            "  Way out: pip install pyrodigal==3.7.1"
        )
    with gzip.open(path, "rt") as lines:
        return parse(lines.read())


def parse(fasta: str) -> np.ndarray:
    """uint8 indices into BASES of the first record of a FASTA text.

    Examples
    --------
    >>> parse(">a name\\nACG\\nT\\n>another\\nA")
    array([0, 1, 2, 3], dtype=uint8)
    """
    _, _, body = fasta.split(">", 2)[1].partition("\n")
    letters = np.frombuffer("".join(body.split()).upper().encode(), np.uint8)
    codes = np.full(256, len(BASES), np.uint8)
    codes[np.frombuffer(BASES.encode(), np.uint8)] = np.arange(len(BASES))
    bases = codes[letters]
    if len(bases) == 0 or bases.max() == len(BASES):
        raise ValueError(f"a FASTA record of {len(bases)} letters that are not all in {BASES}.")
    return bases


def hide(
    bases: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Bases with a share of them replaced by HIDDEN, and the places where.

    Notes
    -----
    Devlin, Chang, Lee, Toutanova, "BERT" (arXiv:1810.04805, 2018), section 3.1, without the tenths
    that it leaves or replaces at random.

    Examples
    --------
    >>> hide(np.zeros(4, np.uint8), 0.5, np.random.default_rng(0))
    (array([0, 4, 4, 0], dtype=uint8), array([1, 2]))
    """
    places = np.sort(rng.permutation(len(bases))[: round(share * len(bases))])
    shown = bases.copy()
    shown[places] = HIDDEN
    return shown, places


class ContextTable:
    """How often each base stands between each `side` bases before and after it.

    The baseline that a model has to beat: it is given the same hidden bases, and counts on all of
    the training part.

    Parameters
    ----------
    side : int
        0 for how often each base is there at all.
    bases : uint8 array (n,)
        To count on.
    share : float
        Of the bases that are hidden, as where it will be used.
    rng : Generator
    rounds : int
        Different choices of hidden bases.

    Examples
    --------
    >>> bases = np.tile(np.arange(4, dtype=np.uint8), 500)
    >>> table = ContextTable(1, bases, 0.1, np.random.default_rng(0))
    >>> shown, places = hide(bases, 0.1, np.random.default_rng(1))
    >>> table.loss(shown, bases, places) < 0.1
    True
    """

    def __init__(
        self,
        side: int,
        bases: np.ndarray,
        share: float,
        rng: np.random.Generator,
        rounds: int = 2,
    ) -> None:
        self.side = side
        self.counts = np.ones((5 ** (2 * side), 4))
        for _ in range(rounds):
            shown, _ = hide(bases, share, rng)
            code = 4 * self._contexts(shown) + bases
            self.counts += np.bincount(code, minlength=self.counts.size).reshape(-1, 4)

    def _contexts(self, shown: np.ndarray) -> np.ndarray:
        """A number for what is around each place; beyond the ends all is hidden."""
        padded = np.pad(shown.astype(np.int32), self.side, constant_values=HIDDEN)
        code = np.zeros(len(shown), np.int32)
        for offset in range(2 * self.side + 1):
            if offset != self.side:
                code = 5 * code + padded[offset : offset + len(shown)]
        return code

    def loss(self, shown: np.ndarray, bases: np.ndarray, places: np.ndarray) -> float:
        """Mean negative log-likelihood of the bases at the places, in nats."""
        counts = self.counts[self._contexts(shown)[places]]
        chosen = counts[np.arange(len(places)), bases[places]]
        return float(-np.log(chosen / counts.sum(axis=1)).mean())
