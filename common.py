"""What every experiment needs and none owns, in the order in which a run meets it: no model, no law.

    python common.py compare RUN ...        which flags, results and verdicts differ; losses drawn
    python common.py claims RUN ...         what runs say about the notes, as markdown
    python common.py report RUN ...         the same with figures, as one HTML page
    python common.py fork exp_a.py exp_mine.py [STUDY ...]    a copy of the core and these studies alone
"""
import argparse
import ast
import csv
import datetime
import difflib
import html
import json
import os
import re
import shlex
import sys
import tempfile
from base64 import b64encode
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from hashlib import sha256
from inspect import getdoc, getfile, getmodule, getsource
from io import BytesIO, StringIO
from itertools import chain, count, pairwise, product
from math import ceil, inf, isfinite, log2, nan, prod
from os import environ
from pathlib import Path
from shutil import rmtree
from signal import SIGINT, SIGTERM, signal
from subprocess import getoutput
from symtable import symtable
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import Literal, get_args

# ---- Surroundings: settled before torch and matplotlib look at them ---------------------------------
# Compiled kernels are kept in the first cache that is absolute, writable and (for compilers) spaceless.
for root in environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"), tempfile.gettempdir():
    path = os.path.join(root, "small-networks", "inductor")
    if os.path.isabs(path) and " " not in path:
        with suppress(OSError):
            os.makedirs(path, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
            environ.setdefault("TORCHINDUCTOR_CACHE_DIR", path)
            break
environ["MPLBACKEND"] = "agg"  # a notebook's own backend is not at hand in a script
sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
for stream in sys.stdout, sys.stderr:
    with suppress(AttributeError):
        stream.reconfigure(errors="replace")  # it may know ASCII only

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import cuda
from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_map
from tqdm import tqdm

matplotlib.rcdefaults()  # not a matplotlibrc's fonts, and no LaTeX
plt.rc("axes.spines", top=False, right=False)
torch.set_flush_denormal(True)  # far below any precision, and slow
np.seterr("ignore")  # NaN and infinity have meanings here: without a value, never reached
NOW = SimpleNamespace()  # what `run_study` knows of the run that is going on

class Stop(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""

def tell(text):
    """Print a line, once for all processes; where the reader of a pipe has gone, go on without."""
    if RANK == 0:
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

# ---- Flags ------------------------------------------------------------------------------------------
def flag(default, help, low=-inf, high=inf, number=False):
    """A dataclass field that is a command-line flag: default, help (with units), inclusive bounds, and
    whether it is only numbers to the tensor program, so that runs which differ in it share one."""
    return field(default_factory=lambda: default, metadata=locals())

class Study:
    """One question: its docstring asks it in the first line and says what its arrays hold. A namespace:
    compute(flags, folder) -> arrays; claims(arrays, say); draw_NAME(arrays, flags) -> figure or None."""
    defaults = {}  # the study's own values of flags
    smoke = {}     # and those of --smoke, on top
    free = ()      # flags that may be changed without the claims losing their meaning

    def check(flags):
        """Raise Stop where the study can't be run."""

    def points(flags):
        """The configurations as dicts of fields; none: one configuration, or the grid of --sweep."""
        return []

    def claims(arrays, say):
        """Judge the sentences of the notes."""

@dataclass
class Flags:
    """The flags that every experiment has. A subclass adds its own and may override `check`."""
    study: str = flag("", "which question to ask")
    steps: int = flag(1000, "training steps", 1)
    seed: int = flag(0, "seed of the first run; run i has seed + i", 0, 2 ** 62, number=True)
    runs: int = flag(1, "seeds per configuration", 1)
    sweep: list[str] = flag([], "field=v1,v2 ...: one configuration for each combination")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where tensors live")
    compile: Literal["auto", "on", "off"] = flag("auto", "compile the step (auto: where it saves time)")
    threads: int = flag(1, "CPU threads", 1)
    block: int = flag(0, "runs that share a kernel (0: by their size; 1 suits a single run)", 0)
    out: str = flag("", "run folder (default runs/EXPERIMENT/NAME)")
    name: str = flag("", "name of the run folder (default: the flags that were given)")
    resume: bool = flag(False, "go on with an unfinished run")
    force: bool = flag(False, "delete what is in the run folder and start again")
    save_every: float = flag(30., "seconds between checkpoints", 0)
    evals: int = flag(30, "log-spaced evaluations over training", 2)
    snapshots: bool = flag(False, "keep the parameters of every evaluation")
    figures: list[str] = flag([], "names of the figures to draw (default: all of the study)")
    plot_only: bool = flag(False, "draw and judge again from the saved arrays")
    smoke: bool = flag(False, "the same path end to end, tiny, in seconds")
    # what `cli` found: the words of the command line, the flags they name, the study's class
    argv: tuple = ()
    given: tuple = ()
    room: type = Study
    def check(self):
        """Raise Stop where the values contradict each other."""

# Flags that say how or where to run, not what: they name no folder and are not compared on resume.
HOW = {*"device compile threads out name resume force save_every figures plot_only".split()}

def study_name(word):
    """A class's name on the command line: TrainMini is train-mini."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", word).lower()

def option(name):
    return "--" + name.replace("_", "-")

def fields_of(flags):
    """{name: field} of what is on the command line."""
    return {f.name: f for f in fields(flags) if f.metadata}

def plain_flags(flags):
    return {name: getattr(flags, name) for name in fields_of(flags)}

def changed(flags, other, *skip):
    """Names of the flags, apart from HOW, whose values in the dict `other` are different."""
    return [k for k, v in plain_flags(flags).items() if k not in HOW | {*skip} and v != other.get(k)]

def parse(one, text):
    """The number that a flag's text stands for; 1e4 is a whole one. one: its field."""
    kind, low, high = one.type, one.metadata["low"], one.metadata["high"]
    with suppress(ValueError, OverflowError):
        value = kind(text if re.fullmatch(r"-?\d+", text) else float(text))
        if low <= value <= high and float(value) == float(text) < inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__} from {low} to {high}")

def read_words(cls, words, rooms=(), about=""):
    """{field: value} of what a command line says; --d_model is --d-model, --no-x turns x off."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [--study NAME] [--flag VALUE ...]", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        allow_abbrev=False, exit_on_error=False)
    for name, one in fields_of(cls).items():
        more = dict(choices=rooms if name == "study" else get_args(one.type) or None)
        if one.type is bool:
            more = dict(action=argparse.BooleanOptionalAction)
        elif one.type == list[str]:
            more = dict(nargs="*")
        elif one.type in (int, float):
            more = dict(type=partial(parse, one))
        text = f"{one.metadata['help']} [{one.default_factory()}]".replace("%", "%%")
        parser.add_argument(option(name), help=text, **more)
    dashed = [re.sub(r"^--[\w-]+(?==|$)", lambda m: m[0].replace("_", "-"), word) for word in words]
    found, left = parser.parse_known_args(dashed)
    for word in left:
        near = difflib.get_close_matches(word, map(option, fields_of(cls)), 1, 0)
        raise Stop(f"unknown flag {word}; did you mean {near[0]}?" if word.startswith("--") else
                   f"no flag takes {word}")
    return vars(found)

def cli(cls, studies, argv=None):
    """Flags from argv, before --smoke, before the study's, before defaults; --help asks questions."""
    words = sys.argv[1:] if argv is None else argv
    rooms = {study_name(s.__name__): s for s in studies}
    about = [getmodule(cls).__doc__ or "", "studies, the first is the default:"]
    about += [f"  {name:12} {getdoc(room).splitlines()[0]}" for name, room in rooms.items()]
    given = {"study": [*rooms][0]} | read_words(cls, words, rooms, "\n".join(about))
    room = rooms[given["study"]]
    smoke = room.smoke if given.get("smoke") else {}
    flags = cls(**room.defaults | smoke | given, argv=words, given=given, room=room)
    for name in {*given, *swept(flags)} - HOW - {"study", "smoke"} - fields_read(room):
        raise Stop(f"--study {flags.study} does not read {option(name)}: leave it out")
    if {*flags.figures} - figures_of(room).keys():
        raise Stop(f"--figures: {flags.study} draws {', '.join(figures_of(room))}")
    device(flags)
    room.check(flags)
    groups_of_runs(flags)  # every run's flags are checked before anything is written
    return flags

@cache
def fields_read(room):
    """Names of the flags that a study reads, itself or through the functions that it reaches."""
    names = {room.__name__}
    for module in getmodule(room), getmodule(Flags):
        source = Source(getsource(module))
        reached = source.reach(names & source.nodes.keys())
        names = names.union(*map(words_in, reached.values()))
    return names

def device(flags):
    """The torch device that --device names; auto is CUDA where there is one. A process has one card."""
    card = torch.accelerator.current_accelerator(check_available=True)
    kind = flags.device.replace("auto", "cuda" if cuda.is_available() else "cpu")
    number = int(LAUNCH.get("LOCAL_RANK", 0))
    if kind != "cpu" and (not card or card.type != kind or number >= torch.accelerator.device_count()):
        raise Stop(f"--device {kind}: torch sees none for process {number}; use --device cpu")
    if kind == "cuda":
        cuda.set_device(number)
    return torch.device(kind)

# ---- Runs -------------------------------------------------------------------------------------------
def swept(flags):
    """{field: values} of --sweep, parsed and checked."""
    own, grid = fields_of(flags).keys() - fields_of(Flags).keys(), {}
    for text in flags.sweep:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if name not in own or name in grid or {name, "sweep"} <= {*flags.given}:
            raise Stop(f"--sweep {text}: each field once; {name} came, or is not a field to sweep")
        spelled = {"true": f"--{name}", "false": f"--no-{name}"}
        grid[name] = [read_words(type(flags), [spelled.get(value, f"--{name}={value}")])[name]
                      for value in values.split(",")]
    return grid

def groups_of_runs(flags):
    """Lists of Flags, one for each tensor program: within it only number fields differ. A flag of the
    command line keeps its value in the study's points or grid (not `steps` and `runs`)."""
    grid, groups = swept(flags), {}
    points = [dict(zip(grid, values)) for values in product(*grid.values())]
    if "sweep" not in flags.given:
        points = flags.room.points(flags) or points
    for point in points:
        own = {k: v for k, v in flags.given.items() if k in point.keys() - {"steps", "runs"}}
        for r in range(point.get("runs", flags.runs)):
            run = replace(flags, **point | own | dict(seed=flags.seed + r, runs=1, sweep=[]))
            run.check()
            shape = [getattr(run, k) for k, f in fields_of(run).items() if not f.metadata["number"]]
            groups.setdefault(str(shape), {})[str(run)] = run
    return [[*runs.values()] for runs in groups.values()]

def numbers(runs, constants=None):
    """{name: tensor [R, ...]} that a step receives beside its state: number fields, constants(run)."""
    found = {name: torch.tensor([getattr(run, name) for run in runs])
             for name, f in fields_of(runs[0]).items() if f.metadata["number"] and f.type is not str}
    return found | (stack(map(constants, runs)) if constants else {})

def marks(steps, count):
    """Sorted steps in 0..steps, log-spaced, about `count` > 1 of them, both ends included."""
    return sorted({0, steps, *map(int, np.geomspace(1, steps, count - 1).round())})

# ---- Random numbers: a pure function of (seed, stream, step, index), the same on every device -------
MASK = 2 ** 32 - 1

def generator(seed, stream):
    """A CPU generator for what is drawn once: initial parameters, laws, evaluation sets."""
    digest = sha256(f"{seed}/{stream}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

def mix(x):
    """A bijection of 32-bit numbers, which are kept in int64 so that no product overflows."""
    x = ((x ^ (x >> 16)) * 0x21f0aaad) & MASK
    x = ((x ^ (x >> 15)) * 0x735a2d97) & MASK
    return x ^ (x >> 15)

def key(seed, stream, step):
    """Two independent 32-bit words for a step's draws. seed, step: int64 []; stream: a number < 2^31."""
    words = []
    for constant in 0x3C6EF372, 0x1F83D9AB:
        word = mix((seed & MASK) ^ constant)
        word = mix(word ^ (seed >> 32))
        word = mix(word ^ stream)
        words.append(mix(word ^ step))
    return words

def hashes(key, *shape):
    """Uniform 32-bit numbers [*shape] as int64."""
    index = torch.arange(prod(shape), device=key[0].device).view(shape)
    return mix(mix(index ^ key[0]) ^ key[1])

def integers(key, n, *shape):
    """Uniform integers in 0..n-1 [*shape] as int64, n < 2^31; probabilities are off by 2^-32 at most."""
    return (hashes(key, *shape) * n) >> 32

def uniform(key, *shape):
    """Uniform float32 numbers in [0, 1) [*shape], multiples of 2^-24."""
    return (hashes(key, *shape) >> 8).float() * 2. ** -24

# ---- The optimiser: a pure function on dicts of tensors ---------------------------------------------
def adam_init(params):
    """Zero moments and step count t (int64) for `adamw`."""
    zeros = tree_map(torch.zeros_like, params)
    return {"m": zeros, "v": zeros, "t": torch.tensor(0)}

def adamw(params, grads, state, lr, weight_decay=0., beta1=.9, beta2=.999, eps=1e-8):
    """One step of AdamW (Loshchilov & Hutter 2019, decoupled decay lr * weight_decay); weight_decay=0 is
    Adam (Kingma & Ba 2015). Every hyperparameter may be a tensor. Returns new params and state."""
    t, dtype = state["t"] + 1, next(iter(params.values())).dtype
    # 1 - beta^t without the cancellation that costs float32 four digits at t = 1
    debias1, debias2 = (-torch.expm1(t.to(dtype) * torch.log(torch.as_tensor(beta, dtype=dtype)))
                        for beta in (beta1, beta2))
    new, m, v = {}, {}, {}
    for k, g in grads.items():
        m[k] = beta1 * state["m"][k] + (1 - beta1) * g
        v[k] = beta2 * state["v"][k] + (1 - beta2) * g * g
        move = (m[k] / debias1) / ((v[k] / debias2).sqrt() + eps)
        new[k] = params[k] * (1 - lr * weight_decay) - lr * move
    return new, {"m": m, "v": v, "t": t}

# ---- Processes: torchrun starts this program several times; each trains its share of the blocks -----
LAUNCH = environ if "MASTER_PORT" in environ else {}
RANK, WORLD = int(LAUNCH.get("RANK", 0)), int(LAUNCH.get("WORLD_SIZE", 1))
MEETINGS = count()  # every process comes to the same ones, in the same order

@cache
def store():
    """Where the processes of torchrun meet: keys and values. All must come in half a minute."""
    return next(rendezvous("env://", timeout=datetime.timedelta(seconds=30)))[0]

def meet(value=None):
    """Wait until every process is here; returns rank 0's value (JSON) on all."""
    if WORLD == 1:
        return value
    number, shared = next(MEETINGS), store()
    if not RANK:
        shared.set(f"value{number}", json.dumps(value))
    shared.add(f"here{number}", 1)
    while shared.add(f"here{number}", 0) < WORLD:
        sleep(.05)
    return json.loads(shared.get(f"value{number}"))

# ---- The fused loop ---------------------------------------------------------------------------------
READ = 100               # steps between two readings of the logs
CACHE_NUMBERS = 2 ** 14  # on a CPU: parameters, and an eighth of the constants, of a block (measured)
CARD_BYTES = 2 ** 28     # on a card: what a step of the runs of a block holds
COMPILE_PAYS = 40.       # seconds of eager training from which compiling pays on a CPU (measured)
TINY = 32                # parameters of a run, up to which the runs of a block lie innermost in memory

def stack(states):
    """Nested dicts of tensors, one per run, to one with a leading axis of runs."""
    return tree_map(lambda *xs: torch.stack(xs), *states)

def run_of(x, r):
    """Run r of a nested dict with a leading axis of runs."""
    return tree_map(lambda t: t[r], x)

def fill(old, new):
    """Copy new into the memory of old, leaf by leaf."""
    tree_map(lambda a, b: a.copy_(b), old, new)

def block_size(flags, params, number, held):
    """Runs in one kernel, by shapes alone: a power of two that fits a cache, or (held bytes) a card."""
    size, law = (sum(x.numel() for x in tensors.values()) for tensors in (params, number))
    fitting = min(16, CACHE_NUMBERS / (size + law / 8))
    most = CARD_BYTES / held if held else fitting
    return flags.block or 2 ** int(log2(max(1, most)))

def first_step(step, state, number, at):
    """(bytes that a step of one run holds on a card, its logs)."""
    state, number = to(at, (state, number))
    _, logs = step(state, number)  # the first one also makes workspaces
    if at.type != "cuda":
        return 0, logs
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    step(state, number)
    return cuda.max_memory_allocated() - before, logs

def to(at, x):
    """A copy of a nested dict on a device."""
    return tree_map(lambda t: t.to(at, copy=True), x)

def captured(f, warm_up):
    """f as one CUDA graph on the memory that it works on, after warm_up(3)."""
    cuda.synchronize()
    with cuda.stream(cuda.Stream()):  # autotuning and workspaces: not while capturing
        warm_up(3)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):  # it waits for the card
        f()
    return graph.replay

class Program:
    """The step of one run, step(state, number) -> (state, logs), as the step of a block: vmapped,
    compiled, on CUDA captured; the state is updated in place, logs go to buffers on the device.
    state, number: nested dicts [B, ...], copied; logs: what a step of one run logs."""
    def __init__(self, step, state, number, logs, at):
        self.size = len(state["t"])
        self.tiny = sum(x[0].numel() for x in state["params"].values()) <= TINY
        rows = tree_map(lambda x: x.new_zeros(self.size, READ, *x.shape), logs)
        lay = lambda x: torch.stack(x.unbind(), -1).movedim(-1, 0) if self.tiny else x
        self.state, self.number, self.rows = tree_map(lay, to(at, (state, number, rows)))
        self.row = torch.arange(1, device=at)
        alone = lambda *inputs: step(*run_of(inputs, 0))
        many = torch.vmap(step) if self.size > 1 else alone
        def update(state, number, rows, row):
            new, logs = many(state, number)
            put = lambda buffer, x: buffer.index_copy_(1, row, x.reshape(buffer[:, :1].shape))
            tree_map(put, rows, logs)
            row.add_(1)
            fill(state, new)
        self.update = update

    def once(self):
        self.update(self.state, self.number, self.rows, self.row)

    def trial(self, steps):
        """Seconds of some steps, after which the state is what it was."""
        kept, start = tree_map(torch.clone, self.state), perf_counter()
        self(steps)
        seconds = perf_counter() - start
        fill(self.state, kept)
        return seconds

    def compile(self):
        """Compile the step and, on CUDA, capture it; returns why that failed, or nothing."""
        eager = self.update
        # random numbers stay in a buffer (else each kernel hashes them again), but a tiny step is one
        # kernel; instruction sets are believed to be there (ten seconds of tests), else tested after all
        for believed in True, None:
            torch._dynamo.reset()  # else the ninth program of a process is a version of the first
            try:  # dynamic=False: all blocks go through the same kernels
                self.update = torch.compile(eager, fullgraph=True, dynamic=False, options={
                    "realize_opcount_threshold": 100 if self.tiny else 8, "cpp.vec_isa_ok": believed,
                    "cpp_wrapper": self.row.is_cpu})
                self.trial(1)
                self.once = captured(self.once, self.trial) if self.row.is_cuda else self.once
                return
            except Exception as error:  # no compiler, a full disk, ...: eager is always right
                if NOW.asked:  # Ctrl-C reached the compiler, too: that decides nothing
                    raise KeyboardInterrupt
                self.update, why = eager, f"{type(error).__name__}: {error}"
        return f"compiling failed: {why}".splitlines()[0]

    def __call__(self, steps):
        """Make at most READ steps; returns their logs {name: [B, steps, ...]} on the CPU."""
        self.row.zero_()
        for _ in range(steps):
            self.once()
        return to("cpu", tree_map(lambda x: x[:, :steps], self.rows))

def train(groups, folder, start, step_of, evaluate_of=None, constants=None):
    """Train groups of runs (lists of Flags). start(run) -> step 0, a dict with `params` and the int64
    count `t`; step_of(flags) -> step(state, number) -> (state, logs with a `loss`) of ONE run;
    evaluate_of(flags) -> f(params, number) -> {name: tensor} of one run, at `--evals` steps;
    constants(run) -> more tensors for `number`. Returns a namespace for each group: runs; params,
    {name: [R, ...]}; optimiser, the rest of the state; metrics, logs [T, R, ...] with step [T], eval_*
    [M, R, ...] with eval_step [M]; snapshots of params [M, R, ...]. NaN after a stop."""
    found = []
    for i, runs in enumerate(groups):
        if found and meet(NOW.asked):
            break
        flags, place = runs[0], folder / f"group{i}" if len(groups) > 1 else folder
        whole = train_group(runs, place, start, step_of, evaluate_of, constants)
        metrics = tree_map(lambda x: x.transpose(0, 1).numpy(), whole["metrics"])
        snapshots = {k[9:]: metrics.pop(k) for k in [*metrics] if k.startswith("snapshot_")}
        for r, run in enumerate(runs if folder == NOW.folder else []):
            ends = {k: float(x[-1, r]) for k, x in metrics.items() if x.ndim == 2}
            finished = int(whole["step"][r]) == flags.steps
            diverged = finished and not isfinite(ends["loss"])
            NOW.rows.append((run, dict(finished=finished, diverged=diverged, **ends)))
        metrics |= dict(step=np.arange(flags.steps) + 1,
                        eval_step=np.array(marks(flags.steps, flags.evals)))
        write(place / "metrics.npz", metrics)
        if snapshots:
            write(place / "snapshots.npz", snapshots | {"step": metrics["eval_step"]})
        found.append(SimpleNamespace(**whole | dict(runs=runs, metrics=metrics, snapshots=snapshots)))
    return found

def train_group(runs, folder, start, step_of, evaluate_of, constants):
    """Train runs of one shape in blocks, each by one process in its folder. The merged checkpoint."""
    path = folder / "checkpoint.pt"
    if path.exists():
        return read(path)
    flags, begin = runs[0], lambda runs: (stack(map(start, runs)), numbers(runs, constants))
    step, evaluate, at = step_of(flags), evaluate_of and evaluate_of(flags), device(flags)
    state, number = run_of(begin(runs[:1]), 0)
    held, logs = first_step(step, state, number, at)
    size = block_size(flags, state["params"], number, held)
    padded = runs + runs[-1:] * (-len(runs) % size)
    blocks = {folder / f"block{a // size}" / "checkpoint.pt": padded[a:a + size]
              for a in range(0, len(runs), size)}
    program = Program(step, *begin(padded[:size]), logs, at)
    with timed("compiling"):
        decide(program, flags, folder / "compiled.json", len(blocks))
    for part, block in [*blocks.items()][RANK::WORLD]:
        train_block(program, part, *begin(block), flags, evaluate)
    meet()
    whole = tree_map(lambda *xs: torch.cat(xs)[:len(runs)], *map(read, blocks))
    whole["number"] = numbers(runs)
    meet()  # everyone has read
    if (whole["step"] == flags.steps).all():
        write(path, whole)
        for part in blocks:
            rmtree(part.parent, ignore_errors=True)
    return whole

def decide(program, flags, path, blocks):
    """Compile or not: as asked, as before, or where it shortens the training; rank 0 decides for all."""
    choice = [flags.compile != "off", f"--compile {flags.compile}"]
    if flags.compile == "auto" and path.exists():
        choice = read(path)
    elif flags.compile == "auto" and not program.row.is_cuda:
        program.trial(1)
        seconds = program.trial(3) / 3 * flags.steps * blocks / WORLD
        choice = [seconds > COMPILE_PAYS, f"eager would take {seconds:.0f} s"]
    compiled, why = meet(choice)
    failed = compiled and program.compile()
    choice = [compiled and not failed, failed or why]
    write(path, choice)
    NOW.compiled.append(choice)
    tell(f"{'compiled' if choice[0] else 'eager'} ({choice[1]}), {blocks} blocks of {program.size} runs")

def train_block(program, path, state, number, flags, evaluate):
    """Train one block, from its checkpoint if there is one, to the end or to Ctrl-C."""
    metrics, done, saved_at = {}, 0, perf_counter()
    if path.exists():
        saved = read(path)
        state, metrics = {"params": saved["params"], **saved["optimiser"]}, saved["metrics"]
        done = int(saved["step"][0])
    fill((program.state, program.number), (state, number))
    params, stops = program.state["params"], marks(flags.steps, flags.evals)
    def log(values, at, total):
        for name, x in values.items():
            empty = torch.full((len(x), total, *x.shape[2:]), nan, dtype=x.dtype)
            metrics.setdefault(name, empty)[:, at:at + x.shape[1]] = x
    cuts = sorted(cut for cut in {done, *range(0, flags.steps, READ), *stops} if cut >= done)
    for step in tqdm(cuts, flags.study, leave=False, disable=RANK or None):
        with timed("stepping"):
            log(program(step - done), done, flags.steps)
        NOW.seconds["run_steps"] += (step - done) * program.size
        with timed("evaluating"):
            if step in stops:
                seen = torch.vmap(evaluate)(params, program.number) if evaluate else {}
                found = {f"eval_{k}": x[:, None] for k, x in seen.items()}
                if flags.snapshots:
                    found |= {f"snapshot_{k}": x[:, None] for k, x in params.items()}
                log(found, stops.index(step), len(stops))
        done = step
        if NOW.asked or done == flags.steps or perf_counter() > saved_at + flags.save_every:
            rest, saved_at = to("cpu", program.state), perf_counter()
            write(path, dict(params=rest.pop("params"), optimiser=rest, metrics=metrics,
                             step=torch.full((program.size,), step)))
        if NOW.asked:
            break

# ---- The run folder ---------------------------------------------------------------------------------
def encode(suffix, value):
    """A value as the bytes of a file, by its name's suffix."""
    buffer = BytesIO()
    if suffix == ".npz":
        np.savez_compressed(buffer, **value)
    elif suffix == ".pt":
        torch.save(value, buffer)
    elif suffix == ".png":
        value.savefig(buffer, dpi=130)
    elif suffix == ".json":
        return json.dumps(value, indent=1).encode()
    return buffer.getvalue() or value

def decode(name, data):
    """What `encode` was given; never runs code. Stop names a file that is not what its name says."""
    try:
        if name.endswith(".npz"):
            return dict(np.load(BytesIO(data), allow_pickle=False))
        if name.endswith(".pt"):
            return torch.load(BytesIO(data), weights_only=True, map_location="cpu")
        return json.loads(data) if name.endswith(".json") else data
    except Exception as error:  # numpy, zipfile, torch and json raise whatever the bytes lead them to
        raise Stop(f"{name} is damaged or of another kind ({type(error).__name__})")

def sums(folder):
    """{file: the checksums of its last versions, in one string}."""
    path = folder / "checksums.json"
    found = decode(path.name, path.read_bytes()) if path.exists() else {}
    return found if isinstance(found, dict) else {}

def write(path, value):
    """Write a file: first its checksum beside older ones, then the file, each by rename, so that a crash
    in between leaves a file that is accepted. Rank 0 writes, and each rank its blocks."""
    if RANK and not path.parent.name.startswith("block"):
        return
    data, known = encode(path.suffix, value), sums(path.parent)
    known[path.name] = f"{known.get(path.name)} {sha256(data).hexdigest()}"[-650:]
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, content in ("checksums.json", encode(".json", known)), (path.name, data):
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path.with_name(name))

