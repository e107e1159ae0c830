"""A small decoder among the costs: how right its hypergradients are, and what they take.

    python -m bench.costs.transformer             every row of the table, and the steps under bf16
    python -m bench.costs.transformer peers       betty, higher and TorchOpt on the same network
    python -m bench.costs.transformer report      tables and a figure of what is stored

It is stored in bench/results/transformer, with the figure.

PT predicts the next byte of texts in made-up languages, and φ weighs the languages; FT predicts the
next byte of one of them with a head of its own. Attention is torch's
scaled_dot_product_attention. Second derivatives torch has for its math kernel alone, which is asked
for where products are exact; elsewhere torch chooses, on a CPU the flash kernel.

FLOPs, bytes saved for backward and time are in PT steps: of the same batch and precision, with the
kernel that torch chooses. Times are the processor's, medians of pairs, a PT step and a meta step in
turn.
"""

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
import rich.console
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapt
from bench.accuracy.precision import cosine
from bench.costs import counting, libraries
from bench.stored import RESULTS, save_figure, save_json
from metapt import Solver, Unroll

STORED = RESULTS / "transformer" / "transformer.json"
PEERS = RESULTS / "transformer" / "transformer-peers.json"
PT_LR = 1e-3  # of Adam
FT_LR = 0.1  # of SGD
# H + I is positive definite on all draws; the reference's CG would stop short if it were not.
DAMPING = 1.0
# The step of finite products under autocast, as --precision bf16 has it
BF16_STEP = 0.1
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = rich.console.Console(width=130)


class Size(NamedTuple):
    layers: int = 4
    width: int = 64
    heads: int = 4
    context: int = 64  # bytes of a text
    symbols: int = 256  # different bytes
    letters: int = 32  # of a language, among the symbols
    languages: int = 8
    batch: int = 16  # texts of PT, FT and validation alike
    before: int = 300  # PT steps before the hypergradients


FULL = Size()


# The data


