"""What every experiment needs and none owns, as plain functions, in the order in which a run meets them:

flags from a dataclass; runs and their groups; random streams; pure optimisers; processes that share the runs; `Fused`,
which turns the step of one run into the step of many; the run folder (atomic, locked, checksummed, resumable); claims;
figures; and `main`, which puts a script's studies on the command line. `python common.py compare RUN RUN ...` tabulates and
draws how finished runs differ, `claims RUN ...` lists what they say about the notes, `report` makes a page of both.

No model, no data law and no experiment's name is in here."""
import argparse
import base64
import collections
import contextlib
import csv
import dataclasses
import datetime
import difflib
import hashlib
import html
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
import threading
import time
import types
import typing
from pathlib import Path
from typing import Literal

# A compile takes 20 s cold and 3 s from this cache, so the cache must outlive /tmp.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(
    os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "small-networks", "inductor"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.animation import PillowWriter
from tqdm import tqdm

CHUNK = 100         # steps whose data is drawn at once; part of the definition of every run's random numbers
BLOCK_NUMBERS = 2 ** 16  # parameters, gradients, moments and constants of runs that share a kernel on a CPU (measured)


class Stop(Exception):
    """A mistake that the user can mend: printed as one line, exit status 2."""


class Interrupted(Exception):
    """Ctrl-C while runs are trained part by part: what is saved can be resumed, and nothing can be drawn yet."""


# ---- Flags ----------------------------------------------------------------------------------------------------------

def flag(default, help, low=None, high=None, number=False):
    """A dataclass field that is a command-line flag: its default, its help (with units), inclusive bounds, and whether
    it is only a number to the tensor program, so that runs which differ in it share one program."""
    metadata = dict(help=help, low=low, high=high, number=number)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Flags:
    """The flags that every experiment has. A subclass adds its own, may override `check`, and may set `per_study`:
    defaults of a study (by its name) and of `--smoke`, which lose against what the command line says."""
    study: str = flag("", "which question to ask")
    steps: int = flag(1000, "training steps", low=1)
    seed: int = flag(0, "seed of the first run; run i has seed + i", low=0, high=2 ** 62)
    runs: int = flag(1, "seeds per configuration", low=1)
    sweep: list[str] = flag([], "field=v1,v2 ...: one configuration for each combination")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where tensors live")
    compile: Literal["auto", "on", "off"] = flag("auto", "compile the step (auto: where the whole run gets shorter)")
    threads: int = flag(1, "CPU threads", low=1)
    block: int = flag(0, "runs that share a kernel on a CPU (0: by their size; 1 is fastest for a single run)", low=0)
    out: str = flag("", "run folder (default runs/EXPERIMENT/NAME)")
    name: str = flag("", "name of the run folder (default: the flags that were changed)")
    resume: bool = flag(False, "go on with an unfinished run")
    force: bool = flag(False, "delete what is in the run folder and start again")
    save_every: float = flag(30., "seconds between checkpoints", low=0)
    snapshots: int = flag(0, "log-spaced copies of the parameters to keep", low=0)
    figures: list[str] = flag([], "names of the figures to draw (default: all of the study)")
    plot_only: bool = flag(False, "draw the figures and judge the claims again from the saved arrays")
    smoke: bool = flag(False, "the same path end to end, tiny, in seconds")

    per_study: typing.ClassVar[dict] = {}
    most_in_block: typing.ClassVar[int] = 16  # runs that may share a kernel on a CPU, however small they are
    compile_pays: typing.ClassVar[float] = 45.  # seconds of eager training from which a cold compile (20 to 30 s, then 3 times
    #                                             faster or more) pays

    def check(self):
        """Raise Stop where the values contradict each other."""

    def points(self):
        """The configurations of the study as dicts of fields; none: one configuration, or the grid of --sweep."""
        return []


# Flags that say how or where to run, not what: they name no folder and are not compared on resume.
HOW = {"device", "compile", "threads", "out", "name", "resume", "force", "save_every", "figures", "plot_only"}