def read(path):
    """What was written there; Stop unless the bytes are those that were written."""
    data = path.read_bytes()
    if sha256(data).hexdigest() not in str(sums(path.parent).get(path.name)):
        raise Stop(f"{path} is damaged or foreign: --force to start again, or --name another")
    return decode(path.name, data)

@contextmanager
def timed(what):
    start = perf_counter()
    yield
    NOW.seconds[what] += perf_counter() - start

def experiment(flags):
    return Path(getfile(type(flags))).stem.removeprefix("exp_")  # exp_addition.py is addition

def config(flags, finished):
    """What config.json holds."""
    at = device(flags)
    name = cuda.get_device_name(at) if at.type == "cuda" else ""
    commit = f"git -C {shlex.quote(str(Path(__file__).parent))} rev-parse HEAD 2>{os.devnull}"
    return dict(flags=plain_flags(flags), argv=flags.argv, finished=finished, device=f"{at} {name}",
                tf32=torch.backends.cuda.matmul.allow_tf32, commit=getoutput(commit),
                versions={module.__name__: module.__version__ for module in (torch, np, matplotlib)},
                compiled=NOW.compiled, seconds=NOW.seconds)

def summarise(flags, claims):
    """summary.csv and summary.json of all runs, and config.json."""
    differ = [k for run, _ in NOW.rows for k in changed(run, plain_flags(flags), "runs", "sweep")]
    rows = [{k: getattr(run, k) for k in ["seed", *differ]} | ends for run, ends in NOW.rows]
    text = StringIO()
    csv.writer(text).writerows([*rows[:1], *map(dict.values, rows)])
    write(NOW.folder / "summary.csv", text.getvalue().encode())
    write(NOW.folder / "summary.json", dict(
        study=flags.study, runs=rows, claims=claims, wall_seconds=perf_counter() - NOW.start,
        run_steps_per_second=NOW.seconds["run_steps"] / max(NOW.seconds["stepping"], 1e-9)))
    write(NOW.folder / "config.json", config(flags, not NOW.asked))

