"""Does GPT-2 turn the embedding of token t, block by block, into the embedding of token t+1?

Law: a text. Model: h_0 = wte + wpe, h_l is the state after block l, z = ln_f(h_L), logits = wte z. The
hypothesis: h_L(t) = emb(t+1). Looked at is any model of GPT-2's architecture; by default a mini, trained
here on the language reference that every Python carries. Its geometry is not GPT-2's.

    python exp_gpt2_paths.py                           65 s, later 5 s: train the mini, follow its paths
    python exp_gpt2_paths.py --model gpt2 --download   the same of GPT-2 (548 MB once), or of a directory
    python exp_gpt2_paths.py --study blocks            which block turns the state, and is it needed?

Claims quote research notes on the states of GPT-2 (French). Logit lens: nostalgebraist 2020. Model and
files: Radford et al. 2019, as Hugging Face stores them."""
import functools
import heapq
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import unicodedata
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager, ft2font
from torch.func import grad_and_value

import common
from common import flag

# ==== Flags ==========================================================================================
@dataclass
class Flags(common.Flags):
    model: str = flag("mini", "mini (trained here once), a name on the Hugging Face hub, or a directory")
    untrained: bool = flag(False, "initial weights in the shape of the model")
    download: bool = flag(False, "fetch a named model that is not there (HF_ENDPOINT)")
    text: str = flag("", "text to look at (default: the mini's held-out text, or built-in sentences)")
    file: str = flag("", "UTF-8 file with the text to look at; train-mini: with the text to learn")
    token: int = flag(-1, "position whose path is drawn; from 0, or from the end with -1")
    window: int = flag(0, "tokens of a window (0: as many as the model has positions)", 0)
    steps: int = flag(700, "mini: training steps", 1)
    n_layers: int = flag(4, "mini: blocks", 1)
    n_heads: int = flag(6, "mini: attention heads", 1)
    d_model: int = flag(96, "mini: width", 3)
    context: int = flag(64, "mini: positions", 4)
    merges: int = flag(512, "mini: merges of its byte-level BPE", 0)
    batch: int = flag(16, "mini: sequences a step", 1)
    lr: float = flag(5e-3, "mini: highest learning rate", 0, number=True)
    weight_decay: float = flag(.1, "mini: decoupled weight decay", 0, number=True)

    def check(self):
        if self.d_model % self.n_heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by --n-heads {self.n_heads}")
        if self.text and self.file:
            raise common.Stop("give --text or --file, not both")
        if "text" in self.given and not self.text:
            raise common.Stop("--text must not be empty")

MINI = "seed steps n_layers n_heads d_model context merges batch lr weight_decay".split()  # make a mini

# ==== Data law =======================================================================================
SENTENCES = ("The train from Paris to Lyon left at eight in the morning, and by noon we were walking "
    "along the river. In the evening we sat in a small restaurant and talked of music, mathematics and "
    "the weather. She asked me whether I would ever come back to live here. The capital of Italy is")
WINDOWS = 8  # of built-in text that are looked at

@functools.cache
def words_of():
    """GPT-2's cut of a text into words for the standard library's `re`, by Python's Unicode: of 20,000
    random strings 7, of rare code points, are cut otherwise by Hugging Face (Python 3.11)."""
    kind = [unicodedata.category(chr(c))[0] for c in range(0x110000)]
    for c in (*range(9, 14), 0x85):
        kind[c] = "Z"  # tab, line ends
    classes, start = defaultdict(str), 0
    for name, run in itertools.groupby(kind):
        stop = start + len(list(run))
        classes[name] += f"\\U{start:08x}-\\U{stop - 1:08x}"
        start = stop
    L, N, S = classes["L"], classes["N"], classes["Z"]
    words = f"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+"
    return re.compile(words)

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # others are written from U+0100
OTHERS = [b for b in range(256) if b not in PRINTABLE]
ALPHABET = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
BYTES = {c: b for b, c in ALPHABET.items()}

class Tokenizer(NamedTuple):
    ids: dict    # token, in the alphabet above -> id
    ranks: dict  # (left, right) -> when this pair was learned to merge
    prefix: str  # put before a text

def learned_tokenizer(text, merges):
    """The tokenizer of a text: its bytes, then merges, pairs in the order in which they were learned."""
    tokens = [*sorted(ALPHABET[b] for b in {*text.encode()}), *map("".join, merges)]
    return Tokenizer({t: i for i, t in enumerate(tokens)}, {p: i for i, p in enumerate(merges)}, "")

def merged(word, ranks):
    """Symbols of a word after all merges: of the pairs that are there always the first learned, from the
    left. A heap of the pairs keeps this n log n, however long a word without spaces is."""
    parts, n = list(word), len(word)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == n or parts[i] is None or ranks.get((parts[i], parts[j])) != rank:
            continue  # one of the two has merged with another since
        parts[i], parts[j], after[i] = parts[i] + parts[j], None, after[j]
        if after[j] < n:
            before[after[j]] = i
        for k in before[i], i:
            if k >= 0 and after[k] < n and (parts[k], parts[after[k]]) in ranks:
                heapq.heappush(heap, (ranks[parts[k], parts[after[k]]], k))
    return [part for part in parts if part is not None]

def encode(text, own):
    """Ids of a text by a Tokenizer, ordinary text: the end of a text spelled out is not one."""
    @functools.cache
    def of_word(word):
        try:
            return [own.ids[s] for s in merged("".join(ALPHABET[b] for b in word.encode()), own.ranks)]
        except (UnicodeEncodeError, KeyError):
            raise common.Stop(f"the model has no token for a part of {word!a:.40}")
    words = words_of().findall(own.prefix * (text[:1] != " ") + text)
    return [i for word in words for i in of_word(word)]

def spelled(own):
    """[V] what each token stands for; bytes that are no text of their own in hexadecimal."""
    names = [bytes(BYTES.get(c, 63) for c in token) for token in sorted(own.ids, key=own.ids.get)]
    return np.array([name.decode(errors="backslashreplace") for name in names])

def learn_merges(text, count):
    """The `count` most frequent pairs, one after another (Sennrich et al. 2016); of equals the last."""
    counts = Counter(words_of().findall(text))
    words = [([ALPHABET[b] for b in word.encode()], n) for word, n in counts.items()]
    pairs, where, merges = Counter(), defaultdict(set), []
    def add(w, sign):
        symbols, n = words[w]
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += sign * n
            where[pair].add(w)
    for w in range(len(words)):
        add(w, 1)
    while len(merges) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for w in where.pop(best):
            add(w, -1)
            words[w][0][:] = merged(words[w][0], {best: 0})
            add(w, 1)
        pairs = +pairs  # those that are left
    return merges

@functools.cache
def read_text(file):
    """The text of a UTF-8 file, read once: it may be a pipe."""
    return trusted(Path.read_text, Path(file), "utf-8-sig")

def corpus(file):
    """(text to learn, text held out) of a file, or of Python's language reference. A paragraph that
    comes again is left out; every tenth of 100 pieces is held out, without 100 letters at its ends."""
    text = read_text(file) if file else "\n\n".join(topics[k] for k in sorted(topics))
    text = "\n\n".join(dict.fromkeys(re.split(r"\n\s*\n", text)))
    cuts = np.linspace(0, len(text), 101).astype(int)
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:])]
    held = [pieces.pop(i)[100:-100] for i in range(99, 0, -10)]
    return "\n".join(pieces), "\n".join(held)

@functools.cache
def lesson(file, merges, context):
    """(Tokenizer, ids to learn [n], held-out ids [windows, context + 1], one overlaps) of a text."""
    learn, held = corpus(file)
    own = learned_tokenizer(learn + held, learn_merges(learn, merges))
    learn, held = (torch.tensor(encode(text, own)) for text in (learn, held))
    if min(len(learn), len(held)) <= context + 1:
        raise common.Stop(f"{len(learn)} tokens to learn, {len(held)} held out: too few for --context")
    return own, learn, held.unfold(0, context + 1, context)[:512]

