"""The language model trained end to end: it learns, plain attention agrees, a resumed run is the same run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

import train_gpt
from gpt.data import Corpus, corpus
from gpt.plot import loss_curves
from gpt.training import History, Training

ROOT = Path(__file__).resolve().parents[1]


# ---- text


def test_corpus_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"ab" * 500)
    assert corpus(str(file), 10).unigram_entropy == pytest.approx(math.log(2))
    file.write_bytes(bytes(range(250)) * 4)
    text = corpus(str(file), 10)
    assert (len(text.train), len(text.test)) == (900, 100)
    tokens, targets = text.batch(3, 10, 0, 5)
    assert tokens.shape == targets.shape == (3, 10)
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(tokens, text.batch(3, 10, 0, 5)[0])
    assert (tokens != text.batch(3, 10, 0, 6)[0]).any()
    (first, _), (_, last) = text.test_batches(2, 2, 10)
    assert first[0, 0] == 150 and last[-1, -1] == 249  # both ends of the last 100 bytes
    with pytest.raises(ValueError, match="has 100 bytes, and a window is 101 long"):
        corpus(str(file), 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["docs", "source"])
def test_the_standard_library_is_a_text(name: str) -> None:
    text = corpus(name, 1024)
    assert len(text.train) > 1_000_000 and len(text.test) > 50_000
    assert 2.5 < text.unigram_entropy < 4  # of English and of programs
    train, test = (set(part.tobytes().split(b"\n\n")) for part in (text.train, text.test))
    assert not train & test


# ---- training


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a megabyte of the manual: faster to read than every module."""
    file = tmp_path_factory.mktemp("text") / "manual.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file


def command(text: Path, out: Path, *more: str) -> list[str]:
    """A training of seconds."""
    sizes = {"layers": 2, "heads": 2, "width": 32, "context": 32, "batch": 16, "steps": 120}
    sizes |= {"tests": 2, "rate": 0.01, "sample": 20, "checkpoint-every": 50}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    return [f"--text={text}", f"--out={out}", *options, *more]


@pytest.fixture(scope="module")
def compared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and printed lines of a comparison."""
    out = tmp_path_factory.mktemp("compared")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_gpt.py"), *command(text, out, "--compare")],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_training_learns_and_the_attentions_agree(compared: tuple[Path, str]) -> None:
    out, printed = compared
    loss, entropy = map(
        float, re.findall(r"test loss ([\d.]+), unigram entropy ([\d.]+)", printed)[0]
    )
    assert loss < entropy - 0.3
    apart = re.search(r"difference of the running loss: (\S+) \(allowed 0.001\)", printed)
    assert apart is not None and 0 < float(apart[1]) < train_gpt.TOLERANCE
    rows = re.findall(r"^(cuflash|plain) .* ([\d.]+) MB$", printed, re.M)
    memory = {name: float(megabytes) for name, megabytes in rows}
    assert set(memory) == {"cuflash", "plain"} and min(memory.values()) > 0
    histories = [_saved(out / f"{name}.npz") for name in ("cuflash", "plain")]
    assert histories[0]["losses"] != histories[1]["losses"]  # two computations, not one


def test_the_curve_is_drawn(compared: tuple[Path, str]) -> None:
    out, printed = compared
    assert f"loss curve: {out / 'loss.svg'}" in printed
    drawn = "".join(ElementTree.parse(out / "loss.svg").getroot().itertext())
    for label in ("plain, train", "cuflash, train", "unigram entropy"):
        assert label in drawn


def test_resuming_is_exact(compared: tuple[Path, str], text: Path, tmp_path: Path) -> None:
    out, _ = compared
    assert train_gpt.main(command(text, tmp_path, "--until=70")) == 0
    assert _saved(tmp_path / "cuflash.npz")["step"] == 70
    assert train_gpt.main(command(text, tmp_path, "--resume")) == 0
    with np.load(out / "cuflash.npz") as whole, np.load(tmp_path / "cuflash.npz") as resumed:
        assert set(whole) == set(resumed)
        for name in set(whole) - {"state"}:
            np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    whole, resumed = _saved(out / "cuflash.npz"), _saved(tmp_path / "cuflash.npz")
    for name in ("step", "settings", "losses", "tests"):
        assert whole[name] == resumed[name], name
    with pytest.raises(SystemExit, match=r"written with rate=0.01, and this run has rate=0.02"):
        train_gpt.main([*command(text, tmp_path, "--resume"), "--rate=0.02"])


def test_sampling(compared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = compared
    said = printed[printed.index("\nThe ") + 1 : printed.rindex("\n\n")]
    assert len(said.encode()) >= len("The ") + 20
    options = train_gpt.parse(["--layers=1", "--heads=1", "--width=8", "--context=5"])
    nothing = Corpus(np.zeros(9, np.uint8), np.zeros(9, np.uint8))
    training = Training(train_gpt.settings(options, "cuflash", nothing), nothing)
    # Weights that make one answer certain: after any byte comes "!".
    weights = training.model.weights
    weights["ln_f.weight"][...] = 0
    weights["ln_f.bias"][...] = weights["wte"][ord("!")] * 1e6
    assert training.sample("abc", 9, temperature=1.0) == "abc" + 9 * "!"


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_training_in_16_bit_attention(precision: str, text: Path, tmp_path: Path) -> None:
    runs = {
        name: train_gpt.main(command(text, tmp_path / name, "--until=40", f"--precision={name}"))
        for name in ("float32", precision)
    }
    assert set(runs.values()) == {0}
    losses = [np.array(_saved(tmp_path / name / "cuflash.npz")["losses"]) for name in runs]
    # Rounding of attention by 2^-8 changes a loss of 5 by much less than that.
    assert 0 < abs(losses[0] - losses[1]).max() < 5 * 2.0**-8


def test_no_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit, match=r"(?s)CuPy finds no GPU.*--device numpy"):
        train_gpt.main([*command(text, tmp_path), "--device=cupy"])


def test_no_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = loss_curves(tmp_path / "loss.svg", {"plain": History([1.0], [(1, 1.0)])}, 3.0)
    assert "pip install matplotlib" in said and not (tmp_path / "loss.svg").exists()


@pytest.mark.gpu
def test_training_on_a_gpu(text: Path, tmp_path: Path) -> None:
    for precision in ("float16", "bfloat16"):
        more = ("--device=cupy", f"--precision={precision}", "--compare")
        assert train_gpt.main(command(text, tmp_path / precision, *more)) == 0
        whole = _saved(tmp_path / precision / "cuflash.npz")
        resumed = tmp_path / f"{precision}-resumed"
        for step in ("--until=70", "--resume"):
            assert train_gpt.main([*command(text, resumed, *more[:2]), step]) == 0
        assert _saved(resumed / "cuflash.npz")["losses"] == whole["losses"]


def _saved(path: Path) -> dict[str, Any]:
    """Settings and history in a checkpoint."""
    with np.load(path) as saved:
        return json.loads(str(saved["state"]))
