"""What every experiment needs and none owns, in the order in which a run meets it: the surroundings,
flags, runs, random numbers, the optimiser, processes, the fused loop, the run folder, claims, figures,
and `main`.

    python common.py compare RUN RUN ...      which flags and results differ, and one metric drawn
    python common.py claims RUN ...           what runs say about the notes, as markdown
    python common.py report [RUN ...]         one HTML page of verdicts and figures
    python common.py fork exp_a.py exp_mine.py [STUDY ...]    a copy of the core and these studies alone

No model, no data law and no experiment's name is in here."""
import ast
import atexit
import base64
import collections
import contextlib
import csv
import dataclasses
import datetime
import difflib
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import typing
from pathlib import Path
from typing import Literal


# ---- Surroundings: settled before torch and matplotlib look at them ---------------------------------

def cache_folder():
    """Where compiled kernels outlive the process: the first of the usual places that is absolute,
    writable and free of spaces (a compiler's command would fall apart at one), else a temporary
    folder."""
    places = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
    named = [os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")]
    for path in named + [os.path.join(p, "small-networks", "inductor") for p in places]:
        if os.path.isabs(path) and not re.search(r"\s", path):
            with contextlib.suppress(OSError):
                os.makedirs(path, exist_ok=True)
                tempfile.TemporaryFile(dir=path).close()
                return path
    path = tempfile.mkdtemp(prefix="small-networks-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_folder()
os.environ["MPLBACKEND"] = "agg"  # a notebook's own backend is not at hand in a script
for name in "stdout", "stderr":
    if getattr(sys, name) is None:  # closed by the shell
        setattr(sys, name, open(os.devnull, "w"))
    elif hasattr(getattr(sys, name), "reconfigure"):
        getattr(sys, name).reconfigure(errors="replace")  # it may know ASCII only

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.animation import PillowWriter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

matplotlib.rcdefaults()  # not a matplotlibrc's fonts, and no LaTeX


class Stop(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


def tell(text):
    """Print a line, once for all processes; where the reader of a pipe has gone, go on without."""
    if rank() == 0:
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


NOW = types.SimpleNamespace(asked=False, met=False)  # asked to stop by Ctrl-C; all processes have met


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ---- Flags ------------------------------------------------------------------------------------------

def flag(default, help, low=None, high=None, number=False):
    """A dataclass field that is a command-line flag: its default, its help (with units), inclusive
    bounds, and whether it is only a number to the tensor program, so that runs which differ in it
    share one program."""
    metadata = dict(help=help, low=low, high=high, number=number)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Flags:
    """The flags that every experiment has. A subclass adds its own and may override `check`."""
    study: str = flag("", "which question to ask")
    steps: int = flag(1000, "training steps", low=1)
    seed: int = flag(0, "seed of the first run; run i has seed + i", low=0, high=2 ** 62)
    runs: int = flag(1, "seeds per configuration", low=1)
    sweep: list[str] = flag([], "field=v1,v2 ...: one configuration for each combination")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where tensors live")
    compile: Literal["auto", "on", "off"] = flag("auto", "compile the step (auto: where it saves time)")
    threads: int = flag(1, "CPU threads", low=1)
    block: int = flag(0, "runs that share a kernel (0: by their size; 1 suits a single run)", low=0)
    out: str = flag("", "run folder (default runs/EXPERIMENT/NAME)")
    name: str = flag("", "name of the run folder (default: the flags that were changed)")
    resume: bool = flag(False, "go on with an unfinished run")
    force: bool = flag(False, "delete what is in the run folder and start again")
    save_every: float = flag(30., "seconds between checkpoints", low=0)
    snapshots: int = flag(0, "log-spaced copies of the parameters to keep", low=0)
    figures: list[str] = flag([], "names of the figures to draw (default: all of the study)")
    plot_only: bool = flag(False, "draw and judge again from the saved arrays")
    smoke: bool = flag(False, "the same path end to end, tiny, in seconds")

    # what `cli` found: the words of the command line, the fields they name, the study's class
    argv: list = dataclasses.field(default_factory=list, repr=False, compare=False)
    given: list = dataclasses.field(default_factory=list, repr=False, compare=False)
    room: type = dataclasses.field(default=None, repr=False, compare=False)

    def check(self):
        """Raise Stop where the values contradict each other."""


# Flags that say how or where to run, not what: they name no folder and are not compared on resume.
HOW = {"device", "compile", "threads", "out", "name", "resume", "force", "save_every", "figures",
       "plot_only"}


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


def study_name(word):
    """A class's name on the command line: TrainMini is train-mini."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", word).lower()


def fields_of(flags):
    """{name: field} of what is on the command line."""
    return {f.name: f for f in dataclasses.fields(flags) if f.metadata}


def parse(text, field, where):
    """A flag's value from its text; Stop with what would have been right. where: how the user knows
    it."""
    kind, low, high = field.type, field.metadata.get("low"), field.metadata.get("high")
    choices = ["true", "false"] if kind is bool else typing.get_args(kind)
    if choices and text not in choices and kind != list[str]:
        raise Stop(f"{where}: {text!r} is not one of {', '.join(choices)}{did_you_mean(text, choices)}")
    if kind not in (int, float):
        return text == "true" if kind is bool else text
    try:
        value = float(text)
        if kind is int:
            value = int(value) if "e" in text.lower() and value == int(value) else int(text)
        if not math.isfinite(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise Stop(f"{where}: {text!r} is not a {'whole' if kind is int else 'finite'} number") from None
    if low is not None and value < low or high is not None and value > high:
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise Stop(f"{where}: {text} must be {bounds}")
    return value


def did_you_mean(word, known):
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def option(name):
    return "--" + name.replace("_", "-")


def read_words(words, fields):
    """{field: value} of what the command line says; --d_model is --d-model, --no-x turns x off."""
    found, name = {}, None
    for word in words:
        if not re.match(r"--[\w-]+(=|$)", word):
            if not name:
                raise Stop(f"{word} belongs to no flag (and those that turn something on take no value)")
            found[name].append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        positive = name if name in fields else name.removeprefix("no_")
        if positive not in fields or positive != name and fields[positive].type is not bool:
            near = did_you_mean(option(name), map(option, fields))
            raise Stop(f"unknown flag {option(name)}{near or '; --help lists them'}")
        if fields[positive].type is not bool:
            is_list = fields[name].type == list[str]
            found[name] = (found.get(name, []) if is_list else []) + [value] * bool(equals)
        elif equals:
            other = option("no_" + positive)
            raise Stop(f"{option(name)} takes no value: {option(positive)} or {other}")
        else:
            found[positive], name = name == positive, None
    for name, values in found.items():
        if fields[name].type not in (bool, list[str]):
            if len(values) != 1:
                raise Stop(f"{option(name)} takes one value, not {len(values)}")
            found[name] = parse(values[0], fields[name], option(name))
    return found


def cli(cls, studies, argv=None):
    """Flags from the command line. Precedence: argv, then --smoke, then the study, then the field's
    default. Prints the help and exits where it is asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    rooms = {study_name(s.__name__): s for s in studies}
    if {"-h", "--help"} & {*words}:
        print_help(cls, rooms)
        raise SystemExit(0)
    given = read_words(words, fields_of(cls))
    study = given.setdefault("study", next(iter(rooms)))
    if study not in rooms:
        raise Stop(f"--study: {study!r} is not one of {', '.join(rooms)}{did_you_mean(study, rooms)}")
    room = rooms[study]
    flags = cls(**{**study_defaults(room, given.get("smoke")), **given})
    flags.argv, flags.given, flags.room = words, sorted(given), room
    if "sweep" not in given:  # a study's own sweep gives way to a flag that fixes the same field
        flags.sweep = [s for s in flags.sweep if s.split("=")[0] not in given]
    for kind, there in ("cuda", torch.cuda), ("mps", torch.backends.mps):
        if flags.device == kind and not there.is_available():
            raise Stop(f"--device {kind}: torch sees no such device; use --device cpu")
    if flags.plot_only and flags.force:
        raise Stop("--plot-only draws what --force would delete: give one of them")
    flags.out = os.path.expanduser(flags.out)
    unread = {*given, *swept(flags)} - HOW - {"study", "smoke"} - fields_read(room)
    if unread:
        raise Stop(f"--study {flags.study} does not read {option(min(unread))}: leave it out")
    unknown = {*flags.figures} - {*figures_of(room)}
    if unknown:
        raise Stop(f"--figures {min(unknown)}: {flags.study} draws {', '.join(figures_of(room))}")
    room.check(flags)
    groups_of_runs(flags)  # every run's flags are checked before anything is written
    return flags


def print_help(cls, rooms):
    """The script's docstring, its studies with their questions, then every flag with its default."""
    module = sys.modules[cls.__module__]
    print(f"usage: python {Path(module.__file__).name} [--study NAME] [--flag VALUE ...]\n")
    print(inspect.cleandoc(module.__doc__ or ""), "\n\nstudies, the first is the default:")
    for name, room in rooms.items():
        print(f"  {name:12} {inspect.getdoc(room).splitlines()[0]}")
    shared = [*fields_of(Flags)][2:]
    for title, is_shared in ("flags of this experiment", False), ("flags of every experiment", True):
        print(f"\n{title}:")
        for name, field in fields_of(cls).items():
            if (name in shared) == is_shared:
                default = getattr(cls(), name)
                word = option(f"no_{name}" if default is True else name)
                print(f"  {word:18} {field.metadata['help']} [{default}]")


def study_defaults(room, smoke=False):
    """The values that a study, and --smoke on top of it, put in the place of the fields' own."""
    return {**room.defaults, **(room.smoke if smoke else {})}


def fields_read(room):
    """Names of the flags that a study reads, itself or through the functions that it reaches."""
    script = Source(inspect.getsource(inspect.getmodule(room)))
    words = set().union(*map(words_in, script.reach([room.__name__]).values()))
    shared = Source(Path(__file__).read_text())
    nodes = shared.reach(words & shared.nodes.keys() - {"Flags"})
    return words.union(*map(words_in, nodes.values()))


def device(flags):
    """The torch device that --device names; auto takes CUDA if there is one, else the CPU."""
    kind = flags.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)


def shorthand(flags):
    """Name of a run from the flags that were changed, such as digit_d_model64_lr3e-3."""
    defaults, words = type(flags)(**study_defaults(flags.room, flags.smoke)), [flags.study]
    for name in fields_of(flags):
        value = getattr(flags, name)
        if name in HOW | {"study"} or value in (getattr(defaults, name), []):
            continue
        text = " ".join(value) if isinstance(value, list) else value
        text = f"{value:g}" if isinstance(value, float) else text
        words.append({"True": name, "False": f"no_{name}"}.get(str(value), f"{name}{text}"))
    name = re.sub(r"[^\w.,=+-]", "-", "_".join(words))
    if len(name.encode()) < 100:
        return name
    return f"{name.encode()[:80].decode(errors='ignore')}-{sha256(name.encode())[:8]}"


# ---- Runs -------------------------------------------------------------------------------------------

def swept(flags):
    """{field: values} of --sweep, parsed and checked."""
    fields, grid = fields_of(flags), {}
    fixed = HOW | {"sweep", "steps", "seed", "runs", "study", "smoke", "snapshots", "block"}
    for text in flags.sweep:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if not values or name in grid:
            raise Stop(f"--sweep {text}: write field=v1,v2, each field once")
        if name not in fields or name in fixed:
            raise Stop(f"--sweep {text}: {name} is not a field to sweep{did_you_mean(name, fields)}")
        values = [parse(v, fields[name], f"--sweep {text}: {name}") for v in values.split(",")]
        grid[name] = list(dict.fromkeys(values))
    return grid


def groups_of_runs(flags):
    """Runs as lists of Flags, one list for each tensor program: within a list only seeds and number
    fields differ. The configurations are the grid of --sweep, or the study's points, in which a flag
    given on the command line keeps its value (but for `steps` and `runs`, which a point may choose from
    them)."""
    fixed = {*flags.given} - {"steps", "runs"}
    grid = swept(flags)
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    if "sweep" not in fixed and flags.room.points(flags):
        own = [{k: getattr(flags, k) if k in fixed else v for k, v in p.items()}
               for p in flags.room.points(flags)]
        points = [p for i, p in enumerate(own) if p not in own[:i]]
    numbers = {name for name, f in fields_of(flags).items() if f.metadata["number"]} | {"runs"}
    groups = {}
    for point in points:
        shape = tuple((k, v) for k, v in point.items() if k not in numbers)
        for i in range(point.get("runs", flags.runs)):
            own = {**point, "seed": flags.seed + i, "runs": 1, "sweep": []}
            run = dataclasses.replace(flags, **own)
            run.check()
            groups.setdefault(shape, []).append(run)
    return list(groups.values())


def numbers(runs, constants=None, dtype=torch.float32):
    """{name: tensor [R, ...]} of what a step receives beside its state: the seed, every number field,
    and the dict of tensors constants(run)."""
    found = {}
    for name, field in fields_of(runs[0]).items():
        if name == "seed" or field.metadata["number"] and field.type in (bool, int, float):
            kind = dtype if field.type is float else torch.int64
            found[name] = torch.tensor([getattr(r, name) for r in runs], dtype=kind)
    return found | (stack([constants(run) for run in runs]) if constants else {})


def number_fields(run):
    """{name: value} of the seed and of every field in which runs of one group differ."""
    names = [name for name, field in fields_of(run).items() if field.metadata["number"]]
    return {name: getattr(run, name) for name in ["seed", *names]}


def marks(steps, count):
    """Sorted steps in 0..steps, log-spaced, about `count` of them, both ends included."""
    if count < 1:
        return []
    return sorted({0, steps, *(int(round(s)) for s in np.geomspace(1, steps, max(count - 1, 1)))})


# ---- Random numbers: a pure function of (seed, stream, step, index), the same on every device -------

MASK = 2 ** 32 - 1


def generator(seed, stream):
    """A CPU generator for what is drawn once: initial parameters, laws, evaluation sets."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def mix(x):
    """A bijection of 32-bit numbers, which are kept in int64 so that no product overflows."""
    x = ((x ^ (x >> 16)) * 0x21f0aaad) & MASK
    x = ((x ^ (x >> 15)) * 0x735a2d97) & MASK
    return x ^ (x >> 15)


def key(seed, stream, step):
    """Two independent 32-bit words for what one step draws. seed, step: int64 tensors []; stream: an
    integer below 2^31, one for each thing that a step draws."""
    words = []
    for constant in 0x3C6EF372, 0x1F83D9AB:
        word = mix((seed & MASK) ^ constant)
        word = mix(word ^ (seed >> 32))
        word = mix(word ^ stream)
        words.append(mix(word ^ step))
    return words


def hashes(key, *shape):
    """Uniform 32-bit numbers [*shape] as int64."""
    index = torch.arange(math.prod(shape), device=key[0].device).view(shape)
    return mix(mix(index ^ key[0]) ^ key[1])


def integers(key, n, *shape):
    """Uniform integers in 0..n-1 [*shape] as int64, n < 2^31; probabilities are off by 2^-32 at most."""
    return (hashes(key, *shape) * n) >> 32


def uniform(key, *shape):
    """Uniform float32 numbers in [0, 1) [*shape], multiples of 2^-24."""
    return (hashes(key, *shape) >> 8).to(torch.float32) * 2. ** -24


# ---- The optimiser: a pure function on dicts of tensors ---------------------------------------------

def adam_init(params):
    """Zero moments and step count t (int64) for `adamw`."""
    zeros = {k: torch.zeros_like(p) for k, p in params.items()}
    return {"m": zeros, "v": dict(zeros), "t": torch.zeros((), dtype=torch.int64)}


def adamw(params, grads, state, lr, weight_decay=0., beta1=.9, beta2=.999, eps=1e-8):
    """One step of AdamW (Loshchilov & Hutter 2019, decoupled decay lr * weight_decay); weight_decay=0 is
    Adam (Kingma & Ba 2015). Every hyperparameter may be a tensor. Returns new params and state."""
    t, dtype = state["t"] + 1, next(iter(params.values())).dtype

    def debias(beta):  # 1 - beta^t without the cancellation that costs float32 four digits at t = 1
        return -torch.expm1(t.to(dtype) * torch.log(torch.as_tensor(beta, dtype=dtype)))
    debias1, debias2 = debias(beta1), debias(beta2)
    m = {k: beta1 * state["m"][k] + (1 - beta1) * g for k, g in grads.items()}
    v = {k: beta2 * state["v"][k] + (1 - beta2) * g * g for k, g in grads.items()}
    new = {}
    for k, p in params.items():
        move = (m[k] / debias1) / ((v[k] / debias2).sqrt() + eps)
        new[k] = p * (1 - lr * weight_decay) - lr * move
    return new, {"m": m, "v": v, "t": t}


def norm(tensors):
    """Euclidean norm of a dict of tensors taken as one vector."""
    return torch.sqrt(sum((x * x).sum() for x in tensors.values()))


# ---- Processes: torchrun starts this program several times; each trains its share of the blocks -----

LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
MEETINGS = itertools.count()  # every process comes to the same ones, in the same order


def rank():
    return int(os.environ["RANK"]) if LAUNCHED else 0


def world():
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


@functools.cache
def store():
    """The key-value store in which processes meet; apart for each attempt of torchrun --max-restarts."""
    keep = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    tcp = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=keep,
                        wait_for_workers=False, timeout=datetime.timedelta(seconds=30))
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), tcp)


def meet(value=None, seconds=math.inf):
    """Wait until every process is here, for so many seconds; returns rank 0's value (JSON) on all."""
    if world() == 1:
        return value
    number, start, cure = next(MEETINGS), time.monotonic(), "start it by torchrun, or unset WORLD_SIZE"
    try:
        if rank() == 0:
            store().set(f"value{number}", json.dumps(value))
        store().add(f"here{number}", 1)
        while (here := store().add(f"here{number}", 0)) < world():
            if time.monotonic() - start > (5 if NOW.asked else seconds):
                raise Stop(f"{here} of {world()} processes came in time; go on with --resume, {cure}")
            time.sleep(.05)
        return json.loads(store().get(f"value{number}"))
    except RuntimeError as error:
        raise Stop(f"no way to the other processes ({type(error).__name__}): {cure}") from None


# ---- The fused loop ---------------------------------------------------------------------------------

READ = 100               # steps between two readings of the logs
CACHE_NUMBERS = 2 ** 16  # on a CPU: parameters, gradients and moments of the runs of a block (measured)
CARD_BYTES = 2 ** 28     # on an accelerator: what the runs of a block hold
COMPILE_PAYS = 40.       # seconds of eager training from which compiling pays on a CPU (measured)


def tree(f, *trees):
    """f applied leaf by leaf to nested dicts of tensors."""
    if isinstance(trees[0], dict):
        return {k: tree(f, *(t[k] for t in trees)) for k in trees[0]}
    return f(*trees)


def stack(states):
    """Nested dicts, one per run, to one with a leading axis of runs."""
    return tree(lambda *xs: torch.stack(xs), *states)


def run_of(x, r):
    """Run r of a nested dict with a leading axis of runs."""
    return tree(lambda t: t[r], x)


def fill(old, new):
    """Copy new into the memory of old, leaf by leaf."""
    tree(lambda a, b: a.copy_(b), old, new)


class Made(TorchDispatchMode):
    """Counts the bytes of all tensors that are made: what a step can hold at most."""
    bytes = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.bytes += x.nbytes if isinstance(x, torch.Tensor) and not x._is_view() else 0
        return out


def dry_run(step, state, number):
    """(bytes that a step of one run makes, its logs as fake tensors), without computing anything."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Made() as made:
        _, logs = step(tree(fake.from_tensor, state), tree(fake.from_tensor, number))
    return made.bytes, logs


def block_size(flags, params, held):
    """Runs that go through one kernel together: a power of two that keeps them in a CPU's cache
    (addition 128-wide: 1, 16-wide: 4, 2-wide: 16) or fills a card. It depends on shapes alone, so that a
    run has the same bits alone and in company. params: of one run; held: bytes that its step holds."""
    most = CARD_BYTES / held
    if device(flags).type == "cpu":
        most = min(16, CACHE_NUMBERS / sum(4 * p.numel() for p in params.values()))
    return flags.block or 2 ** int(math.log2(max(1, most)))


class Program:
    """The step of one run, step(state, number) -> (state, logs), as the step of a block: vmapped,
    compiled, on CUDA captured as a graph. The state is updated in place; the logs go to a buffer on the
    device.

    state, number: nested dicts [B, ...], copied; logs: what a step of one run logs, by `dry_run`."""

    def __init__(self, step, state, number, logs, at):
        self.state, self.number = (tree(lambda x: x.to(at, copy=True), t) for t in (state, number))
        self.size, self.at, self.graph = len(state["t"]), at, None
        self.shapes = {k: tuple(x.shape) for k, x in logs.items()}
        dtype = max((x.dtype for x in logs.values()), key=lambda d: d.itemsize)
        width = sum(map(math.prod, self.shapes.values()))
        self.rows = torch.zeros(READ, self.size, width, dtype=dtype, device=at)
        self.row = torch.zeros(1, dtype=torch.int64, device=at)
        alone = lambda state, number: step(run_of(state, 0), run_of(number, 0))
        many = alone if self.size == 1 else torch.vmap(step)

        def update(state, number, rows, row):
            new, logs = many(state, number)
            line = torch.cat([logs[k].reshape(self.size, -1) for k in self.shapes], 1)
            rows.index_copy_(0, row, line[None])
            row.add_(1)
            fill(state, new)
        self.update = update

    def load(self, state, number):
        """Put other runs of the same shapes into the program's memory."""
        fill(self.state, state)
        fill(self.number, number)

    def once(self):
        self.update(self.state, self.number, self.rows, self.row)

    def trial(self, steps):
        """Seconds of some steps, after which the state is what it was."""
        kept, start = tree(torch.clone, self.state), time.perf_counter()
        for _ in range(steps):
            self.once()
        seconds = time.perf_counter() - start
        fill(self.state, kept)
        self.row.zero_()
        return seconds

    def compile(self):
        """Compile the step and, on CUDA, capture it. Raises whatever the compiler raises."""
        eager = self.update
        # the threshold keeps random numbers in a buffer; by default each kernel hashes them again, and
        # compiling takes three times as long. The processor's own word for its instruction sets saves
        # ten seconds of test builds; where the compiler is too old for them, they are tested after all
        for known in True, None:
            options = {"realize_opcount_threshold": 8, "cpp.vec_isa_ok": known}
            torch._dynamo.reset()  # else the ninth program of a process counts as a version of the first
            # dynamic=False: all blocks go through the same kernels
            self.update = torch.compile(eager, fullgraph=True, dynamic=False, options=options)
            try:
                return self.capture() if self.at.type == "cuda" else self.trial(1)
            except Exception:
                self.update = eager
                if known is None:
                    raise

    def capture(self):
        """One CUDA graph of the compiled step."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # autotuning and workspaces: not while capturing
            self.trial(3)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.once()

    def __call__(self, steps):
        """Make at most READ steps; returns their logs {name: [steps, B, ...]} on the CPU."""
        self.row.zero_()
        for _ in range(steps):
            self.graph.replay() if self.graph else self.once()
        rows = self.rows[:steps].to("cpu", copy=True)  # the only synchronisation
        parts = rows.split([math.prod(s) for s in self.shapes.values()], 2)
        return {k: x.reshape(steps, self.size, *s) for (k, s), x in zip(self.shapes.items(), parts)}

    def evaluate(self, f):
        """f(params, number) of every run, {name: [B, ...]} on the CPU."""
        with torch.no_grad():
            return tree(lambda x: x.cpu(), torch.vmap(f)(self.state["params"], self.number))


def train(groups, folder, start, step_of, evaluate_of=None, constants=None, eval_at=None, final=None):
    """Train groups of runs (lists of Flags), one tensor program after the other.

    start(run) -> step 0 of one run, a dict with `params` and the int64 count `t`; step_of(flags) ->
    step(state, number) -> (state, logs) of ONE run, whose logs have a `loss`; evaluate_of(flags) ->
    f(params, number) -> {name: tensor} of one run, at the steps eval_at(flags); constants(run) -> what
    `numbers` takes; final(runs, metrics) -> {name: [R]} for the summary.

    Returns a namespace for each group: runs; state {"params": {name: [R, ...]}, ...}; metrics, what a
    step logs [T, R, ...] with step [T], what is evaluated [M, R, ...] as eval_* with eval_step [M], and
    snapshots, step [S] and parameters [S, R, ...], NaN after a run was stopped; final."""
    found = []
    for i, runs in enumerate(groups):
        place = folder.sub(f"group{i}") if len(groups) > 1 else folder
        evaluate = evaluate_of(runs[0]) if evaluate_of else None
        stops = sorted({0, runs[0].steps, *(eval_at(runs[0]) if eval_at else ())})
        whole = train_group(runs, place, start, step_of(runs[0]), evaluate, constants, stops)
        metrics = {k: v.numpy() for k, v in whole["metrics"].items()}
        metrics["step"] = np.arange(1, runs[0].steps + 1)
        metrics["eval_step"] = np.array(stops)
        last = {"loss": metrics.get("eval_loss", metrics["loss"])[-1]}
        last |= final(runs, metrics) if final else {}
        snapshots = {"step": np.array(marks(runs[0].steps, runs[0].snapshots)), **whole["snapshots"]}
        place.write("metrics.npz", metrics)
        if whole["snapshots"]:
            place.write("snapshots.npz", snapshots)
        finished = (whole["steps"] == runs[0].steps).tolist()
        place.add_rows(runs, finished, last)
        state = {"params": whole["params"], **whole["optimiser"]}
        found.append(types.SimpleNamespace(runs=runs, state=state, metrics=metrics, final=last,
                                           snapshots=snapshots))
    return found


def train_group(runs, folder, start, step, evaluate, constants, stops):
    """Train runs of one shape block by block, each to its end in a folder and with a checkpoint of its
    own, by the process whose turn it is; then all processes read all blocks. Returns the merged
    checkpoint."""
    flags = runs[0]
    begin = lambda runs: (stack([start(run) for run in runs]), numbers(runs, constants))
    state, number = begin(runs[:1])
    if folder.has("checkpoint.pt"):
        return folder.checkpoint(state)
    made, logs = dry_run(step, run_of(state, 0), run_of(number, 0))
    size = block_size(flags, run_of(state["params"], 0), made)
    blocks = [runs[a:a + size] for a in range(0, len(runs), size)]
    blocks = [block + block[-1:] * (size - len(block)) for block in blocks]
    count = sum(x.numel() for x in state["params"].values())
    tell(f"{count:,} parameters a run, {len(runs)} runs in blocks of {size}")
    program = Program(step, *begin(blocks[0]), logs, device(flags))
    decide(program, flags, folder, len(blocks))
    parts = [folder.sub(f"block{i}", own=i % world() == rank()) for i in range(len(blocks))]
    for i in range(rank(), len(blocks), world()):
        program.label = f"{flags.study}, block {i + 1} of {len(blocks)}"
        train_block(program, parts[i], *begin(blocks[i]), flags, evaluate, stops)
    meet()
    saved = [part.checkpoint(state) for part in parts]
    whole = {"step": min(s["step"] for s in saved), "runs": [number_fields(run) for run in runs],
             "steps": torch.tensor([s["step"] for s in saved]).repeat_interleave(size)[:len(runs)]}
    for name, axis in ("params", 0), ("optimiser", 0), ("metrics", 1), ("snapshots", 1):
        join = lambda *xs, axis=axis: torch.cat(xs, axis).narrow(axis, 0, len(runs))
        whole[name] = tree(join, *(s[name] for s in saved))
    meet()  # everyone has read
    if whole["step"] == flags.steps:
        folder.write("checkpoint.pt", whole)
        for part in parts:
            shutil.rmtree(part.path, ignore_errors=True)
    return whole


def decide(program, flags, folder, blocks):
    """Compile or not: as asked, as before, or where it shortens the training; rank 0 decides for all."""
    compiled, why, start = flags.compile != "off", f"--compile {flags.compile}", time.perf_counter()
    if flags.compile == "auto" and folder.has("compiled.json"):
        compiled, why = folder.read("compiled.json")
    elif flags.compile == "auto" and program.at.type != "cuda":
        program.trial(1)
        seconds = program.trial(3) / 3 * flags.steps * math.ceil(blocks / world())
        compiled = seconds > COMPILE_PAYS
        why = f"eager would take {seconds:.0f} s; compiling pays from {COMPILE_PAYS:.0f} s"
    compiled, why = meet([compiled, why])
    if compiled:
        try:
            program.compile()
        except Exception as error:  # no compiler, no headers, a full disk, ...: eager is always right
            if NOW.asked:  # Ctrl-C reached the compiler, too: that decides nothing
                raise KeyboardInterrupt from None
            reason = (str(error).strip().splitlines() or [""])[0][:120]
            compiled, why = False, f"compiling failed: {type(error).__name__}: {reason}"
    folder.write("compiled.json", [compiled, why])
    folder.book("compiling", start)
    folder.root.compiled.append(dict(compiled=compiled, why=why, block=program.size))
    tell(f"{'compiled' if compiled else 'eager'} ({why})")


def train_block(program, folder, state, number, flags, evaluate, stops):
    """Train one block, from its checkpoint if there is one, to the end or to Ctrl-C."""
    metrics, snapshots, done, last = {}, {}, 0, time.monotonic()
    if folder.has("checkpoint.pt"):
        saved = folder.checkpoint(state)
        state = {"params": saved["params"], **saved["optimiser"]}
        metrics, snapshots, done = saved["metrics"], saved["snapshots"], saved["step"]
    program.load(state, number)
    keep_at = marks(flags.steps, flags.snapshots)

    def log(place, total, at, values):
        for name, x in values.items():
            if name not in place:
                place[name] = torch.full((total, *x.shape[1:]), math.nan, dtype=x.dtype)
            place[name][at:at + len(x)] = x

    def look(step):
        start = time.perf_counter()
        if evaluate and step in stops:
            seen = program.evaluate(evaluate)
            log(metrics, len(stops), stops.index(step), {f"eval_{k}": v[None] for k, v in seen.items()})
        if step in keep_at:
            kept = tree(lambda x: x.cpu()[None], program.state["params"])
            log(snapshots, len(keep_at), keep_at.index(step), kept)
        folder.book("evaluating", start)

    def save():
        now = tree(lambda x: x.cpu(), program.state)
        folder.write(
            "checkpoint.pt",
            dict(
                params=now.pop("params"), optimiser=now, step=done, metrics=metrics, snapshots=snapshots
            ),
        )

    if not done:
        look(0)
        log(metrics, flags.steps, 0, program(0))
    bar = tqdm(total=flags.steps, initial=done, desc=program.label, leave=False,
               disable=rank() > 0 or None)  # None: where there is no terminal
    cuts = sorted({done, *range(0, flags.steps, READ), *stops, *keep_at})
    for a, b in itertools.pairwise(c for c in cuts if c >= done):
        if NOW.asked:
            break
        start = time.perf_counter()
        log(metrics, flags.steps, a, program(b - a))
        folder.book("stepping", start, (b - a) * program.size)
        look(b)
        done = b
        bar.set_postfix_str(f"loss {metrics['loss'][a:b].nanmedian():.3g}", refresh=False)
        bar.update(b - a)
        if time.monotonic() - last > flags.save_every:
            save()
            last = time.monotonic()
    bar.close()
    save()


def side_by_side(trained):
    """The metrics of all groups along one axis of runs, {name: [T, R, ...]}; the step axes are the
    same."""
    join = lambda k: np.concatenate([t.metrics[k] for t in trained], 1)
    return {k: x if x.ndim == 1 else join(k) for k, x in trained[0].metrics.items()}


# ---- The run folder ---------------------------------------------------------------------------------

def encode(name, value):
    """A value as the bytes of a file, by the name's suffix."""
    if isinstance(value, bytes):
        return value
    buffer = io.BytesIO()
    if name.endswith(".npz"):
        np.savez_compressed(buffer, **{k: np.asarray(v) for k, v in value.items()})
    elif name.endswith(".pt"):
        torch.save(value, buffer)
    else:
        buffer.write(json.dumps(finite(value), indent=1, default=str).encode())
    return buffer.getvalue()


def decode(name, data):
    """What `encode` was given; never runs code. Stop names a file that is not what its name says."""
    try:
        if name.endswith(".npz"):
            with np.load(io.BytesIO(data), allow_pickle=False) as z:
                return {k: z[k] for k in z.files}
        if name.endswith(".pt"):
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        return json.loads(data) if name.endswith(".json") else data
    except Exception as error:  # numpy, zipfile, torch and json raise whatever the bytes lead them to
        raise Stop(f"{name} is damaged or of another kind ({type(error).__name__})") from None


def finite(x):
    """x for JSON: null for NaN and infinity, plain numbers for numpy's."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    x = x.item() if hasattr(x, "item") else x
    return None if isinstance(x, float) and not math.isfinite(x) else x


def checked(saved, state, name):
    """A checkpoint whose parameters have the shapes of those of a state, apart from the number of
    runs."""
    shapes = lambda params: {k: tuple(p.shape[1:]) for k, p in params.items()}
    try:
        have, _ = shapes(saved["params"]), saved["step"] + len(saved["optimiser"])
    except Exception:  # anything can be in a stranger's file
        raise Stop(f"{name} is not a checkpoint of this project") from None
    want = shapes(state["params"])
    for k in sorted({*have, *want}):
        if have.get(k) != want.get(k):
            raise Stop(f"{name} is of another shape: {k} is {have.get(k, 'missing')}, not {want.get(k)}")
    return saved


def checkpoint_of(path, state):
    """A checkpoint.pt from anywhere, for models whose state is like this one."""
    try:
        return checked(decode(str(path), Path(path).read_bytes()), state, path)
    except OSError as error:
        raise Stop(f"cannot read {path}: {error.strerror}") from None


class Folder:
    """One run folder: atomic writes with checksums; `root` is the outermost one, which knows of all runs
    in it."""

    def __init__(self, path, flags, root=None, own=False):
        self.path, self.flags, self.root = Path(path), flags, root or self
        self.mine = own or rank() == 0  # else another process writes it
        self.rows, self.compiled, self.seconds = [], [], collections.Counter()

    def sub(self, name, own=False):
        """A folder inside this one; own: this process writes it."""
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return Folder(self.path / name, self.flags, self.root, own)

    def aside(self, name):
        """A folder inside this one for runs that serve another one: they have no row in the summary."""
        return Folder(self.sub(name).path, self.flags)

    def book(self, what, start, run_steps=0):
        """Add the seconds since `start` to what config.json says of compiling, stepping and
        evaluating."""
        self.root.seconds[what] += time.perf_counter() - start
        self.root.seconds["run_steps"] += run_steps

    def sums(self):
        """{file: checksums that are accepted}."""
        place = self.path / "checksums.json"
        sums = decode(str(place), place.read_bytes()) if place.exists() else {}
        if not isinstance(sums, dict) or not all(isinstance(v, list) for v in sums.values()):
            raise Stop(f"{place} is damaged; --force to start again")
        return sums

    def write(self, name, value):
        """Write a file: first its checksum beside the old one, then the file, each by rename, so that a
        crash in between leaves a file that is still accepted."""
        if not self.mine:
            return
        data, sums = encode(name, value), self.sums()
        now = [sha256((self.path / name).read_bytes())] if self.has(name) else []
        sums[name] = [x for x in now if x in sums.get(name, [])] + [sha256(data)]
        for target, content in ("checksums.json", encode("sums.json", sums)), (name, data):
            temporary = self.path / f".{target}.tmp"
            try:
                with open(temporary, "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, self.path / target)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise Stop(f"cannot write {self.path / name}: {error.strerror}; what was saved "
                           "stays") from None

    def has(self, name):
        return (self.path / name).exists()

    def read(self, name):
        """What was written under a name; Stop unless the bytes are those that were written."""
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise Stop(f"cannot read {self.path / name}: {error.strerror}") from None
        if sha256(data) not in self.sums().get(name, []):
            raise Stop(
                f"{self.path / name} is damaged or foreign: its checksum is not the recorded one; "
                "--force to start again, or --name another"
            )
        return decode(name, data)

    def checkpoint(self, state):
        return checked(self.read("checkpoint.pt"), state, self.path / "checkpoint.pt")

    def add_rows(self, runs, finished, final):
        """One row of the summary for each run: seed, what sets it apart, and its final metrics {name:
        [R]}."""
        grid = swept(self.flags)
        for i, run in enumerate(runs):
            ends = {k: float(v[i]) for k, v in final.items()}
            fields = [f for f in fields_of(run) if f not in HOW | {"seed", "runs", "sweep"}
                      and (f in grid or getattr(run, f) != getattr(self.flags, f))]
            settings = {f: getattr(run, f) for f in ["seed", *fields]}
            diverged = finished[i] and not math.isfinite(ends["loss"])
            self.root.rows.append((settings, {"finished": finished[i], "diverged": diverged, **ends}))

    def summarise(self, claims, wall):
        """summary.csv and summary.json of all runs, and config.json."""
        fields = dict.fromkeys(k for settings, _ in self.rows for k in settings)
        rows = [{k: s.get(k, getattr(self.flags, k)) for k in fields} | ends for s, ends in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write("summary.csv", text.getvalue().encode())
        speed = self.seconds["run_steps"] / max(self.seconds["stepping"], 1e-9)
        self.write(
            "summary.json",
            dict(experiment=experiment(self.flags), study=self.flags.study, runs=rows,
                 settings=[*fields], claims=claims, wall_seconds=wall, run_steps_per_second=speed),
        )
        self.write("config.json", config(self, finished=not NOW.asked))


def experiment(flags):
    """Name of the script that a Flags class belongs to: exp_addition.py -> addition."""
    return Path(sys.modules[type(flags).__module__].__file__).stem.removeprefix("exp_")


def plain_flags(flags):
    return {name: getattr(flags, name) for name in fields_of(flags)}


def config(folder, finished=False):
    """What config.json holds."""
    flags, commit = folder.flags, None
    if shutil.which("git"):
        asked = ["git", "rev-parse", "HEAD"]
        said = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = said.stdout.strip()
    at = device(flags)
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else platform.machine()
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    matplotlib=matplotlib.__version__)
    return dict(experiment=experiment(flags), flags=plain_flags(flags), argv=flags.argv,
                finished=finished, versions=versions, device=f"{at} ({name})",
                tf32=torch.backends.cuda.matmul.allow_tf32, commit=commit, compiled=folder.compiled,
                seconds=folder.seconds)


@contextlib.contextmanager
def locked(path):
    """Keep a second process out of a folder; the system lets go of the lock even of a killed process."""
    with open(path / ".lock", "a") as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"another process works in {path}; wait for it or give --name") from None
        except (ImportError, OSError):  # Windows, some network file systems
            tell(f"{path} can't be locked here: start no second process in it")
        yield


def folder_path(flags):
    """Where this run lives; made if need be, so that it can be locked."""
    if flags.name and (Path(flags.name).name != flags.name or flags.name in (".", "..")):
        raise Stop(f"--name {flags.name} must be the name of one folder; --out takes a path")
    path = Path(flags.out or Path("runs", experiment(flags), flags.name or shorthand(flags)))
    try:
        inside = {p.name for p in path.iterdir() if p.suffix != ".tmp"} if path.exists() else set()
        if inside - {".lock"} and "checksums.json" not in inside:
            raise Stop(f"{path} exists and is no run folder of this project; give another --out")
        if flags.plot_only and "arrays.npz" not in inside:
            raise Stop(f"{path} holds no run to draw; run the same command without --plot-only first")
        path.mkdir(parents=True, exist_ok=True)
        (path / ".lock").touch()
    except OSError as error:
        raise Stop(f"cannot write to {path}: {error.strerror}; give another --out") from None
    return path


def open_folder(path, flags, script):
    """The folder of this run, checked against what is already there; None if the run is finished."""
    code = {"script.py": script.read_bytes(), "common.py": Path(__file__).read_bytes()}
    if flags.force:
        for item in path.iterdir():
            if item.name != ".lock":
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    folder = Folder(path, flags)
    if folder.has("config.json"):
        old, now = folder.read("config.json"), json.loads(encode("flags.json", plain_flags(flags)))
        if old["experiment"] != experiment(flags):
            raise Stop(f"{path} belongs to the experiment {old['experiment']}; give another --name")
        differ = [f"{k} {old['flags'].get(k)} -> {now[k]}" for k in now
                  if k not in HOW and old["flags"].get(k) != now[k]]
        if differ:
            raise Stop(f"{path} holds another configuration: {', '.join(differ)}; --force to redo, "
                       "--name for a new folder")
        if flags.plot_only:
            return folder
        begun = any(path.rglob("checkpoint.pt"))
        changed = [n for n, data in code.items() if not folder.has(n) or folder.read(n) != data]
        if changed and (begun or old["finished"]):
            raise Stop(f"{' and '.join(changed)} changed since {path} was made: --force to redo, "
                       "--name for a new folder")
        if old["finished"]:
            tell(f"finished already: {path}  (--force to do it again, --plot-only to redraw)")
            return None
        if begun and not flags.resume:
            raise Stop(f"{path} holds an unfinished run: --resume to go on, --force to start again")
    if flags.resume and not any(path.rglob("checkpoint.pt")):
        tell(f"nothing to resume in {path}: starting afresh")
    folder.write("config.json", config(folder))
    for name, data in code.items():
        folder.write(name, data)
    return folder


def load(path):
    """A finished run for a notebook: flags (a namespace), params {name: [R, ...]}, arrays. Of a sweep
    over shapes it is one of its groups: load("runs/../group0")."""
    folder = Folder(path, None)
    outer = folder if folder.has("config.json") else Folder(Path(path).parent, None)
    params = folder.read("checkpoint.pt")["params"] if folder.has("checkpoint.pt") else {}
    arrays = folder.read("arrays.npz" if folder.has("arrays.npz") else "metrics.npz")
    flags = types.SimpleNamespace(**outer.read("config.json")["flags"])
    return types.SimpleNamespace(flags=flags, params=params, arrays=arrays)


# ---- Claims -----------------------------------------------------------------------------------------

RELATIONS = {"<": lambda x, b: x < b, ">": lambda x, b: x > b, "is": lambda x, b: x == b,
             "in": lambda x, b: (x >= b[0]) & (x <= b[1])}
VERDICTS = {True: "holds", False: "FALSE", None: "open"}


def judge(id, statement, source, measured, relation, bound):
    """One sentence and its verdict. measured: one value a run, of which three quarters decide and fewer
    than three runs decide nothing (NaN has no vote, infinity is what was never reached); or (value, low,
    high), which is decided where the whole interval is on one side; or one exact value."""
    agree = RELATIONS[relation]
    words = str(bound)
    if relation != "is":
        words = " .. ".join(f"{x:.4g}" for x in np.atleast_1d(bound))
    if isinstance(measured, tuple):
        value, low, high = measured
        inside = [bool(agree(np.float64(x), bound)) for x in (low, value, high)]
        holds = all(inside) if all(inside) or not any(inside) else None
        text = f"{value:.3g} [{low:.3g}, {high:.3g}]"
    elif np.ndim(measured) == 0:
        holds = bool(agree(measured, bound))
        text = measured if isinstance(measured, str) else f"{measured:.6g}"
    else:
        measured = np.asarray(measured)
        text = spread(measured) if measured.dtype.kind in "fiu" else ", ".join(map(str, measured))
        votes = agree(measured, bound)[measured == measured]
        share = votes.mean() if len(votes) > 2 else .5
        holds = True if share >= .75 else False if share <= .25 else None
    return dict(id=id, statement=statement, source=source, expected=f"{relation} {words}", measured=text,
                holds=holds)


def judged(flags, arrays, finished):
    """The claims of a study, where it ran with its own settings and to its end."""
    own = type(flags)(**study_defaults(flags.room))
    skip = HOW | {"seed", "runs", "study", "snapshots", "block", *flags.room.free}
    changed = [option(k) for k in fields_of(flags)
               if k not in skip and getattr(flags, k) != getattr(own, k)]
    if changed or not finished:
        reason = f"{', '.join(changed)} changed" if changed else "stopped before its end"
        tell(f"claims are not judged: they are about the study's own settings ({reason})")
        return []
    found = []
    flags.room.claims(arrays, lambda *words: found.append(judge(*words)))
    return found


def spread(values):
    """'median [lowest, highest], n runs' of one number per run, where infinity is what never came."""
    values = np.asarray(values, float)
    known = values[~np.isnan(values)]
    if not len(known):
        return f"no value in {len(values)} runs"
    levels = np.quantile(known, [0, .5, 1], method="lower")
    low, middle, high = (f"{x:.3g}".replace("inf", "never") for x in levels)
    lost = f", {len(values) - len(known)} without a value" * (len(known) < len(values))
    return f"{middle} [{low}, {high}], {len(values)} runs{lost}"


# ---- Figures ----------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
#          Okabe & Ito 2008, told apart by colour-blind readers


def panels(count, title, flags, columns=2, size=(5.4, 3.7)):
    """A figure with `count` axes in a grid, a title, and the flags in small print: (figure, axes)."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows + .5),
                                squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=11)
    small_print = re.sub("[^ -~]", "?", shlex.join([f"exp_{experiment(flags)}.py", *flags.argv]))
    figure.supxlabel(small_print, fontsize=6, color="grey")  # a font may lack others
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def band(ax, x, y, label, colour):
    """Median and interquartile band over runs of y [T, R], thin single runs behind. Runs without any
    value are left out and counted in the legend."""
    y = np.asarray(y, float)
    known = np.isfinite(y).any(0)
    y = np.where(np.isfinite(y), y, np.nan)[:, known]
    if not known.any():
        return
    rows = np.isfinite(y).any(1)
    x, y = np.asarray(x)[rows], y[rows]
    lost = f", {(~known).sum()} without a value" if not known.all() else ""
    ax.plot(x, y, color=colour, lw=.5, alpha=.3)
    ax.fill_between(x, *np.nanquantile(y, [.25, .75], axis=1), color=colour, alpha=.2, lw=0)
    label = f"{label} ({y.shape[1]} run{'s' * (y.shape[1] > 1)}{lost})"
    ax.plot(x, np.nanmedian(y, axis=1), color=colour, lw=1.6, label=label)


def bars(ax, x, y, label, colour, width=.8):
    """Median over runs of y [R, n] as bars, single runs as dots."""
    y = y[np.isfinite(y).any(1)]
    if not len(y):
        return
    ax.bar(x, np.nanmedian(y, 0), width, color=colour, label=f"{label}, median of {len(y)} runs")
    ax.plot(x, y.T, ".", color="black", ms=3)


def shelf(ax, y, text, colour="grey", side="right"):
    """A dashed horizontal line with its name: a floor, chance, a level that is known exactly."""
    ax.axhline(y, color=colour, ls="--", lw=.8, zorder=3)
    paper = dict(facecolor="white", edgecolor="none", alpha=.7, pad=.4)  # curves pass behind the label
    ax.annotate(text, (side == "right", y), (-3 if side == "right" else 3, 1), fontsize=6.5,
                color=colour, ha=side, xycoords=("axes fraction", "data"), textcoords="offset points",
                bbox=paper, zorder=4)


def image(ax, x, title, figure, xlabel="", ylabel="", limits=None):
    """x [rows, columns] as an image, between limits, or in colours symmetric about 0."""
    most = np.nanmax(np.abs(x)) or 1
    low, high = limits or (-most, most)
    shown = ax.imshow(x, vmin=low, vmax=high, cmap="viridis" if low >= 0 else "RdBu_r", aspect="auto",
                      interpolation="nearest")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=9)
    ax.spines[:].set_visible(True)
    figure.colorbar(shown, ax=ax, shrink=.85)


