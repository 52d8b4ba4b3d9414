"""The page of benchmarks/scaling.py: its figures as tables, and their extrapolation to a billion rows."""

from dataclasses import dataclass, field

BILLION = 10**9


@dataclass
class Cost:
    """Cost of a script's function, over all its calls."""

    seconds: float = 0.0
    peak_mb: float = 0.0  # of the process, during the calls
    added_mb: float = 0.0  # above the memory before a call
    reads: int = 0  # rows read; counted in a later start only


@dataclass
class Start:
    """One run of a script, up to its training."""

    costs: dict[str, Cost] = field(default_factory=dict)
    # (workers, part of the epoch) -> median seconds to the first batch, and the most rows read until then
    first_batches: dict[tuple[int, float], tuple[float, int]] = field(default_factory=dict)
    most_reads: dict[int, int] = field(default_factory=dict)  # workers -> batch x (prefetch + 1) x workers

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs.values())

    @property
    def peak_mb(self) -> float:
        return max(cost.peak_mb for cost in self.costs.values())

    @property
    def reads(self) -> int:
        return sum(cost.reads for cost in self.costs.values())


@dataclass
class Figures:
    """Figures of one kind of data: a first and a later start on ``count`` rows, and both on ``fewer``, a tenth."""

    what: str
    bounded: tuple[str, ...]  # functions whose cost does not grow beyond some number of rows
    count: int
    fewer: int
    file_mb: float
    made_mb: float  # caches beside the file
    first_of_fewer: Start
    later_of_fewer: Start
    first: Start
    later: Start

    def at_a_billion(self, many: float, few: float) -> float:
        """A cost of ``many`` for ``count`` rows and ``few`` for ``fewer``, extrapolated linearly."""
        return many + max(0.0, many - few) / (self.count - self.fewer) * (BILLION - self.count)

    def billion(self) -> list[str]:
        """Size of file and caches, seconds and memory of a first and of a later start, rows read by the latter."""
        first_s, added_mb = 0.0, 0.0
        for name, cost in self.first.costs.items():
            few = self.first_of_fewer.costs[name]
            first_s += cost.seconds if name in self.bounded else self.at_a_billion(cost.seconds, few.seconds)
            if name != "prepare_tokenizer":  # whose memory grows with the distinct words
                added_mb = max(added_mb, self.at_a_billion(cost.added_mb, few.added_mb))
        later_mb = self.at_a_billion(self.later.peak_mb, self.later_of_fewer.peak_mb)
        first_mb = max(self.first.peak_mb + added_mb, later_mb)
        later_s = self.at_a_billion(self.later.seconds, self.later_of_fewer.seconds)
        sizes = [f"{size / self.count * BILLION / 1e3:,.0f} GB" for size in (self.file_mb, self.made_mb)]
        first, later = f"{first_s / 3600:,.1f} h", f"{later_s:,.0f} s"
        reads = f"{self.later.reads / self.count * BILLION:,.0f}"
        return [*sizes, first, f"{first_mb / 1e3:,.1f} GB", later, f"{later_mb / 1e3:,.1f} GB", reads]


@dataclass
class Order:
    """Cost of computing the rows of one step, among ``rows``."""

    rows: int
    us_per_sample: float
    step_bytes: int


def table(header: str, rows: list[list[str]]) -> str:
    rule = " | ".join(["---"] + ["---:"] * header.count(" | "))
    return "\n".join(f"| {line} |" for line in (header, rule, *map(" | ".join, rows)))


def prepared(f: Figures) -> list[list[str]]:
    """The table's lines for one kind of data: one for each function, and their sum."""
    lines = []
    for name, cost in f.first.costs.items():
        later, few = f.later.costs[name], f.first_of_fewer.costs[name]
        speed = f"{f.file_mb / cost.seconds:,.1f} MB/s" if name.startswith("prepare") else ""  # of the whole file
        lines.append([f.what, f"`{name}`", f"{cost.seconds:.2f} s", speed])
        lines[-1] += [f"{cost.peak_mb:,.0f} MB", f"{cost.added_mb:.1f} MB", f"{few.added_mb:.1f} MB"]
        lines[-1] += [f"{later.seconds:.3f} s", f"{later.reads:,}"]
    speed = f"{f.count / f.first.seconds:,.0f} rows/s"
    lines.append([f.what, "all", f"{f.first.seconds:.2f} s", speed, f"{f.first.peak_mb:,.0f} MB", "", ""])
    lines[-1] += [f"{f.later.seconds:.3f} s", f"{f.later.reads:,}"]
    return lines


