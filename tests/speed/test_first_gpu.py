"""The first hour on a GPU, in its small form on a CPU."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

FOLDER = ROOT / "bench" / "first_gpu"


@pytest.fixture
def hour(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("first_gpu_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "first_gpu_run", module)
    spec.loader.exec_module(module)
    return module


def python(hour: Any, name: str, code: str, limit_s: int = 60) -> Any:
    return hour.Step(name, 1, limit_s, 5, ("-c", code, hour.JSON), ("-c", code, hour.JSON))


def test_what_fails_or_is_late_does_not_stop_the_rest(
    hour: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
    )
    steps = [
        python(hour, "broken", "raise SystemExit(3)"),
        python(hour, "hangs", child, limit_s=2),
        python(hour, "works", "import sys; print('fine'); open(sys.argv[1], 'w').write('[1]')"),
    ]
    monkeypatch.setattr(hour, "STEPS", steps)
    results = tmp_path / "results"
    assert hour.main([str(results)]) == 1
    ended = {name: step["ended"] for name, step in json.loads((results / "steps.json").read_text()).items()}
    assert ended == {"broken": "with exit code 3", "hangs": "late", "works": "well"}
    assert (results / "works.json").read_text() == "[1]"
    assert "fine\n--- works ended well" in capsys.readouterr().out
    sleeper = Path("/proc") / (results / "hangs.txt").read_text().strip() / "stat"
    for _ in range(50):  # what a step started ends with it; a moment may pass until it is gone
        if not sleeper.exists() or sleeper.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a step that was late lives on")
    with tarfile.open(tmp_path / "results.tgz") as packed:
        assert "results/works.json" in packed.getnames()
    assert hour.main([str(results), "--steps", "works", "--seconds", "1"]) == 1
    assert json.loads((results / "steps.json").read_text())["works"] == {"ended": "skipped"}
    assert json.loads((results / "steps.json").read_text())["broken"]["ended"] == "with exit code 3"


def test_the_page_has_every_step_with_its_limit(hour: Any) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    said = {name: int(limit) for name, limit in re.findall(r"`(\w+)` \((\d+)\)", page)}
    assert said == {step.name: step.limit_s for step in hour.STEPS}
    parts = {int(part): int(sum_s) for part, sum_s in re.findall(r"^\| (\d), (\d+) s", page, re.MULTILINE)}
    assert parts == {part: sum(s.limit_s for s in hour.STEPS if s.part == part) for part in range(1, 5)}


def test_rows_are_those_of_the_ladder(hour: Any) -> None:
    from fastmrcnn.speed.training_rows import cpu_rows, cuda_rows

    for step in hour.STEPS:
        for words, rows in ((step.words, cuda_rows(True)), (step.small, cpu_rows(True))):
            if "--rows" in words:
                names = [word for word in words[words.index("--rows") + 1 :] if "=" not in word]
                assert names
                assert {*names} <= {row.name for row in rows}, step.name


@pytest.mark.slow
def test_every_step_runs_small_on_a_cpu(hour: Any, tmp_path: Path) -> None:
    results = tmp_path / "results"
    subprocess.run([sys.executable, FOLDER / "run.py", results, "--small"], check=False)
    ended = {name: step["ended"] for name, step in json.loads((results / "steps.json").read_text()).items()}
    if importlib.util.find_spec("torchvision") is None:
        assert ended.pop("patched") == "with exit code 2"
    assert ended
    assert set(ended.values()) == {"well"}, ended
    for step in hour.STEPS:
        assert (results / f"{step.name}.txt").stat().st_size > 0
        if step.measures:
            assert json.loads((results / f"{step.name}.json").read_text())
    convolutions = json.loads((results / "convolutions.json").read_text())
    assert set(convolutions["sum_ms"]) == {"forward", "input gradient", "weight gradient"}
    assert not any("failure" in one for one in convolutions["convolutions"])
    for name in ("eager", "graphs"):
        (row,) = json.loads((results / f"{name}.json").read_text())["ladder"]
        assert row["images_per_second"] > 0
