"""The page of a report: its title, columns, cells, legends, and the command that runs it again."""

import html
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import get_args

import matplotlib
import pytest
from PIL import Image

from implicit_diffusion.cli import main
from implicit_diffusion.commands.command_line.options import options_of
from implicit_diffusion.commands.command_line.parsing import read
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.report.frontier import frontier
from implicit_diffusion.commands.finetune.report.report import command, write_report
from implicit_diffusion.commands.finetune.report.samples import hacking
from implicit_diffusion.commands.finetune.report.training import cost, staleness, training
from implicit_diffusion.commands.registry import CONFIGURATIONS
from implicit_diffusion.commands.shared.drawing import STYLE
from implicit_diffusion.commands.shared.formatting import model_name
from implicit_diffusion.commands.shared.page import Picture, figures, table
from implicit_diffusion.runs import RunDirectory
from tests.helpers import tiny, toy_model
from tests.helpers.toy_result import colour_result, digits_result


@pytest.fixture(scope="module")
def good():
    return digits_result()


def pasted(line):
    """The words that a shell makes of a command."""
    shell = subprocess.run(["sh"], input=f"printf '%s\\0' {line}", capture_output=True, text=True, check=True)
    return shell.stdout.split("\0")[:-1]


OTHERS = {int: 7, float: 0.3, bool: True, str: "a 'b' -c", Path: Path("/some where/prompts.txt")}
OTHERS[tuple[int, int]] = (16, 32)
OTHERS[tuple[str, ...]] = ("a 'b' -c", "--x=2")


@pytest.mark.parametrize("option", options_of(Config), ids=lambda option: option.field)
def test_the_command_is_read_as_the_same_configuration(option):
    """With every option at another value than its default, one by one; out and plan are left to the new run."""
    several = option.many and get_args(get_args(option.type)[0])
    other = several or OTHERS.get(option.type) or get_args(option.type)[-1]
    config = replace(Config(), **{option.field: other})
    words = pasted(command(config))
    assert words[:2] == ["implicit-diffusion", "finetune"]
    chosen = read(words[1:], CONFIGURATIONS, prog="", description="")
    assert replace(chosen, out=None, plan=False) == replace(config, out=None, plan=False)


@pytest.mark.parametrize("value", ["-x.py:f", "--lr", "", " ", "a\nb", "$HOME", "ß"])
def test_any_name_survives_the_command(value):
    chosen = read(pasted(command(Config(reward=value)))[1:], CONFIGURATIONS, prog="", description="")
    assert chosen.reward == (value,)


@pytest.mark.slow
def test_the_report_of_a_run_has_a_command_that_runs(tmp_path, monkeypatch):
    """Pasted into a shell: the model's folder has a blank in its name, which a shell would split."""
    model = toy_model.folder(tmp_path / "my runs" / "model", tiny.scheduler())
    sizes = "--num-steps 3 --batch 2 --updates 1 --starts 4 --kl-weight 2"
    options = f"--reward brightness --device cpu {sizes}".split()
    assert main(["finetune", "--model", str(model), *options, "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<title>my runs/model, fine-tuned for brightness</title>" in page
    blocks = [html.unescape(block) for block in re.findall("<pre><code>(.*?)</code></pre>", page, re.DOTALL)]
    (again,) = [block for block in blocks if block.startswith("implicit-diffusion finetune")]
    monkeypatch.chdir(tmp_path)
    assert main([*pasted(again)[1:], "--out", "again"]) == 0
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("digits", "digits"),
        ("google/ddpm-cat-256", "google/ddpm-cat-256"),
        ("/home/me/runs/cats/model", "cats/model"),
        ("/home/me/flowers", "flowers"),
        ("/model", "model"),
        ("/", "/"),
        ("/cache/models--google--ddpm-cat-256/snapshots/0123abc", "google/ddpm-cat-256"),
    ],
)
def test_a_model_is_named_by_what_tells(model, name):
    assert model_name(model) == name


def cells(page):
    return re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", page, re.DOTALL)


def test_no_cell_and_no_column_is_empty(good, tmp_path):
    for name, result in {"good": good, "colour": colour_result()}.items():
        page = write_report(result, [], RunDirectory.create(tmp_path / name)).read_text()
        assert all(cells(page)[1:]) and "real, held out" in page if name == "good" else "real" not in page
        assert page.count('class="note"></p>') == 0
    assert table(["", "a", "b", "c"], [["x", "", "1", ""], ["y", "", "", ""]]).count("—") == 1
    assert ">b<" in table(["", "a", "b"], [["x", "", "1"]]) and ">a<" not in table(["", "a", "b"], [["x", "", "1"]])


def picture(folder, name, height, words=20):
    path = folder / f"{name}.png"
    Image.new("L", (100, height)).save(path)
    return Picture(name, path, name, "word " * words)


def test_columns_of_pictures_end_as_level_as_can_be_and_keep_their_order_on_a_phone(tmp_path):
    heights = [300, 100, 100, 100, 50, 50]
    made = [picture(tmp_path, f"p{i}", height, words=0) for i, height in enumerate(heights)]
    left, right = re.findall(r"<div>(.*?)</div>", figures(made), re.DOTALL)
    total = [sum(heights[int(i)] for i in re.findall(r'id="p(\d)"', column)) for column in (left, right)]
    assert 'id="p0"' in left and sorted(total) == [350, 350]
    assert re.findall(r'id="p(\d)" style="order:(\d)"', left + right) == [
        (i, i) for i in re.findall(r'id="p(\d)"', left + right)
    ]
    assert figures(made[:1]).count("<div>") == 1 and figures([]) == ""


def test_legends_hide_nothing_and_titles_begin_where_the_axes_do(good):
    """In every picture of a report: a legend lies outside of all axes, a title is at the left."""
    for drawing in (frontier, training, hacking, cost, staleness):
        with matplotlib.rc_context(STYLE):
            figure = drawing(good)[0]
            figure.draw_without_rendering()
        boxes = [axes.get_window_extent() for axes in figure.axes]
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
        for legend in legends:
            extent = legend.get_window_extent()
            assert not any(extent.overlaps(box.shrunk(0.999, 0.98)) for box in boxes), drawing.__name__
        assert not any(axes.get_title("center") for axes in figure.axes)