# ==== Model ==========================================================================================
class Config(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    eps: float = 1e-5

class Model(NamedTuple):
    params: dict
    config: Config
    tokenizer: Tokenizer
    name: str  # what it is called in figures and claims

def shapes(config):
    """{name: shape} of GPT-2's parameters, as its files name them; matrices are stored [in, out]."""
    d, found = config.n_embd, {}
    layers = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d),
              "mlp.c_proj": (4 * d, d), "ln_1": (d,), "ln_2": (d,)}
    every = {f"h.{l}.{name}": shape for l in range(config.n_layer) for name, shape in layers.items()}
    for name, shape in (every | {"ln_f": (d,)}).items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return {"wte.weight": (config.vocab_size, d), "wpe.weight": (config.n_positions, d)} | found

def init(config, generator):
    """N(0, .02^2), what is added to the residual stream smaller by sqrt(2 layers); gains 1, biases 0."""
    params = {}
    for name, shape in shapes(config).items():
        if len(shape) == 2:
            small = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1
            params[name] = torch.randn(shape, generator=generator) * .02 / small
        else:
            params[name] = torch.full(shape, float("ln" in name and "weight" in name))
    return params

def forward(params, tokens, config, patch=lambda name, x: x):
    """States of tokens [.., T]: h_0 = wte + wpe and h_l after block l, before ln_f; a list of L + 1
    tensors [.., T, d]. patch(name, x) replaces what `attn.l` and `mlp.l` add to the state."""
    d, heads, T = config.n_embd, config.n_head, tokens.shape[-1]
    unseen = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
    split = lambda x: x.unflatten(-1, (heads, d // heads)).transpose(-2, -3)  # [.., heads, T, d_head]
    def linear(x, name):
        return F.linear(x, params[f"{name}.weight"].T, params[f"{name}.bias"])
    def norm(x, name):
        return F.layer_norm(x, (d,), params[f"{name}.weight"], params[f"{name}.bias"], config.eps)
    E, at = params["wte.weight"], tokens.device
    if at.type == "cpu":
        x = E[tokens]
    else:  # on a card the gradient of an index adds in any order
        x = (tokens[..., None] == torch.arange(len(E), device=at)).to(E.dtype) @ E
    states = [x + params["wpe.weight"][:T]]
    for l in range(config.n_layer):
        x = states[-1]
        q, k, v = map(split, linear(norm(x, f"h.{l}.ln_1"), f"h.{l}.attn.c_attn").split(d, -1))
        scores = (q / (d // heads) ** .5 @ k.transpose(-1, -2)).masked_fill(unseen, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
        x = x + patch(f"attn.{l}", linear(mixed, f"h.{l}.attn.c_proj"))
        hidden = F.gelu(linear(norm(x, f"h.{l}.ln_2"), f"h.{l}.mlp.c_fc"), approximate="tanh")
        states.append(x + patch(f"mlp.{l}", linear(hidden, f"h.{l}.mlp.c_proj")))
    return states

def final_norm(params, h, config):
    """z = ln_f(h)."""
    return F.layer_norm(h, h.shape[-1:], params["ln_f.weight"], params["ln_f.bias"], config.eps)

def unembedding(params):
    """[V, d]; wte, but for a file with an lm_head of its own."""
    return params.get("lm_head.weight", params["wte.weight"])

# ==== Train ==========================================================================================
def taught(run):
    """(Tokenizer, ids to learn, held-out windows, Config) of a mini."""
    own, learn, held = lesson(run.file if run.room.learns else "", run.merges, run.context)
    return own, learn, held, Config(run.n_layers, run.n_heads, run.d_model, run.context, len(own.ids))

def start(run):
    """Step 0 of one run."""
    params = init(taught(run)[3], common.generator(run.seed, "init"))
    return {"params": params, **common.adam_init(params)}

def constants(run):
    """What is learned [n], and the held-out windows [m, context + 1]."""
    _, learn, held, _ = taught(run)
    return {"learn": learn, "held": held}

def nll(params, rows, config):
    """Loss [.., T] of rows of tokens [.., T+1], nats."""
    z = final_norm(params, forward(params, rows[..., :-1], config)[-1], config)
    logits = z @ unembedding(params).T
    return F.cross_entropy(logits.movedim(-1, 1), rows[..., 1:], reduction="none")

def schedule(t, steps):
    """The learning rate's factor at step t: up to 1 over a tenth of the steps, then down to .1."""
    return torch.minimum((t + 1) * 10 / steps, 1.1 - t / steps)

def step_of(flags):
    """The training step of ONE run, on windows drawn from what is learned."""
    config = taught(flags)[3]
    def step(state, number):
        key = common.key(number["seed"], 0, state["t"])
        first = common.integers(key, len(number["learn"]) - flags.context, flags.batch)
        rows = number["learn"][first[:, None] + torch.arange(flags.context + 1, device=first.device)]
        loss_of = lambda params: nll(params, rows, config).mean()
        grads, loss = grad_and_value(loss_of)(state["params"])
        size = sum((g * g).sum() for g in grads.values()).sqrt().clamp(min=1.)
        grads = {k: g / size for k, g in grads.items()}  # at most 1 long: else a burst ruins a run
        lr, decay = number["lr"] * schedule(state["t"], flags.steps), number["weight_decay"]
        params, optimiser = common.adamw(state["params"], grads, state, lr, decay, beta2=.99)
        return {"params": params, **optimiser}, {"loss": loss}
    return step

def evaluate_of(flags):
    """The held-out loss of ONE run."""
    config = taught(flags)[3]
    return lambda params, number: {"loss": nll(params, number["held"], config).mean()}

# ==== What several studies share =====================================================================
# Files of Hugging Face: whatever they hold comes from a stranger.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ACTIVATIONS = "gelu_new", "gelu_pytorch_tanh", "gelu_fast"  # one function
FILES = "config.json", "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors"

def trusted(read, *what):
    """What a reader of strangers' files finds; Stop, in one line, for whatever it stumbles over."""
    try:
        return read(*what)
    except common.Stop:
        raise
    except Exception as error:
        raise common.Stop(f"{what[0]} can't be read: {error!r:.200}")

def read_json(path, data=None):
    """The JSON object in a file, or in its bytes."""
    data = path.read_bytes() if data is None else data
    if data.startswith(b"version https://git-lfs"):
        raise common.Stop(f"{path} is a git-LFS pointer: fetch the file itself with `git lfs pull`")
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise common.Stop(f"{path} is no JSON object: {error}")

def read_safetensors(path):
    """{name: float tensor} of a safetensors file; tensors of other kinds (masks) are left out."""
    tensors = {}
    with open(path, "rb") as f:
        start, whole = f.read(8), path.stat().st_size  # the length of a JSON header, which comes next
        length = int.from_bytes(start, "little")
        header = read_json(path, f.read(length) if length < whole else start + f.read(99))
        for name, entry in header.items():
            dtype = DTYPES.get(entry.get("dtype"))
            if dtype:
                first, last = entry["data_offsets"]
                if not 0 <= first < last <= whole - 8 - length:
                    raise ValueError(f"{path}: the offsets of {name[:80]!r} lie outside of the file")
                f.seek(8 + length + first)
                data = torch.frombuffer(bytearray(f.read(last - first)), dtype=dtype)
                tensors[name] = data.view(entry["shape"]).float()
    return tensors

def read_weights(folder):
    """{name: tensor} of model.safetensors, whole or in shards, without what stands before wte.weight."""
    index, files = folder / "model.safetensors.index.json", {"": "model.safetensors"}
    if index.is_file():
        files = read_json(index)["weight_map"]
    tensors = {}
    for file in sorted({*files.values()}):
        if Path(file).name != file or not (folder / file).is_file():
            raise common.Stop(f"{folder} has no {file}: an older format is saved anew with transformers")
        tensors |= read_safetensors(folder / file)
    before = [name[:-10] for name in tensors if name.endswith("wte.weight")]
    if len(before) != 1:
        raise common.Stop(f"{folder} holds no GPT-2, or several: {len(before)} tensors named wte.weight")
    own = {name.removeprefix(before[0]): x for name, x in tensors.items()}
    return own | {name[-14:]: x for name, x in tensors.items() if name.endswith("lm_head.weight")}

def read_config(folder):
    """(Config, whether logits are read through wte) of config.json; Stop for another architecture."""
    path = folder / "config.json"
    given = read_json(path)
    wanted = {"model_type": ["gpt2"], "activation_function": ACTIVATIONS, "scale_attn_weights": [True],
              "scale_attn_by_inverse_layer_idx": [False]}
    other = [f"{k} {given[k]!r:.80}" for k, fine in wanted.items() if given.get(k, fine[0]) not in fine]
    if other:
        raise common.Stop(f"{path} describes another architecture than GPT-2: {', '.join(other)}")
    given["n_positions"] = given.get("n_positions") or given.get("n_ctx")
    sizes = [given.get(name) for name in Config._fields[:5]]
    eps = given.get("layer_norm_epsilon", 1e-5)
    sound = all(type(x) is int and 0 < x < 2 ** 31 for x in sizes) and 0 < eps < 1
    if not sound or sizes[2] % sizes[1] or sizes[2] < 3:
        raise common.Stop(f"{path}: {Config._fields[:5]} are {sizes}, eps {eps}: no GPT-2's"[:300])
    return Config(*sizes, eps), given.get("tie_word_embeddings", True)

def read_tokenizer(folder):
    """The Tokenizer of tokenizer.json, or of vocab.json and merges.txt."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    spaced = settings.is_file() and read_json(settings).get("add_prefix_space")
    if path.is_file():
        whole = read_json(path)
        ids, merges = whole["model"]["vocab"], whole["model"]["merges"]
        ids |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        cut = whole["pre_tokenizer"]
        if cut["type"] != "ByteLevel" or not cut.get("use_regex", True) or whole.get("normalizer"):
            raise common.Stop(f"{path} is no byte-level BPE as GPT-2's")
        spaced = cut.get("add_prefix_space", spaced)
    else:
        path, extra = folder / "vocab.json", folder / "added_tokens.json"
        ids = read_json(path) | (read_json(extra) if extra.is_file() else {})
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in merges if line and not line.startswith("#version")]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    missing = {a + b for a, b in pairs} - ids.keys()
    if missing or [*map(str, sorted(ids.values()))] != [*map(str, range(len(ids)))]:
        raise common.Stop(f"{path}: ids must be 0 .. {len(ids) - 1}; without one: {sorted(missing)[:3]}")
    return Tokenizer(ids, {pair: i for i, pair in enumerate(pairs)}, " " if spaced else "")

@functools.cache
def load(folder, name):
    """The Model in a folder, checked. A square matrix that lies transposed can't be seen."""
    (config, tied), own, tensors = read_config(folder), read_tokenizer(folder), read_weights(folder)
    wanted, V = shapes(config), len(own.ids)
    if not tied:
        wanted["lm_head.weight"] = wanted["wte.weight"]
    for key, shape in wanted.items():
        found = tensors.get(key, torch.empty(0))
        if found.shape != shape or not found.isfinite().all():
            raise common.Stop(f"{folder}: {key} must be {shape} finite numbers, it is {[*found.shape]}")
    if V > config.vocab_size:
        raise common.Stop(f"{folder}: the tokenizer has {V} tokens, wte.weight {config.vocab_size} rows")
    ignored = sorted(tensors.keys() - wanted.keys() - {"lm_head.weight"})
    if ignored or V < config.vocab_size:
        common.tell(f"{folder}: {V} of {config.vocab_size} rows have a token; not read: {ignored[:3]}")
    rows = {"wte.weight": V, "lm_head.weight": V}
    params = {key: tensors[key][:rows.get(key)] for key in wanted}
    return Model(params, config._replace(vocab_size=V), own, name)

def cache():
    """Where this script keeps its mini models and what it downloads."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "small-networks" / "gpt2"
    place.mkdir(parents=True, exist_ok=True)
    return place

def find(flags):
    """The folder of --model: a directory, or a name in the hub's cache, in ours, or on the network."""
    name = flags.model if "/" in flags.model else f"openai-community/{flags.model}"
    home = Path(os.environ.get("HF_HOME") or cache().parents[1] / "huggingface")
    hub, own = Path(os.environ.get("HF_HUB_CACHE") or home / "hub"), cache() / name.replace("/", "--")
    places = [Path(flags.model)]
    for known in name, flags.model:
        main = hub / f"models--{known.replace('/', '--')}" / "refs" / "main"
        if main.is_file():
            places.append(main.parents[1] / "snapshots" / main.read_text().strip())
    for place in *places, own:
        if (place / "config.json").is_file() and [*place.glob("model.safetensors*")]:
            return place
    web = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not flags.download:
        raise common.Stop(f"--model {flags.model}: neither it nor {hub} has its config.json and "
                          "model.safetensors; --download fetches a name of the hub")
    if common.RANK == 0:
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            for file in FILES:
                try:
                    url = f"{web}/{name}/resolve/main/{file}"
                    torch.hub.download_url_to_file(url, f"{folder}/{file}")
                except (OSError, ValueError) as error:
                    if "404" not in str(error):  # a tokenizer has two spellings
                        raise common.Stop(f"{web}/{name}: {error}")
            trusted(read_weights, Path(folder))  # all of it came
            shutil.copytree(folder, own, dirs_exist_ok=True)
    common.meet()
    return own

def model_of(flags, params):
    """The Model of a mini's parameters."""
    own, _, _, config = taught(flags)
    return Model(params, config, own, "mini")

def mini(flags, folder):
    """The mini of these flags, from the cache or trained here and put there."""
    made_of = [getattr(flags, name) for name in MINI] + [torch.__version__, taught(flags)[0]]
    made_of += [Path(module).read_bytes() for module in (__file__, common.__file__)]
    place = cache() / sha256(repr(made_of).encode()).hexdigest()[:16] / "mini.pt"
    if common.meet(not place.exists()):
        trained, = common.train([[flags]], folder / "mini", start, step_of, evaluate_of, constants)
        model = model_of(flags, common.run_of(trained.params, 0))
        if common.NOW.asked:
            return model._replace(name="mini (interrupted)")
        common.write(place, model.params)
        common.meet()
    return model_of(flags, common.read(place))

def untrained(model, seed):
    """Initial weights in a model's shape."""
    params = init(model.config, common.generator(seed, "init"))
    return model._replace(params=params, name=f"untrained {model.name}")

def get(flags, folder):
    """The Model that the flags name."""
    if flags.model != "mini":
        model = trusted(load, find(flags), Path(flags.model).name)
    else:
        model = model_of(flags, {}) if flags.untrained else mini(flags, folder)
    return untrained(model, flags.seed) if flags.untrained else model

def reading(flags):
    """(ids [T] of the text to look at, where its windows start)."""
    if flags.model == "mini":
        own, _, held, config = taught(flags)
        ids = held[:WINDOWS, :-1].flatten().tolist()
    else:
        place = find(flags)
        (config, _), own = (trusted(read, place) for read in (read_config, read_tokenizer))
        ids = encode(SENTENCES, own)
    given = flags.text or flags.file
    if given:
        ids = encode(read_text(given) if flags.file else given, own)
    size = flags.window or config.n_positions
    if size > config.n_positions or len(ids) > size and given and not flags.window:
        raise common.Stop(f"{len(ids)} tokens, {config.n_positions} positions: give a smaller --window")
    if min(len(ids), size) < 2 or not -len(ids) <= flags.token < len(ids):
        raise common.Stop(f"{len(ids)} tokens, windows of {size}: too few, or for --token {flags.token}")
    return torch.tensor(ids), list(range(0, len(ids), size))

# Of L + 1 states of T positions. The first of a window sees itself alone: it has no vote (`first`).
NOTES, OURS = "research notes on the states of GPT-2", "this project"
STATES, PIECE = 832, 2048  # states and tokens compared at once (measured: scores stay in the cache)

def cosine(x, e):
    """Cosine along the last axis; 0 where one of the two is 0."""
    return (x * e).sum(-1) / (x.norm(dim=-1) * e.norm(dim=-1)).clamp(min=1e-30)

def decode(states, model):
    """Every state [L+1, T, d] against the whole vocabulary, [L+1, T] each. The logit lens,
    softmax(W ln_f(h_l)): lens_kl of the end from it (nats), lens_token (its first), lens_rank of the
    predicted token (0: first). Its rank by cosine with h_l (rank_cosine) and with ln_f(h_l) (.._final);
    nearest: the token of the largest cosine with h_l. [T]: predicted; entropy of the end."""
    found = [against(x, model) for x in states.split(max(1, STATES // len(states)), 1)]
    return {k: torch.cat([part[k] for part in found], -1) for k in found[0]}

def against(x, model):
    """`decode` of states x [L+1, B, d], one piece of the vocabulary after the other."""
    E, W = model.params["wte.weight"], unembedding(model.params)
    z, size = final_norm(model.params, x, model.config), E.norm(dim=1).clamp(min=1e-30)
    end = (z[-1] @ W.T).log_softmax(-1)  # [B, V]
    p, chosen = end.exp(), end.argmax(-1)
    unit = E[chosen] / size[chosen, None]
    target = {"lens_rank": (z * W[chosen]).sum(-1), "rank_cosine": (x * unit).sum(-1),
              "rank_cosine_final": (z * unit).sum(-1)}
    found = defaultdict(lambda: torch.zeros(x.shape[:2], dtype=torch.int64))
    best = defaultdict(lambda: torch.full(x.shape[:2], -math.inf))
    total, crossed = best["total"], 0.
    for at in range(0, len(E), PIECE):
        piece = slice(at, at + PIECE)
        logits, cosines = z @ W[piece].T, x @ E[piece].T / size[piece]  # [L+1, B, PIECE], times |x|
        scores = {"lens_rank": logits, "rank_cosine": cosines,
                  "rank_cosine_final": (logits if W is E else z @ E[piece].T) / size[piece]}
        here = ((chosen >= at) & (chosen < at + PIECE)).nonzero()[:, 0]
        for k, score in scores.items():
            score[:, here, chosen[here] - at] = target[k][:, here]  # a token is not above itself
            found[k] += (score > target[k][..., None]).sum(-1, dtype=torch.int32)
        for k, score in ("lens_token", logits), ("nearest", cosines):
            top, token = score.max(-1)
            found[k] = torch.where(top > best[k], token + at, found[k])
            best[k] = torch.maximum(best[k], top)
        logits -= target["lens_rank"][..., None]  # sums lose as much as the scores lie from 0
        total = torch.logaddexp(total, logits.logsumexp(-1))
        crossed = crossed + torch.einsum("bv,lbv->lb", p[:, piece], logits)
    entropy = -(p * end).sum(-1)
    kl = (total - crossed - entropy).clamp(min=0)
    return {**found, "lens_kl": kl, "predicted": chosen, "entropy": entropy}

def look(model, ids, starts, seed):
    """What all studies see of a text: tokens [T], first [T], states [L+1, T, d], final [T, d] (ln_f of
    the last), norm, what `decode` finds, cosines of h_l (and of ln_f(h_l), .._final) with embeddings."""
    T, windows = len(ids), ids.tensor_split(starts[1:])
    states = [torch.stack(forward(model.params, part, model.config)) for part in windows]
    states = torch.cat(states, 1)
    final = final_norm(model.params, states, model.config)
    found = {"tokens": ids, "states": states, "final": final[-1], "norm": states.norm(dim=-1)}
    found |= decode(states, model)
    if not found["lens_kl"].isfinite().all():
        raise common.Stop(f"{model.name}: the states of this text are not finite (a mini: lower --lr)")
    predicted, E = found["predicted"], model.params["wte.weight"]
    who = {"predicted": predicted, "input": ids, "shuffled": predicted.roll(-max(1, T // 2)),
           "random": torch.randint(len(E), (T,), generator=common.generator(seed, "eval"))}
    for name, tokens in who.items():
        found[f"cosine_{name}"] = cosine(states, E[tokens])
        found[f"cosine_{name}_final"] = cosine(final, E[tokens])
    first = torch.isin(torch.arange(T), torch.tensor(starts))
    return found | {"first": first, "model": model.name, "names": spelled(model.tokenizer)}

def quartiles(values):
    """(median, lower quartile, upper quartile) over positions: decided where three quarters agree."""
    values = np.asarray(values, float)
    return tuple(np.nanquantile(values, [.5, .25, .75])) if np.isfinite(values).sum() > 2 else []

def monotone(y):
    """[T] rank correlation of y [L+1, T] with the layer (Spearman)."""
    ranks = y.argsort(0).argsort(0) - (len(y) - 1) / 2
    layer = np.arange(len(y)) - (len(y) - 1) / 2
    return layer @ ranks / (layer @ layer)

class Look(common.Study):
    """A model looked at, on one text. learns: whether --file is what a mini learns."""
    learns = False
    free = "model untrained download text file token window".split()
    defaults = dict(evals=5, compile="off", block=1)  # a step is matrix products, which fill the cache
    smoke = dict(steps=4, n_layers=2, n_heads=2, d_model=12, context=16, merges=20, batch=2)

    def check(flags):
        flags.check()
        odd = {"runs", "sweep", "snapshots", *(MINI[1:] if flags.model != "mini" else [])}
        for name in sorted(odd & {*flags.given}):
            raise common.Stop(f"{common.option(name)} has no part in {flags.study} of {flags.model}")
        if not flags.plot_only and not flags.download:
            reading(flags)

    def compute(flags, folder):
        model = get(flags, folder)
        seen = look(model, *reading(flags), flags.seed)
        seen["token"] = flags.token % len(seen["first"])
        found = seen | flags.room.measure(model, seen, flags)
        return {k: x for k, x in found.items() if k not in ("states", "final")}

def say_all(say, sentences, name):
    """Judge sentences on a model, position by position."""
    for id, statement, source, values, relation, bound in sentences:
        say(id, f"{name}: {statement}", source, quartiles(values), relation, bound)

# Figures.
BLUE, RED, GREEN, _, ORANGE = common.COLOURS[:5]
GLYPHS = ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()

def shown(text, width=99):
    """A text as a figure can show it: what the font lacks as ?, line ends (in tokens spaces) seen."""
    text = str(text).replace("\n", "\\n").replace(" ", "\u00b7" if width < 20 else " ")
    text = "".join(c if ord(c) in GLYPHS else "?" for c in text).replace("$", "\\$")
    return text if len(text) <= width else text[:width - 2] + ".."

def title(arrays, what, of_token=False):
    """What a figure shows, of which model, and after which text if it is about one token."""
    name, i = str(arrays["model"]), int(arrays["token"])
    text = f"{what}\n{shown(name)}" + ", made here: its geometry is its own" * ("mini" in name.split())
    before = "".join(arrays["names"][arrays["tokens"][max(0, i - 8):i + 1]])[-40:]
    red = shown(arrays["names"][arrays["predicted"][i]], 12)
    return text + f'; after "..{shown(before)}": {red}' * of_token

def layers(ax, y, label, colour):
    """Median over positions of y [layers, T], quartiles as a band; or y [layers] as it is."""
    low, middle, high = np.nanquantile(np.reshape(y, (len(y), -1)) * 1., [.25, .5, .75], axis=1)
    ax.fill_between(np.arange(len(y)), low, high, color=colour, alpha=.2, lw=0)
    ax.plot(middle, "o-", color=colour, ms=3, label=label)
    ax.set_xlabel("layer (0: embedding)")
    ax.locator_params("x", integer=True)

def legends(axes):
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6.5)

# ==== Studies ========================================================================================
class Paths(Look):
    """What path do the states take in the space of the embeddings: do they turn into emb(t+1)?

    What `look` names; explained [3, d]: share of the embeddings' variance by component and mode;
    pca_tokens [V, 2], pca_states [L+1, T, 2]: coordinates in two components (raw); square, three: share
    of the embeddings within [-1, 1]^2, and of their variance in three components (on dim)."""

    def measure(model, seen, flags):
        E = model.params["wte.weight"]
        every = [basis_of(E, mode) for mode in MODES]
        kept = torch.stack([b.variance / b.variance.sum() for b in every])
        tokens, states = (coordinates(x, every[0], 2) for x in (E, seen["states"]))
        return {"pca_tokens": tokens, "pca_states": states, "explained": kept,
                "three": kept[-1, :3].sum(), "square": (tokens.abs() <= 1).all(1).double().mean()}

    def claims(arrays, say):
        say_all(say, path_sentences(arrays), arrays["model"])
        box, end = arrays["pca_tokens"], arrays["pca_states"][-1, ~arrays["first"]]
        out = np.maximum(end - box.max(0), box.min(0) - end) / np.ptp(box, 0)
        words = "in two components the last states lie far outside of all embeddings (sides of a box)"
        say_all(say, [("beyond", words, NOTES, out.max(1), ">", .5)], arrays["model"])
        say("square", f"{arrays['model']}: the embeddings lie within [-1, 1] x [-1, 1] (share)", NOTES,
            float(arrays["square"]), ">", .9999)
        say("three-components", f"{arrays['model']}: three components keep 4 % of the variance", NOTES,
            float(arrays["three"]), "in", (.035, .045))

    def draw_path(arrays, flags):
        what = "The path of one token's states in the plane of the embeddings"
        figure, axes = common.panels(3, title(arrays, what, True), flags, 3)
        i, tokens, path = (arrays[k] for k in ("token", "pca_tokens", "pca_states"))
        for ax in axes[:2]:
            ax.scatter(*tokens.T, s=1, color="silver", label="embeddings")
            ax.plot(*path[:, i].T, "o-", color=BLUE, ms=3, label="states h_0 .. h_L")
            ax.plot(*tokens[arrays["predicted"][i]], "o", color=RED, label="predicted token")
            ax.add_patch(plt.Rectangle((-1, -1), 2, 2, fill=False, ls="--", label="[-1, 1]²"))
            ax.set(xlabel="first component of the embeddings", ylabel="second component")
        for l, at in enumerate(path[:, i]):
            axes[0].annotate(str(l), at, (2, 2), textcoords="offset points", fontsize=6)
        low, high = np.minimum(tokens.min(0), -1.05), np.maximum(tokens.max(0), 1.05)
        axes[1].axis([low[0], high[0], low[1], high[1]])
        for mode, kept in zip(MODES, arrays["explained"]):
            axes[2].plot(np.arange(len(kept)) + 1, kept.cumsum(),
                         label=f"{mode}: {kept[:3].sum():.1%} in 3")
        axes[2].set(xscale="log", xlabel="components of the embeddings' PCA", ylabel="share of variance")
        legends(axes)
        return figure

    def draw_cosines(arrays, flags):
        what = "Do the states turn into the next token's embedding?"
        figure, axes = common.panels(3, title(arrays, what), flags, 3)
        who = dict(predicted="predicted token", input="input token", random="random token",
                   shuffled="token predicted elsewhere")
        for ax, end, words in (axes[0], "", "h_l"), (axes[1], "_final", "ln_f(h_l)"):
            for (key, label), colour in zip(who.items(), common.COLOURS):
                layers(ax, arrays[f"cosine_{key}{end}"][:, ~arrays["first"]], label, colour)
            common.shelf(ax, 1, "emb(t+1) itself", "left")
            ax.set(ylabel=f"cosine of {words} and an embedding")
        ranks = dict(rank_cosine="by cosine with h_l", rank_cosine_final="by cosine with ln_f(h_l)",
                     lens_rank="by dot product with ln_f(h_l)")
        for (key, label), colour in zip(ranks.items(), (BLUE, GREEN, RED)):
            layers(axes[2], np.median(arrays[key][:, ~arrays["first"]], 1) + 1, label, colour)
        common.shelf(axes[2], len(arrays["names"]) / 2, "chance")
        axes[2].set(yscale="log", ylabel="median rank of the predicted token (1: first)")
        legends(axes)
        return figure

def path_sentences(a):
    """(id, statement, source, values [T'], relation, bound) on cosines and ranks."""
    later = ~a["first"]
    last = lambda key: a[key][-1, later]
    steps = np.diff(a["cosine_predicted"][:, later], axis=0)
    rise = steps.sum(0)
    return [
        ("not-embedding", "last_state(t) is not emb(t+1) (cosine of h_L with the predicted one)", NOTES,
         last("cosine_predicted"), "<", .9),
        ("little-by-little", "the blocks turn the input, little by little, into emb(t+1) (rise of the "
         "cosine over its largest change in a block)", NOTES, rise / np.abs(steps).max(0), ">", 2),
        ("by-cosine", "the last state picks emb(t+1) by cosine similarity, after ln_f (tokens nearer)",
         NOTES, last("rank_cosine_final"), "<", .5)]

MODES = "raw", "on x", "on dim"  # how embeddings are scaled for a PCA

Basis = namedtuple("Basis", "scaled mean axes variance")  # of a PCA: a function, [d], [d, d], [d]

def basis_of(E, mode):
    """The Basis of embeddings [V, d], in float64: raw, each row divided by its norm (on x), or each
    dimension by its standard deviation (on dim). Each axis' largest entry is positive."""
    size = torch.ones(E.shape[1]).double()
    if mode == "on dim":
        size = E.double().std(0, correction=0).clamp(min=1e-15)
    scaled = lambda x: (F.normalize(x, dim=-1) if mode == "on x" else x) / size
    x = scaled(E)
    mean = x.mean(0)
    variance, axes = torch.linalg.eigh(x.T @ x / len(x) - mean[:, None] * mean)
    variance, axes = variance.flip(0).clamp(min=0), axes.flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return Basis(scaled, mean, axes, variance)

def coordinates(x, basis, k=None):
    """[.., k] of x [.., d] in a basis of the embeddings, as they would be if x were one of them."""
    return basis.scaled(x) @ basis.axes[:, :k] - basis.mean @ basis.axes[:, :k]

class Plane(Look):
    """Is the path above a plane of embeddings, and what does the last state select?

    What `look` names; outside [L+1, d+1]: median share of |x - mean|^2 beyond the first k components;
    kept [d]: share of the embeddings' variance in each; beyond [T]: of h_L, beyond those that hold .9 of
    that variance, limit: what .95 of the embeddings stay below; plane_states [L+1, T, 3], plane_tokens
    [V, 3]: two components and the direction orthogonal to them that carries most of every second h_L;
    above [L+1, T]: its share of |h_l - mean|^2; kept_random, kept_other [T]: still predicted if as much
    of z as lies along emb(t+1) - mean is taken away along a random way, or another prediction's."""

    def outside(x, basis):
        """[.., d+1] share of |x - mean|^2 outside the span of the first k axes, k = 0 .. d."""
        energy = coordinates(x, basis).square()
        return 1 - F.pad(energy.cumsum(-1), (1, 0)) / energy.sum(-1, keepdim=True).clamp(min=1e-30)

    def measure(model, seen, flags):
        E, W = model.params["wte.weight"], unembedding(model.params)
        states = seen["states"]
        basis, later = basis_of(E, "raw"), ~seen["first"]
        kept = basis.variance / basis.variance.sum()
        k = int((kept.cumsum(0) < .9).sum()) + 1
        shares = torch.cat([Plane.outside(x, basis)[:, k] for x in E.split(4096)])
        fitted = coordinates(states[-1][later][::2], basis)[:, 2:]
        up = basis.axes[:, 2:] @ torch.linalg.eigh(fitted.T @ fitted).eigenvectors[:, -1]
        centred = states - basis.mean
        up = up * (centred[-1] @ up).median().sign()
        frame = torch.cat([basis.axes[:, :2], up[:, None]], 1)
        path = centred @ frame
        beyond = [Plane.outside(x, basis) for x in states]
        found = {"outside": torch.stack([x[later].median(0).values for x in beyond]), "kept": kept,
                 "beyond": beyond[-1][:, k], "limit": shares.quantile(.95),
                 "plane_states": path, "plane_tokens": (E - basis.mean) @ frame,
                 "above": path[..., 2].square() / centred.square().sum(-1)}
        u = F.normalize(W[seen["predicted"]] - W.mean(0), dim=-1)
        amount = (seen["final"] * u).sum(-1, keepdim=True)
        random = F.normalize(torch.randn(u.shape, generator=common.generator(flags.seed, "way")), dim=-1)
        for name, v in ("other", u.roll(-1, 0)), ("random", random):
            rows = (seen["final"] - amount * v).split(256)
            found[f"kept_{name}"] = torch.cat([(x @ W.T).argmax(-1) for x in rows]) == seen["predicted"]
        return found

    def claims(arrays, say):
        later = ~arrays["first"]
        other = later & (later.cumsum() % 2 == 0)  # the direction is fitted to the first, the third, ..
        say_all(say, [
            ("outside-embeddings", "the states are not in the space of the embeddings: more of h_L lies "
             "outside the components with .9 of their variance than of 95 % of the embeddings", NOTES,
             arrays["beyond"][later], ">", arrays["limit"]),
            ("path-above-plane", "there is a plane of embeddings with the path above it: one direction "
             "orthogonal to it carries most of h_L (positions that it is not fitted to; share)", NOTES,
             arrays["above"][-1, other], ">", .5)], arrays["model"])
        for key, words in ("random", "a random direction"), ("other", "another prediction's embedding"):
            kept = arrays[f"kept_{key}"][later]
            half = 2 * kept.std() / len(kept) ** .5
            say(f"selects-{key}", f"{arrays['model']}: the last state selects just the features that "
                f"tell emb(t+1): if as much is taken away along {words}, most predictions stay (share; "
                "along emb(t+1) none can)", NOTES + ", an intervention",
                (kept.mean(), kept.mean() - half, kept.mean() + half), ">", .75)

    def draw_plane(arrays, flags):
        what = "Is the path above a plane of embeddings?"
        figure, axes = common.panels(4, title(arrays, what, True), flags)
        L, later, k = len(arrays["norm"]) - 1, ~arrays["first"], np.arange(arrays["outside"].shape[1])
        for l, colour in zip(sorted({0, L // 2, L}), common.COLOURS):
            axes[0].plot(k, arrays["outside"][l], color=colour, label=f"h_{l} (median)")
        axes[0].plot(k[1:], 1 - arrays["kept"].cumsum(), color="black", label="embeddings")
        axes[0].plot(k, 1 - k / k[-1], "--", color="grey", label="random direction")
        axes[0].set(xlabel="first k components of the embeddings", ylabel="share of |x - mean|² outside")
        i, tokens, path = int(arrays["token"]), arrays["plane_tokens"], arrays["plane_states"]
        for ax, x in zip(axes[1:], (0, 1)):
            ax.scatter(*tokens[:, [x, 2]].T, s=1, color="silver", label="embeddings")
            ax.plot(*path[:, i][:, [x, 2]].T, "o-", color=BLUE, ms=3, lw=1, label="states h_0 .. h_L")
            ax.set(xlabel=f"component {x + 1} of the embeddings", ylabel="direction orthogonal to both")
        layers(axes[3], arrays["above"][:, later], "states", BLUE)
        common.shelf(axes[3], .5, "most", "left")
        axes[3].set(ylabel="share of |h_l - mean|² along that direction", ylim=(0, 1.02))
        legends(axes)
        return figure

class Sphere(Look):
    """Where do the states point, on the sphere of three components, seen from outside and inside?

    What `look` names; log_p [V]: of the next token, base 10; tokens_3 [2, V, 3], path_3 [2, L+1, 3]:
    directions in three components, of the path of `token`, on dim and on x; explained [2]: share
    of the variance in them; angle [T]: of h_L from the predicted token in three components, on dim;
    full_angle [T]: in all (degrees)."""
    WAYS = "on dim", "on x"

    def measure(model, seen, flags):
        E, i = model.params["wte.weight"], flags.token
        ways = [basis_of(E, way) for way in Sphere.WAYS]
        ball = lambda x: torch.stack([F.normalize(coordinates(x, b, 3), dim=-1) for b in ways])
        def angle(k):
            last, red = (coordinates(x, ways[0], k) for x in (seen["states"][-1], E[seen["predicted"]]))
            return cosine(last, red).clamp(-1, 1).acos().rad2deg()
        logits = unembedding(model.params) @ seen["final"][i]
        return {"log_p": logits.log_softmax(0) / math.log(10), "tokens_3": ball(E),
                "path_3": ball(seen["states"][:, i]), "angle": angle(3), "full_angle": angle(None),
                "explained": [b.variance[:3].sum() / b.variance.sum() for b in ways]}

    def claims(arrays, say):
        angle, full = (arrays[k][~arrays["first"]] for k in ("angle", "full_angle"))
        say_all(say, [
            ("sphere-apart", "on the sphere of three components the last state is far from the "
             "predicted token (degrees)", NOTES, angle, ">", 30),
            ("angles-altered", "angles seen in three dimensions are altered (by degrees)", NOTES,
             np.abs(angle - full), ">", 15)], arrays["model"])

    def globe(ax, arrays, way, inside):
        """The unit sphere from outside (the half that faces us) or from its centre (80 degrees around,
        stereographic): tokens by their probability, the predicted one red, states numbered."""
        path, tokens, log_p = arrays["path_3"][way], arrays["tokens_3"][way], arrays["log_p"]
        red = tokens[arrays["predicted"][arrays["token"]]]
        towards = (path[-1] + red + 1e-3) * (1 if inside else -1)  # we look there
        towards /= np.linalg.norm(towards)
        right = np.cross(towards, [0, 0, 1] if abs(towards[2]) < .9 else [0, 1, 0])
        right /= np.linalg.norm(right)
        frame, edge = np.stack([right, np.cross(right, towards), towards]), math.cos(math.radians(80))
        def seen(x):  # [n, 3] -> x and y [2, n], NaN where they are behind us or on the far side
            *at, deep = frame @ x.T
            size = (1 + np.maximum(deep, edge)) * math.tan(math.radians(40)) if inside else 1
            return np.where(deep < edge if inside else deep > 0, np.nan, np.stack(at) / size)
        turn = np.linspace(0, 2 * np.pi, 181)
        c, s = np.cos(turn), np.sin(turn)
        for a in np.radians(np.arange(-60, 61, 30)):
            for circle in ((np.cos(a) * c, np.cos(a) * s, 0 * c + np.sin(a)),
                           (c * np.cos(a), c * np.sin(a), s)):
                ax.plot(*seen(np.stack(circle, 1)), color="#dddddd", lw=.5, zorder=0)
        order = log_p.argsort()
        dots = ax.scatter(*seen(tokens[order]), c=log_p[order], s=2 if len(order) > 5000 else 8, vmin=-8,
                          vmax=0, lw=0)
        share = np.linspace(0, 1, 21)[:, None]
        for a, b in zip(path, path[1:]):
            arc = a + share * (b - a) + 1e-9
            ax.plot(*seen(arc / np.linalg.norm(arc, axis=1, keepdims=True)), "k", lw=.7)
        for l, at in enumerate(seen(path).T):
            if np.isfinite(at).all():
                size = 10 if l == len(path) - 1 else 7
                ax.annotate(str(l), at, fontsize=size, ha="center", va="center",
                            bbox=dict(boxstyle="circle,pad=.15", fc="white", lw=.5, alpha=.8))
        ax.plot(*seen(red[None]), "o", color="#D00000", ms=8, mec="white", zorder=5)
        ax.set(aspect="equal", xticks=[], yticks=[], xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        ax.spines[:].set_visible(False)
        return dots

    def draw_sphere(arrays, flags):
        what = "On the sphere of directions, in three components (numbers: states; red: predicted)"
        figure, axes = common.panels(4, title(arrays, what, True), flags, 2, (4.6, 4.2))
        for ax, (way, inside) in zip(axes, itertools.product((0, 1), (False, True))):
            dots = Sphere.globe(ax, arrays, way, inside)
            ax.set_title(f"{Sphere.WAYS[way]} ({arrays['explained'][way]:.1%} of the variance), from "
                         f"{'inside' if inside else 'outside'}", fontsize=8)
        figure.colorbar(dots, ax=axes, shrink=.5, label="log10 p(token)")
        return figure

class Lens(Look):
    """Do the states decode into logits through the embedding matrix, layer by layer?

    What `look` names; reading_kl, reading_top1 [3, T]: what is read through the unembedding from
    h_L / |h_L|, from that times sqrt(d), and from the centred one with ln_f's gain: KL of the final
    distribution from it (nats), the same first token."""
    WAYS = "h / |h|", "times sqrt(d)", "centred, with gain"

    def measure(model, seen, flags):
        h, W = seen["states"][-1], unembedding(model.params)
        unit = F.normalize(h, dim=-1)
        plain = F.layer_norm(h, h.shape[-1:], eps=model.config.eps) * model.params["ln_f.weight"]
        kl, same = [], []
        for rows in torch.stack([unit, unit * h.shape[1] ** .5, plain, seen["final"]]).split(64, 1):
            log = (rows @ W.T).log_softmax(-1)
            kl.append((log[-1].exp() * (log[-1] - log)).sum(-1)[:3])
            same.append((log.argmax(-1) == log[-1].argmax(-1))[:3])
        return {"reading_kl": torch.cat(kl, 1), "reading_top1": torch.cat(same, 1)}

    def claims(arrays, say):
        later = ~arrays["first"]
        say_all(say, lens_sentences(arrays) + [
            ("dot-product", "the last operation is the dot product of the last state, divided by its "
             "norm, with the embeddings (KL of the true distribution from that, nats)", NOTES,
             arrays["reading_kl"][0, later], "<", .01),
            ("dot-product-first", "at least it has the same first token (1 or 0)", OURS,
             arrays["reading_top1"][0, later], ">", .5)], arrays["model"])

    def draw_lens(arrays, flags):
        what = "Do the states decode through the embedding matrix?"
        figure, axes = common.panels(4, title(arrays, what), flags)
        later = ~arrays["first"]
        layers(axes[0], arrays["lens_kl"][:, later], "positions after the first", BLUE)
        uniform = np.median(math.log(len(arrays["names"])) - arrays["entropy"][later])
        common.shelf(axes[0], uniform, "of a guess in which all tokens are alike")
        axes[0].set_yscale("symlog", linthresh=.1)
        axes[0].set(ylabel="KL to the end from the lens, nats", ylim=(0, None))
        shares = {"lens: same first token as at the end": arrays["lens_rank"] == 0,
                  "nearest embedding of h_l: the input token": arrays["nearest"] == arrays["tokens"],
                  "nearest embedding of h_l: the prediction": arrays["nearest"] == arrays["predicted"]}
        for (label, same), colour in zip(shares.items(), common.COLOURS):
            layers(axes[1], same[:, later].mean(1), label, colour)
        axes[1].set(ylabel="share of positions", ylim=(-.02, 1.02))
        layers(axes[2], arrays["norm"][:, later], "positions after the first", BLUE)
        layers(axes[2], arrays["norm"][:, ~later], "first position", ORANGE)
        axes[2].set(ylabel="|h_l|", yscale="log")
        top = arrays["reading_top1"][:, later].mean(1)
        names = [f"{way}\nsame first token: {share:.0%}" for way, share in zip(Lens.WAYS, top)]
        axes[3].bar(names, np.median(arrays["reading_kl"][:, later], 1), color=BLUE, width=.6)
        axes[3].set(ylabel="median KL of the end from it, nats", title="without parts of ln_f")
        axes[3].tick_params("x", labelsize=7)
        legends(axes)
        return figure

    def draw_table(arrays, flags):
        """The lens at up to 16 positions up to the drawn token: the first token of every layer."""
        i, L = int(arrays["token"]), len(arrays["norm"]) - 1
        show = range(max(np.flatnonzero(arrays["first"][:i + 1])[-1], i - 15), i + 1)
        every = sorted({*range(0, L + 1, max(1, L // 16)), L})
        what = "The logit lens: first token of every layer (bold: as at the end)"
        size = max(7, .75 * len(show)), 1.5 + .3 * len(every)
        figure, (ax,) = common.panels(1, title(arrays, what), flags, 1, size)
        kl, names = arrays["lens_kl"][every][:, show], arrays["names"]
        most = kl.max()
        common.image(ax, kl, "KL to the end, nats", figure, "input token", "layer", (0, most))
        ax.invert_yaxis()
        for (y, x), value in np.ndenumerate(kl):
            at = every[y], show[x]
            ax.text(x, y, shown(names[arrays["lens_token"][at]], 9), ha="center", va="center", size=6.5,
                    color="black" if value > .5 * most else "white",
                    weight="bold" if arrays["lens_rank"][at] == 0 else "normal")
        words = [shown(names[arrays["tokens"][t]], 10) for t in show]
        ax.set_xticks(range(len(show)), words, rotation=60, size=7, ha="right")
        ax.set_yticks(range(len(every)), every)
        return figure

def lens_sentences(a):
    """(id, statement, source, values [T'], relation, bound) on the logit lens."""
    later = ~a["first"]
    kl, inner = a["lens_kl"][:, later], a["nearest"][1:-1, later]
    strange = (inner != a["tokens"][later]) & (inner != a["predicted"][later])
    uniform = math.log(len(a["names"])) - a["entropy"][later]  # KL from a guess in which all are alike
    return [
        ("decodes", "the states decode to logits through the embedding matrix, the better the deeper "
         "(rank correlation of the lens' KL with depth)", NOTES, monotone(kl[:-1]), "<", -.9),
        ("decodes-halfway", "half of the blocks are more than halfway from a uniform guess to the end "
         "(KL over the uniform guess')", OURS, kl[(len(kl) - 1) // 2] / uniform, "<", .5),
        ("not-interpretable", "states between are not interpretable in the space of the embeddings: the "
         "nearest is neither input nor prediction (share of layers)", NOTES, strange.mean(0), ">", .5)]

class Blocks(Look):
    """Which block turns the state, by attention or by the MLP, and does the answer survive without it?

    What `look` names; by block and part (attention, MLP), [L, 2, T]: turn, angle by which it turns the
    state (degrees); push, what it adds to the logit of the predicted token, less the mean logit, at the
    end's scale of ln_f; kept, still predicted when the part is left out; lost, KL of the end from that
    without it (nats)."""

    def measure(model, seen, flags):
        params, config, W = model.params, model.config, unembedding(model.params)
        first, added = seen["first"].nonzero()[:, 0].tolist(), defaultdict(list)
        windows = seen["tokens"].tensor_split(first[1:])
        def end(patch):
            states = [forward(params, ids, config, patch)[-1] for ids in windows]
            return (final_norm(params, torch.cat(states), config) @ W.T).log_softmax(-1)
        def keep(name, x):
            added[name].append(x)
            return x
        whole, rows = end(keep), defaultdict(list)
        p = whole.exp()
        toward = (W[seen["predicted"]] - W.mean(0)) * params["ln_f.weight"]
        scale = (seen["states"][-1].var(-1, correction=0) + config.eps).sqrt()
        for l, state in enumerate(seen["states"][:-1]):
            for name in f"attn.{l}", f"mlp.{l}":
                x = torch.cat(added[name])
                log = end(lambda place, y: y * (place != name))
                rows["turn"].append(cosine(state, state + x).clamp(-1, 1).acos().rad2deg())
                rows["push"].append(((x - x.mean(-1, keepdim=True)) * toward).sum(-1) / scale)
                rows["kept"].append(log.argmax(-1) == seen["predicted"])
                rows["lost"].append((p * (whole - log)).sum(-1))
                state = state + x
        return {k: torch.stack(x).unflatten(0, (-1, 2)) for k, x in rows.items()}

    def claims(arrays, say):
        turn, kept, push = (arrays[k][..., ~arrays["first"]] for k in ("turn", "kept", "push"))
        half = len(push) // 2
        say_all(say, [
            ("mlp-turns-more", "the MLPs turn the state further than attention does (sums over blocks; "
             "ratio)", OURS, turn[:, 1].sum(0) / turn[:, 0].sum(0), ">", 1),
            ("late-push", "the later half of the blocks adds more to the prediction's logit than the "
             "earlier (difference)", OURS, push[half:].sum((0, 1)) - push[:half].sum((0, 1)), ">", 0),
            ("none-needed", "the answer survives without any one part (an intervention; least over all "
             "parts, 1 or 0)", NOTES + ": the role of the blocks", kept.min((0, 1)), ">", .5),
            ("none-needed-later", "it survives without any one part after the first block", OURS,
             kept[1:].min((0, 1)) if half else [], ">", .5)], arrays["model"])

    def draw_blocks(arrays, flags):
        what = "Which block turns the state, and does the answer survive without it?"
        figure, axes = common.panels(4, title(arrays, what), flags)
        words = dict(turn="angle by which it turns the state (degrees)",
                     push="added to the predicted token's logit", lost="KL to the end without it, nats")
        for part, name, colour in (0, "attention", BLUE), (1, "MLP", RED):
            for ax, (key, label) in zip(axes, words.items()):
                layers(ax, arrays[key][:, part][:, ~arrays["first"]], name, colour)
                ax.set(xlabel="block", ylabel=label)
            kept = arrays["kept"][:, part][:, ~arrays["first"]].mean(1)
            layers(axes[3], kept, f"without its {name}", colour)
        axes[2].set_yscale("symlog", linthresh=.01)
        axes[3].set(xlabel="block", ylabel="share of answers that stay", ylim=(-.02, 1.02))
        legends(axes)
        return figure

class Compare(Look):
    """Which findings does an untrained model of the same shape have as well?

    What `look` names; other_*: of its initial weights."""

    def measure(model, seen, flags):
        starts = seen["first"].nonzero()[:, 0].tolist()
        other = look(untrained(model, flags.seed), seen["tokens"], starts, flags.seed)
        return {f"other_{k}": x for k, x in other.items() if k not in ("states", "final")}

    def both(arrays):
        """What `look` names of the model, and of its initial weights."""
        return arrays, {k[6:]: x for k, x in arrays.items() if k.startswith("other_")}

    def claims(arrays, say):
        for end, a in zip(("", "-untrained"), Compare.both(arrays)):
            sentences = path_sentences(a) + lens_sentences(a)
            say_all(say, [(id + end, *rest) for id, *rest in sentences], a["model"])

    def draw_compare(arrays, flags):
        what = "A model and its initial weights on one text"
        figure, axes = common.panels(4, title(arrays, what), flags)
        measures = dict(norm="|h_l|", cosine_predicted="cosine of h_l with emb(predicted)",
                        cosine_predicted_final="cosine of ln_f(h_l) with emb(predicted)",
                        lens_kl="KL to the end from the lens, nats")
        for ax, (key, label) in zip(axes, measures.items()):
            for a, colour in zip(Compare.both(arrays), (BLUE, ORANGE)):
                layers(ax, a[key][:, ~a["first"]], shown(a["model"]), colour)
            ax.set(ylabel=label)
        axes[0].set_yscale("log")
        axes[3].set_yscale("symlog", linthresh=.1)
        legends(axes)
        return figure

class TrainMini(Look):
    """How well do minis learn, and do their states agree from seed to seed? (--file: another text)

    One entry a run [R]: loss, held-out (nats a token); bigram, that of counts of pairs; under the id of
    each sentence its median over positions. eval_step [M], eval_loss [M, R]."""
    learns = True
    defaults = Look.defaults | dict(runs=3, evals=12)

    def check(flags):
        for name in sorted({"text", "model", "untrained", "token", "window"} & {*flags.given}):
            raise common.Stop(f"{common.option(name)} has no part in --study train-mini")
        if len(common.groups_of_runs(flags)) > 1:
            raise common.Stop("--sweep numbers alone (lr, weight_decay): other shapes are another run")
        if not flags.plot_only:
            taught(flags)

    def bigram(learn, held, vocab):
        """Nats a token on held-out windows of what counts pairs, backed by w unigrams (the best w)."""
        one = (torch.bincount(learn, minlength=vocab) + 1.) / (len(learn) + vocab)
        two = torch.bincount(learn[:-1] * vocab + learn[1:], minlength=vocab ** 2).view(vocab, vocab)
        a, b = held[:, :-1].flatten(), held[:, 1:].flatten()
        of = lambda w: -((two[a, b] + w * one[b]) / (two[a].sum(1) + w)).log().mean()
        return min(map(of, (2, 8, 32, 128)))

    def compute(flags, folder):
        groups = common.groups_of_runs(flags)
        group, = common.train(groups, folder, start, step_of, evaluate_of, constants)
        own, learn, held, _ = taught(flags)
        curve, bigram = group.metrics["eval_loss"], TrainMini.bigram(learn, held, len(own.ids))
        values = defaultdict(lambda: np.full(len(group.runs), np.nan))
        for r, run in enumerate(group.runs):
            if np.isfinite(curve[-1, r]):  # not diverged, not stopped
                model = model_of(run, common.run_of(group.params, r))
                ids, starts = held[:WINDOWS, :-1].flatten(), range(0, WINDOWS * run.context, run.context)
                seen = {k: np.asarray(x) for k, x in look(model, ids, [*starts], run.seed).items()}
                for id, _, _, x, *_ in path_sentences(seen) + lens_sentences(seen):
                    values[id][r] = np.median(x)
        return {**values, "loss": curve[-1], "bigram": [bigram] * len(curve[-1]), "eval_loss": curve,
                "eval_step": group.metrics["eval_step"]}

    def claims(arrays, say):
        say("learned", "a mini knows more than counts of pairs (held-out loss less the bigrams', nats)",
            OURS, arrays["loss"] - arrays["bigram"], "<", 0)
        blank = defaultdict(lambda: np.ones((3, 3)), first=np.zeros(3, bool), tokens=np.ones(3),
                            predicted=np.ones(3), entropy=np.zeros(3), names=np.ones(3))
        for id, words, source, _, relation, bound in path_sentences(blank) + lens_sentences(blank):
            say(id, f"mini, median over positions: {words}", source, arrays.get(id, []), relation, bound)

    def draw_training(arrays, flags):
        what = "Minis of GPT-2's architecture, trained here"
        figure, (ax,) = common.panels(1, what, flags)
        common.band(ax, arrays["eval_step"], arrays["eval_loss"], "held-out text", BLUE)
        common.shelf(ax, arrays["bigram"][0], "who counts pairs", "left")
        ax.set(xlabel="step", ylabel="loss, nats a token")
        legends([ax])
        return figure

STUDIES = [Paths, Plane, Sphere, Lens, Blocks, Compare, TrainMini]

if __name__ == "__main__":
    raise SystemExit(common.main(Flags, STUDIES))