def smooth(y, width):
    """Running mean along axis 0 over the last `width` entries (fewer at the start)."""
    total = np.cumsum(np.concatenate([np.zeros_like(y[:1]), y]), 0, dtype=float)
    i = np.arange(1, len(y) + 1)
    low = np.maximum(i - width, 0)
    return (total[i] - total[low]) / (i - low).reshape(-1, *[1] * (y.ndim - 1))


def figures_of(room):
    """{name: draw function} of a study, in the order of its text."""
    return {k.removeprefix("draw_"): f for k, f in vars(room).items() if k.startswith("draw_")}


def save_figure(folder, name, figure):
    """Write a figure as NAME.png; an animation, (figure, number of frames, draw(i)), as NAME.gif."""
    buffer = io.BytesIO()
    if not isinstance(figure, tuple):
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        return folder.write(f"{name}.png", buffer.getvalue())
    figure, frames, draw = figure
    with tempfile.TemporaryDirectory() as there:
        writer = PillowWriter(fps=3)
        with writer.saving(figure, f"{there}/{name}.gif", dpi=80):
            for i in range(frames):
                draw(i)
                writer.grab_frame()
                figure.set_layout_engine("none")  # the first frame's layout stays
        plt.close(figure)
        folder.write(f"{name}.gif", Path(there, f"{name}.gif").read_bytes())