def parse(text, kind):
    """A flag's value from its text; Stop with what would have been right."""
    try:
        if kind is int:
            number = float(text) if re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", text) else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            if not math.isfinite(float(text)):
                raise ValueError
            return float(text)
    except (ValueError, OverflowError):
        raise Stop(f"{text!r} is not {'a whole number' if kind is int else 'a finite number'}") from None
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise Stop(f"{text!r} is neither true nor false")
        return text.lower() in ("true", "1", "yes")
    choices = typing.get_args(kind)
    if choices and text not in choices:
        near = difflib.get_close_matches(text, choices, 1)
        raise Stop(f"{text!r} is not one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else ""))
    return text


def refuse(message):
    raise Stop(message)


def cli(cls, argv=None):
    """Flags from the command line. Precedence: argv, then --smoke, then the study, then the field's default."""
    given_argv = list(sys.argv[1:] if argv is None else argv)
    argv = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) for a in given_argv]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kinds = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(prog=f"python {Path(sys.modules[cls.__module__].__file__).name}",
                                     description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     epilog="\n".join(f"defaults of {study}: {', '.join(f'{k}={v}' for k, v in d.items())}"
                                                      for study, d in cls.per_study.items()),
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, exit_on_error=False)
    parser.error = refuse
    common = {f.name for f in dataclasses.fields(Flags)} - {"study", "steps"}
    groups = {False: parser.add_argument_group("experiment"), True: parser.add_argument_group("running")}
    for name, field in fields.items():
        kind, listy = kinds[name], typing.get_origin(kinds[name]) is list
        default = " ".join(field.default_factory()) if listy else field.default
        options = dict(help=f"{field.metadata['help']} [{default}]".replace("%", "%%"))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else \
                "TEXT" if listy or kind is str else kind.__name__.upper()
            if listy:
                options |= dict(nargs="+", action="extend")
        groups[name in common].add_argument("--" + name.replace("_", "-"), **options)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise Stop(str(error)) from None
    if unknown:
        known = [o for a in parser._actions for o in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        raise Stop(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
    explicit = {}
    for name, value in vars(given).items():
        try:
            explicit[name] = parse(value, kinds[name]) if isinstance(value, str) else value
        except Stop as stop:
            raise Stop(f"--{name.replace('_', '-')}: {stop}") from None
    defaults = study_defaults(cls, explicit.get("study", fields["study"].default), explicit.get("smoke"))
    flags = cls(**{**defaults, **explicit})
    if "sweep" not in explicit:  # a study's own sweep gives way to a flag that fixes the same field
        flags.sweep = [s for s in flags.sweep if s.split("=")[0] not in explicit]
    for field in fields.values():
        value, low, high = getattr(flags, field.name), field.metadata["low"], field.metadata["high"]
        if low is not None and value < low or high is not None and value > high:
            raise Stop(f"--{field.name.replace('_', '-')} {value} must be "
                       + " and ".join([f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)))
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda: torch sees no CUDA device; use --device cpu")
    if flags.device == "mps" and not torch.backends.mps.is_available():
        raise Stop("--device mps: torch sees no MPS device; use --device cpu")
    if flags.plot_only and flags.force:
        raise Stop("--plot-only draws what --force would delete: give one of them")
    flags.argv, flags.given = given_argv, set(explicit)
    groups_of_runs(flags)  # every run's flags are checked before anything is written
    return flags


def device(flags):
    """The torch device that --device names; auto takes CUDA if there is one, else the CPU."""
    kind = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(flags.device, flags.device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)


def study_defaults(cls, study, smoke):
    """The defaults that a study, and --smoke on top of it, put in the place of the fields' own."""
    return cls.per_study.get(study, {}) | (cls.per_study.get("smoke", {}) if smoke else {})


def shorthand(flags):
    """Name of a run from the flags that were changed, such as digit_d_model64_lr3e-3."""
    defaults = type(flags)(**study_defaults(type(flags), flags.study, flags.smoke))
    words = [flags.study] if flags.study else []
    for f in dataclasses.fields(flags):
        value = getattr(flags, f.name)
        if f.name not in HOW | {"study"} and value != getattr(defaults, f.name) and value != []:
            if isinstance(value, bool):
                words.append(f.name if value else f"no_{f.name}")
            else:
                text = " ".join(value) if isinstance(value, list) else value
                if isinstance(value, float):  # 0.25, but 3e-3
                    text = min(f"{value:g}", np.format_float_scientific(value, trim="-", exp_digits=1), key=len)
                words.append(f"{f.name}{text}")
    name = re.sub(r"[^\w.,=+-]", "-", "_".join(words)) or "default"
    return name if len(name) < 100 else f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# ---- Runs -----------------------------------------------------------------------------------------------------------

def swept(flags):
    """{field: values} of --sweep, parsed and checked."""
    kinds, fields = typing.get_type_hints(type(flags)), {f.name: f for f in dataclasses.fields(flags)}
    grid = {}
    for text in flags.sweep:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not values:
            raise Stop(f"--sweep {text}: write field=v1,v2")
        if name not in fields or name in HOW | {"sweep", "seed", "runs", "study", "smoke", "snapshots"} or name in grid:
            near = difflib.get_close_matches(name, fields, 1)
            raise Stop(f"--sweep {text}: {name} is " + ("given twice" if name in grid else "not a field to sweep"
                       + (f"; did you mean {near[0]}?" if near and near[0] != name else "")))
        try:
            grid[name] = list(dict.fromkeys(parse(v, kinds[name]) for v in values.split(",")))
        except Stop as stop:
            raise Stop(f"--sweep {text}: {stop}") from None
        low, high = fields[name].metadata["low"], fields[name].metadata["high"]
        for v in grid[name]:
            if low is not None and v < low or high is not None and v > high:
                raise Stop(f"--sweep {text}: {name} {v} is outside {low if low is not None else '-inf'} .. "
                           f"{high if high is not None else 'inf'}")
    return grid


def groups_of_runs(flags, points=None):
    """Runs as lists of Flags, one list for each tensor program: within a list only seeds and number fields differ.

    points: configurations as dicts of fields; by default those of the study, where a flag given on the command line keeps
    its value, or the grid of --sweep. Run i of a configuration has seed flags.seed + i."""
    if points is None:
        fixed = set(getattr(flags, "given", ())) - {"steps"}  # a study's own steps are made from --steps
        own = [p | {k: getattr(flags, k) for k in p if k in fixed} for p in flags.points()]
        points = [p for i, p in enumerate(own) if p not in own[:i]]
    if not points:
        grid = swept(flags)
        points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    numbers = {f.name for f in dataclasses.fields(flags) if f.metadata["number"]}
    groups = {}
    for point in points:
        shape = tuple((k, v) for k, v in point.items() if k not in numbers)
        for i in range(flags.runs):
            run = dataclasses.replace(flags, **point, seed=flags.seed + i, runs=1, sweep=[])
            run.check()
            groups.setdefault(shape, []).append(run)
    return list(groups.values())


def numbers(runs, dtype=torch.float32):
    """{field: tensor [R]} of every number field of the runs: what a step receives beside state and batch. (A number field
    that holds text is turned into tensors by the script.)"""
    kinds = typing.get_type_hints(type(runs[0]))
    return {f.name: torch.tensor([getattr(r, f.name) for r in runs], dtype=dtype if kinds[f.name] is float else torch.int32)
            for f in dataclasses.fields(runs[0]) if f.metadata["number"] and kinds[f.name] in (bool, int, float)}


def generator(seed, stream, chunk=0):
    """A CPU generator for (seed, stream name, chunk number); the same on every machine and in every process."""
    digest = hashlib.sha256(f"{seed}/{stream}/{chunk}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def marks(steps, count):
    """Sorted steps in 0..steps, log-spaced, about `count` of them, both ends included."""
    if count < 1:
        return []
    return sorted({0, steps, *(int(round(s)) for s in np.geomspace(1, steps, max(count - 1, 1)))})


def segments(done, steps, stops=()):
    """(start, stop) pieces of done..steps that cross neither a chunk boundary nor a step in `stops`."""
    cuts = sorted({done, steps, *range(0, steps, CHUNK), *stops})
    cuts = [c for c in cuts if done <= c <= steps]
    return list(zip(cuts, cuts[1:]))


# ---- Optimisers: pure functions on dicts of tensors; the state is a dict that holds the step count t ---------------------

def adam_init(params):
    """Zero moments and step count for `adamw`."""
    some = next(iter(params.values()))
    zeros = lambda: {k: torch.zeros_like(p) for k, p in params.items()}
    return {"m": zeros(), "v": zeros(), "t": torch.zeros((), dtype=some.dtype, device=some.device)}


def adamw(params, grads, state, lr, weight_decay=0., beta1=.9, beta2=.999, eps=1e-8):
    """One step of AdamW (Loshchilov & Hutter 2019, decoupled decay lr * weight_decay); weight_decay=0 is Adam
    (Kingma & Ba 2015). Every hyperparameter may be a tensor. Returns new params and state."""
    t = state["t"] + 1
    # 1 - beta^t without the cancellation that costs float32 four digits at beta = .999, t = 1
    debias1, debias2 = (-torch.expm1(t * torch.log(torch.as_tensor(b, dtype=t.dtype))) for b in (beta1, beta2))
    m = {k: beta1 * state["m"][k] + (1 - beta1) * g for k, g in grads.items()}
    v = {k: beta2 * state["v"][k] + (1 - beta2) * g * g for k, g in grads.items()}
    new = {k: p * (1 - lr * weight_decay) - lr * (m[k] / debias1) / ((v[k] / debias2).sqrt() + eps)
           for k, p in params.items()}
    return new, {"m": m, "v": v, "t": t}


def sgd_init(params):
    """Zero velocity and step count for `sgd`."""
    return {k: v for k, v in adam_init(params).items() if k != "v"}


def sgd(params, grads, state, lr, momentum=0., weight_decay=0.):
    """One step of SGD with heavy-ball momentum and L2 decay, as torch.optim.SGD (dampening 0)."""
    m = {k: momentum * state["m"][k] + g + weight_decay * params[k] for k, g in grads.items()}
    return {k: p - lr * m[k] for k, p in params.items()}, {"m": m, "t": state["t"] + 1}


def norm(tensors):
    """Euclidean norm of a dict of tensors taken as one vector."""
    return torch.sqrt(sum((x * x).sum() for x in tensors.values()))


# ---- Processes: torchrun starts this program several times; every rank trains its share of the runs -----------------------

LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()  # by torchrun


def rank():
    return int(os.environ["RANK"]) if LAUNCHED else 0


def world():
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


def shared(x):
    """x of rank 0, on every rank."""
    box = [x]
    if world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(x):
    """The x of every rank, a list, on every rank."""
    rows = [x] * world()
    if world() > 1:
        dist.all_gather_object(rows, x)
    return rows


TOGETHER = [True]  # whether all ranks do the same now, or each trains runs of its own


def divided(f, xs):
    """[f(x) for x in xs], shared among the ranks while all of them do the same."""
    if world() == 1 or not TOGETHER[0]:
        return [f(x) for x in xs]
    found = gathered([f(x) for x in xs[rank()::world()]])
    return [found[i % world()][i // world()] for i in range(len(xs))]


def store(seconds, keep=False):
    """torchrun's store, or one that this rank keeps; apart for each attempt of --max-restarts, else the next calls the dead."""
    tcp = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=keep, multi_tenant=keep,
                        timeout=datetime.timedelta(seconds=seconds))
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), tcp)


class Alive(threading.Thread):
    """Counts up in torchrun's store while this process lives, so that the others can name it when it does not."""

    def __init__(self):
        super().__init__(daemon=True)
        self.store, self.over = store(20), threading.Event()
        self.start()

    def run(self):
        for beat in itertools.count():
            self.store.set(f"alive{rank()}", str(beat))
            if self.over.wait(.5):
                break
        self.store.set(f"alive{rank()}", "ended")

    def end(self):
        """This process is done. (A thread that is left within the store when Python ends aborts it.)"""
        self.over.set()
        self.join(20)

    def dead(self):
        """Ranks that do not count any more, and did not end."""
        try:
            known = store(20)
            look = lambda: [known.get(f"alive{r}") for r in range(world())]
            before = look()
            time.sleep(2)
            return [r for r, (a, b) in enumerate(zip(before, look())) if a == b != b"ended"]
        except RuntimeError:  # without torchrun's own store rank 0 keeps it
            return [0]


@contextlib.contextmanager
def processes():
    """Join the other ranks, if torchrun started this process as one of several; only rank 0 prints. What is exchanged are
    results on the CPU, through gloo; every rank has its own GPU, where there are some."""
    if world() < 2:
        yield None
        return
    keep = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    dist.init_process_group("gloo", store=store(300, keep), rank=rank(), world_size=world(),
                            timeout=datetime.timedelta(days=30))  # one rank may wait long for another one's runs
    alive = Alive()
    gathered(None)  # everyone has begun to count
    with contextlib.ExitStack() as quiet:
        if rank():
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
        try:
            yield alive
        except RuntimeError:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends now; to name the dead takes two seconds
            bury(alive)
            raise
        finally:
            alive.end()
            dist.destroy_process_group()


def bury(alive):
    """Name the ranks that died, if any, and end."""
    dead = alive.dead() if alive else []
    if dead and rank() == min(set(range(world())) - set(dead)):
        print(f"rank {', '.join(map(str, dead))} died; the same command with --resume goes on, with any number of ranks",
              file=sys.stderr, flush=True)
    if dead:
        os._exit(1)  # the others can't be reached any more


# ---- The fused loop -------------------------------------------------------------------------------------------------

def tree(f, *trees):
    """f applied leaf by leaf to nested dicts of tensors."""
    return {k: tree(f, *(t[k] for t in trees)) for k in trees[0]} if isinstance(trees[0], dict) else f(*trees)


def leaves(x):
    return [leaf for v in x.values() for leaf in leaves(v)] if isinstance(x, dict) else [x]


def stack(states):
    """Nested dicts, one per run, to one with a leading axis of runs."""
    states = list(states)
    return tree(lambda *xs: torch.stack(xs), *states)


def run_of(x, r):
    """Run r of a nested dict with a leading axis of runs."""
    return tree(lambda t: t[r], x)


def block_size(flags, params, numbers):
    """Runs that go through one kernel together. On a CPU a power of two up to `most_in_block` that keeps what they compute
    with in the cache (addition 128-wide: 1; 16-wide: 4; 2-wide: 16), whatever the number of runs, so that a run has the same
    bits alone and in company; on an accelerator all runs."""
    if device(flags).type != "cpu":
        return len(leaves(params)[0])
    size = sum(x[0].numel() for x in 4 * leaves(params) + leaves(numbers))
    return flags.block or min(flags.most_in_block, 2 ** int(math.log2(max(1, BLOCK_NUMBERS // size))))


class Fused:
    """The step of one run as the step of many: `step(state, batch, numbers) -> (state, logs)` on single runs becomes,
    on tensors with a leading axis of runs, blocks of one fixed size (padded), compiled, updated in place.

    state: nested dict of tensors [R, ...] with "params" in it; numbers: what else a step needs of its run, tensors [R, ...];
    example: data of one step [R, ...]; unroll: steps that share a compiled graph (a call costs 50 to 100 microseconds, which
    only tiny steps feel). In blocks of 128 runs or more the runs are the innermost axis, along which tiny steps vectorise.
    plain: the step is a program of its own (it draws, loops, writes in place): one run at a time, never compiled. like: a
    Fused of other runs with the same step, whose compiled step serves again.
    `compiled`, `why` and `compile_seconds` say what was decided; pass `compiled` of an earlier part of the same run to keep
    its decision."""

    def __init__(self, step, state, numbers, example, flags, steps, compiled=None, unroll=1, plain=False, like=None):
        self.at, self.runs, self.unroll = device(flags), len(leaves(state)[0]), unroll
        self.size = 1 if plain else block_size(flags, state["params"], numbers)
        self.axis = -1 if self.size >= 128 and self.at.type == "cpu" else 0  # where the runs of a block lie
        padded = torch.arange(-(-self.runs // self.size) * self.size).clamp(max=self.runs - 1)
        self.index = list(padded.split(self.size))
        move = lambda x: [tree(lambda leaf: self.laid(leaf[i], 0).to(self.at), x) for i in self.index]
        self.blocks, self.numbers = move(state), move(numbers)
        self.step = self.eager = self.batched(step)
        self.compile_seconds = 0.
        self.compiled, self.why = (False, "the step is a program, not a graph") if plain else \
            self.decide(flags, example, steps) if compiled is None else (compiled, "as before")
        if like:
            self.step, self.compiled, self.why = like.step, like.compiled, like.why
        elif self.compiled and steps:
            self.build(example)
        if self.compiled != compiled:  # decided here, or decided before and impossible now
            print(f"{'compiled' if self.compiled else 'eager'} ({self.why})", flush=True)

    def laid(self, x, axis):
        """x with its runs, now at `axis`, where this layout has them; a tensor of its own."""
        return x.movedim(axis, self.axis if self.axis < 0 else axis).contiguous()

    def batched(self, step):
        """step of one run -> in-place steps of one block, on data [K, ...]; logs [K, ...]."""
        if self.size == 1:
            def many(state, batch, numbers):
                new, logs = step(*(tree(lambda x: x[0], x) for x in (state, batch, numbers)))
                return tree(lambda x: x[None], new), tree(lambda x: x[None], logs)
        else:
            many = torch.vmap(step, self.axis, self.axis)

        def update(state, data, numbers):
            new, logs = state, []
            for k in range(len(leaves(data)[0])):
                new, out = many(new, tree(lambda x: x[k], data), numbers)
                logs.append(out)
            logs = tree(lambda *xs: torch.stack(xs), *logs)  # before the state moves: a log may be a part of it
            tree(lambda old, value: old.copy_(value), state, new)
            return logs
        return update

    def first(self, example, steps):
        """Arguments for trial steps: copies, so that nothing moves."""
        data = tree(lambda x: self.laid(x[self.index[0]].expand(steps, -1, *x.shape[1:]), 1).to(self.at), example)
        return tree(torch.clone, self.blocks[0]), data, self.numbers[0]

    def decide(self, flags, example, steps):
        if flags.compile != "auto" or self.at.type == "mps":
            on = flags.compile == "on" and self.at.type != "mps"
            return on, f"--compile {flags.compile}" if self.at.type != "mps" else "MPS runs eager"
        if self.at.type == "cuda":
            return True, "CUDA"
        arguments = self.first(example, 1)
        self.eager(*arguments)
        start = time.perf_counter()
        for trial in range(1, 6):
            self.eager(*arguments)
            if time.perf_counter() - start > 2:
                break
        total = (time.perf_counter() - start) / trial * len(self.blocks) * steps
        pays = flags.compile_pays
        return total > pays, f"eager would take {total:.0f} s" + (
            f", less than the {pays:.0f} s from which compiling pays" if total <= pays else "")

    def build(self, example):
        start = time.perf_counter()
        try:
            # dynamic=False: one shape, so that every run of every block goes through the same kernels
            mode = dict(mode="reduce-overhead") if self.at.type == "cuda" else {}
            torch._dynamo.reset()  # else the ninth program of a process is refused as the ninth version of the first
            step = torch.compile(self.eager, fullgraph=True, dynamic=False, **mode)
            step(*self.first(example, self.unroll))
            self.step = step
        except Exception as error:  # no compiler, no Python headers, read-only cache, ... : eager is always right
            reason = str(error).strip().splitlines()
            self.compiled, self.why = False, f"compiling failed ({type(error).__name__}: {reason[0][:120] if reason else ''})"
        self.compile_seconds = time.perf_counter() - start

    def __call__(self, data):
        """Do data.shape[0] steps on data [K, R, ...] (a tensor or nested dict); returns logs {name: [K, R, ...]}."""
        logs = []
        for i, block, hyper in zip(self.index, self.blocks, self.numbers):
            mine = tree(lambda x: self.laid(x[:, i], 1).to(self.at), data)
            rows, K = [], len(leaves(mine)[0])
            for k in range(0, K, self.unroll):
                if self.at.type == "cuda":  # a captured graph writes its outputs to the same memory every time
                    torch.compiler.cudagraph_mark_step_begin()
                step = self.step if k + self.unroll <= K else self.eager  # a rest that fills no graph
                out = step(block, tree(lambda x: x[k:k + self.unroll], mine), hyper)
                rows.append(tree(torch.clone, out) if self.at.type == "cuda" else out)
            logs.append(tree(lambda *xs: torch.cat(xs).movedim(self.axis if self.axis < 0 else 1, 1), *rows))
        return tree(lambda *xs: (torch.cat(xs, 1) if len(xs) > 1 else xs[0])[:, :self.runs].cpu(), *logs)

    def state(self):
        """The state of all runs, on the CPU, without the padding."""
        return tree(lambda *xs: torch.cat([x.movedim(self.axis, 0) for x in xs])[:self.runs].cpu(), *self.blocks)


class Progress:
    """Loss, run-steps per second and time left: a bar on a terminal, a plain line every 20 s elsewhere."""

    def __init__(self, runs, done, steps, label):
        self.runs, self.done, self.steps, self.label = runs, done, steps, label
        self.start = self.last = time.perf_counter()
        self.first = done
        self.bar = tqdm(total=steps, initial=done, desc=label, unit="step", leave=False) if sys.stderr.isatty() else None

    def __call__(self, step, loss):
        now, n = time.perf_counter(), step - self.first
        rate = n / max(now - self.start, 1e-9)
        if self.bar:
            self.bar.set_postfix_str(f"loss {loss:.3g}, {rate * self.runs:.0f} run-steps/s")
            self.bar.update(step - self.done)
        elif now - self.last > 20 or step == self.steps:
            self.last = now
            print(f"{self.label}  step {step}/{self.steps}  loss {loss:.3g}  {rate * self.runs:.0f} run-steps/s  "
                  f"{(self.steps - step) / rate:.0f} s left", flush=True)
        self.done = step
        if self.bar and step == self.steps:
            self.bar.close()


def train(runs, folder, state, numbers, step, draw, evaluate, eval_at, label="", unroll=1, plain=False):
    """Train runs of one shape together, from the folder's checkpoint if it has one. state: their step 0 and numbers: their
    constants, [R, ...]; step: the training step of one run; draw(r, chunk): the data of CHUNK steps of run r, [CHUNK, ...];
    evaluate(r, params): what is logged at the steps `eval_at`; unroll, plain: see `Fused`. Returns the final state,
    metrics (what a step logs [T, R, ...] with step [T], what is evaluated [M, R, ...] as eval_* with eval_step [M]) and
    snapshots {step as text: params}.

    Runs that do not fit into memory together, or that several processes share, are cut into parts, each trained to its end
    in a folder of its own; a run's numbers do not depend on it."""
    flags, R = runs[0], len(runs)
    whole = folder.resume(like=state)
    plan = shared(folder.read_json("parts.json") if rank() == 0 and folder.has("parts.json") else None)
    if whole and whole["step"] == flags.steps:
        plan = dict(size=R, compiled=whole["compiled"])
    size = plan["size"] if plan else part_size(runs, state, numbers, draw, plain)
    parts = [range(a, min(a + size, R)) for a in range(0, R, size)]
    print(f"{sum(p[0].numel() for p in state['params'].values()):,} parameters a run, {R} runs"
          + f", {len(parts)} parts of {size} runs" * (len(parts) > 1))

    def fuse(state, numbers, data, steps, compiled, like=None):
        return Fused(step, state, numbers, tree(lambda x: x[0], data), flags, steps, compiled, unroll, plain, like)
    cut = lambda x, part, axis=0: tree(lambda leaf: leaf.narrow(axis, part.start, len(part)), x)
    first, found = None, {}
    if not plan and (len(parts) > 1 or world() > 1):  # rank 0 decides for all, before anything is saved
        plan = dict(size=size, compiled=whole and whole["compiled"])
        if rank() == 0 and not whole:
            data = draw_all(draw, parts[0], 0)
            first = fuse(cut(state, parts[0]), cut(numbers, parts[0]), data, flags.steps * -(-len(parts) // world()), None)
            plan["compiled"] = first.compiled
        if rank() == 0 and len(parts) > 1:
            folder.write_json("parts.json", plan)
        plan = shared(plan)
    made = (lambda *_, own=first: own) if first else fuse
    if len(parts) == 1:
        _, *found, booked = train_part(runs, folder, state, numbers, whole, draw, evaluate, eval_at, label,
                                       made, plan["compiled"] if plan else whole and whole["compiled"])
        folder.book([booked], R)
        return shared(found)  # another machine's may differ by rounding, and all go on alike
    TOGETHER[0] = False
    for i in range(rank(), len(parts), world()):
        part, sub = parts[i], folder.scratch(f"part{i}", own=True)
        begun = whole and whole | {k: cut(whole[k], part) for k in ("params", "optimiser")} | {
            "metrics": {k: x if k == "eval_step" else cut(x, part, 1) for k, x in whole["metrics"].items()},
            "snapshots": {k: cut(x, part) for k, x in whole["snapshots"].items()}}
        saved = sub.resume(like=cut(state, part)) if sub.has("checkpoint.pt") else begun
        first, *found[i] = train_part(
            [runs[r] for r in part], sub, cut(state, part), cut(numbers, part), saved, lambda r, chunk: draw(part[r], chunk),
            lambda r, params: evaluate(part[r], params), eval_at, f"{label}, part {i + 1} of {len(parts)}",
            fuse if i else made, plan["compiled"], first)
        if folder.interrupted:
            break
    TOGETHER[0] = True
    everyone = gathered(None if folder.interrupted else found)
    if None in everyone:
        raise Interrupted
    rows = [row for _, row in sorted(item for found in everyone for item in found.items())]
    states, metrics, snapshots, booked = zip(*rows)
    final = tree(lambda *xs: torch.cat(xs), *states)
    metrics = {k: x if k in ("step", "eval_step") else np.concatenate([m[k] for m in metrics], 1)
               for k, x in metrics[0].items()}
    snapshots = {at: tree(lambda *xs: torch.cat(xs), *(s[at] for s in snapshots)) for at in snapshots[0]}
    folder.book(booked, R)
    folder.checkpoint(types.SimpleNamespace(state=lambda: final, compiled=plan["compiled"]), flags.steps,
                      {k: [torch.from_numpy(v)] for k, v in metrics.items() if k != "step"}, snapshots, force=True)
    if rank() == 0:
        for i in range(len(parts)):
            shutil.rmtree(folder.path / f"part{i}", ignore_errors=True)
        (folder.path / "parts.json").unlink(missing_ok=True)
    return final, metrics, snapshots


MEMORY = 2 ** 30  # bytes of data, states and logs that the runs of one part may take


def part_size(runs, state, numbers, draw, plain):
    """How many runs are trained together: what fits into memory, shared among the processes, in whole blocks."""
    flags, R = runs[0], len(runs)
    held = sum(x[0].numel() * x.element_size() for x in 4 * leaves(state)) + sum(
        x.numel() * x.element_size() for x in leaves(draw(0, 0))) * 3
    block = 1 if plain or device(flags).type != "cpu" else block_size(flags, state["params"], numbers)
    size = min(MEMORY // max(held, 1), -(-R // world()))
    return shared(min(R, max(1, -(-size // block)) * block))


def draw_all(draw, runs, chunk):
    """The data of all runs, [CHUNK, R, ...]."""
    return tree(lambda *x: torch.stack(x, 1), *(draw(r, chunk) for r in runs))


def train_part(runs, folder, state, numbers, saved, draw, evaluate, eval_at, label, fuse, compiled, fused=None):
    """`train` of runs that are trained together, from the checkpoint `saved`. fused: made for earlier runs, or for these.
    Returns (Fused, final state, metrics, snapshots, what to book)."""
    flags, R = runs[0], len(runs)
    done, log, snapshots = 0, {}, {}
    if saved:
        state, done, snapshots = {"params": saved["params"], **saved["optimiser"]}, saved["step"], saved["snapshots"]
        log = {k: [v] for k, v in saved["metrics"].items()}
    data = draw_all(draw, range(R), done // CHUNK)
    fused = fuse(state, numbers, data, flags.steps - done, compiled, fused)
    eval_at, keep_at = list(eval_at), marks(flags.steps, flags.snapshots)
    progress, seconds = Progress(R, done, flags.steps, f"{label}, {R} runs"), 0.

    def look(at):
        params = fused.state()["params"]
        if at in eval_at:
            seen = stack(evaluate(r, run_of(params, r)) for r in range(R))
            for k, v in {"step": torch.tensor(at), **seen}.items():
                log.setdefault(f"eval_{k}", []).append(v[None])
        if at in keep_at:
            snapshots[str(at)] = params

    if not done:
        look(0)
    b = done
    for a, b in segments(done, flags.steps, {*eval_at, *keep_at}):
        if a % CHUNK == 0 and a > done:
            data = draw_all(draw, range(R), a // CHUNK)
        clock = -time.perf_counter()
        logs = fused(tree(lambda x: x[a % CHUNK:][:b - a], data))
        seconds += clock + time.perf_counter()
        for k, v in logs.items():
            log.setdefault(k, []).append(v)
        if b in eval_at or b in keep_at:
            look(b)
        progress(b, logs["loss"][-1].nanmedian().item())
        folder.agree()
        folder.checkpoint(fused, b, log, snapshots, force=b == flags.steps)
        if folder.interrupted:
            break
    if b not in eval_at:  # stopped before the end: what is saved is the state of now
        eval_at.append(b)
        look(b)
    made = dict(compiled=fused.compiled, why=fused.why, seconds=round(fused.compile_seconds, 2), block=fused.size)
    metrics = {k: torch.cat(v).numpy() for k, v in log.items()}
    return fused, fused.state(), {"step": np.arange(1, len(metrics["loss"]) + 1), **metrics}, snapshots, (
        made, seconds, b - done, rank())


# ---- Arrays with one entry a run ------------------------------------------------------------------------------------

def pick(arrays, **fields):
    """Mask of the runs with these settings."""
    mask = np.ones(len(arrays["seed"]), bool)
    for k, v in fields.items():
        mask &= arrays[k] == v
    return mask


def by_seed(arrays, values, **settings):
    """One value a seed, in the order of the seeds, of the runs with these settings. values: [R, ...], or their name."""
    mine, values = pick(arrays, **settings), arrays[values] if isinstance(values, str) else values
    return values[mine][np.argsort(arrays["seed"][mine], kind="stable")]


def padded(arrays):
    """Arrays end to end along the first axis; where their shapes differ the other axes are filled up with NaN."""
    if len({a.shape[1:] for a in arrays}) == 1:
        return np.concatenate(arrays)
    shape = np.max([a.shape[1:] for a in arrays], 0)
    grown = [np.pad(a.astype(float), [(0, 0), *((0, n - m) for n, m in zip(shape, a.shape[1:]))],
                    constant_values=np.nan) for a in arrays]
    return np.concatenate(grown)


def stacked(rows):
    """A list of dicts of arrays to one dict with a leading axis (`padded`); {} of none."""
    return {k: padded([np.asarray(row[k])[None] for row in rows]) for k in (rows[0] if rows else ())}


def blanked(x, loss):
    """x [R, ..] with NaN in place of what diverged runs measure."""
    lost = ~np.isfinite(loss)
    return np.where(lost.reshape(-1, *[1] * (x.ndim - 1)), np.nan, x) if lost.any() else x


# ---- The run folder -------------------------------------------------------------------------------------------------

class Folder:
    """One run folder: atomic writes, checksums, a lock, the flags it belongs to, and what the summary needs."""

    def __init__(self, path, flags, parent=None, own=False):
        self.path, self.flags, self.parent = Path(path), flags, parent
        self.mine = own or rank() == 0  # else another rank writes it
        self.rows, self.seconds, self.run_steps, self.compiled = [], 0., 0, []
        self.stop = parent.stop if parent else dict(asked=False, agreed=False)  # shared by a folder and its groups
        self.saved = time.monotonic()
        self.sums = {}
        if (self.path / "checksums.json").exists():
            try:
                self.sums = json.loads((self.path / "checksums.json").read_text())
                assert all(isinstance(v, list) for v in self.sums.values())
            except (ValueError, AttributeError, AssertionError, OSError):
                raise Stop(f"{self.path / 'checksums.json'} is damaged; --force to start again, or --name another") from None

    def sub(self, i, count):
        """Folder of shape group i: this one if there is only one group."""
        if count == 1:
            return self
        return self.scratch(f"group{i}")

    def scratch(self, name, own=False):
        """A folder inside this one for a run that serves another; it has no row in the summary. own: this rank writes it."""
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return Folder(self.path / name, self.flags, parent=self, own=own)

    @property
    def interrupted(self):
        """Whether Ctrl-C asked this process to stop; of several processes, whether they agreed to."""
        return self.stop["agreed" if world() > 1 else "asked"]

    def agree(self):
        """Processes that do the same stop after the same step."""
        self.stop["agreed"] = any(gathered(self.stop["asked"])) if TOGETHER[0] else self.stop["asked"]

    # -- bytes in and out
    def write(self, name, data):
        """Write bytes under a name: first the checksum (beside the old one), then the file by rename, so that a crash
        between the two leaves a file that is still accepted."""
        self.sums[name] = self.sums.get(name, []) + [hashlib.sha256(data).hexdigest()]
        if not self.mine:
            return
        try:
            for target, content in (("checksums.json", json.dumps(self.sums, indent=1).encode()), (name, data)):
                temporary = self.path / f".{target}.tmp"
                with open(temporary, "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, self.path / target)
            self.sums[name] = self.sums[name][-1:]
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise Stop(f"cannot write {self.path / name}: {error.strerror}; what was saved before is untouched") from None

    def read(self, name):
        """The bytes of a file of this folder, if they are those that were written."""
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise Stop(f"cannot read {self.path / name}: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() not in self.sums.get(name, []):
            raise Stop(f"{self.path / name} is damaged or foreign: its checksum is not the one recorded; "
                       "--force to start again, or --name another")
        return data

    def has(self, name):
        return (self.path / name).exists()

    def write_json(self, name, value):
        self.write(name, (json.dumps(finite(value), indent=1, default=plain) + "\n").encode())

    def read_json(self, name):
        try:
            return json.loads(self.read(name))
        except ValueError:
            raise Stop(f"{self.path / name} is not JSON") from None

    def write_npz(self, name, arrays):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{k: np.asarray(v) for k, v in arrays.items()})
        self.write(name, buffer.getvalue())

    def read_npz(self, name):
        return read_npz(io.BytesIO(self.read(name)), self.path / name)

    # -- checkpoints
    def checkpoint(self, fused, step, log, snapshots, force=False):
        """Save fused.state(), the state of all runs, as {"params", "optimiser", "step"}, and the metrics so far (log: {name:
        list of tensors}), every --save-every seconds, when forced, and on Ctrl-C."""
        if not (force or self.interrupted or time.monotonic() - self.saved > self.flags.save_every):
            return
        buffer, state = io.BytesIO(), fused.state()
        torch.save({"params": state["params"], "optimiser": {k: v for k, v in state.items() if k != "params"},
                    "step": step, "metrics": {k: torch.cat(v) for k, v in log.items()},
                    "snapshots": snapshots, "compiled": fused.compiled}, buffer)
        self.write("checkpoint.pt", buffer.getvalue())
        self.saved = time.monotonic()

    def resume(self, like=None):
        """The checkpoint of this folder as a dict, or None where there is none (says so under --resume).
        like: a state of the expected shapes."""
        if not self.has("checkpoint.pt"):
            if self.flags.resume and not any(self.path.rglob("checkpoint.pt")):
                print(f"nothing to resume in {self.path}: starting afresh")
            return None
        saved = load_checkpoint(self.path / "checkpoint.pt", self.read("checkpoint.pt"))
        if like is not None:
            same_shapes(saved, like, self.path / "checkpoint.pt")
        return saved

    def book(self, parts, runs):
        """Book what training did, for config.json and summary.json. parts: (how it was compiled, seconds, steps, rank) each;
        ranks work side by side."""
        seconds = max(sum(s for _, s, _, by in parts if by == one) for one in {by for *_, by in parts})
        steps = sum(n for _, _, n, _ in parts) / len(parts) * runs
        for folder in (self, self.parent) if self.parent else (self,):
            folder.compiled += [made for made, *_ in parts]
            folder.seconds, folder.run_steps = folder.seconds + seconds, folder.run_steps + steps

    def result(self, runs, metrics, final, snapshots=None):
        """Save metrics.npz, snapshots.npz (step [S] and every parameter [S, R, ...]; snapshots: {step as text: params}) and one
        row per run: seed, swept fields, diverged, final metrics {name: [R]}."""
        fields = [f.name for f in dataclasses.fields(runs[0]) if f.name not in HOW and f.name != "seed"
                  and (f.name in swept(self.flags) or any(getattr(r, f.name) != getattr(self.flags, f.name) for r in runs))
                  and f.name not in ("runs", "sweep")]
        rows = []
        for i, run in enumerate(runs):
            finals = {k: float(v[i]) for k, v in final.items()}
            rows.append({"seed": run.seed, **{f: getattr(run, f) for f in fields},
                         "diverged": not math.isfinite(finals["loss"]), **finals})
        self.write_npz("metrics.npz", metrics)
        if snapshots:
            steps = sorted(snapshots, key=int)
            self.write_npz("snapshots.npz", {"step": np.array(steps, int), **stack(snapshots[step] for step in steps)})
        (self.parent or self).rows += rows
        if self.parent:
            self.finish(rows=rows)
        return rows

    def finish(self, rows=None, claims=(), wall=0.):
        """summary.csv, summary.json and config.json of a folder whose work is done (or interrupted)."""
        rows = self.rows if rows is None else rows
        settings = [k for row in rows for k in ("seed", *settings_of([row]))]
        named = list(dict.fromkeys([*settings, *(k for row in rows for k in row)]))
        rows = [{k: row[k] if k in row else getattr(self.flags, k, "") for k in named} for row in rows]  # or its default
        speed = round(self.run_steps / self.seconds, 3) if self.seconds else None
        text = io.StringIO()
        writer = csv.DictWriter(text, named, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write("summary.csv", text.getvalue().encode())
        self.write_json("summary.json", dict(
            experiment=experiment(self.flags), study=self.flags.study, runs=rows, claims=list(claims),
            wall_seconds=round(wall, 2), run_steps_per_second=speed))
        self.write_json("config.json", config(self.flags, self.compiled, finished=not self.interrupted))


def finite(x):
    """x with null for every NaN and infinity: JSON has neither."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def plain(value):
    """numpy and torch scalars for json."""
    return value.item() if hasattr(value, "item") else str(value)


def read_npz(source, name):
    """Arrays of an npz file, no pickles; Stop names a bad file."""
    try:
        with np.load(source, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except Exception as error:  # numpy, zipfile and zlib raise whatever the bytes lead them to
        raise Stop(f"{name} is not a readable npz file ({type(error).__name__})") from None


def load_checkpoint(name, data=None):
    """A checkpoint as a dict of tensors, never code; Stop names a truncated or foreign one."""
    try:
        saved = torch.load(io.BytesIO(Path(name).read_bytes() if data is None else data), weights_only=True, map_location="cpu")
        params = saved["params"]
        assert params and all(isinstance(p, torch.Tensor) for p in params.values())
        assert isinstance(saved["step"], int) and isinstance(saved["optimiser"], dict)
    except OSError as error:
        raise Stop(f"cannot read {name}: {error.strerror}") from None
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise Stop(f"{name} is not a checkpoint of this project ({type(error).__name__}); "
                   "give another file, or --force to start again") from None
    return saved


def same_shapes(saved, like, name):
    """Stop unless the checkpoint holds the same tensors as the state `like`."""
    have = {"params": saved["params"], **saved["optimiser"]}
    shapes = lambda x, at="": {k2: s for k, v in x.items() for k2, s in shapes(v, f"{at}{k}.").items()} \
        if isinstance(x, dict) else {at[:-1]: tuple(x.shape)}
    a, b = shapes(have), shapes(like)
    for key in sorted(set(a) | set(b)):
        if a.get(key) != b.get(key):
            raise Stop(f"{name} is of another shape: {key} is {a.get(key, 'missing')}, expected {b.get(key, 'none')}")


def experiment(flags):
    """Name of the script that a Flags class belongs to: exp_addition.py -> addition."""
    return Path(sys.modules[type(flags).__module__].__file__).stem.removeprefix("exp_")


def config(flags, compiled=(), finished=False):
    """What config.json holds."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent) \
        if shutil.which("git") else None
    return dict(experiment=experiment(flags), flags=dataclasses.asdict(flags), argv=flags.argv, finished=finished,
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                              matplotlib=matplotlib.__version__),
                device=str(device(flags)), machine=platform.machine(), threads=flags.threads, chunk=CHUNK,
                commit=commit.stdout.strip() if commit and commit.returncode == 0 else None, compiled=list(compiled))


@contextlib.contextmanager
def locked(path):
    """Keep a second process out of a folder; the system lets go of the lock even of a killed process."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock: no lock there
        yield
        return
    with open(path / ".lock", "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"another process works in {path}; wait for it or give --name") from None
        yield


def ours(path):
    """Whether a folder is empty or made by this project, whose first file is checksums.json."""
    names = {p.name for p in path.iterdir() if p.suffix != ".tmp"}
    return names <= {".lock"} or "checksums.json" in names and bool(names & {".lock", "script.py"})


def folder_path(flags):
    """Where this run lives; made if need be, so that it can be locked."""
    if flags.name and (Path(flags.name).name != flags.name or flags.name in (".", "..")):
        raise Stop(f"--name {flags.name} must be the name of one folder; --out takes a path")
    path = Path(flags.out) if flags.out else Path("runs") / experiment(flags) / (flags.name or shorthand(flags))
    if path.is_dir() and not ours(path):
        raise Stop(f"{path} exists and is no run folder of this project; give another --out or --name")
    if flags.plot_only and not (path / "config.json").exists():
        raise Stop(f"{path} holds no run to draw; run the same command without --plot-only first")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".lock").touch()
    except OSError as error:
        raise Stop(f"cannot write to {path}: {error.strerror}; give another --out") from None
    return path


def open_folder(path, flags, script):
    """The (locked) folder of this run, checked against what is already there; None if the run is finished."""
    code = {"script.py": Path(script).read_bytes(), "common.py": Path(__file__).read_bytes()}
    if flags.force:
        for item in path.iterdir():
            if item.name != ".lock":
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    folder = Folder(path, flags)
    if folder.has("config.json"):
        old = folder.read_json("config.json")
        if old.get("experiment") != experiment(flags):
            raise Stop(f"{path} belongs to the experiment {old.get('experiment')}; give another --name")
        was, now = old.get("flags", {}), dataclasses.asdict(flags)
        differ = [f"{k} {was.get(k)} -> {now.get(k)}" for k in now if k not in HOW and was.get(k) != now[k]]
        if differ:
            raise Stop(f"{path} holds another configuration: {', '.join(differ)}; --force to redo, --name for a new folder")
        if flags.plot_only:
            return folder
        changed = [n for n, data in code.items() if not folder.has(n) or folder.read(n) != data]
        unfinished = not old.get("finished")
        started = any(path.rglob("checkpoint.pt"))
        if changed and (started or not unfinished):
            raise Stop(f"{' and '.join(changed)} changed since {path} was made: --force to redo, --name for a new folder")
        if not unfinished:
            print(f"finished already: {path}  (--force to do it again, --plot-only to redraw)")
            return None
        if started and not flags.resume:
            raise Stop(f"{path} holds an unfinished run: --resume to go on, --force to start again")
    folder.write_json("config.json", config(flags))
    for name, data in code.items():
        folder.write(name, data)
    return folder


# ---- Claims ---------------------------------------------------------------------------------------------------------

def claim(id, statement, source, expected, measured, agree, enough=True):
    """One sentence and its verdict. measured: one number per run, or text; agree: whether each run agrees (then `vote`
    decides) or a bool; the verdict is None where agree is None or not `enough` was run."""
    holds = vote(agree) if isinstance(agree, (list, np.ndarray)) else agree
    return dict(id=id, statement=statement, source=source, expected=expected,
                measured=measured if isinstance(measured, str) else spread(measured),
                holds=None if holds is None or not enough else bool(holds))


def as_designed(flags, free=()):
    """Whether the study runs the configurations that its figure and claims are about, but for the fields `free`."""
    return not flags.sweep and not {k for p in flags.points() for k in p} - {"steps", *free} & getattr(flags, "given", set())


def judged(judge, always, columns):
    """A study's judge from always(arrays, say, flags), the claims that hold for every run, and judge(arrays, say, flags), those
    about the study's own configurations: only where it ran whole, to its end, with its own values of the fields `columns`;
    with fewer steps than its own they stay open. say(id, statement, source, expected, measured, agree) makes a `claim`, in
    which a run without a value (NaN) has no vote."""
    def claims_of(arrays, flags):
        own, claims = type(flags)(**study_defaults(type(flags), flags.study, False)), []

        def say(id, statement, source, expected, measured, agree, enough=flags.steps >= own.steps):
            if isinstance(agree, np.ndarray):
                known = ~np.isnan(measured if agree.dtype == bool and not isinstance(measured, str) else agree.astype(float))
                agree = agree[known].astype(bool)
            claims.append(claim(id, statement, source, expected, measured, agree, enough))

        always(arrays, say, flags)
        same = as_designed(flags) and all(getattr(flags, f) == getattr(own, f) for f in columns if f not in ("seed", "steps"))
        if same and not flags.smoke and getattr(flags, "finished", True) and len(arrays["seed"]) == sum(
                map(len, groups_of_runs(flags))):
            judge(arrays, say, flags)
        elif not flags.smoke:
            print("the claims of this study are about its own settings, run to their end: not judged")
        return claims
    return claims_of


def vote(agree, least=3):
    """Verdict over seeds: true if three quarters of them agree, false if three quarters do not, else (or with fewer
    than `least` seeds) undecided."""
    agree = np.asarray(agree, bool)
    if len(agree) < least:
        return None
    return True if agree.mean() >= .75 else False if agree.mean() <= .25 else None


def spread(values, digits=3):
    """'median [lowest, highest], n seeds' of one number per run; runs that are not finite are named, never averaged: infinite
    is what was never reached."""
    values = np.asarray(values, float)
    good, never, lost = values[np.isfinite(values)], np.isinf(values).sum(), np.isnan(values).sum()
    left = f", {never} never" * bool(never) + f", {lost} without a value" * bool(lost)
    if not len(good):
        return f"no value in {len(values)} seeds" + left * bool(never)
    f = f"{{:.{digits}g}}".format
    return f"{f(np.median(good))} [{f(good.min())}, {f(good.max())}], {len(values)} seeds{left}"


VERDICTS = {True: "holds", False: "FALSE", None: "open"}
CLAIM = {"id", "statement", "source", "expected", "measured", "holds"}


def print_claims(claims):
    for c in claims:
        print(f"{VERDICTS[c['holds']]:7} {c['id']}: {c['statement']}   measured {c['measured']}")


# ---- Figures --------------------------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]  # Okabe & Ito 2008


def panels(count, title, flags, columns=2, size=(5.4, 3.7)):
    """A figure with `count` axes in a grid, a title, and the flags in small print. Returns (figure, list of axes)."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows + .5), squeeze=False,
                                layout="constrained")
    figure.suptitle(title, fontsize=11)
    small_print = f"{experiment(flags)} {shorthand(flags)}  steps={flags.steps} runs={flags.runs} seed={flags.seed}"
    figure.supxlabel(re.sub("[^ -~]", "?", small_print), fontsize=6, color="grey")  # a text's letters may lack in the font
    axes = list(axes.flat)
    for ax in axes[count:]:
        ax.set_axis_off()
    for ax in axes[:count]:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def band(ax, x, y, label, colour):
    """Median and interquartile band over runs of y [T, R], thin single runs behind; diverged runs left out and named."""
    y = np.asarray(y, float)
    good = np.isfinite(y[-1]) if len(y) else np.ones(y.shape[1], bool)
    lost = f", {np.sum(~good)} of {len(good)} diverged" if not good.all() else ""
    y = y[:, good]
    if not y.size:
        return
    ax.plot(x, y, color=colour, lw=.5, alpha=.3)
    ax.fill_between(x, *np.nanquantile(y, [.25, .75], axis=1), color=colour, alpha=.2, lw=0)
    ax.plot(x, np.nanmedian(y, axis=1), color=colour, lw=1.6, label=f"{label} ({y.shape[1]} run{'s' * (y.shape[1] > 1)}{lost})")


def shelf(ax, y, text, colour="grey", side="right"):
    """A dashed horizontal line with its name: a floor, a shelf, chance."""
    ax.axhline(y, color=colour, ls="--", lw=.8, zorder=1)
    at = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha=side, va="bottom")
    ax.annotate(text, (side == "right", y), (-3 if side == "right" else 3, 0), fontsize=6.5, color=colour, **at)


def image(ax, x, title, figure, xlabel="", ylabel="", limits=None, bar=True, **style):
    """x [rows, columns] as an image, between limits, or in colours symmetric about 0."""
    low, high = limits or (-(np.nanmax(np.abs(x)) or 1), np.nanmax(np.abs(x)) or 1)
    shown = ax.imshow(x, vmin=low, vmax=high, **dict(cmap="viridis" if low >= 0 else "RdBu_r", aspect="auto",
                                                     interpolation="nearest") | style)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=9)
    ax.spines[:].set_visible(True)
    if bar:
        figure.colorbar(shown, ax=ax, shrink=.85)


def smooth(y, width):
    """Running mean along axis 0 over the last `width` entries (fewer at the start)."""
    total = np.cumsum(np.concatenate([np.zeros_like(y[:1]), y]), 0, dtype=float)
    i = np.arange(1, len(y) + 1)
    low = np.maximum(i - width, 0)
    return (total[i] - total[low]) / (i - low).reshape(-1, *[1] * (y.ndim - 1))


# ---- The command line of a script -----------------------------------------------------------------------------------

def main(cls, studies, argv=None):
    """Run a script. studies: {name: (compute, judge, {figure name: draw})} with compute(flags, folder) -> arrays,
    judge(arrays, flags) -> claims, draw(arrays, flags) -> figure, or None where it can't be drawn. Returns the exit status:
    0, 2 for a mistake that the user can mend, 130 after Ctrl-C."""
    script = Path(sys.modules[cls.__module__].__file__)
    complain = lambda text: rank() == 0 and print(f"{script.name}: {text}", file=sys.stderr)
    try:
        with processes() as alive:
            return run_study(cls, studies, argv, script, alive)
    except Stop as stop:
        complain(stop)
        return 2
    except KeyboardInterrupt:
        complain("stopped at once; what was saved before can be resumed")
        return 130
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; so is the CPU's
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        complain("out of memory; lower --runs, or the sizes (such as --batch)")
        return 2


def run_study(cls, studies, argv, script, alive):
    """One command line, from flags to figures."""
    start = time.perf_counter()
    flags = cli(cls, argv)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts starts the same command again
        flags.resume, flags.force = True, False
    compute, judge, figures = studies[flags.study]
    unknown = set(flags.figures) - set(figures)
    if unknown:
        raise Stop(f"--figures {sorted(unknown)[0]}: the study {flags.study} draws {', '.join(figures)}")
    torch.set_num_threads(flags.threads)
    with contextlib.ExitStack() as ending:
        folder = prepared(flags, script, ending)
        if folder is None:
            return 0
        ending.enter_context(interruptible(folder, alive))
        go_on = f"python {script.name} {shlex.join([*(a for a in flags.argv if a not in ('--resume', '--force')), '--resume'])}"
        go_on += " (or with torchrun)" * (world() > 1)
        if flags.plot_only:
            if rank():
                return 0
            arrays = folder.read_npz("arrays.npz")
        else:
            try:
                arrays = {k: np.asarray(v) for k, v in compute(flags, folder).items()}
            except Interrupted:
                print(f"stopped; go on with: {go_on}")
                return 130
            except Stop as stop:
                if rank():  # what only this rank knows
                    print(f"rank {rank()}: {stop}", file=sys.stderr)
                raise
            if rank():  # rank 0 draws and judges
                return 130 if folder.interrupted else 0
            folder.write_npz("arrays.npz", arrays)
        flags.finished = folder.read_json("config.json")["finished"] if flags.plot_only else not folder.interrupted
        claims = judge(arrays, flags)
        for name, draw in figures.items():
            figure = draw(arrays, flags) if not flags.figures or name in flags.figures else None
            if figure is not None:
                save_figure(folder, name, figure)
        if flags.plot_only:
            folder.write_json("summary.json", folder.read_json("summary.json") | {"claims": claims})
        else:
            folder.finish(claims=claims, wall=time.perf_counter() - start)
        print_claims(claims)
        lost = sum(row["diverged"] for row in folder.rows)
        if lost:
            print(f"{lost} of {len(folder.rows)} runs diverged: marked in summary.csv, left out of medians")
        print(f"{folder.path}  ({time.perf_counter() - start:.0f} s)")
        if folder.interrupted:
            print(f"stopped; go on with: {go_on}")
            return 130
    return 0


def prepared(flags, script, ending):
    """The run folder, locked and checked by rank 0 for all; None if there is nothing left to do."""
    folder, trouble = None, None
    if rank() == 0:
        try:
            path = folder_path(flags)
            ending.enter_context(locked(path))
            folder = open_folder(path, flags, script)
        except Stop as stop:
            trouble = stop
    trouble, path = shared((trouble, folder and folder.path))
    if trouble:
        raise trouble
    if rank() and path:
        folder = Folder(path, flags)
        path.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def interruptible(folder, alive=None):
    """Ctrl-C or SIGTERM asks the training loop to save and stop; a second Ctrl-C stops at once. torchrun sends SIGTERM too when
    another rank has died."""
    def ask(number, frame):
        bury(alive)
        if folder.stop["asked"]:
            raise KeyboardInterrupt
        folder.stop["asked"] = True
        print("\nstopping after this chunk (again: at once)", flush=True)
    try:
        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        old = {}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def save_figure(folder, name, figure):
    """Write a figure as NAME.png; an animation, (figure, number of frames, draw(i)), as NAME.gif."""
    buffer, suffix = io.BytesIO(), "gif" if isinstance(figure, tuple) else "png"
    if suffix == "gif":
        figure, frames, draw = figure
        with tempfile.TemporaryDirectory() as there:
            writer = PillowWriter(fps=3)
            with writer.saving(figure, f"{there}/{name}.gif", dpi=80):
                for i in range(frames):
                    draw(i)
                    writer.grab_frame()
                    figure.set_layout_engine("none")  # the first frame's layout stays
            buffer.write(Path(there, f"{name}.gif").read_bytes())
    else:
        figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    folder.write(f"{name}.{suffix}", buffer.getvalue())


# ---- Finished runs: compared, listed, reported ----------------------------------------------------------------------

def finished(path):
    """Folder, config.json and summary.json of a run."""
    folder = Folder(path, types.SimpleNamespace())
    settings = folder.read_json("config.json")
    if not folder.has("summary.json"):
        raise Stop(f"{path} was stopped before it had results: its command with --resume goes on")
    summary = folder.read_json("summary.json")
    try:  # a stranger's folder has checksums, too
        dict(settings["flags"]), " ".join(settings["argv"]), dict(settings["versions"])["torch"], settings["finished"]
        f"{summary['wall_seconds']:f} {summary['run_steps_per_second'] or 0:f}", summary["experiment"], summary["study"]
        assert all(list(row)[:1] == ["seed"] and "diverged" in row for row in summary["runs"])
        assert all(c["holds"] in VERDICTS and c.keys() >= CLAIM for c in summary["claims"])
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError):
        raise Stop(f"{path} holds no run of this project") from None
    return folder, settings, summary


def settings_of(rows):
    """The fields of a summary's rows that say how a run was made, but for its seed."""
    return list(rows[0])[1:list(rows[0]).index("diverged")] if rows else []


def histories(path, metric):
    """(configuration as text, steps [T], values [T, n]) of one metric for every configuration in a run folder."""
    rows, found = finished(path)[2]["runs"], []
    groups = sorted((p for p in Path(path).glob("group*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    for place in groups or [Path(path)]:
        folder = Folder(place, types.SimpleNamespace())
        if folder.has("metrics.npz"):  # else Ctrl-C came before
            metrics = folder.read_npz("metrics.npz")
            at = lambda k: "eval_step" if k.startswith("eval_") else "step"
            curves = [k for k, v in metrics.items() if v.ndim == 2 and at(k) in metrics]
            if metric not in curves:
                raise Stop(f"{metric} is not one number a run and step of {place}; such are: {', '.join(curves) or 'none'}")
            found.append((metrics[at(metric)], metrics[metric]))
    if not found or sum(y.shape[1] for _, y in found) != len(rows):
        raise Stop(f"{path} has not one curve {metric} for each of its {len(rows)} runs")
    named = [", ".join(f"{k}={row[k]}" for k in settings_of([row])) for row in rows]
    for x, y in found:
        mine, named = np.array(named[:y.shape[1]]), named[y.shape[1]:]
        yield from ((name, x, y[:, mine == name]) for name in dict.fromkeys(mine))


def compare(paths, metric="loss", out="runs/compare.png"):
    """Print what differs between run folders: flags, then medians over all of their runs of what was measured at the end; draw
    one metric over steps: one that training logs, such as loss, or an evaluated one, such as eval_loss."""
    if not str(out).endswith(".png"):
        raise Stop(f"--out {out} must end in .png")
    tables = []
    for path in paths:
        _, settings, summary = finished(path)
        known = {k: ", ".join(dict.fromkeys(str(row[k]) for row in summary["runs"])) for k in settings_of(summary["runs"])}
        metrics = {}
        for row in summary["runs"]:
            for k in [k for k in row if k not in {"seed", "diverged", *known}]:
                if isinstance(row[k], (int, float)) and not row["diverged"]:
                    metrics.setdefault(k, []).append(row[k])
        tables.append(({k: known.get(k, str(v)) for k, v in settings["flags"].items() if k not in HOW},
                       {k: f"{np.median(v):.4g}" for k, v in metrics.items()}
                       | {c["id"]: VERDICTS[c["holds"]] for c in summary["claims"]}
                       | {"all runs": str(len(summary["runs"])), "finished": str(settings["finished"]),
                          "run-steps/s": str(summary["run_steps_per_second"])}))
    rows = [("", [Path(p).name for p in paths])]
    for part, all_rows in ((0, False), (1, True)):
        for key in dict.fromkeys(k for t in tables for k in t[part]):
            cells = [t[part].get(key, "-") for t in tables]
            if all_rows or len(set(cells)) > 1:
                rows.append((key, cells))
    widths = [max(len(r[1][i]) for r in rows) for i in range(len(paths))]
    for key, cells in rows:
        print(f"{key:32}", *(c.rjust(w) for c, w in zip(cells, widths)), sep="  ")
    curves = []
    for p in paths:
        try:
            curves += [(f"{Path(p).name}  {name}".strip(), x, y) for name, x, y in histories(p, metric)]
        except Stop as stop:
            print(f"not drawn: {stop}")
    if not curves:
        return
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    colours = COLOURS if len(curves) <= len(COLOURS) else plt.cm.turbo(np.linspace(.05, .95, len(curves)))
    for colour, (label, x, y) in zip(colours, curves):
        band(ax, x, smooth(y, max(1, len(x) // 100)), label, colour)
    drawn = np.concatenate([y[np.isfinite(y)] for _, _, y in curves])
    ax.set(xlabel="step", ylabel=metric if metric[:5] == "eval_" else f"{metric} (while training)",
           yscale="log" if len(drawn) and 0 < 30 * drawn.min() < drawn.max() else "linear")
    ax.set_title("running means over 1 % of the logged steps; median and quartiles over runs", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "wb") as f:
        figure.savefig(f, format="png", dpi=130)
    plt.close(figure)
    print(out)


def ledger(paths):
    """Print the claims of finished runs as a markdown table, with a heading for each run where there are several."""
    for path in paths:
        _, settings, summary = finished(path)
        if len(paths) > 1 or not settings["finished"]:
            runs = f"{len(summary['runs'])} runs" + ", not finished" * (not settings["finished"])
            print(f"\n### {summary['experiment']}, {summary['study']}: {runs}; {tally(summary['claims'])}\n")
        print("| claim | statement | expected | measured | verdict |\n| --- | --- | --- | --- | --- |")
        for c in summary["claims"]:
            cells = c["id"], c["statement"], c["expected"], c["measured"], VERDICTS[c["holds"]]
            print("|", " | ".join(" ".join(str(x).split()).replace("|", "\\|") for x in cells), "|")


def tally(claims):
    """How many claims hold, are false, are open."""
    count = [sum(c["holds"] is verdict for c in claims) for verdict in VERDICTS]
    return "{} hold, {} false, {} open".format(*count)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lab report</title><link rel="icon" href="data:,">
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 1rem; color: #222; background: #fff;
overflow-wrap: anywhere } table { border-collapse: collapse; width: 100%; table-layout: fixed }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #222 } th:nth-child(1) { width: 4rem } th:nth-child(3) { width: 30% }
th:nth-child(5) { width: 24% } th:nth-child(7) { width: 3rem }
.holds, .FALSE, .open { font-weight: bold; white-space: nowrap } .holds { color: #00624a } .FALSE { color: #b03a00 }
.open { color: #555 } small { color: #555 } figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .5rem; margin: .5rem 0 }
summary { cursor: pointer; padding: .3rem 0 } label { margin-right: 1rem } select, input { font: inherit; max-width: 100% }
@media (max-width: 700px) { thead { display: none } tr:not([hidden]), td { display: block; border: 0 }
tr { border-bottom: 1px solid #999 !important; padding: .4rem 0 } td { padding: .1rem 0 }
td::before { content: attr(data-name) ": "; color: #555 } }
</style></head><body>
<h1>Lab report</h1><p>{summary}</p>{left_out}
<h2>Claims</h2>
<p><label>verdict <select id="verdict"><option value="">all</option>{verdicts}</select></label>
<label>script <select id="script"><option value="">all</option>{scripts}</select></label>
<label>words <input id="words" type="search"></label> <span id="count"></span></p>
<table><thead><tr>{heads}</tr></thead><tbody id="claims">
{claims}
</tbody></table>
<h2>Runs</h2>
{runs}
<script>
const at = id => document.getElementById(id), rows = [...document.querySelectorAll("#claims tr")];
function filter() {
  const words = at("words").value.toLowerCase().split(" ");
  for (const row of rows) {
    const fits = ["verdict", "script"].every(id => !at(id).value || row.dataset[id] === at(id).value);
    row.hidden = !fits || !words.every(word => row.textContent.toLowerCase().includes(word));
  }
  at("count").textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " claims";
}
function unfold() {  // the run that a claim's link leads to
  const run = at(location.hash.slice(1));
  if (run) { run.open = true; run.scrollIntoView(); }
}
["verdict", "script", "words"].forEach(id => at(id).addEventListener("input", filter));
addEventListener("hashchange", unfold);
filter();
unfold();
</script></body></html>
"""


def report(paths, out="runs/report.html"):
    """One HTML file of finished runs (all under runs/ if none is named): the ledger of claims, filtered by verdict, script and
    words; then each run's figures, flags, times, and the command that repeats it. Needs nothing but itself to be read."""
    e, heads = lambda x: html.escape(str(x)), ("verdict", "claim", "statement", "expected", "measured", "script", "runs")
    claims, rows, sections, left_out = [], [], [], []
    found = [Path(p) for p in paths] or sorted(p.parent for p in Path("runs").glob("*/*/config.json"))
    for n, path in enumerate(found):
        try:
            folder, settings, summary = finished(path)
            names = [name for name in folder.sums if name.endswith((".png", ".gif")) and folder.has(name)]
            figures = [(name, base64.b64encode(folder.read(name)).decode()) for name in names]
        except Stop as stop:
            if paths:
                raise
            left_out.append(f"<p>left out: {e(stop)}</p>")
            print(f"left out: {stop}")
            continue
        script, runs = f"exp_{summary['experiment']}.py", summary["runs"]
        for c in summary["claims"]:
            verdict = VERDICTS[c["holds"]]
            cells = (f'<span class="{verdict}">{verdict}</span>', f'<a href="#run{n}">{e(c["id"])}</a>',
                     f'{e(c["statement"])}<br><small>{e(c["source"])}</small>', e(c["expected"]), e(c["measured"]),
                     e(f"{script} {summary['study']}"), len(runs))
            rows.append(f'<tr data-verdict="{verdict}" data-script="{e(script)}">' + "".join(
                f'<td data-name="{h}">{cell}</td>' for h, cell in zip(heads, cells)) + "</tr>")
            claims.append(c | {"verdict": verdict, "script": script})
        lost, speed = sum(row["diverged"] for row in runs), summary["run_steps_per_second"]
        facts = [f"{len(runs)} runs" + f", {lost} diverged" * bool(lost), f"{summary['wall_seconds']:.0f} s",
                 f"{speed:.4g} run-steps a second" if speed else "", "" if settings["finished"] else "not finished",
                 f"torch {settings['versions']['torch']}, {settings['device']}, {settings['threads']} thread", tally(
                     summary["claims"])]
        flags = ", ".join(f"{k}={v}" for k, v in settings["flags"].items() if k not in HOW and v not in ("", [], None))
        sections.append(
            f'<details id="run{n}"{" open" * (len(found) < 8)}><summary><b>{e(path)}</b> {e("; ".join(filter(None, facts)))}'
            f'</summary><pre>python {e(script)} {e(shlex.join(settings["argv"]))}</pre><small>{e(flags)}</small>' + "".join(
                f'<figure><img loading="lazy" alt="{e(name)}" src="data:image/{name[-3:]};base64,{data}">'
                f'<figcaption>{e(name)}</figcaption></figure>\n' for name, data in figures) + "</details>")
    if not sections:
        raise Stop("no finished run under runs/: run a script first, or name run folders")
    options = lambda key: "".join(f'<option value="{e(v)}">{e(v)} ({n})</option>' for v, n in sorted(
        collections.Counter(c[key] for c in claims).items()))
    said = f"{len(sections)} runs, {len(claims)} claims: {tally(claims)}"
    parts = dict(summary=f"{said}. Made {datetime.date.today()}.", left_out="".join(left_out), runs="\n".join(sections),
                 heads="".join(f"<th>{h}</th>" for h in heads), verdicts=options("verdict"), scripts=options("script"),
                 claims="\n".join(rows))
    page = re.sub(r"\{(\w+)\}", lambda m: parts.get(m[1], m[0]), PAGE)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(page, encoding="utf-8")
    print(f"{out}: {said}, {len(page) / 1e6:.1f} MB")


def tools(argv):
    """`python common.py compare|claims|report`."""
    parser = argparse.ArgumentParser(prog="python common.py", description="What finished runs say.")
    parser.error = refuse
    commands = parser.add_subparsers(dest="command", required=True)
    for function, name, count, out in ((compare, "compare", "+", "runs/compare.png"), (ledger, "claims", "+", None),
                                       (report, "report", "*", "runs/report.html")):
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.error = refuse
        command.set_defaults(function=function)
        command.add_argument("paths", nargs=count, metavar="RUN", help="run folder")
        if out:
            command.add_argument("--out", default=out, help=f"file to write [{out}]")
        if name == "compare":
            command.add_argument("--metric", default="loss", help="what is drawn [loss]")
    try:
        given = vars(parser.parse_args(argv))
        del given["command"]
        given.pop("function")(**given)
    except Stop as stop:
        print(f"common.py: {stop}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"common.py: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tools(sys.argv[1:]))
