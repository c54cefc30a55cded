"""One command runs every evaluation of a run, goes on where it stopped, and makes a page of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from g3n.config import G3nError
from g3n.report import figures, write_report
from tests import untrained


class Calls(list[list[str]]):
    """Stands for the ``g3n`` command: remembers the words and leaves metrics behind; ``fails`` ends with an error."""

    fails = ""

    def __call__(self, words: Sequence[str]) -> None:
        if self.fails and self.fails in words:
            raise G3nError("stopped here")
        self.append(list(words))
        folder = Path(words[words.index("--output") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        name = "audit.json" if words[0] == "audit" else "metrics.json"
        (folder / name).write_text(
            json.dumps({f"{folder.name}_figure": {"value": 1.5, "low": 1.0, "high": 2.0, "n": 9}})
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.chain(tmp_path_factory.mktemp("report"))


def test_every_evaluation_is_run_once_and_a_stopped_report_goes_on(root: Path, tmp_path: Path) -> None:
    call, runs = Calls(), root / "runs"
    call.fails = "distances"
    words = (runs / "dit", runs / "forecast", tmp_path / "report", 32, 5)
    with pytest.raises(G3nError, match="stopped here"):
        write_report(call, *words)
    assert [w[1] for w in call] == ["reconstruction", "generation"]
    call.fails = ""
    page = write_report(call, *words)
    assert [w[1] if w[0] == "evaluate" else w[0] for w in call] == [
        "reconstruction", "generation", "distances", "forecasting", "audit",
    ]  # fmt: skip
    assert call[0][2:6] == ["--run", f"{runs}/decoder", "--shards", f"{root}/shards"]
    assert call[2][2:8] == ["--run", f"{runs}/dit", "--latents", f"{root}/latents", "--count", "32"]
    text = page.read_text()
    for name in ("reconstruction", "generation", "distances", "forecasting", "audit"):
        assert f"{name} figure" in text
    assert (
        f"g3n report --run {runs}/dit --forecaster {runs}/forecast --output {tmp_path}/report --count 32 --seed 5"
        in text
    )
    assert json.loads((tmp_path / "report/report.json").read_text())["audit"]["audit_figure"]["value"] == 1.5
    write_report(call, *words)
    assert len(call) == 5
    write_report(call, runs / "dit", runs / "forecast", tmp_path / "report", 64, 5)  # other distances and audit
    assert [w[1] if w[0] == "evaluate" else w[0] for w in call[5:]] == ["distances", "audit"]


def test_a_folder_of_another_run_is_refused(root: Path, tmp_path: Path) -> None:
    write_report(Calls(), root / "runs/dit", None, tmp_path / "report", 32, 0)
    other = root / "runs/dit/ckpt/step_00000020"
    with pytest.raises(G3nError, match="holds the report of another run"):
        write_report(Calls(), other, None, tmp_path / "report", 32, 0)


def test_figures_are_numbers_by_path() -> None:
    tree = {"a": {"psnr": {"value": 2.0, "low": 1.0, "high": 3.0}, "flag": True, "none": None}, "n": 3, "word": "x"}
    assert figures(tree) == {"report/a/psnr": 2.0, "report/n": 3.0}
