"""Runs of a suite: what is finished stays, what was interrupted goes on, what fails is named. The report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import FakeTraining, bench_in, made_up_report

from fastmrcnn import experiments
from fastmrcnn.errors import UserError
from fastmrcnn.study.document import Heading, Items, Paragraph, Picture, Table, as_html, as_markdown
from fastmrcnn.study.places import metrics_file
from fastmrcnn.study.plan import PastTimes, plan
from fastmrcnn.study.runs import Bench, Run
from fastmrcnn.study.sets import Sets, given_sets
from fastmrcnn.study.small import SMALL
from fastmrcnn.study.writing import read_results, write_report


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(Bench, "_python", lambda bench, *rest: fake(bench, *rest))
    monkeypatch.setattr(Bench, "keep", lambda *_: None)
    return fake


def test_what_is_finished_is_not_run_again(tmp_path: Path, training: FakeTraining) -> None:
    bench = bench_in(tmp_path)
    runs = bench.runs_of(SMALL.chosen(("competition",)), seeds=2)
    assert [run.name for run in runs] == [
        "c4/seed_0",
        "c4_softmax/seed_0",
        "c4/seed_1",
        "c4_softmax/seed_1",
    ]
    bench.run_all(runs, jobs=2)
    assert len(training.commands) == 4
    found = bench.finished(runs[0])
    assert found is not None
    assert found["metrics"] == {"bbox/AP": 22, "segm/AP": 20.0}
    assert found["seconds"] == 20.0  # two rows of 20 steps, half a second each
    bench_in(tmp_path).run_all(runs, jobs=2)
    assert len(training.commands) == 4


def test_other_settings_are_another_run(tmp_path: Path, training: FakeTraining) -> None:
    runs = bench_in(tmp_path).runs_of(SMALL.chosen(("competition",)), seeds=1)
    bench_in(tmp_path).run_all(runs, jobs=1)
    changed = bench_in(tmp_path, "train.steps=7")
    assert [changed.finished(run) for run in runs] == [None, None]
    changed.run_all(runs, jobs=1)
    assert len(training.commands) == 4
    assert "train.steps=7" in training.commands[-1]


def test_threads_and_folders_do_not_make_another_run(tmp_path: Path) -> None:
    one, other = bench_in(tmp_path / "a"), bench_in(tmp_path / "b", "output=elsewhere", "runtime.threads=3")
    run = Run(SMALL.cells["fpn_separate"], 1)
    assert one.key(run) == other.key(run)
    assert one.key(run) != one.key(Run(SMALL.cells["fpn_separate"], 2))


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path: Path, training: FakeTraining) -> None:
    bench = bench_in(tmp_path)
    run = Run(SMALL.cells["fpn"], 0)
    bench.run_all([run], jobs=1)
    bench.metrics_file(run).unlink()
    checkpoints = bench.folder(run) / "run_001" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last_checkpoint").touch()
    bench.run_all([run], jobs=1)
    assert training.commands[-1] == ["-m", "fastmrcnn.train", "--resume", str(bench.folder(run) / "run_001")]


def test_heads_wait_for_the_proposals_that_they_stand_on(tmp_path: Path, training: FakeTraining) -> None:
    bench = bench_in(tmp_path)
    bench.run_all(bench.runs_of(SMALL.chosen(("sharing",)), seeds=1), jobs=2)
    names = [command[1] for command in training.commands]
    assert names.count("fastmrcnn.propose") == 2
    last = training.commands[-1]
    assert any(word.startswith("data.train.proposals=") for word in last)
    before = bench.folder(Run(SMALL.cells["rpn"], 0)) / "run_001"
    assert str(before) in training.commands[names.index("fastmrcnn.propose")]


def test_a_failed_run_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: FakeTraining
) -> None:
    training.fails = ("c4_softmax",)
    bench = bench_in(tmp_path)
    runs = bench.runs_of(SMALL.chosen(("competition",)), seeds=1)
    with pytest.raises(UserError, match="c4_softmax/seed_0: exit code 1"):
        bench.run_all(runs, jobs=2)
    assert bench.finished(runs[0]) is not None
    assert bench.finished(runs[1]) is None


def test_a_process_that_fails_is_told_with_its_last_line(
    tmp_path: Path,
) -> None:
    bench = bench_in(tmp_path)
    log = tmp_path / "log.txt"
    with pytest.raises(UserError, match=r"fpn/seed_0: exit code 3 \(what was wrong\).*log\.txt"):
        bench._python(["-c", "print('what was wrong'); raise SystemExit(3)"], log, Run(SMALL.cells["fpn"], 0))


def test_a_damaged_metrics_file_is_named(tmp_path: Path, training: FakeTraining) -> None:
    bench = bench_in(tmp_path)
    run = Run(SMALL.cells["fpn"], 0)
    path = metrics_file(tmp_path, "small", "fpn", 0)
    path.parent.mkdir(parents=True)
    for text in ('{"cell": "fpn"', "[]", '{"cell": "fpn"}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"seed_0\.json: is no metrics file.*remove it"):
            bench.finished(run)


def test_the_plan_counts_shared_runs_once_and_learns_their_time(
    tmp_path: Path, training: FakeTraining
) -> None:
    bench = bench_in(tmp_path)
    rows = {row.comparison: row for row in plan(bench, SMALL.comparisons, 3, PastTimes(bench))}
    assert (rows["competition"].runs, rows["alignment"].runs) == (6, 12)  # c4 is in both
    assert rows["competition"].hours != rows["competition"].hours  # not known
    bench.run_all([Run(SMALL.cells["c4"], 0)], jobs=1)
    rows = {row.comparison: row for row in plan(bench, SMALL.comparisons, 3, PastTimes(bench))}
    assert rows["competition"].finished == 1
    assert rows["competition"].hours == pytest.approx(5 * 20 / 3600)


def without_pictures(page: str) -> str:
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", page)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a report on made-up runs."""
    return made_up_report(tmp_path_factory.mktemp("report"))


