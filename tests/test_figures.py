"""Chapter 8: tables, the bar of progress, and the figures that know no domain."""

import io
import re
from unittest import mock

import numpy as np
import pytest
import rich.console
import rich.progress
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tools import Toy, domain_of

import metapt


def rendered(draw) -> Figure:
    """A figure as a run has it, drawn to the end, without a warning."""
    figure = Figure(figsize=(3.5, 2.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    canvas.draw()
    return figure


def tick_labels(axis) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    inside = [tick for tick in ticks if low <= tick.get_loc() <= high]
    return [tick.label1.get_text() for tick in inside if tick.label1.get_text()]


def legend_of(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes)]
    return [text.get_text() for legend in legends if legend for text in legend.get_texts()]


def history(steps: list[int], **values: list) -> list[dict]:
    names = list(values)
    rows = zip(steps, *values.values(), strict=True)
    return [{"step": step, **dict(zip(names, row, strict=True))} for step, *row in rows]


# ------------------------------------------------------------------------------------------------
# Tables and the bar


def test_tables_show_names_as_they_are_and_numbers_on_the_right():
    out = io.StringIO()
    console = rich.console.Console(file=out, width=80, markup=False, highlight=False)
    names = ["e[lr=0.1]", "x[/y]", "[red]r[/red]", "a:fire:b", "c$x$"]
    rows = [[name, "1.0"] for name in names]
    metapt.show_table(console, "The [b]title[/b] :fire:", ["name", "value [%]"], rows)
    text = out.getvalue()
    for words in (*names, "The [b]title[/b] :fire:", "value [%]"):
        assert words in text
    lines = [line.rstrip() for line in text.splitlines() if line.rstrip().endswith("1.0")]
    assert len({len(line) for line in lines}) == 1
    assert all(line.startswith("  " + name) for line, name in zip(lines, names, strict=True))


def test_the_console_takes_names_for_text():
    with mock.patch("sys.stdout", new=io.StringIO()) as out:
        console = metapt.make_console(as_json=False)
        console.print("run x[/y] [red]r[/red] a:fire:b")
    assert out.getvalue() == "run x[/y] [red]r[/red] a:fire:b\n"


def test_a_method_has_words_and_a_run_its_path():
    assert metapt.method_name("no_pretraining") == "no pre-training"
    assert metapt.method_name("./no_pretraining") == "./no_pretraining"
    assert metapt.method_name("runs/meta-toy") == "runs/meta-toy"


def test_what_is_no_number_is_a_dash():
    assert metapt.percent(None) == "–"
    assert metapt.percent(0.1234) == "12.3"


@pytest.mark.parametrize("width", [80, 60])
def test_the_progress_bar_says_it_all_in_80_columns(width, monkeypatch):
    """Step, of how many, rate, time left and φ, rendered at a fixed width."""
    out = io.StringIO()
    console = rich.console.Console(
        file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False
    )
    clock = iter(range(0, 1_000_000, 2))
    monkeypatch.setattr(rich.progress, "monotonic", lambda: float(next(clock)), raising=False)
    with metapt.progress_bar(console, "learning φ", 2600) as bar:
        for step in (500, 1000, 1500):
            bar(step, "φ -179.9")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
    last = plain.strip().splitlines()[-1].rstrip()
    assert len(last) <= width
    assert "learning φ" in last
    assert "1500/2600" in last
    assert last.endswith("φ -179.9")
    if width == 80:
        assert re.search(r"[\d.]+/s", last)
        assert re.search(r"\d+:\d\d:\d\d", last)


def test_the_bar_moves_by_one_without_a_number():
    out = io.StringIO()
    console = rich.console.Console(file=out, width=80)
    with metapt.progress_bar(console, "comparing", 3) as bar:
        for _ in range(3):
            bar()
    assert "3/3" in out.getvalue()


# ------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("losses", [[2.05, 2.04], [2.31, 2.1, 1.9, 0.9], [0.5], [0.0, 0.1]])
def test_the_losses_of_a_short_run_have_ticks_that_are_read_at_once(losses):
    """Plain numbers, not 2.05 × 10⁰, and no half steps."""
    steps = list(range(1, len(losses) + 1))
    rows = history(steps, pretrain_loss=losses, validation_loss=[None, *losses[1:]])
    figure = rendered(lambda figure: metapt.draw_losses(figure, rows))
    (axis,) = figure.axes
    labels = tick_labels(axis.yaxis)
    assert axis.get_yscale() == "linear"
    assert len(labels) >= 2
    assert all(re.fullmatch(r"−?\d+(\.\d+)?", label) for label in labels)
    assert all(re.fullmatch(r"−?\d+", label) for label in tick_labels(axis.xaxis))
    assert "PT" in legend_of(figure)
    assert ("validation" in legend_of(figure)) == (len(losses) > 1)


def test_losses_over_decades_are_on_a_logarithmic_axis():
    rows = history([1, 2, 3], pretrain_loss=[2.0, 0.2, 0.01], finetune_loss=[1.0, 0.5, 0.2])
    figure = rendered(lambda figure: metapt.draw_losses(figure, rows))
    (axis,) = figure.axes
    assert axis.get_yscale() == "log"
    assert len(tick_labels(axis.yaxis)) >= 2
    assert legend_of(figure) == ["PT", "FT"]


@pytest.mark.parametrize("rows", [[], history([4], pretrain_loss=[None])])
def test_losses_that_there_are_not_are_an_empty_axis(rows):
    figure = rendered(lambda figure: metapt.draw_losses(figure, rows))
    assert legend_of(figure) == []


@pytest.mark.parametrize("steps", [[1, 2], [4, 8, 12], [1, 2, 3, 4, 5]])
def test_phi_has_whole_steps(steps):
    """No tick at 2.5 steps, and a line for each number that was measured."""
    rows = history(steps, left=[0.1] * len(steps), right=[0.2] * len(steps))
    domain = domain_of(Toy)
    names = ["left", "right"]
    figure = rendered(lambda figure: metapt.draw_phi(figure, rows, domain, names))
    (axis,) = figure.axes
    assert all(re.fullmatch(r"−?\d+", label) for label in tick_labels(axis.xaxis))
    assert axis.get_xlabel() == "PT steps"
    assert axis.get_ylabel() == "φ"
    assert legend_of(figure) == names


def test_one_number_of_phi_names_the_axis(monkeypatch):
    rows = history([1, 2], logits_std=[0.1, 0.2])
    domain = domain_of(Toy)

    def drawn():
        names = ["logits_std"]
        return rendered(lambda figure: metapt.draw_phi(figure, rows, domain, names))

    assert drawn().axes[0].get_ylabel() == "logits_std"
    monkeypatch.setattr(Toy, "captions", {"logits_std": "spread of the logits"})
    figure = drawn()
    assert figure.axes[0].get_ylabel() == "spread of the logits"
    assert legend_of(figure) == ["learned φ"]


def test_a_number_of_phi_that_comes_later_is_drawn_from_there():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": 1.0, "b": True}, {"step": 3, "a": None, "b": 2}]
    domain = domain_of(Toy)
    figure = rendered(lambda figure: metapt.draw_phi(figure, rows, domain, ["a", "b"]))
    lines = figure.axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [2, 3]]