# ---- The command line of a script -------------------------------------------------------------------

def main(cls, studies, argv=None):
    """Run a script whose flags are cls and whose studies are these classes. Returns the exit status: 0,
    2 for a mistake that the user can mend, 130 after Ctrl-C."""
    script = Path(sys.modules[cls.__module__].__file__)
    try:
        return run_study(cli(cls, studies, argv), script)
    except Stop as stop:
        message, status = stop, 2
    except KeyboardInterrupt:
        message, status = "stopped at once; what was saved before can be resumed", 130
    except (RuntimeError, MemoryError) as error:  # out of memory is a RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "alloc" not in str(error):
            raise
        message, status = "out of memory; lower --block, or the sizes (such as --batch)", 2
    if rank() == 0 or NOW.met:
        print(f"{script.name}: {f'rank {rank()}: ' * (rank() > 0)}{message}", file=sys.stderr)
    return status


def run_study(flags, script):
    """One command line, from flags to figures."""
    start, NOW.asked = time.perf_counter(), False
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun --max-restarts
        flags.resume, flags.force = True, False
    torch.set_num_threads(flags.threads)
    if device(flags).type == "cuda":
        torch.cuda.set_device(device(flags))
    with contextlib.ExitStack() as ending:
        path = folder = None
        if rank() == 0:
            path = folder_path(flags)
            ending.enter_context(locked(path))
            folder = open_folder(path, flags, script)
        ready = meet(str(path) if folder else None, seconds=60)
        NOW.met = True
        if not ready:
            return 0
        folder = folder or Folder(ready, flags)
        ending.enter_context(interruptible(folder))
        words = [w for w in flags.argv if w not in ("--resume", "--force")]
        go_on = f"stopped; go on with: python {script.name} {shlex.join([*words, '--resume'])}"
        if flags.plot_only:
            arrays, finished = folder.read("arrays.npz"), folder.read("config.json")["finished"]
        else:
            arrays = {k: np.asarray(v) for k, v in flags.room.compute(flags, folder).items()}
            finished = not NOW.asked
        if rank() > 0:  # rank 0 writes, judges and draws
            return 0
        claims = judged(flags, arrays, finished)
        if flags.plot_only:
            folder.write("summary.json", {**folder.read("summary.json"), "claims": claims})
        else:
            folder.write("arrays.npz", arrays)
            folder.summarise(claims, time.perf_counter() - start)
        for name, draw in figures_of(flags.room).items():
            figure = draw(arrays, flags) if name in (flags.figures or [name]) else None
            if figure is not None:
                save_figure(folder, name, figure)
        for c in claims:
            tell(f"{VERDICTS[c['holds']]:7} {c['id']}: {c['statement']}   measured {c['measured']}")
        for mark, lost in ("diverged", True), ("finished", False):
            count = sum(ends[mark] is lost for _, ends in folder.rows)
            if count:
                tell(f"{count} of {len(folder.rows)} runs: {mark} is {lost} in summary.csv; not counted")
        tell(f"{folder.path}  ({time.perf_counter() - start:.0f} s)" if finished else go_on)
        return 0 if finished else 130


