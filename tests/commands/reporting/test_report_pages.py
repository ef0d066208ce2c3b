"""`report` of unfinished runs, and of several: from files alone, beside a run that writes, and for every command."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from implicit_diffusion import cli
from implicit_diffusion.commands.registry import COMMANDS
from implicit_diffusion.commands.reporting.command import Report, run
from implicit_diffusion.commands.reporting.course import Number, over_seeds
from implicit_diffusion.commands.reporting.curves import draw_courses
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.lock import hold
from implicit_diffusion.runs import RunDirectory, records

SE = {"held_out_reward_se": 0.1, "held_out_path_kl_se": 0.02, "held_out_objective_se": 0.1}
PLAN = {
    "reward": 1.0,
    "reward_se": 0.1,
    "reward_std": 2.0,
    "rows": [
        {"kl_weight": b, "path_kl": k, "path_kl_se": 0.01, "reward_gain": g, "reward_gain_se": 0.05}
        for b, k, g in ((4.0, 0.1, 0.5), (2.0, 0.4, 1.2))
    ],
}
SUMMARY = {
    "reward_after": 2.5,
    "reward_after_se": 0.3,
    "path_kl": 0.5,
    "path_kl_se": 0.05,
    "j_after": -1.0,
    "captured": None,
    "updates": 40,
    "seconds": 3.5,
}


def finetune_line(n):
    numbers = {"objective": -1 - n / 20, "reward": 1 + n / 20, "path_kl": n / 80, "grad_norm": 1.0}
    held_out = {f"held_out_{name}": numbers[name] for name in ("reward", "path_kl", "objective")} | SE
    return {"updates": n, "seconds": n / 10, **numbers, **(held_out if n % 5 == 0 else {})}


def study(x, *names):
    return [
        {"arm": arm, "seed": seed, x: n, **dict.fromkeys(names, 0.1 + n / 9 + seed / 5)}
        for arm in ("implicit", "weighted")
        for seed in (0, 1)
        for n in range(1, 5 + seed)
    ]


LINES = {
    "finetune": [finetune_line(n) for n in range(1, 41)],
    "pretrain": [{"updates": n, "loss": 1 / n, "seconds": n} for n in range(1, 30)],
    "ebm": [
        {"updates": n, "nll": 2.0 - n / 50, "grad_norm": 1.0, "ess": 30.0, "seconds": n}
        | ({"energy_gap": 0.1, "energy_gap_se": 0.3, "exact_kl": 1 / n} if n % 10 == 0 else {})
        for n in range(1, 41)
    ],
    "ebm --compare": [
        {"arm": arm, "lr": 0.1, "seed": seed, "updates": 8, "curve": [
            {"updates": n, "gradient_evaluations": 3 * n, "kl": 1 / n + seed} for n in (4, 8)
        ]}
        for arm in ("weighted", "cd") for seed in (0, 1)
    ],
    "tilt": [
        {"arm": arm, "seed": seed, "kl_weight": w, "kl": w + seed, "reward": 1 + w, "objective": 0.0}
        for arm in ("unweighted", "weighted") for w in (0.5, 1.0) for seed in (0, 1)
    ],
    "hexagon": study("iteration", "reward", "reward_exact", "kl_from_initial"),
    "recovery": study("updates", "kl", "kl_to_data"),
    "theory": study("updates", "squared_gradient"),
    "compare": [
        {"problem": "gaussian", "arm": arm, "seed": seed, "evaluations": 9 * n, "seconds": n, "updates": n,
         "fall": n / 9, "fall_se": 0.1, "reward": 1.0, "path_kl": n / 20}
        for arm in ("adjoint", "score") for seed in (0, 1) for n in (4, 8)
    ],
}  # fmt: skip


def begun(path, kind="finetune", lines=None, **options):
    """The folder of an unfinished run."""
    command, _, compare = kind.partition(" --")
    directory = RunDirectory.create(path)
    config = COMMANDS[command].config
    needed = {"model": Path("m")} if command == "tilt" else {"compare": True} if compare else {}
    directory.write_config(config(**needed | options), command)
    directory.append_metrics(*(LINES[kind] if lines is None else lines))
    if command == "finetune":
        records.write(directory.path / "plan.json", PLAN)
    return directory


def finished(path, kind="finetune", summary=SUMMARY, **options):
    """A folder with the files that a comparison reads of a finished run."""
    directory = begun(path, kind, **options)
    directory.write_summary(summary)
    return directory


def text_of(page):
    """What a page says, without its pictures and its style."""
    body = re.sub(r'"data:image/png;base64,[^"]*"', "", page.read_text())
    return body[body.index("<main>") :]


def words_of(page):
    return " ".join(re.sub(r"<[^>]+>", " ", text_of(page)).split())


def files_of(folder):
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", LINES)
def test_an_unfinished_run_of_every_command_is_shown_while_it_is_held(kind, tmp_path, capsys):
    """Another thread holds the folder, as the run does; its files stay as they are, and the page is beside them."""
    directory = begun(tmp_path / "run", kind)
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"updates": 41, "rew')  # being written
    held, over = threading.Event(), threading.Event()

    def train():
        with hold(directory.path):
            held.set()
            over.wait(60)

    thread = threading.Thread(target=train)
    thread.start()
    held.wait(60)
    try:
        before = files_of(directory.path)
        assert cli.main(["report", str(directory.path)]) == 0
        page = directory.path / "so-far.html"
        after = files_of(directory.path)
        assert after.pop(page) and after == before
    finally:
        over.set()
        thread.join()
    said = words_of(page)
    how_far = "8 trainings" if kind == "tilt" else "4 trainings" if "arm" in LINES[kind][0] else None
    how_far = how_far or f"update {LINES[kind][-1]['updates']} "
    assert f"Unfinished, after {how_far}" in said and "This run is unfinished. The last line of metrics" in said
    assert re.search(r"is of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; this page was made at \d{4}", said)
    assert text_of(page).count("<figure") >= 1 and "Numbers so far" in said
    assert f"report {page}" in " ".join(capsys.readouterr().out.split())
    assert not (directory.path / "report.html").exists()


def test_every_command_that_leaves_a_run_is_among_these():
    assert {kind.split()[0] for kind in LINES} == {name for name, entry in COMMANDS.items() if entry.resumable}
    assert all(entry.course_place for entry in COMMANDS.values() if entry.resumable)


def test_a_run_without_a_line_has_a_page(tmp_path):
    directory = begun(tmp_path / "run", lines=[])
    run(Report((directory.path,), tmp_path / "elsewhere" / "page.html"))
    said = words_of(tmp_path / "elsewhere" / "page.html")
    assert "There is no line of metrics; this page" in said and "update 0 of 250" in said


def test_lines_that_are_no_metrics_are_passed_over(tmp_path):
    odd = [
        "[1]",
        "{",
        "null",
        '{"updates": "x"}',
        '{"updates": 3, "reward": NaN, "path_kl": "<b>"}',
        '{"reward": 1e999}',
    ]
    odd += [
        '{"updates": true, "reward": {}}',
        '{"updates": 4, "reward": ' + "9" * 400 + "}",
        '{"arm": [1], "seed": {}}',
    ]
    directory = begun(tmp_path / "run")
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write("\n".join(odd) + "\n")
    run(Report((directory.path,)))
    assert "mean reward 3.0 ± 0.1" in words_of(directory.path / "so-far.html")


def test_runs_side_by_side(tmp_path, capsys):
    one = finished(tmp_path / "a" / "run", kl_weight=2.0)
    two = begun(tmp_path / "b" / "run", lines=LINES["finetune"][:20], kl_weight=3.0, lr=1e-3)
    page = tmp_path / "pages" / "both.html"
    before = files_of(one.path) | files_of(two.path)
    assert cli.main(["report", str(one.path), str(two.path), "--out", str(page)]) == 0
    assert files_of(one.path) | files_of(two.path) == before
    said = words_of(page)
    assert "1 finished, 1 unfinished" in said and "Unfinished: B." in said
    assert f"A {one.path} finished update 40 of 250" in said and f"B {two.path} unfinished update 20 of 250" in said
    assert "mean reward 2.5 ± 0.3 2.0 ± 0.1" in said  # to one digit of the error
    assert "path KL (nats) 0.50 ± 0.05 0.25 ± 0.02" in said and "updates 40 20" in said
    differing = said[said.index("Options that differ") :]
    assert "kl_weight 2.0 3.0 lr 5e-05 0.001 Configuration" in differing
    assert not re.search(r"\b(out|track) ", differing)
    assert ["frontier", *(f"panel-{i}" for i in (0, 1, 2, 4))] == re.findall(r'<figure id="([\w-]+)"', text_of(page))


def test_numbers_of_other_things_are_not_passed_off_as_the_same(tmp_path):
    one, two = begun(tmp_path / "a"), begun(tmp_path / "b", reward="darkness")
    page = tmp_path / "page.html"
    run(Report((one.path, two.path), page))
    assert "Their numbers are not of the same thing. These runs have different --reward" in words_of(page)


def test_a_study_is_compared_arm_by_arm(tmp_path):
    one, two = begun(tmp_path / "a", "hexagon"), begun(tmp_path / "b", "hexagon", lr=0.3)
    page = tmp_path / "page.html"
    run(Report((one.path, two.path), page))
    said = words_of(page)
    exact = over_seeds([[{"reward": 1.0}] * 10 + [{"reward": 3.0}], [{"reward": 5.0}]], "reward")
    assert exact == Number(4.0, 1.0)
    assert "E R under π_θ, implicit 0.69 ± 0.16".replace("0.69 ± 0.16", "0.7 ± 0.2") in said
    assert "reward of the particles, weighted" in said


def test_what_cannot_be_compared_is_refused_by_name(tmp_path, capsys):
    one, two, other = begun(tmp_path / "a"), begun(tmp_path / "b"), begun(tmp_path / "c", "pretrain")
    ways, plain = begun(tmp_path / "d", "ebm --compare"), begun(tmp_path / "e", "ebm")
    for words, said in (
        ([one, other], f"{one.path} is of `finetune` and {other.path} of `pretrain`"),
        ([plain, ways], f"{plain.path} is of `ebm` and {ways.path} of `ebm --compare`"),
        ([one, two, one], f"{one.path} is given twice"),
        ([one, two, "--out", tmp_path / "page.txt"], "must be a file that ends in .html"),
        ([one, two, "--out", one.path / "report.html"], "lies in the folder of a run"),
        ([one, two, "--out", tmp_path / "page.html" / "x.html"], None),
        ([one, tmp_path / "nothing"], f"there is no run {tmp_path / 'nothing'}"),
        ([finished(tmp_path / "f"), "--out", tmp_path / "p.html"], "--out is for an unfinished run, or for several"),
    ):
        if said is None:
            (tmp_path / "page.html").touch()
        arguments = [str(getattr(word, "path", word)) for word in words]
        assert cli.main(["report", *arguments]) == 2
        assert (said or "cannot be made") in capsys.readouterr().err


def test_strings_from_outside_stay_strings(tmp_path):
    """Names of folders, options and arms, in text and in diagrams: neither HTML nor formulas nor hidden labels."""
    evil = "_<script>alert(1)</script> $x_$ &\n\x1b[0m"
    one = begun(tmp_path / evil.replace("/", "|"), reward=f"x.py:{evil}")
    two = begun(tmp_path / "two")
    page = tmp_path / "page.html"
    run(Report((one.path, two.path), page))
    run(Report((one.path,), tmp_path / "one.html"))
    for each in (page, tmp_path / "one.html"):
        assert "<script" not in each.read_text() and "&lt;script&gt;" in each.read_text()
    arms = [line | {"arm": evil} for line in LINES["recovery"]]
    odd = begun(tmp_path / "arms", "recovery", lines=arms)
    run(Report((odd.path,), tmp_path / "arms.html"))
    assert "<script" not in (tmp_path / "arms.html").read_text()


@pytest.mark.drawn
@pytest.mark.slow
def test_diagrams_have_labels_legends_and_what_is_in_the_lines(tmp_path, monkeypatch):
    """Read from the figures themselves."""
    figures = {}
    monkeypatch.setattr(
        "implicit_diffusion.commands.reporting.curves.save",
        lambda figure, path: figures.update({path.stem: figure}) or path.write_bytes(b""),
    )
    from implicit_diffusion.commands.reporting.command import _read

    courses = {f"{x} run": _read(begun(tmp_path / x, kl_weight=k).path).course for x, k in (("A", 1.0), ("B", 2.0))}
    draw_courses(courses, tmp_path)
    assert figures.keys() == {"frontier", "panel-0", "panel-1", "panel-2", "panel-4"}
    for figure in figures.values():
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
        (legend,) = (axes.get_legend() for axes in figure.axes)
        assert {"A run", "B run"} <= {text.get_text() for text in legend.get_texts()}
    (axes,) = figures["panel-1"].axes
    raw = axes.lines[0].get_xydata()
    assert raw.tolist() == [[line["updates"], line["reward"]] for line in LINES["finetune"]]
    assert len(axes.containers) == 2  # held-out checks of both runs, with their errors
    (segments,) = (container[2][0].get_segments() for container in axes.containers[:1])
    assert segments[0][:, 1].tolist() == pytest.approx([1.25 - 0.2, 1.25 + 0.2])


def test_the_page_of_progress_goes_when_the_report_is_drawn(tmp_path, monkeypatch):
    directory = begun(tmp_path / "run", "pretrain")
    run(Report((directory.path,)))
    directory.write_summary({})
    monkeypatch.setattr("implicit_diffusion.commands.reporting.command.report", lambda path: {"done": True})
    assert run(Report((directory.path,))) == {"done": True}
    assert not (directory.path / "so-far.html").exists()
    assert json.loads((directory.path / "summary.json").read_text()) == {}


def test_a_sweep_says_how_its_runs_are_compared(tmp_path):
    (tmp_path / "sweep" / "beta-1").mkdir(parents=True)
    with pytest.raises(InvalidInputError, match=r"implicit-diffusion report .*sweep/beta-\*"):
        run(replace(Report((tmp_path / "sweep",)), out=None))