@contextmanager
def opened(flags, script):
    """The folder of this run, --out or named by the flags that were given: locked, then `prepared`."""
    given = [f"_{k}={v}" for k, v in flags.given.items() if k not in HOW | {"study"}]
    name = flags.name or re.sub("[^0-9A-Za-z.,=+_-]", "", flags.study + "".join(given))[:99]
    if "/" in name:
        raise Stop(f"--name {name} must be the name of one folder; --out takes a path")
    path = Path(os.path.expanduser(flags.out or f"runs/{experiment(flags)}/{name}"))
    if flags.plot_only:
        read(path / "arrays.npz")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.glob("[!.]*")) and not (path / "checksums.json").exists():
        raise Stop(f"{path} exists and is no run folder of this project; give another --out")
    with open(path / ".lock", "a") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of a killed process's
        except BlockingIOError:
            raise Stop(f"another process works in {path}; wait for it or give --name")
        except (ImportError, OSError):  # Windows, some network file systems
            tell(f"{path} can't be locked here: start no second process in it")
        yield prepared(path, flags, script)

def prepared(path, flags, script):
    """The folder of this run, checked against what is already there; None for a finished run."""
    code, cure = {"script.py": script, "common.py": Path(__file__)}, "--force or give another --name"
    for item in sorted(path.glob("[!.]*")) if flags.force and not flags.plot_only else []:
        rmtree(item) if item.is_dir() else item.unlink()
    saved = path / "config.json"
    if saved.exists():
        old = read(saved)
        differ = [f"{k} {old['flags'].get(k)} -> {getattr(flags, k)}"
                  for k in changed(flags, old["flags"])]
        if differ:
            raise Stop(f"{path} holds another configuration: {', '.join(differ)}; {cure}")
        if flags.plot_only:
            return path
        new = [name for name, source in code.items() if read(path / name) != source.read_bytes()]
        if new:
            raise Stop(f"{' and '.join(new)} changed since {path} was made: {cure}")
        if old["finished"]:
            tell(f"finished already: {path}  (--force to do it again, --plot-only to redraw)")
            return
        if not flags.resume:
            raise Stop(f"{path} holds an unfinished run: --resume to go on; {cure} to start again")
    for name, source in code.items():
        write(path / name, source.read_bytes())
    write(saved, config(flags, False))
    return path