@contextlib.contextmanager
def interruptible(folder):
    """Ctrl-C or SIGTERM asks the training loop to save and stop; a second one stops at once."""
    def ask(number, frame):
        if NOW.asked:
            raise KeyboardInterrupt
        NOW.asked = True
        tell("\nstopping (again: at once)")
    try:
        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        old = {}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ---- A script's text: what its studies reach, for `fork` and for flags that a study does not read ----

class Source:
    """The top level of a script: nodes {name: statement}, and members {name: statement} of its Flags."""

    def __init__(self, text):
        self.tree, self.nodes, self.members = ast.parse(text), {}, {}
        for node in self.tree.body:
            for name in defined(node):
                self.nodes[name] = node
        for node in getattr(self.nodes.get("Flags"), "body", []):
            for name in defined(node):
                self.members[name] = node

    def reach(self, names):
        """The statements that these names use, directly or not, their own included: {name: statement}. A
        member of Flags is used by its name as an attribute, a keyword or a string."""
        found, left = {}, [*names]
        while left:
            name = left.pop()
            if name in found or name not in self.nodes | self.members:
                continue
            node = found[name] = (self.nodes | self.members)[name]
            parts = [*node.decorator_list, *node.bases] if name == "Flags" else [node]
            for part in parts:
                left += names_in(part) & self.nodes.keys()
                left += words_in(part) & self.members.keys() - {"check"}
        return found