def page(made: str, base_mb: float, figures: list[Figures], orders: list[Order]) -> str:
    """
    Args:
        made: command, date and machine.
        base_mb: memory of a process that has only imported the scripts.
    """
    late, within, resumed = [], True, []
    for f in figures:
        for (workers, part), (seconds, reads) in f.later.first_batches.items():
            ratio, most = seconds / f.later.first_batches[workers, 0.0][0], f.later.most_reads[workers]
            within &= reads <= most
            late += [ratio] if part == 0.99 else []
            line = [
                f.what,
                f"{workers}",
                f"{part:.0%}",
                f"{1e3 * seconds:.1f} ms",
                f"{ratio:.2f}",
                f"{reads}",
                f"{most}",
            ]
            resumed.append(line)
    return PAGE.format(
        made=made,
        base=f"{base_mb:,.0f} MB",
        peak=f"{max(f.first.peak_mb for f in figures):,.0f} MB",
        ratios=f"{min(late):.2f} to {max(late):.2f}",
        within="never more" if within else "**more**",
        files=table(
            "data | rows | file | made beside it | bytes a row",
            [
                [
                    f.what,
                    f"{f.count:,}",
                    f"{f.file_mb:,.1f} MB",
                    f"{f.made_mb:,.1f} MB",
                    f"{1e6 * f.made_mb / f.count:.0f}",
                ]
                for f in figures
            ],
        ),
        prepared=table(
            "data | function | first start | speed | peak memory | added | added by a tenth | later start | rows read",
            [line for f in figures for line in prepared(f)],
        ),
        resumed=table("data | workers | resumed at | first batch | ratio to 0 % | rows read | at most", resumed),
        order=table(
            "rows | time a sample | memory for a step | a shuffled list of rows would take",
            [
                [f"{o.rows:,}", f"{o.us_per_sample:.1f} us", f"{o.step_bytes / 1e3:.1f} kB", f"{8e-6 * o.rows:,.6g} MB"]
                for o in orders
            ],
        ),
        billion=table(
            "data | file | made beside it | first start | its memory | later start | its memory | rows it reads",
            [[f.what, *f.billion()] for f in figures],
        ),
    )


PAGE = """# How it scales

{made}

Each stage's own script ran up to the beginning of training, on made-up data. A process that has only imported
the scripts holds {base}; preparing took at most {peak}. The first batch of a run resumed at 99 % of an epoch
came after {ratios} times the time that it takes at the beginning, and {within} rows were read for it than
batch x (prefetch + 1) x workers.

## Preparing data, and starting again

{files}

Text becomes a tokenizer and a cache of tokens; a manifest an index of byte positions. Stage B also reads the header of
every recording and counts the tokens of every text. A later start finds all that and reads only held-out rows.
"Added" is a function's peak above the memory before it.

{prepared}

## Resuming

From setting `skip_samples` to the first batch, in medians, and the most rows read until then. Stage A's rows are
sequences of tokens, slices of a file; stage B's are recordings, read and turned into log-mels.

{resumed}

## The order of an epoch

A keyed permutation gives the row at each position, so no list of rows is shuffled or stored.

{order}

## A billion rows, computed

Extrapolated linearly from the figures for all rows and for a tenth of them; none of this was run.

{billion}

Position, order and reading a row cost the same as before. These costs grow:

- **Memory, of the stages that read manifests.** Which rows train is a list, 8 bytes a row; stage B has another, of
  lengths, and copies of both while it makes them. An index is collected in memory before it is written, 36 bytes a row.
  Text needs no such list. The memory of stage B's tokenizer training grows with the distinct words, and is not in the
  table: it is trained on all texts, A's on 24 MiB and C's on half a million captions.
- **The first start of stage B.** It reads every header, and every text three times. Here 64 recordings serve all rows
  and lie in the page cache; a billion files on a disk take longer.
- **The loss by a kill** while an index or the lengths are made: all of them so far. Of a text it is 16 MiB.
- **Every start** goes through the list of rows once more. Stages B and C read all held-out rows, and `val_split` holds
  out a share of all rows; a held-out file (`val_csv`, `val_manifest`) can be small.

## Where data parallelism ends

`torchrun` gives every process the whole model: 16 bytes for each trained parameter with AdamW (weight, gradient, two
averages in float32), 12 with Muon, whose kernels have one average. What the activations need comes on top, and can be
made smaller with `batch_size` and `gradient_accumulation_steps`; these bytes cannot. **Computed**, with a third of the
card left for activations:

| card | largest model with AdamW | times the `_tiny` Thinker (42 M) |
| --- | ---: | ---: |
| 12 GB | 0.5 billion parameters | 12 |
| 24 GB | 1 billion | 24 |
| 80 GB | 3.3 billion | 80 |

More cards make a step shorter, not the model larger. Beyond these sizes weights and averages have to be divided between
the cards: `torch.distributed.fsdp.fully_shard` (FSDP2) is PyTorch's way, and programs that are built on it, such as
torchtitan, know the Qwen3 that the exported Thinker is. It is not in the training loop here, and that is a decision: a
step that is given up without a wait, gradients that are clipped on the device, updates of whole matrices (Muon) and one
sealed file as a checkpoint each take a plain tensor for granted, and no stage comes near these sizes.

## From one process to two in mid-run

A position counts the samples of all processes, and each step has the same samples, however they are distributed. A run
of one process therefore goes on with two if the samples per step stay as they are: `batch_size` halved, or
`gradient_accumulation_steps`.

```bash
python train_text.py --config my.json                                               # batch_size 8; killed
torchrun --nproc_per_node=2 train_text.py --config my.json --set batch_size=4       # "resumed at step ..."
```

With other samples per step the run is refused. The tests in `tests/test_distributed.py` kill such a run and go on with
two processes, and the other way round: every step trains on the rows that one process would have had, and the losses
agree up to the order of sums. Random states belong to processes, so dropout differs. Stage C
needs `gradient_accumulation_steps` halved: its loss compares the samples of a micro-batch with each other.
"""