def load(path, group="."):
    """A finished run for a notebook: flags, params {name: [R, ...]} (by group of a sweep), arrays."""
    path = Path(path)
    return SimpleNamespace(flags=SimpleNamespace(**read(path / "config.json")["flags"]),
                           params=read(path / group / "checkpoint.pt")["params"],
                           arrays=read(path / "arrays.npz"))

# ---- Claims -----------------------------------------------------------------------------------------
RELATIONS = {"<": np.less, ">": np.greater, "is": np.equal,
             "in": lambda x, bounds: (x >= bounds[0]) & (x <= bounds[1])}

def judge(id, statement, source, measured, relation, bound):
    """One sentence and its verdict. measured: one value a run (three quarters decide, fewer than three
    decide nothing, NaN has no vote); or (value, low, high), decided where all agree; or one value."""
    votes, needed = np.atleast_1d(measured), 1
    if isinstance(measured, tuple):
        text = "{:.3g} [{:.3g}, {:.3g}]".format(*measured)
    elif np.ndim(measured):
        votes, needed = np.sort(votes[votes == votes]), .75
        text = f"{len(votes)} of {len(measured)} runs"
        if len(votes):
            levels = f"{votes[(len(votes) - 1) // 2]:.3g} [{votes[0]:.3g}, {votes[-1]:.3g}]"
            text = f"{levels}, {text}".replace("inf", "never")
    else:
        text = f"{measured:.4g}"
    share = RELATIONS[relation](votes, bound).mean() if needed == 1 or len(votes) > 2 else .5
    verdict = "holds" if share >= needed else "FALSE" if share <= 1 - needed else "open"
    expected = " .. ".join(f"{x:.4g}" for x in np.atleast_1d(bound))
    return dict(id=id, statement=statement, source=source, expected=f"{relation} {expected}",
                measured=text, verdict=verdict)