class Languages:
    """Each is a Markov chain on letters of its own among the bytes; some letters are shared."""

    def __init__(self, size: Size):
        generator = torch.Generator().manual_seed(0)
        alphabets = []
        for _ in range(size.languages):
            order = torch.randperm(size.symbols, generator=generator)
            alphabets.append(order[: size.letters])
        self.alphabets = torch.stack(alphabets)
        shape = (size.languages, size.letters, size.letters)
        self.transitions = (2 * torch.randn(shape, generator=generator)).softmax(2)

    def texts(self, languages: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """A text of so many bytes in each of the named languages, [texts, length]."""
        letters = self.alphabets.shape[1]
        place = torch.randint(letters, languages.shape, generator=generator)
        places = [place]
        for _ in range(length - 1):
            following = self.transitions[languages, place]
            place = torch.multinomial(following, 1, generator=generator).squeeze(1)
            places.append(place)
        return self.alphabets[languages[:, None], torch.stack(places, dim=1)]


# The network


class Block(nn.Module):
    """Causal attention and a perceptron, each added to what it is given after LayerNorm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_of_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm_of_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        texts, length, width = x.shape
        of_heads = self.query_key_value(self.norm_of_attention(x))
        of_heads = of_heads.view(texts, length, 3, self.heads, width // self.heads)
        query, key, value = of_heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(texts, length, width))
        return x + self.perceptron(self.norm_of_perceptron(x))


class Decoder(nn.Module):
    """Texts [texts, context] to features of each place, [texts · context, width]."""

    def __init__(self, size: Size):
        super().__init__()
        self.symbols = nn.Embedding(size.symbols, size.width)
        self.places = nn.Parameter(0.1 * torch.randn(size.context, size.width))
        self.blocks = nn.Sequential(*[Block(size.width, size.heads) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)

    def forward(self, texts: Tensor) -> Tensor:
        x = self.blocks(self.symbols(texts) + self.places)
        return self.norm(x).flatten(0, 1)


class Transformer(libraries.Task):
    """PT and FT of the decoder as functions and as modules, on one draw of batches.

    `penalty` adds ½·penalty·‖θ‖² to L_PT, for libraries that know no damping.
    """

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32, penalty: float = 0.0):
        self.size = size
        self.decay = penalty / 2
        self.languages = Languages(size)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = Decoder(size)
            self.pt_head = nn.Linear(size.width, size.symbols)
            self.ft_head = nn.Linear(size.width, size.symbols)
        self.body = nn.ModuleDict({"encoder": self.encoder, "head": self.pt_head})
        self.body.to(dtype)
        self.ft_head.to(dtype)
        self.phi = torch.zeros(size.languages, dtype=dtype)
        self.optimizer = torch.optim.Adam(self.body.parameters(), PT_LR)
        self.draw(0)

    def draw(self, number: int) -> None:
        """New batches, by their number. PT's are of all languages, FT's and L_V's of the first."""
        generator = torch.Generator().manual_seed(number)
        self.of_languages = torch.arange(self.size.batch) % self.size.languages
        of_first = torch.zeros_like(self.of_languages)
        self.x, self.y = self._batch(self.of_languages, generator)
        self.xf, self.yf = self._batch(of_first, generator)
        self.xv, self.yv = self._batch(of_first, generator)

    def _batch(self, languages: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Bytes, and for each of them the one that follows."""
        texts = self.languages.texts(languages, self.size.context + 1, generator)
        return texts[:, :-1], texts[:, 1:].flatten()

    def weigh(self, logits: Tensor, phi: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
        of_bytes = F.cross_entropy(logits, self.y, reduction="none")
        of_texts = of_bytes.view(self.size.batch, -1).mean(1)
        weights = 2 * phi["weights"].sigmoid()
        loss = (weights[self.of_languages] * of_texts).mean()
        if self.decay:
            loss = loss + self.decay * sum(t.square().sum() for t in theta.values())
        return loss

    def pt_step(self) -> None:
        self.optimizer.zero_grad()
        self.pretrain_loss_of_modules(self.phi).backward()
        self.optimizer.step()


@functools.cache
def pretrained(size: Size) -> tuple[dict, dict]:
    """θ and ψ after PT in float32, a step of ψ beside each of θ; as state_dicts of the modules."""
    task = Transformer(size)
    of_head = torch.optim.Adam(task.ft_head.parameters(), PT_LR)
    for step in range(size.before):
        task.draw(step)
        task.pt_step()
        with torch.no_grad():
            features = task.encoder(task.xf)
        of_head.zero_grad()
        F.cross_entropy(task.ft_head(features), task.yf).backward()
        of_head.step()
    return task.body.state_dict(), task.ft_head.state_dict()


def after_pretraining(
    size: Size, draw: int = 0, dtype: torch.dtype = torch.float32, penalty: float = 0.0
) -> Transformer:
    """The network after PT, on batches that PT has not seen."""
    body, head = pretrained(size)
    task = Transformer(size, dtype, penalty)
    task.body.load_state_dict(body)
    task.ft_head.load_state_dict(head)
    task.draw(size.before + draw)
    return task


# The hypergradient, in every way


class Case(NamedTuple):
    products: str = "exact"  # or "finite", or "finite, FT exact"
    precision: str = "float32"  # or "bf16", or "float64"
    scope: str = "head"  # or "all"
    steps: int = 1  # K
    solver: str = "identity"  # or "cg 5"
    hvp_step: float | None = None  # of finite products; None: BF16_STEP under autocast


def cases() -> list[Case]:
    """Those of the table."""
    found = []
    for scope, steps in itertools.product(("head", "all"), (1, 5)):
        for solver in ("identity", "cg 5"):
            for products in ("exact", "finite", "finite, FT exact"):
                # In scope "all" FT's steps have second derivatives of the attention.
                if products == "finite, FT exact" and scope == "all":
                    continue
                for precision in ("float32", "bf16"):
                    found.append(Case(products, precision, scope, steps, solver))
    return found


def math_kernel(wanted: bool = True) -> contextlib.AbstractContextManager:
    """Attention by the math kernel, where it is wanted, else by the one that torch chooses."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else contextlib.nullcontext()


def autocast(precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def solver_of(case: Case) -> Solver:
    method, _, terms = case.solver.partition(" ")
    hvp, _, _ = case.products.partition(",")
    step = case.hvp_step
    if step is None and hvp == "finite" and case.precision == "bf16":
        step = BF16_STEP
    return Solver(method, int(terms or 1), damping=DAMPING, tol=1e-8, hvp=hvp, step=step)


def problem(task: Transformer) -> tuple:
    """What metapt.hypergradient takes by position: three losses, and θ, ψ and φ."""
    return (
        task.pretrain_loss,
        task.finetune_loss,
        task.validation_loss,
        metapt.detached(task.body),
        metapt.detached(task.ft_head),
        {"weights": task.phi},
    )


def hypergradient(task: Transformer, case: Case) -> metapt.Hypergradient:
    of_steps = "exact" if case.products == "finite, FT exact" else None
    with math_kernel(case.products == "exact"), autocast(case.precision):
        return metapt.hypergradient(
            *problem(task),
            unroll=Unroll(case.steps, FT_LR, scope=case.scope, hvp=of_steps),
            solver=solver_of(case),
        )


# What is measured


def joined(size: Size, case: Case, draws: int) -> Tensor:
    """The hypergradients of all draws in one vector, in float64."""
    dtype = torch.float64 if case.precision == "float64" else torch.float32
    found = []
    for draw in range(draws):
        task = after_pretraining(size, draw, dtype)
        found.append(hypergradient(task, case).phi["weights"].double())
    return torch.cat(found)


@functools.cache
def reference(size: Size, scope: str, steps: int, draws: int) -> Tensor:
    """By exact products in float64 and a long solve; all draws in one vector."""
    found = []
    for draw in range(draws):
        task = after_pretraining(size, draw, torch.float64)
        case = Case("exact", "float64", scope, steps, "cg 500")
        result = hypergradient(task, case)
        assert result.residual <= 1e-8, f"CG stopped at a residual of {result.residual:.1e}"
        found.append(result.phi["weights"])
    return torch.cat(found)


@functools.cache
def in_float64(size: Size, scope: str, steps: int, solver: str, draws: int) -> Tensor:
    """What the solver gives with exact products in float64."""
    return joined(size, Case("exact", "float64", scope, steps, solver), draws)


def pt_step_costs(size: Size, precision: str, math: bool = False) -> dict:
    task = after_pretraining(size)
    with math_kernel(math), autocast(precision):
        return {"flops": counting.flops(task.pt_step), "bytes": counting.peak(task.pt_step)}


def measure(size: Size, case: Case, draws: int, repeats: int) -> dict:
    """A row: costs of one meta step in PT steps, cosines over all draws."""
    task = after_pretraining(size)
    plain = after_pretraining(size)

    def meta_step():
        return hypergradient(task, case)

    def pt_step():
        with autocast(case.precision):
            plain.pt_step()

    step = pt_step_costs(size, case.precision)
    row = {
        **case._asdict(),
        "flops": counting.flops(meta_step) / step["flops"],
        "bytes": counting.peak(meta_step) / step["bytes"],
        "time": None,
    }
    if repeats:
        seconds = seconds_of({"meta": meta_step, "pt": pt_step}, repeats)
        ratios = np.array(seconds["meta"]) / np.array(seconds["pt"])
        row["time"] = float(np.median(ratios))
        row["time_range"] = [float(ratios.min()), float(ratios.max())]
    if draws:
        found = joined(size, case, draws)
        same = in_float64(size, case.scope, case.steps, case.solver, draws)
        row["cosine_to_same"] = cosine(found, same)
        row["cosine_to_reference"] = cosine(found, reference(size, case.scope, case.steps, draws))
    return row


def seconds_of(works: dict, repeats: int) -> dict[object, list[float]]:
    """Of the processor, one thread, in turn: whatever else the machine does."""
    return counting.in_turn(works, repeats, torch.device("cpu"), time.process_time)


def about(size: Size, repeats: int = 10) -> dict:
    """The network, and a PT step of each precision and kernel with its time beside the first."""
    task = after_pretraining(size)
    with torch.no_grad():
        losses = {
            "pretrain_loss": task.pretrain_loss_of_modules(task.phi).item(),
            "finetune_loss": task.finetune_loss(task.theta(), metapt.detached(task.ft_head)).item(),
        }
    steps = {}
    works = {}
    for precision, math in itertools.product(("float32", "bf16"), (False, True)):
        name = f"{precision}, {'math' if math else 'chosen'} kernel"
        steps[name] = pt_step_costs(size, precision, math)

        def work(task=after_pretraining(size), precision=precision, math=math):
            with math_kernel(math), autocast(precision):
                task.pt_step()

        works[name] = work
    seconds = seconds_of(works, repeats)
    first = np.array(seconds["float32, chosen kernel"])
    for name, step in steps.items():
        step["time"] = float(np.median(np.array(seconds[name]) / first))
    return {
        **size._asdict(),
        "parameters": sum(t.numel() for t in task.theta().values()),
        **losses,
        "pt_steps": steps,
    }


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    draws: Annotated[int, typer.Option(help="Draws of batches")] = 3,
    repeats: Annotated[int, typer.Option(help="Of the timings")] = 5,
):
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    found = {
        "torch": torch.__version__,
        "draws": draws,
        "about": about(FULL),
        "rows": [],
        "bf16_steps": [],
    }
    for case in cases():
        row = measure(FULL, case, draws, repeats)
        found["rows"].append(row)
        save_json(STORED, found)
        console.print(*cells_of(row))
    for solver, precision in itertools.product(("identity", "cg 5"), ("float32", "bf16")):
        for step in (None, 0.01, 0.03, 0.1, 0.3, 1.0):
            if step is None and precision == "bf16":
                continue
            case = Case("finite", precision, solver=solver, hvp_step=step)
            same = in_float64(FULL, case.scope, case.steps, solver, draws)
            cosine_to_same = cosine(joined(FULL, case, draws), same)
            found["bf16_steps"].append({**case._asdict(), "cosine_to_same": cosine_to_same})
            save_json(STORED, found)
    report()


@app.command()
def peers(repeats: Annotated[int, typer.Option(help="Of the timings")] = 3):
    """betty, higher and TorchOpt beside metapt, in float64, all with the math kernel.

    Then once more with the kernel that torch chooses, to see which of them run.
    """
    torch.set_num_threads(1)

    def make(size: str) -> Transformer:
        # The libraries know no damping; the penalty adds the same to H.
        return after_pretraining(FULL._replace(batch=8), dtype=torch.float64, penalty=DAMPING)

    with math_kernel():
        rows = libraries.compare("transformer", repeats, make)
    for row in rows:
        function, _ = libraries.ENTRIES[row["name"]]
        row["with_chosen_kernel"] = runs(function, make("transformer"))
    save_json(PEERS, {"torch": torch.__version__, "rows": rows})
    report()


def runs(function: Callable, task: Transformer) -> bool:
    """Whether it comes to an end."""
    try:
        function(task)
    except Exception:
        return False
    return True


# What is shown


def cells_of(row: dict) -> list[str]:
    low, high = row["time_range"]
    return [
        row["scope"],
        str(row["steps"]),
        row["solver"],
        row["products"],
        row["precision"],
        f"{row['cosine_to_same']:.4f}",
        f"{row['cosine_to_reference']:.4f}",
        f"{row['flops']:.2f}",
        f"{row['bytes']:.2f}",
        f"{row['time']:.2f}",
        f"{low:.2f} … {high:.2f}",
    ]


@app.command()
def report():
    """Tables and a figure of what is stored."""
    found = json.loads(STORED.read_text())
    about = found["about"]
    console.print(
        f"{about['parameters']:,} parameters; after {about['before']} PT steps L_PT "
        f"{about['pretrain_loss']:.2f}, L_FT {about['finetune_loss']:.2f}"
    )
    cells = []
    for name, step in about["pt_steps"].items():
        cells.append(
            [
                name,
                f"{step['flops'] / 1e9:.3f}",
                f"{step['bytes'] / 2**20:.1f}",
                f"{step['time']:.2f}",
            ]
        )
    columns = ["one PT step", "GFLOP", "MiB saved", "time"]
    metapt.show_table(console, "PT steps", columns, cells)
    columns = ["scope", "K", "solver", "products", "precision", "same solver", "long solve"]
    columns += ["FLOPs", "bytes", "time", "range"]
    metapt.show_table(
        console,
        "one meta step in PT steps; cosines to float64",
        columns,
        [cells_of(row) for row in found["rows"]],
    )
    show_steps(found["bf16_steps"])
    if PEERS.exists():
        rows = json.loads(PEERS.read_text())["rows"]
        libraries.show("transformer", rows)
        names = [row["name"] for row in rows if row["with_chosen_kernel"]]
        console.print(f"with the kernel that torch chooses these run: {'; '.join(names)}")
    save_figure(STORED.with_suffix(".png"), functools.partial(draw_costs, rows=found["rows"]))


def show_steps(rows: list[dict]) -> None:
    """Cosines by the step of finite products."""
    steps = [0.01, 0.03, 0.1, 0.3, 1.0]
    cells = []
    for solver, precision in itertools.product(("identity", "cg 5"), ("float32", "bf16")):
        line = [f"{solver}, {precision}"]
        for step in (None, *steps):
            of = [
                row["cosine_to_same"]
                for row in rows
                if (row["solver"], row["precision"], row["hvp_step"]) == (solver, precision, step)
            ]
            line.append(f"{of[0]:.4f}" if of else "")
        cells.append(line)
    columns = ["finite, scope head, K = 1", "default step", *map(str, steps)]
    metapt.show_table(console, "cosine to the same solver in float64", columns, cells)


def draw_costs(figure, rows: list[dict]) -> None:
    """FLOPs against bytes: a colour for each kind of products, a marker for each precision."""
    figure.set_size_inches(4.5, 3)
    axis = figure.subplots()
    markers = {"float32": "o", "bf16": "x"}
    kinds = ("exact", "finite, FT exact", "finite")
    for number, products in enumerate(kinds):
        for precision, marker in markers.items():
            of = [r for r in rows if (r["products"], r["precision"]) == (products, precision)]
            axis.plot(
                [r["flops"] for r in of],
                [r["bytes"] for r in of],
                marker,
                color=f"C{number}",
                ms=4,
                label=f"{products}, {precision}",
            )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs of a meta step, in PT steps",
        ylabel="bytes saved for backward, in PT steps",
    )
    axis.legend(fontsize=6)


if __name__ == "__main__":
    app()