def test_report_has_every_comparison_in_both_languages(report: Path) -> None:
    english, chinese = ((report / f"report{ending}.md").read_text(encoding="utf-8") for ending in ("", ".zh"))
    for comparison in SMALL.comparisons:
        assert comparison.title.en in english
        assert comparison.title.zh in chinese
    # c4 has 22, 23, 24 in place of c4_softmax's 30, 31, 32.
    assert "-8.0 [-8.0, -8.0]" in english
    assert "| sigmoid | 21.0 ± 1.0 | 30.3 |" in english
    for name in re.findall(r"\]\((figures/[^)]+)\)", english):
        assert (report / name).stat().st_size > 0


def test_the_page_is_one_file(report: Path) -> None:
    """It opens without a network."""
    for name in ("report.html", "report.zh.html"):
        page = without_pictures((report / name).read_text(encoding="utf-8"))
        assert not re.findall(r'(?:src|rel)="(?!data:)[^"]*"', page)
        assert "<script" not in page
        assert "@import" not in page


@pytest.mark.slow
def test_the_same_metrics_give_the_same_report(report: Path) -> None:
    first = {path.name: path.read_bytes() for path in report.glob("report.*")}
    write_report(SMALL, report)
    assert first == {path.name: path.read_bytes() for path in report.glob("report.*")}


def test_a_report_on_nothing_says_so(tmp_path: Path) -> None:
    text = write_report(SMALL, tmp_path)[0].read_text(encoding="utf-8")
    assert "have not both been run yet" in text
    assert read_results(SMALL, tmp_path).cells == {}


def test_both_forms_of_a_document() -> None:
    picture = Picture("a.png", lambda: b"abc", "What *it* shows")
    blocks = [
        Heading(1, "A & B"),
        Paragraph("**x** *y* `z<1` [w](http://a.b/c)"),
        Items(["one"]),
        Table(["", "AP"], [["a|b", "1"]]),
        picture,
    ]
    text = as_markdown(blocks, "figures")
    assert "# A & B\n\n**x**" in text
    assert "| a/b | 1 |" in text
    assert "](figures/a.png)" in text
    page = as_html(blocks, "en", {"a.png": b"abc"})
    assert "<title>A &amp; B</title>" in page
    assert '<strong>x</strong> <em>y</em> <code>z&lt;1</code> <a href="http://a.b/c">w</a>' in page
    assert "data:image/png;base64,YWJj" in page
    assert 'alt="What it shows"' in page


def test_data_arguments(tmp_path: Path) -> None:
    assert given_sets([f"coco={tmp_path}"]) == {"coco": tmp_path}
    with pytest.raises(UserError, match="--data coco: must be NAME=DIR"):
        given_sets(["coco"])
    with pytest.raises(UserError, match="there is no such folder"):
        given_sets([f"coco={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="give --data coco=DIR"):
        Sets(tmp_path, {})("coco")
    with pytest.raises(UserError, match=r"train2017: is not there"):
        Sets(tmp_path, {"coco": tmp_path})("coco_person")


def test_scenes_are_drawn_once(tmp_path: Path) -> None:
    sets = Sets(tmp_path, {}, {"objects": (2, 1)})
    first = sets("objects").train_annotations.stat().st_mtime_ns
    assert sets("objects").train_annotations.stat().st_mtime_ns == first


def test_command_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiments.main(["--plan", "--output", str(tmp_path)])
    assert "In all not known hours" in capsys.readouterr().out
    experiments.main(["--plan", "--suite", "coco", "--only", "stride", "--output", str(tmp_path)])
    assert re.search(r"stride +2 +2 +0 +\d+\.\d\d\n", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--only: no comparison strides"):
        experiments.main(["--plan", "--only", "strides", "--output", str(tmp_path)])


@pytest.mark.slow
def test_the_whole_pipeline_on_a_tiny_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From drawing to the report, with real runs of seconds."""
    tiny = {"objects": (6, 4), "figures": (6, 4)}
    monkeypatch.setattr(experiments, "Sets", lambda work, given: Sets(work, given, tiny))
    settings: dict[str, Any] = {
        "train.steps": 4,
        "train.log_every": 2,
        "model.backbone.width": 8,
        "model.fpn.channels": 8,
    }
    extra = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    arguments = ["--only", "competition", "sharing", "--seeds", "1", "--jobs", "2", "--output", str(tmp_path)]
    experiments.main([*arguments, *extra])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "small_competition_pictures.png" in text
    assert "sampling.svg" in text
    assert (tmp_path / "figures" / "sampling.svg").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "metrics").rglob("*") if path.is_file()}
    experiments.main([*arguments, *extra])
    assert before == {path: path.read_bytes() for path in before}