def judged(flags, arrays):
    """The claims of a study, where it ran with its own settings and to its end."""
    found, own = [], plain_flags(type(flags)(**flags.room.defaults))
    differ = changed(flags, own, "seed", "runs", "study", "snapshots", "block", *flags.room.free)
    if differ or NOW.asked:
        tell("claims are not judged: they are about whole runs with the study's own settings "
             f"(changed: {', '.join(map(option, differ)) or 'stopped before the end'})")
    else:
        flags.room.claims(arrays, lambda *words: found.append(judge(*words)))
    return found

# ---- Figures ----------------------------------------------------------------------------------------
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #F0E442".split()  # Okabe & Ito

def panels(count, title, flags, columns=2, size=(5.4, 3.7)):
    """A figure with `count` axes in a grid, a title, and the flags in small print: (figure, axes)."""
    columns, rows = min(columns, count), ceil(count / columns)
    figure = plt.figure(figsize=(size[0] * columns, size[1] * rows + .5), layout="constrained")
    figure.suptitle(title)
    figure.supxlabel(  # in any font
        f"exp_{experiment(flags)}.py {ascii(shlex.join(flags.argv))[1:-1]}", size=6, parse_math=False)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]

def band(ax, x, y, label, colour):
    """Median and quartiles over runs of y [T, R], a hundred single runs behind, without empty runs."""
    known = np.isfinite(y)
    rows, runs = known.any(1), known.any(0)
    if not known.any():
        return
    x, y = x[rows], np.where(known, y, nan)[rows]
    low, middle, high = np.nanquantile(y, [.25, .5, .75], axis=1)
    ax.plot(x, y[:, :100], color=colour, lw=.5, alpha=.3)
    ax.fill_between(x, low, high, color=colour, alpha=.2)
    ax.plot(x, middle, color=colour, label=f"{label} ({runs.sum()} of {len(runs)} runs)")