def comparison(means: dict[str, list], sizes=(30, 300), stderr=0.01) -> list[dict]:
    return [
        {
            "method": method,
            "ft_examples": size,
            "metric": "accuracy",
            "mean": mean,
            "stderr": stderr,
            "seeds": 3,
        }
        for method, row in means.items()
        for size, mean in zip(sizes, row, strict=True)
    ]


def test_equal_lines_of_a_comparison_do_not_hide_each_other():
    rows = comparison({"one": [0.5, 0.7], "other": [0.5, 0.7], "third": [0.5, 0.7]})
    figure = rendered(lambda figure: metapt.draw_comparison(figure, rows))
    (axis,) = figure.axes
    points = []
    for container in axis.containers:
        line = container.lines[0]
        points.append(axis.transData.transform(np.column_stack(line.get_data()).astype(float)))
    assert len(points) == 3
    for i in range(3):
        for j in range(i):
            # In pixels of a figure of 350 by 250: the centres are apart.
            assert np.abs(points[i] - points[j]).max(axis=1).min() > 1
    assert tick_labels(axis.xaxis) == ["30", "300"]
    assert legend_of(figure) == ["one", "other", "third"]


NAMES = ["_a", "c$x", "c$x$_{", "$\\frac", "e[lr=0.1]", "x[/y]", "a  b", "ö_ß", "%s", "\\alpha"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_in_figures_too(name, recwarn):
    """`$` begins a formula of matplotlib, and what begins with `_` has no entry in a legend."""
    rows = comparison({name: [0.5, 0.7], "no_pretraining": [0.4, 0.6]})
    figure = rendered(lambda figure: metapt.draw_comparison(figure, rows))
    assert len(legend_of(figure)) == 2
    shown = legend_of(figure)[0].replace("\\$", "$").strip()
    assert shown == name
    rows = history([1, 2], **{name: [0.1, 0.2], "other": [1, 2]})
    domain = domain_of(Toy)
    figure = rendered(lambda figure: metapt.draw_phi(figure, rows, domain, [name, "other"]))
    assert len(legend_of(figure)) == 2
    rendered(lambda figure: metapt.draw_phi(figure, rows, domain, [name]))
    assert not recwarn.list


def test_a_comparison_shows_the_first_metric_and_leaves_out_what_there_is_not():
    rows = comparison({"one": [0.5, None], "other": [None, None]}, stderr=None)
    other = comparison({"one": [0.1, 0.2]})
    for row in other:
        row["metric"] = "auroc"
    figure = rendered(lambda figure: metapt.draw_comparison(figure, rows + other))
    assert figure.axes[0].get_ylabel() == "test accuracy (%), mean ± s.e."
    assert legend_of(figure) == ["one"]
    nothing = comparison({"one": [None, None]}, stderr=None)
    rendered(lambda figure: metapt.draw_comparison(figure, nothing))


def test_a_figure_is_png_and_keeps_the_style_to_itself(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    run = metapt.Run(tmp_path)
    run.save_figure("figure.png", lambda figure: figure.subplots().plot([1, 2], [1e300, 1e308]))
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert dict(matplotlib.rcParams) == before