def defined(node):
    """Names that a statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {a.asname or a.name.split(".")[0] for a in node.names}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}


def names_in(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def words_in(node):
    """Attributes, keywords and strings of a statement: the ways to name a flag."""
    kinds = {ast.Attribute: "attr", ast.keyword: "arg", ast.Constant: "value"}
    return {getattr(n, kinds[type(n)]) for n in ast.walk(node) if type(n) in kinds}


def fork(source, target, *wanted):
    """Copy a script with its core and the named studies (default: the first), and without whatever these
    do not reach: functions, constants, flags and their checks, imports."""
    if Path(target).exists():
        raise Stop(f"{target} exists: give another name")
    text = Path(source).read_text()
    script, lines = Source(text), text.splitlines()
    rooms = {study_name(n.id): n.id for n in script.nodes["STUDIES"].value.elts}
    unknown = {*wanted} - {*rooms}
    if unknown:
        raise Stop(f"{source} has no study {min(unknown)}: it has {', '.join(rooms)}")
    wanted = wanted or [*rooms][:1]
    kept = script.reach(["Flags", "common", *(rooms[w] for w in wanted)])
    drop = set()

    def remove(node, also=()):
        first = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])])
        while lines[first - 2].lstrip().startswith("# ") and not lines[first - 2].startswith("# =="):
            first -= 1
        drop.update(range(first, node.end_lineno + 1))

    for node in script.tree.body[1:-1]:
        names = defined(node)
        if names == {"STUDIES"}:
            lines[node.lineno - 1] = f"STUDIES = [{', '.join(rooms[w] for w in wanted)}]"
            drop.update(range(node.lineno + 1, node.end_lineno + 1))
        elif isinstance(node, ast.ImportFrom):
            used = [a.name for a in node.names if a.name in kept]
            lines[node.lineno - 1] = f"from {node.module} import {', '.join(used)}"
            drop.update([node.lineno] * (not used))
        elif not names & kept.keys():
            remove(node)
    gone = {name for name in script.members if name not in kept} - {"check"}
    for name in gone:
        remove(script.members[name])
    check = script.members.get("check")
    for node in check.body if check else []:
        if (words_in(node) | names_in(node)) & gone:
            remove(node)
            gone |= defined(node)
    if check and drop.issuperset(range(check.body[0].lineno, check.end_lineno + 1)):
        remove(check)
    doc = range(1, script.tree.body[0].end_lineno + 1)
    other = "|".join(r for r in rooms if r not in wanted)
    drop.update(i for i in doc if other and re.search(rf"--study ({other})\b", lines[i - 1]))
    text = "\n".join(line for i, line in enumerate(lines, 1) if i not in drop) + "\n"
    text = text.replace(Path(source).name, Path(target).name)
    text = re.sub(r"(?m)^# ==== .*\n+(?=# ==== )", "", re.sub(r"\n{4,}", "\n\n\n", text))
    Path(target).write_text(text)
    print(f"{target}: {len(text.splitlines())} lines, {', '.join(wanted)}")


# ---- Finished runs: compared, listed, reported ------------------------------------------------------

def finished_run(path):
    """Folder, config.json and summary.json of a run; Stop where it is none of this project."""
    folder = Folder(path, None)
    settings, summary = folder.read("config.json"), folder.read("summary.json")
    try:
        [r["finished"] for r in summary["runs"]], [VERDICTS[c["holds"]] for c in summary["claims"]]
        settings["flags"]["steps"], " ".join(settings["argv"])
    except (KeyError, TypeError, IndexError):
        raise Stop(f"{path} holds no run of this project") from None
    return folder, settings, summary


def compare(paths, metric="loss", out="runs/compare.png"):
    """Print which flags and median final metrics of runs differ, and draw one metric of metrics.npz."""
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    tables = []
    for colour, path in zip(itertools.cycle(COLOURS), paths):
        folder, settings, summary = finished_run(path)
        rows = [r for r in summary["runs"] if r["finished"] and not r["diverged"]]
        table = {k: str(v) for k, v in settings["flags"].items() if k not in HOW}
        for k in summary["runs"][0]:
            values = [r[k] for r in rows if isinstance(r[k], (int, float))]
            table[k] = f"{np.median(values):.4g}" if values else "-"
        tables.append(table | {c["id"]: VERDICTS[c["holds"]] for c in summary["claims"]})
        places = [p for p in folder.path.glob("group*")] or [folder.path]
        for place in places:
            metrics = Folder(place, None).read("metrics.npz")
            if metrics.get(metric, np.zeros(0)).ndim != 2:
                raise Stop(f"{place} has no {metric} by step and run; it has {', '.join(metrics)}")
            steps = metrics["eval_step" if metric.startswith("eval_") else "step"]
            band(ax, steps, metrics[metric], f"{path} {place.name}", colour)
    for k in dict.fromkeys(k for t in tables for k in t):
        cells = [t.get(k, "-") for t in tables]
        if len({*cells}) > 1:
            print(f"{k:28}", *(f"{c:>14}" for c in cells))
    ax.set(xlabel="step", ylabel=metric, xscale="log", yscale="log")
    ax.legend(fontsize=7)
    figure.savefig(out)
    print(out)


def claims(paths):
    """Print the claims of runs as a markdown table."""
    for path in paths:
        _, settings, summary = finished_run(path)
        count = collections.Counter(VERDICTS[c["holds"]] for c in summary["claims"])
        print(f"\n### {summary['experiment']}, {summary['study']}: {len(summary['runs'])} runs; "
              + ", ".join(f"{count[v]} {v}" for v in VERDICTS.values()))
        print("\n| claim | statement | expected | measured | verdict |\n| --- | --- | --- | --- | --- |")
        for c in summary["claims"]:
            cells = [c["id"], c["statement"], c["expected"], c["measured"], VERDICTS[c["holds"]]]
            print("|", " | ".join(str(x).replace("|", "\\|") for x in cells), "|")


def report(paths, out="runs/report.html"):
    """One HTML file of runs (all under runs/ if none is named): verdicts, figures, and the command of
    each."""
    page = [
        "<!doctype html><meta charset=utf-8><title>Lab report</title><style>body{font:15px sans-serif;"
        "max-width:1100px;margin:auto}img{max-width:100%}td{border-top:1px solid #ccc}</style>"
    ]
    for path in paths or sorted(p.parent for p in Path("runs").glob("*/*/summary.json")):
        folder, settings, summary = finished_run(path)
        command = f"python exp_{summary['experiment']}.py {shlex.join(settings['argv'])}"
        page.append(f"<h2>{html.escape(str(path))}</h2><pre>{html.escape(command)}</pre><table>")
        for c in summary["claims"]:
            keys = ("id", "statement", "source", "expected", "measured")
            cells = [VERDICTS[c["holds"]], *(c[k] for k in keys)]
            page.append("<tr>" + "".join(f"<td>{html.escape(str(x))}" for x in cells))
        page.append("</table>")
        for name in sorted(n for n in folder.sums() if n.endswith((".png", ".gif"))):
            data = base64.b64encode(folder.read(name)).decode()
            page.append(f'<p><img alt="{html.escape(name)}" src="data:image/{name[-3:]};base64,{data}">')
    Path(out).write_text("\n".join(page), encoding="utf-8")
    print(out)


@dataclasses.dataclass
class Tools:
    names: list[str] = flag([], "what to do, and to what")
    out: str = flag("", "the file to write")
    metric: str = flag("loss", "what `compare` draws")


def tools(argv):
    """`python common.py compare|claims|report|fork`."""
    words = read_words(["--names", *argv], fields_of(Tools))
    name, *names = words.pop("names") or ["help"]
    known = {"compare": compare, "claims": claims, "report": report, "fork": fork}
    least = {"compare": 1, "claims": 1, "report": 0, "fork": 2}
    if name not in known or len(names) < least[name]:
        raise Stop(__doc__.split("\n\n")[1])
    return fork(*names, **words) if name == "fork" else known[name](names, **words)


if __name__ == "__main__":
    try:
        tools(sys.argv[1:])
    except (Stop, OSError, TypeError) as error:
        print(f"common.py: {error}", file=sys.stderr)
        sys.exit(2)