def shelf(ax, y, text, side="right"):
    """A dashed horizontal line with its name: a floor, chance, a level that is known exactly."""
    ax.axhline(y, color="grey", ls="--", zorder=3)
    paper = dict(facecolor="white", edgecolor="none", alpha=.7, pad=.4)  # curves pass behind the label
    ax.text(side == "right", y, text, transform=ax.get_yaxis_transform(), color="grey", fontsize=6.5,
            ha=side, va="bottom", bbox=paper)

def image(ax, x, title, figure, xlabel="", ylabel="", limits=None):
    """x [rows, columns] as an image, between limits, or in colours symmetric about 0."""
    most = np.nanmax(np.abs(x), initial=0) or 1
    shown = ax.imshow(x, "viridis" if limits else "RdBu_r", clim=limits or (-most, most), aspect="auto")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    figure.colorbar(shown, ax=ax)

def figures_of(room):
    """{name: draw function} of a study, in the order of its text."""
    return {k[5:]: f for k, f in vars(room).items() if k.startswith("draw_")}

# ---- The command line of a script -------------------------------------------------------------------
def main(cls, studies, argv=None):
    """Run a script. Returns the exit status: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    script, status = Path(getfile(cls)), 2
    try:
        return run_study(cli(cls, studies, argv), script)
    except (Stop, argparse.ArgumentError) as error:
        message = error
    except KeyboardInterrupt:
        message, status = "stopped at once; what was saved before can be resumed", 130
    except DistError:
        message = "a process did not come, or went: torchrun starts them all, --resume goes on"
    except OSError as error:
        message = f"cannot read or write: {error}"
    except (RuntimeError, MemoryError) as error:
        if "alloc" not in str(error):
            raise
        message = "out of memory; lower --block, or the sizes (such as --batch)"
    print(f"{script.name}: {message}", file=sys.stderr)
    return status

def run_study(flags, script):
    """One command line, from flags to figures."""
    NOW.__init__(start=perf_counter(), asked=False, rows=[], compiled=[], seconds=Counter())
    torch.set_num_threads(flags.threads)
    def ask(*_):  # Ctrl-C or SIGTERM: the training loop saves and stops; the second time all stops
        if NOW.asked:
            raise KeyboardInterrupt
        NOW.asked = True
        tell("\nstopping (again: at once)")
    with ExitStack() as ending:
        path = None if RANK else ending.enter_context(opened(flags, script))
        path = meet(path and str(path))
        if not path:
            return 0
        for number in SIGINT, SIGTERM:
            ending.callback(signal, number, signal(number, ask))
        NOW.folder = Path(path)
        if flags.plot_only:
            arrays = read(NOW.folder / "arrays.npz")
            NOW.asked = not read(NOW.folder / "config.json")["finished"]
        else:
            arrays = {k: np.asarray(v) for k, v in flags.room.compute(flags, NOW.folder).items()}
            write(NOW.folder / "arrays.npz", arrays)
        if not RANK:
            conclude(flags, arrays)
        tell(f"stopped; go on with: python {script.name} "
             f"{shlex.join(w for w in flags.argv if w not in '--resume --force --plot-only'.split())} "
             "--resume" if NOW.asked else f"{path}  ({perf_counter() - NOW.start:.0f} s)")
        return 130 * NOW.asked

def conclude(flags, arrays):
    """Judge the claims, write the summary, then draw."""
    found, summary = judged(flags, arrays), NOW.folder / "summary.json"
    if flags.plot_only:
        write(summary, read(summary) | {"claims": found})
    else:
        summarise(flags, found)
    verdicts = Counter(c["verdict"] for c in found)
    counts = ", ".join(f"{verdicts[v]} {v}" for v in ("holds", "FALSE", "open"))
    text = f"### {experiment(flags)}, {flags.study}: {len(read(summary)['runs'])} runs; {counts}\n\n"
    text += "| claim | statement | expected | measured | verdict |\n| --- | --- | --- | --- | --- |\n"
    for c in found:
        tell("{verdict:7} {id}: {statement}   measured {measured}".format(**c))
        text += "| {id} | {statement} | {expected} | {measured} | {verdict} |\n".format(**c)
    write(NOW.folder / "claims.md", text.encode())
    draws = figures_of(flags.room)
    for name in flags.figures or draws:
        figure = draws[name](arrays, flags)
        if figure:  # or the bytes of an animation
            write(NOW.folder / f"{name}.{'gif' if isinstance(figure, bytes) else 'png'}", figure)
        plt.close("all")
    diverged = sum(ends["diverged"] for _, ends in NOW.rows)
    if diverged:
        tell(f"{diverged} of {len(NOW.rows)} runs diverged: see summary.csv")

# ---- A script's text: what its studies reach, for `fork` and for flags that a study does not read ----
class Source:
    """The top level of a script: nodes {name: statement}, and members {name: statement} of its Flags."""
    def __init__(self, text):
        self.tree = ast.parse(text)
        self.nodes = {name: node for node in self.tree.body for name in defined(node)}
        flags = self.nodes["Flags"]
        self.members = {name: node for node in flags.body for name in defined(node)}
        flags.body = [ast.Pass()]

    def reach(self, names):
        """{name: statement} of all that these names use, directly or not, and of themselves."""
        found, left, known = {}, [*names], self.members | self.nodes
        while left:
            name = left.pop()
            if name in known and name not in found:
                node = found[name] = known[name]
                left += strings(node, ast.Name) & self.nodes.keys()
                left += words_in(node) & self.members.keys() - {"check"}
        return found

def defined(node):
    """Names that a statement binds."""
    symbols = symtable(ast.unparse(node), "", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_local()}

def words_in(node):
    """Attributes, keywords and strings of a statement: the ways to name a flag."""
    return strings(node, ast.Attribute, ast.keyword, ast.Constant)

def strings(node, *kinds):
    """Names and texts in a tree's nodes of these kinds."""
    nodes = [n for n in ast.walk(node) if isinstance(n, kinds)]
    return {value for n in nodes for value in vars(n).values() if isinstance(value, str)}

def fork(source, target, *wanted):
    """Copy a script with the named studies (default: the first) and what they and `check` reach."""
    text = Path(source).read_text()
    script, lines = Source(text), text.splitlines()
    rooms = {study_name(n.id): n.id for n in script.nodes["STUDIES"].value.elts}
    wanted = wanted or [*rooms][:1]
    if {*wanted} - rooms.keys():
        raise Stop(f"the studies of {source} are {', '.join(rooms)}")
    names = [rooms[w] for w in wanted]
    kept = script.reach(["Flags", "common", "check", *names]).keys() | {"STUDIES"}
    # what stands between two statements goes with the second
    for before, node in chain(pairwise(script.tree.body[:-1]), pairwise(script.members.values())):
        if not defined(node) & kept:
            for i in range(before.end_lineno, node.end_lineno):
                lines[i] = f"\n\n{lines[i]}" if lines[i].startswith("# ====") else None
    text = "\n".join(line for line in lines if line is not None) + "\n"
    text = re.sub(r"(?ms)^STUDIES = .*?\]", f"STUDIES = [{', '.join(names)}]", text)
    text = text.replace(Path(source).name, Path(target).name)
    empty = rf"(?m)^    python .* --study (?!({'|'.join(wanted)})\b).*\n|^# ==== .*\n+(?=# ==== )"
    with open(target, "x") as f:  # without others' commands and banners of what is empty
        f.write(re.sub(empty, "", text))

# ---- Finished runs: compared, listed, reported ------------------------------------------------------
def compare(*paths):
    """Print which flags and median final metrics of runs differ; draw their losses."""
    tables, ax = [], plt.figure().add_subplot(xscale="log", yscale="log", xlabel="step")
    for path in map(Path, paths):
        for file in sorted(path.rglob("metrics.npz")):
            metrics = read(file)
            ends = {k: f"{np.median(x[-1]):.4g}" for k, x in metrics.items() if x.ndim == 2}
            band(ax, metrics["step"], abs(metrics["loss"]), f"|loss|, {file.parent}", f"C{len(tables)}")
            tables.append({"run": file.parent} | read(path / "config.json")["flags"] | ends)
    for k in tables[0]:
        cells = [f"{table.get(k, '-')}" for table in tables]
        if len({*cells}) > 1:
            print(k, *cells, sep="\t")
    ax.legend()
    plt.savefig("runs/compare.png")

def claims(*paths):
    """Print what runs say about the notes, as markdown tables."""
    for path in paths:
        print(read(Path(path, "claims.md")).decode())

def report(*paths):
    """Write runs/report.html, one page of verdicts and figures."""
    page = ["<!doctype html><meta charset=utf-8><style>pre {white-space: pre-wrap}</style>"]
    for path in map(Path, paths):
        page.append(f"<pre>{html.escape(read(path / 'claims.md').decode())}</pre>")
        for f in sorted(path.glob("*.[pg][ni][gf]")):
            page.append(f"<img src='data:image/{f.suffix[1:]};base64,{b64encode(read(f)).decode()}'>")
    Path("runs/report.html").write_text("\n".join(page), encoding="utf-8")

if __name__ == "__main__":
    tools = {f.__name__: f for f in (compare, claims, report, fork)}
    try:
        tools[sys.argv[1]](*sys.argv[2:])
    except (Stop, OSError, LookupError, TypeError) as error:
        print(f"common.py: {error}" if isinstance(error, (Stop, OSError)) else __doc__, file=sys.stderr)
        sys.exit(2)
