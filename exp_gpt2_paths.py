"""Does GPT-2 turn the embedding of token t, block by block, into the embedding of token t+1?

Law: a text. h_0 = wte + wpe, h_l is the state after block l, z = ln_f(h_L), logits = wte z (tied). The hypothesis: h_L(t) =
emb(t+1). Looked at is any model of GPT-2's architecture; without a download a mini, trained here on the language reference that
every Python carries. Its own claims say "mini", because its geometry is not GPT-2's, and beside them stands what its initial
weights do. Exact: ranks among the whole vocabulary, losses of predictors that count. Nulls: a random token, one predicted
elsewhere.

    python exp_gpt2_paths.py                               2 min on one core, later 15 s: train the mini, follow its paths
    python exp_gpt2_paths.py --model gpt2 --download       the same of GPT-2 (548 MB once); or --model DIRECTORY
    python exp_gpt2_paths.py --study compare               which findings does an untrained model have as well?

Studies: `paths` (default): `path` (one token's states in the plane of the embeddings), `cosines` (with the predicted, the
input and random tokens), `spike` (the last state against the whole vocabulary), `plane` (is the path above it?), `geometry`
(steps, angles, anisotropy), `lens` (what each layer would predict), `sphere` and `turning` (directions in three components,
from outside and inside); `lens` (with a table of tokens) and `sphere` alone; `compare`; `train-mini` (several seeds, their
floors and development; their folders are models for --model). arrays.npz holds, of T tokens, L blocks, width d, a vocabulary
of V, what the docstrings of `compute_*` and of the measures name; first [T] marks the first position of a window: no vote.

Claims come from research notes on the states of GPT-2 (French). Measures: logit lens (nostalgebraist 2020), anisotropy
(Ethayarajh 2019; Timkey & van Schijndel 2021). Model and files: Radford et al. 2019, as Hugging Face stores them.
"""
import functools
import hashlib
import heapq
import http.client
import itertools
import json
import math
import mmap
import os
import re
import tempfile
import unicodedata
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad_and_value
from tqdm import tqdm

import common_v1 as common
from common_v1 import flag

# ---- Flags ----------------------------------------------------------------------------------------------------------

SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}  # layers, width
MINI = ("mini", "untrained")  # made here: a small model of GPT-2's architecture, and its initial weights
HEADS = 6  # of the mini, unless --n-heads
OF_MINI = ("seed", "steps", "n_layers", "n_heads", "d_model", "context", "merges", "batch", "lr", "weight_decay")


@dataclass
class Flags(common.Flags):
    study: Literal["paths", "lens", "sphere", "compare", "train-mini"] = flag("paths", "which question to ask")
    model: str = flag("mini", f"mini (trained here), untrained (its initial weights), {', '.join(SIZES)} (looked up in the "
                      "Hugging Face cache), or a directory with config, weights, vocab.json and merges.txt")
    other: str = flag("untrained", "compare: the model to compare with")
    text: str = flag("", "text to look at (default: held-out text of the mini, or built-in sentences)")
    file: str = flag("", "UTF-8 file with the text to look at; train-mini: with the text to learn")
    token: int = flag(-1, "position whose path is drawn; from 0, or from the end with -1")
    window: int = flag(0, "cut the text into windows of so many tokens (0: it must fit the model's context)", low=0)
    download: bool = flag(False, "fetch a named model that is not there (HF_ENDPOINT, default huggingface.co)")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "how weights are held; arithmetic is float32")
    n_heads: int = flag(0, f"attention heads (0: as config.json says; mini: {HEADS})", low=0)
    n_layers: int = flag(6, "mini: blocks", low=1)
    d_model: int = flag(96, "mini: width", low=3)
    context: int = flag(64, "mini: positions", low=4)
    merges: int = flag(512, "mini: merges of its byte-level BPE", low=0)
    batch: int = flag(16, "mini: sequences a step", low=1)
    steps: int = flag(800, "mini: training steps", low=1)
    lr: float = flag(3e-3, "mini: highest rate (it rises for a tenth of the steps, then falls to a tenth)", low=0, number=True)
    weight_decay: float = flag(.1, "mini: decoupled decay", low=0, number=True)

    per_study: ClassVar[dict] = {
        "train-mini": dict(runs=3),
        "smoke": dict(steps=4, n_layers=2, d_model=12, context=16, merges=20, batch=2, runs=1)}
    most_in_block: ClassVar[int] = 1  # a mini fills the cache alone
    compile_pays: ClassVar[float] = 400.  # two thirds of a step are matrix products, which compiling leaves as they are

    def check(self):
        heads = self.n_heads or HEADS
        if self.made and self.d_model % heads:
            raise common.Stop(f"--d-model {self.d_model} must be divisible by --n-heads {heads}")
        if self.text and self.file:
            raise common.Stop("give --text or --file, not both")
        if self.study == "compare" and self.model == self.other:
            raise common.Stop(f"--other {self.other} is the model itself")
        if self.window == 1:
            raise common.Stop("--window 1 leaves no position but the first of its window: take 2 or more")
        if self.plot_only:
            return
        if self.study == "train-mini":
            rows_of(self)
            return
        for name in self.names:
            like = self.model if name == "untrained" else name  # it has the shape of the other
            ids, _ = reading(name, self, self.context if like in MINI else get(like, self).config.n_positions)
            if not -len(ids) <= self.token < len(ids):
                raise common.Stop(f"--token {self.token}: the text has {len(ids)} tokens")

    def points(self):
        useless = {"model", "other", "text", "window", "token", "dtype", "download"} if self.study == "train-mini" else \
            {"runs", "sweep", "snapshots"} | ({"other"} if self.study != "compare" else set()) | (
                set() if self.made else {*OF_MINI} - {"seed", "n_heads"})
        given = getattr(self, "given", set())
        if "text" in given and not self.text:
            raise common.Stop("--text is empty")
        useless &= given
        if useless:
            raise common.Stop(f"--{min(useless).replace('_', '-')} has no part in --study {self.study} of "
                              + " and ".join(self.names))
        if any(text.split("=")[0] in ("steps", "file") for text in self.sweep):
            raise common.Stop(f"--sweep {' '.join(self.sweep)}: use --name and a second run")
        return []

    @property
    def made(self):
        """Whether a model of the study is made here."""
        return "mini" in self.names or self.model in MINI

    @property
    def names(self):
        """The models that the study looks at."""
        return [self.model, self.other] if self.study == "compare" else ["mini"] if self.study == "train-mini" else [self.model]


# ---- Data law -------------------------------------------------------------------------------------------------------

SENTENCES = (
    "The train from Paris to Lyon left at eight in the morning, and by noon we were walking along the river. My sister had "
    "never seen the city before, so I showed her the old market, the bridges and the house where I was born. In the evening we "
    "sat in a small restaurant and talked about music, mathematics and the weather. She asked me whether I would ever come "
    "back to live here. I said that I did not know. The capital of Italy is")
TEXT = 8     # windows of built-in text that are looked at
EVALS = 16   # evaluations over a mini's training
HELD = 10    # one block of paragraphs in HELD is kept for evaluation
BLOCK = 20   # paragraphs in a block


@functools.lru_cache
def words_of():
    """GPT-2's cut of a text into words (Radford et al. 2019) for the standard library's `re`, whose classes differ from
    Unicode's: its white space has U+001C .. U+001F, and it has no letters (L) and numbers (N)."""
    kind = [unicodedata.category(chr(c))[0] for c in range(0x110000)]
    for c in (*range(9, 14), 0x85):
        kind[c] = "Z"  # tab, line ends
    classes, start = defaultdict(str), 0
    for name, run in itertools.groupby(kind):
        stop = start + len(list(run))
        classes[name] += f"\\U{start:08x}-\\U{stop - 1:08x}"
        start = stop
    L, N, S = classes["L"], classes["N"], classes["Z"]
    return re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+")


# GPT-2 writes bytes as printable characters: those that are printable as themselves, the others from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
BYTES = {c: b for b, c in ALPHABET.items()}
END = "<|endoftext|>"


class Tokenizer(NamedTuple):
    ids: dict    # token, in the alphabet above -> id
    ranks: dict  # (left, right) -> when this pair was learned to merge
    cache: dict


def tokenizer(merges):
    """The tokenizer of a list of pairs, in GPT-2's order: bytes, merges, the end of a text."""
    tokens = [*ALPHABET.values(), *(a + b for a, b in merges), END]
    return Tokenizer({t: i for i, t in enumerate(tokens)}, {pair: i for i, pair in enumerate(merges)}, {})


def merged(word, ranks):
    """Symbols of a word after all merges: of the pairs that are there always the first learned, from the left. A heap of the
    pairs keeps this n log n, however long a word without spaces is."""
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
        for k in (before[i], i):
            if k >= 0 and after[k] < n and (parts[k], parts[after[k]]) in ranks:
                heapq.heappush(heap, (ranks[parts[k], parts[after[k]]], k))
    return [p for p in parts if p is not None]


def encode(text, tokenizer):
    """Ids of a text, all of it ordinary text: END spelled out is not the end of a text."""
    ids = []
    for word in words_of().findall(text):
        if word not in tokenizer.cache:
            try:
                symbols = merged("".join(ALPHABET[b] for b in word.encode()), tokenizer.ranks)
            except UnicodeEncodeError:
                raise common.Stop("the text holds a lone surrogate and is no Unicode text") from None
            tokenizer.cache[word] = [tokenizer.ids[s] for s in symbols]
        ids += tokenizer.cache[word]
    return ids


def spelled(tokenizer):
    """[V] what each token stands for, as text; bytes that are no text of their own in hexadecimal."""
    names = np.empty(len(tokenizer.ids), object)
    for token, i in tokenizer.ids.items():
        try:
            data = bytes(BYTES[c] for c in token)
            names[i] = data.decode()
        except UnicodeDecodeError:
            names[i] = "\\x" + data.hex()
        except KeyError:  # a token of its own, not made of bytes
            names[i] = token
    return names


def learn_merges(text, count):
    """The `count` most frequent pairs, one after the other, each merged before the next is counted (Sennrich et al. 2016)."""
    words = [(["".join(ALPHABET[b] for b in bytes([x])) for x in word.encode()], n)
             for word, n in Counter(words_of().findall(text)).items()]
    pairs, where, merges = Counter(), defaultdict(set), []
    for w, (symbols, n) in enumerate(words):
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += n
            where[pair].add(w)
    while len(merges) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for w in where.pop(best):
            symbols, n = words[w]
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] -= n
            i, new = 0, []
            while i < len(symbols):
                both = tuple(symbols[i:i + 2]) == best
                new.append("".join(best) if both else symbols[i])
                i += 1 + both
            symbols[:] = new
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n
                where[pair].add(w)
        pairs = +pairs
    return merges


@functools.lru_cache
def corpus(file):
    """(text to learn, text held out) of a file, or of the language reference that every Python carries, or else of the sources
    of its library. Every HELD-th block of paragraphs is held out; a paragraph that comes again is left out, so that what is
    held out has not been learned."""
    if file:
        text = read_text(file)
    else:
        try:
            from pydoc_data.topics import topics
            text = "\n\n".join(topics[k] for k in sorted(topics))
        except ImportError:
            library = sorted(Path(os.__file__).parent.glob("*.py"))
            text = "\n\n".join(p.read_text(encoding="utf-8", errors="replace") for p in library)[:1_000_000]
    paragraphs = list(dict.fromkeys(re.split(r"\n\s*\n", text)))
    held = [i // BLOCK % HELD == HELD - 1 for i in range(len(paragraphs))]
    return tuple("\n\n".join(itertools.compress(paragraphs, [h == part for h in held])) for part in (False, True))


def read_text(file):
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise common.Stop(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise common.Stop(f"{file} is no UTF-8 text (byte {error.start}); convert it") from None


@functools.lru_cache
def lesson(file, merges):
    """(tokenizer, ids to learn, ids held out) of a text: the tokenizer is learned on what is learned."""
    learn, held = corpus(file)
    own = tokenizer(learn_merges(learn, merges))
    return own, *(torch.tensor(encode(text, own)) for text in (learn, held))


def floors(learn, held, vocab):
    """Nats a token on ids `held` of predictors that count ids `learn`, exactly: all tokens alike; unigrams; bigrams, each count
    backed by the unigrams as if these had been seen `weight` times more (the weight of the least loss on held)."""
    one = (torch.bincount(learn, minlength=vocab) + 1.) / (len(learn) + vocab)
    two = torch.zeros(vocab, vocab).index_put_((learn[:-1], learn[1:]), torch.ones(1), accumulate=True)
    a, b = held[:-1], held[1:]
    backed = [-((two[a, b] + w * one[b]) / (two[a].sum(1) + w)).log().mean() for w in 2. ** torch.arange(-2, 12)]
    return {"uniform": math.log(vocab), "unigram": float(-one[b].log().mean()), "bigram": float(min(backed))}


# ---- Model ----------------------------------------------------------------------------------------------------------

class Config(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    eps: float = 1e-5


def shapes(config):
    """{name: shape} of GPT-2's parameters (Radford et al. 2019), as its files name them; matrices are stored [in, out]."""
    d, block = config.n_embd, {}
    for l in range(config.n_layer):
        block |= {f"h.{l}.{name}": shape for name, shape in {
            "ln_1.weight": (d,), "ln_1.bias": (d,), "attn.c_attn.weight": (d, 3 * d), "attn.c_attn.bias": (3 * d,),
            "attn.c_proj.weight": (d, d), "attn.c_proj.bias": (d,), "ln_2.weight": (d,), "ln_2.bias": (d,),
            "mlp.c_fc.weight": (d, 4 * d), "mlp.c_fc.bias": (4 * d,), "mlp.c_proj.weight": (4 * d, d), "mlp.c_proj.bias": (d,)
        }.items()}
    return {"wte.weight": (config.vocab_size, d), "wpe.weight": (config.n_positions, d), **block,
            "ln_f.weight": (d,), "ln_f.bias": (d,)}


def init(config, generator):
    """GPT-2's start: N(0, .02^2), what is added to the residual stream smaller by sqrt(2 layers); gains 1, biases 0."""
    params = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            params[name] = torch.full(shape, float("ln" in name and name.endswith("weight")))
        else:
            params[name] = torch.randn(shape, generator=generator) * .02
            if "c_proj" in name:
                params[name] /= math.sqrt(2 * config.n_layer)
    return params


def held_as(params):
    """params(name): a parameter in the arithmetic's precision (bfloat16 is only how it is held)."""
    return lambda name: params[name].float() if params[name].dtype == torch.bfloat16 else params[name]


def forward(params, tokens, config):
    """States of tokens [.., T]: h_0 = wte + wpe and h_l after block l, before ln_f; a list of L + 1 tensors [.., T, d]."""
    w, d, heads = held_as(params), config.n_embd, config.n_head
    split = lambda x: x.unflatten(-1, (heads, d // heads)).transpose(-2, -3)  # [.., T, d] -> [.., heads, T, d_head]
    linear = lambda x, name: F.linear(x, w(f"{name}.weight").T, w(f"{name}.bias"))
    norm = lambda x, name: F.layer_norm(x, (d,), w(f"{name}.weight"), w(f"{name}.bias"), config.eps)
    states = [w("wte.weight")[tokens] + w("wpe.weight")[:tokens.shape[-1]]]
    for l in range(config.n_layer):
        x = states[-1]
        q, k, v = map(split, linear(norm(x, f"h.{l}.ln_1"), f"h.{l}.attn.c_attn").split(d, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scores / sqrt(d_head)
        x = x + linear(mixed.transpose(-2, -3).flatten(-2), f"h.{l}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"h.{l}.ln_2"), f"h.{l}.mlp.c_fc"), approximate="tanh"), f"h.{l}.mlp.c_proj")
        states.append(x)
    return states


def final_norm(params, h, config):
    """z = ln_f(h)."""
    w = held_as(params)
    return F.layer_norm(h, (config.n_embd,), w("ln_f.weight"), w("ln_f.bias"), config.eps)


def unembedding(params):
    """[V, d]; wte, but for a file with an lm_head of its own."""
    return held_as(params)("lm_head.weight" if "lm_head.weight" in params else "wte.weight")


# -- files in Hugging Face layout: whatever they hold comes from a stranger

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8,
          "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
MOST = 2 ** 26  # bytes of a vocabulary, a configuration or a header


def once(pairs):
    """A JSON object's pairs as a dict; ValueError where a key comes twice."""
    if len({k for k, _ in pairs}) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def small_file(path):
    """The bytes of a file that has no reason to be large."""
    try:
        if not path.is_file() or path.stat().st_size > MOST:
            raise common.Stop(f"{path} is " + (f"larger than {MOST} bytes" if path.is_file() else "missing or no file"))
        return path.read_bytes()
    except OSError as error:
        raise common.Stop(f"cannot read {path}: {error.strerror}") from None


def read_json(path):
    """The JSON object in a file."""
    try:
        value = json.loads(small_file(path), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise common.Stop(f"{path} is not JSON: {first_line(error)}{impostor(path)}") from None
    if not isinstance(value, dict):
        raise common.Stop(f"{path} holds no JSON object")
    return value


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def impostor(path):
    """What a file is that stands in for another, as far as its first bytes tell."""
    with open(path, "rb") as f:
        head = f.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "; it is a git-LFS pointer: fetch the file itself with `git lfs pull`"
    return "; it is a web page: download the file itself" if head.startswith(b"<") else ""


def read_safetensors(path):
    """{name: tensor} of a safetensors file (8 bytes: length of the header; JSON: dtype, shape, offsets; data), memory-mapped; a
    tensor that lies askew in it is copied. Stop unless the header describes the data to the byte."""
    def refuse(why):
        raise common.Stop(f"{path} is no safetensors file: {why}{impostor(path)}")
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MOST):
                refuse(f"its header would be {length} bytes long, the file has {size}")
            header = json.loads(f.read(length), object_pairs_hook=once)
            whole = torch.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)[8 + length:]
    except OSError as error:
        raise common.Stop(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        refuse(f"its header is not JSON ({first_line(error)})")
    if not isinstance(header, dict):
        refuse("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    natural = lambda x: isinstance(x, list) and len(x) < 9 and all(type(n) is int and 0 <= n < 2 ** 60 for n in x)
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        dtype = DTYPES.get(entry.get("dtype")) if isinstance(entry.get("dtype"), str) else None
        if not (dtype and natural(shape) and natural(offsets) and len(offsets) == 2):
            refuse(f"{name[:80]!r} has no known dtype, shape and two offsets")
        start, stop = offsets
        if stop - start != math.prod(shape) * dtype.itemsize or stop > len(whole):
            refuse(f"the offsets of {name[:80]!r} do not fit its shape and the file")
        spans.append((start, stop))
        data = whole[start:stop]
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()
        tensors[name] = data.view(dtype).view(shape)
    edges = [0, *(edge for span in sorted(spans) for edge in span), len(whole)]
    if edges[::2] != edges[1::2]:
        refuse("its tensors overlap or leave gaps")
    return tensors


def safetensors_of(tensors):
    """The bytes of a safetensors file of contiguous float32 tensors."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + 4 * x.numel()]}
        at += 4 * x.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(x.contiguous().numpy().tobytes() for x in tensors.values())


def read_bin(path):
    """{name: tensor} of a file of torch.save; never code."""
    try:
        try:
            tensors = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except RuntimeError:  # the format before 2020 can't be mapped
            tensors = torch.load(path, weights_only=True, map_location="cpu")
        assert isinstance(tensors, dict)
        tensors = {k: x.detach() for k, x in tensors.items()}
        assert all(x.layout == torch.strided and x.device.type == "cpu" for x in tensors.values())
    except OSError as error:
        raise common.Stop(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise common.Stop(f"{path} holds no weights, or code beside them ({type(error).__name__}){impostor(path)}") from None
    return tensors


WEIGHTS = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_bin}


def read_weights(folder):
    """{name: tensor} of model.safetensors, its shards, or pytorch_model.bin or its shards; names without `transformer.`, and
    without the causal masks that old files keep."""
    for name, read in WEIGHTS.items():
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            parts = [name]
        elif index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
                raise common.Stop(f"{index} has no weight_map of files beside it")
            parts = sorted(set(shards.values()))
        else:
            continue
        tensors = {}
        for part in parts:
            if not (folder / part).is_file():
                raise common.Stop(f"{folder / part} is missing or no file")
            for key, x in read(folder / part).items():
                key = str(key).removeprefix("transformer.")
                if key in tensors or not re.fullmatch(r"[\w.]{1,200}", key, re.ASCII):
                    raise common.Stop(f"{folder / part}: {key[:80]!r} comes twice or is no parameter's name")
                if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", key):
                    tensors[key] = x
        return tensors
    raise common.Stop(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of shards)")


def read_config(folder, tensors, n_heads):
    """The Config of config.json, or without one of the weights and --n-heads; Stop where it is another architecture."""
    path, given = folder / "config.json", {}
    if path.exists():
        given = read_json(path)
        wanted = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                  "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
        other = [f"{k} {given[k]!r:.80}" for k, known in wanted.items() if given.get(k, known[0]) not in known]
        if other:
            raise common.Stop(f"{path} describes another architecture than GPT-2: {', '.join(other)}")
    wte, wpe = (tensors.get(k, torch.empty(0, 0)) for k in ("wte.weight", "wpe.weight"))
    if wte.dim() != 2 or wpe.dim() != 2 or not wte.numel() or not wpe.numel():
        raise common.Stop(f"{folder} holds no GPT-2: wte.weight or wpe.weight is missing or no matrix; it has "
                          + (", ".join(list(tensors)[:3]) or "no tensor"))
    d = wte.shape[1]
    layers = len({k.split(".")[1] for k in tensors if k.startswith("h.")})
    n_head = given.get("n_head") or (d // 64 if (layers, d) in SIZES.values() else n_heads)
    if n_heads and n_heads != n_head:
        raise common.Stop(f"--n-heads {n_heads} contradicts {path}: n_head {n_head}")
    if not n_head:
        raise common.Stop(f"{folder} does not say how many heads it has: give --n-heads")
    found = {"n_layer": layers, "n_embd": d, "n_positions": len(wpe), "vocab_size": len(wte)}
    wrong = [f"{k} {given[k]!r:.80} (weights: {v})" for k, v in found.items() if given.get(k, v) != v]
    if wrong:
        raise common.Stop(f"{path} does not fit the weights: {', '.join(wrong)}")
    eps = given.get("layer_norm_epsilon", 1e-5)
    if d < 3:
        raise common.Stop(f"{folder}: a path needs a width of 3 or more, wte.weight has {d}")
    if type(n_head) is not int or n_head < 1 or d % n_head or not isinstance(eps, float) or not 0 < eps < 1:
        raise common.Stop(f"{folder}: width {d} must be divisible by n_head {n_head!r:.80}, and eps {eps!r:.80} small")
    return Config(n_head=n_head, eps=eps, **found)


def read_tokenizer(folder):
    """The Tokenizer of vocab.json and merges.txt."""
    ids = read_json(folder / "vocab.json")
    if sorted(i for i in ids.values() if type(i) is int) != list(range(len(ids))):
        raise common.Stop(f"{folder / 'vocab.json'}: the ids must be 0 .. {len(ids) - 1}, each once")
    try:
        text = small_file(folder / "merges.txt").decode()
    except UnicodeDecodeError:
        raise common.Stop(f"{folder / 'merges.txt'} is no UTF-8 text") from None
    if "\r" in text:
        raise common.Stop(f"{folder / 'merges.txt'} has Windows line ends (CRLF); convert it to LF")
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    merges = [tuple(line.split(" ")) for line in lines]
    for line, pair in zip(lines, merges):
        if len(pair) != 2 or not all(part in ids for part in (*pair, "".join(pair))):
            raise common.Stop(f"{folder / 'merges.txt'}: {line[:80]!r} is no pair of tokens whose union is in vocab.json")
    lacking = [c for c in ALPHABET.values() if c not in ids]
    if lacking:
        raise common.Stop(f"{folder / 'vocab.json'} lacks the byte {BYTES[lacking[0]]} ({lacking[0]!r})")
    return Tokenizer(ids, {pair: i for i, pair in enumerate(merges)}, {})


def available():
    """Bytes of memory that can still be had, or infinity where the system doesn't say."""
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf


class Model(NamedTuple):
    params: dict
    config: Config
    tokenizer: Tokenizer
    name: str  # what it is called in figures and claims
    learned: torch.Tensor  # ids of the tokens that its training is known to have met (of a file: all)


@functools.lru_cache(maxsize=2)
def load(folder, name, dtype="float32", n_heads=0):
    """The Model in a directory in Hugging Face layout; checked to the last number before anything is computed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise common.Stop(f"{folder} is no directory; --model takes {', '.join((*MINI, *SIZES))} or a directory")
    own, tensors = read_tokenizer(folder), read_weights(folder)
    config = read_config(folder, tensors, n_heads)
    wanted = shapes(config)
    head = tensors.get("lm_head.weight")
    if head is not None and head.shape == tensors["wte.weight"].shape and torch.equal(head, tensors["wte.weight"]):
        del tensors["lm_head.weight"]  # tied
    elif head is not None:
        wanted |= {"lm_head.weight": wanted["wte.weight"]}
    for names, what in ((set(wanted) - set(tensors), "lacks"), (set(tensors) - set(wanted), "has unexpected")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise common.Stop(f"{folder} {what} {', '.join(sorted(names)[:3])}{more}")
    for key, shape in wanted.items():
        if tensors[key].shape != shape or not tensors[key].is_floating_point():
            is_now = f"{tuple(tensors[key].shape)} of {tensors[key].dtype}"
            raise common.Stop(f"{folder}: {key} is {is_now}, expected {shape} of floats")
    if len(own.ids) != config.vocab_size:
        raise common.Stop(f"{folder}: vocab.json has {len(own.ids)} tokens, wte.weight {config.vocab_size}")
    need, have = sum(x.numel() for x in tensors.values()) * (2 if dtype == "bfloat16" else 4) + 2 ** 30, available()
    if need > have:
        raise common.Stop(f"{folder} needs {need / 2 ** 30:.1f} GiB of memory and {have / 2 ** 30:.1f} are free: "
                          "--dtype bfloat16 halves the weights")
    params = {}
    for key in wanted:
        params[key] = tensors.pop(key).to(getattr(torch, dtype))
        if not all(x.isfinite() for x in params[key].aminmax()):
            raise common.Stop(f"{folder}: {key} holds NaN or infinity")
    learned = list(range(config.vocab_size))
    if (folder / "learned.json").exists():
        learned = read_json(folder / "learned.json").get("ids")
        known = set(own.ids.values())
        if not isinstance(learned, list) or len(learned) < 2 or not all(type(i) is int and i in known for i in learned):
            raise common.Stop(f"{folder / 'learned.json'} is no list of tokens")
    return Model(params, config, own, name, torch.tensor(learned))


FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")


def caches():
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache():
    """Where this script keeps its mini models and what it downloads."""
    return caches() / "small-networks" / "gpt2"


def find(name, download):
    """The directory of a named model: the Hugging Face cache (HF_HUB_CACHE, HF_HOME), then our own, then, where `download`
    allows it, the network."""
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or caches() / "huggingface") / "hub")
    whole = lambda place: all((place / file).exists() for file in FILES[:3]) and any(
        (place / f"{weights}{end}").exists() for weights in WEIGHTS for end in ("", ".index.json"))
    for repository in (hub / f"models--openai-community--{name}", hub / f"models--{name}"):
        main = repository / "refs" / "main"  # names the snapshot that is used, where there are several
        used = main.read_bytes().decode(errors="replace").strip() if main.is_file() else ""
        for place in sorted(repository.glob("snapshots/*"), key=lambda place: place.name != used):
            if whole(place):
                return place
    own = cache() / name
    if not download and not whole(own):
        raise common.Stop(f"{name} is neither in {hub} nor in {own}: --download fetches it, or give a directory")
    if download and int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a machine
        own.mkdir(parents=True, exist_ok=True)
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        for file in FILES:
            if not (own / file).exists():
                fetch(f"{endpoint.rstrip('/')}/openai-community/{name}/resolve/main/{file}", own / file)
    common.gathered(None)  # all wait for it
    return own


def fetch(url, target):
    """Download url to target. What has come lies in target.part and is gone on with if the server still has that file (its ETag
    says so); it takes its name when its size is the one announced."""
    part, tag = (target.with_name(target.name + end) for end in (".part", ".etag"))
    have = part.stat().st_size if part.exists() and tag.exists() and tag.read_text() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            if answer.status == 206 and answer.headers.get("ETag") != tag.read_text():  # the rest of another file
                part.unlink()
                return fetch(url, target)
            if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                have = 0
            size = have + int(answer.headers.get("Content-Length") or -1)
            if size < have:
                raise common.Stop(f"{url}: the server does not say how long the file is")
            tag.write_text(answer.headers.get("ETag") or "")
            bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=target.name)
            with bar, open(part, "ab" if have else "wb") as f:
                while block := answer.read(2 ** 20):
                    f.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: start over
            part.unlink()
            return fetch(url, target)
        raise common.Stop(f"{url}: {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise common.Stop(f"{url}: {first_line(error)}; the same command goes on from what has come") from None
    if part.stat().st_size != size:
        raise common.Stop(f"{url} broke off after {part.stat().st_size} of {size} bytes: the same command goes on from there")
    os.replace(part, target)
    tag.unlink()


# ---- Measures -------------------------------------------------------------------------------------------------------
# L + 1 states of T positions: [L+1, T, d]. `first` [T] marks the first position of a window, which is reported apart: it sees
# nothing but itself, and GPT-2 gives it a state of its own kind.

MODES = ("raw", "raw centred", "on x", "on x centred", "on dim", "on dim centred")  # of a PCA of the embeddings
SPHERES = ("on dim centred", "on x centred")  # those drawn on a sphere
DEGREES = 180 / math.pi
ROWS, PIECE = 832, 2048  # states and tokens that are compared at once (measured: their scores stay in the cache)


def read_out(model, tokens, starts, at):
    """(states [L+1, T, d], final [T, d]) of ids [T], in windows that begin at `starts`, each with positions from 0."""
    states, stops = [], [*starts[1:], len(tokens)]
    for start, stop in tqdm(list(zip(starts, stops)), desc="windows", disable=None if len(starts) > 8 else True):
        states.append(torch.stack(forward(model.params, tokens[start:stop].to(at), model.config)))
    states = torch.cat(states, 1)
    return states, final_norm(model.params, states[-1], model.config)


def cosine(x, e):
    """Cosine along the last axis; 0 where one of the two is 0."""
    return (x * e).sum(-1) / (x.norm(dim=-1) * e.norm(dim=-1)).clamp(min=1e-30)


def angle(x, e):
    """Angle along the last axis, degrees."""
    return cosine(x, e).clamp(-1, 1).acos() * DEGREES


def walk(states):
    """Of the path h_0 .. h_L at each position: norm [L+1, T]; step [L, T] = |h_l - h_{l-1}|; length [T] of all steps;
    straightness [T] = |h_L - h_0| / length; turning [L-1, T]: angle between consecutive steps; between [L, T]: between
    consecutive states (degrees; 90 where one of the two is 0)."""
    steps = states.diff(dim=0)
    length = steps.norm(dim=-1).sum(0)
    return {"norm": states.norm(dim=-1), "step": steps.norm(dim=-1), "length": length,
            "straightness": (states[-1] - states[0]).norm(dim=-1) / length.clamp(min=1e-30),
            "turning": angle(steps[1:], steps[:-1]), "between": angle(states[1:], states[:-1])}


def decode(states, params, config):
    """Every state against the whole vocabulary; all [L+1, T] but the last two.

    The logit lens (nostalgebraist 2020), softmax(W ln_f(h_l)) with the statistics of that layer: lens_kl (of the final
    distribution from it, nats), lens_top1 (same first token), lens_entropy, lens_token (first token), lens_rank of the finally
    predicted token (0: first). Its rank among all embeddings by dot product and by cosine with h_l: rank_dot, rank_cosine; by
    cosine with ln_f(h_l): rank_cosine_final; nearest: the token of the largest cosine with h_l. predicted [T],
    final_probability [T] of it."""
    E, W = held_as(params)("wte.weight"), unembedding(params)
    found = [against(x, final_norm(params, x, config), E, W) for x in states.split(max(1, ROWS // len(states)), 1)]
    return {k: torch.cat([part[k] for part in found], -1) for k in found[0]}


def against(x, z, E, W):
    """`decode` of a block of positions: states x and z = ln_f(x) [L+1, B, d]. The vocabulary comes in pieces that stay in the
    cache; of each are kept its largest scores, how many are above the predicted token's, and its part of the softmax."""
    final = (z[-1] @ W.T).log_softmax(-1)  # [B, V]
    chosen, p, size = final.argmax(-1), final.exp(), E.norm(dim=1).clamp(min=1e-30)
    dot = lambda a, M: (a * M[chosen]).sum(-1)[..., None]
    target = {"lens_rank": dot(z, W), "rank_dot": dot(x, E), "rank_cosine": dot(x, E) / size[chosen, None],
              "rank_cosine_final": dot(z, E) / size[chosen, None]}
    found = {k: torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device) for k in target}
    pieces, crossed = defaultdict(list), 0.
    for at in range(0, len(E), PIECE):
        piece = slice(at, at + PIECE)
        logits, dots = z @ W[piece].T, x @ E[piece].T  # [L+1, B, PIECE]
        scores = {"lens_rank": logits, "rank_dot": dots, "rank_cosine": dots / size[piece],
                  "rank_cosine_final": (logits if W is E else z @ E[piece].T) / size[piece]}
        own = ((chosen >= at) & (chosen < at + PIECE)).nonzero()[:, 0]  # where the predicted token is one of the piece:
        for k, s in scores.items():
            found[k] += (s > target[k]).sum(-1, dtype=torch.int32)
            found[k][:, own] -= (s[:, own, chosen[own] - at] > target[k][:, own, 0]).int()  # it is not above itself
        logits.sub_(target["lens_rank"])  # as far as from 0 they lie, as much would the sums lose
        share = logits.softmax(-1)
        pieces["total"].append(logits.logsumexp(-1))
        pieces["mean"].append(torch.einsum("lbv,lbv->lb", share, logits))
        crossed = crossed + torch.einsum("bv,lbv->lb", p[:, piece], logits)
        for k, s in (("lens_token", logits), ("nearest", scores["rank_cosine"])):
            best, token = s.max(-1)
            pieces[f"{k} score"].append(best)
            pieces[k].append(token + at)
    pieces = {k: torch.stack(v) for k, v in pieces.items()}
    total = pieces["total"].logsumexp(0)
    for k in ("lens_token", "nearest"):
        found[k] = pieces[k].gather(0, pieces[f"{k} score"].argmax(0, keepdim=True))[0]
    mean = ((pieces["total"] - total).exp() * pieces["mean"]).sum(0)
    return found | {"lens_entropy": total - mean, "lens_kl": ((p * final).sum(-1) - crossed + total).clamp(min=0),
                    "lens_top1": found["lens_token"] == chosen, "predicted": chosen,
                    "final_probability": final.amax(-1).exp()}


def cosines(states, params, config, who, mean):
    """Cosines of h_l, and of ln_f(h_l) (.._final), with the embeddings of tokens {name: ids [T]}, raw and with the mean
    embedding [d] taken away (.._centred): cosine_NAME.. [L+1, T]."""
    E, z = held_as(params)("wte.weight"), final_norm(params, states, config)
    return {f"cosine_{name}{end}{way}": cosine(x, e - shift) for name, e in ((k, E[ids]) for k, ids in who.items())
            for end, x in (("", states), ("_final", z)) for way, shift in (("", 0.), ("_centred", mean))}


class Basis(NamedTuple):
    """A PCA of the embeddings: coordinates of x are ((x / scale or x / |x|) - mean) @ axes, axes [d, d] by variance [d]."""
    mean: torch.Tensor
    scale: torch.Tensor
    axes: torch.Tensor
    variance: torch.Tensor


def bases(E):
    """{mode: Basis} of embeddings [V, d], in float64 from their d x d second moments: raw, each row divided by its norm (on x),
    or each dimension by its standard deviation (on dim); with the mean taken away (centred) or not. Each axis' largest entry
    is positive."""
    def moments(scaled):
        total, second = 0., 0.
        for rows in E.split(4096):
            x = scaled(rows.double())
            total, second = total + x.sum(0), second + x.T @ x
        return total / len(E), second / len(E)

    (mean, second), (unit_mean, unit_second) = moments(lambda x: x), moments(lambda x: F.normalize(x, dim=1))
    deviation = (second.diagonal() - mean * mean).clamp(min=1e-30).sqrt()
    found = {}
    for mode in MODES:
        m, S, scale = (unit_mean, unit_second, torch.ones(0)) if "on x" in mode else (mean, second, torch.ones_like(mean))
        if "on dim" in mode:
            m, S, scale = m / deviation, S / deviation / deviation[:, None], deviation
        m = m if "centred" in mode else torch.zeros_like(m)
        variance, axes = torch.linalg.eigh(S - m[:, None] * m)
        variance, axes = variance.flip(0).clamp(min=0), axes.flip(1)
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        found[mode] = Basis(m, scale, axes, variance)
    return found


def coordinates(x, basis, k=None):
    """[.., k] of x [.., d] in a basis of the embeddings, as they would be if x were one of them."""
    x = x.double()
    x = x / basis.scale if len(basis.scale) else x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return (x - basis.mean) @ basis.axes[:, :k]


def outside(x, basis):
    """[.., d+1] share of |x - mean|^2 outside the span of the first k axes, k = 0 .. d."""
    energy = coordinates(x, basis).square()
    total = energy.sum(-1, keepdim=True).clamp(min=1e-30)
    return 1 - torch.cat([torch.zeros_like(total), energy.cumsum(-1)], -1) / total


def height(h, basis):
    """[d] the direction orthogonal to the plane of the first two axes that carries most of states h [T, d]."""
    c = coordinates(h, basis)[:, 2:]
    return basis.axes[:, 2:] @ torch.linalg.eigh(c.T @ c).eigenvectors[:, -1]


def anisotropy(states):
    """Mean cosine of two different states of a layer (Ethayarajh 2019): anisotropy [L+1]; contribution [L+1, d] of each
    dimension to it (Timkey & van Schijndel 2021); standardised [L+1]: with each dimension standardised over positions first."""
    n = states.shape[1]

    def pairs(x):  # mean over pairs of x_i . y_i, for unit vectors
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return (x.sum(1).square() - x.square().sum(1)) / max(n * (n - 1), 1)
    x = states.cpu().double()  # an accelerator may have no float64
    scaled = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True).clamp(min=1e-30)
    return {"anisotropy": pairs(x).sum(-1), "contribution": pairs(x), "standardised": pairs(scaled).sum(-1)}


READINGS = ("h / |h|", "times sqrt(d)", "centred", ".. with gain", "ln_f: .. with bias")


def readings(h, params, config):
    """What is read through the unembedding in five ways: reading_top1, reading_kl [5, T] (nats, of the final distribution from
    it): h_L / |h_L| as the notes say; times sqrt(d); with its mean taken away first, over its deviation; times ln_f's gain;
    plus its bias, which is z."""
    W = unembedding(params)
    plain = F.layer_norm(h, h.shape[-1:], eps=config.eps)
    gained = plain * held_as(params)("ln_f.weight")
    unit = F.normalize(h, dim=-1)
    ways = unit, unit * math.sqrt(config.n_embd), plain, gained, final_norm(params, h, config)
    found = []
    for block in torch.stack(ways).split(max(1, 2 ** 22 // len(W)), 1):
        log = (block @ W.T).log_softmax(-1)
        found.append(((log.argmax(-1) == log[-1].argmax(-1)), (log[-1].exp() * (log[-1] - log)).sum(-1)))
    return {k: torch.cat(v, 1) for k, v in zip(("reading_top1", "reading_kl"), zip(*found))}


def selected(z, params, predicted, mean):
    """An intervention. u: unit vector of the predicted token's embedding minus the mean embedding. selected [T]: share of |z|^2
    along u; kept [T]: whether the token is still predicted from z minus as much along the u of the next position (NaN where the
    same token is predicted there). Without its part along its own u it can't be: its logit is then that of the mean."""
    E, W = held_as(params)("wte.weight"), unembedding(params)
    u = F.normalize(E[predicted] - mean, dim=-1)
    amount = (z * u).sum(-1, keepdim=True)
    y = z - amount * u.roll(-1, 0)
    kept = torch.cat([(part @ W.T).argmax(-1) for part in y.split(256)]) == predicted
    return {"selected": (amount[:, 0] / z.norm(dim=-1)).square(),
            "kept": kept.float().masked_fill(predicted.roll(-1) == predicted, math.nan)}


def by_rows(f, E):
    """f of the rows of E [V, d], some thousands at a time."""
    return torch.cat([f(x) for x in E.split(4096)])


def spans(states, later, basis, embeddings):
    """outside_.. of `compute_paths`: how much of states [L+1, T, d] is outside the embeddings' first components."""
    quartiles = lambda x: np.quantile(x, [.25, .5, .75], axis=0)
    beyond = [outside(x, basis) for x in states]  # of each layer [T, d+1]
    k = int((basis.variance.cumsum(0) < .9 * basis.variance.sum()).sum()) + 1
    centred = states[-1, later] - states[-1, later].mean(0) + basis.mean
    return {"outside": np.stack([quartiles(x[later]) for x in beyond]), "outside_centred": quartiles(outside(centred, basis)),
            "outside_k": k, "outside_at": torch.stack([x[:, k] for x in beyond]),
            "outside_limit": np.quantile(by_rows(lambda x: outside(x, basis)[:, k], embeddings), .95)}


def plane(states, i, later, basis, E, learned):
    """plane_.. of `compute_paths`: the direction above the plane of two components, fitted to every second position; the path
    of position i goes up."""
    fitted, other = np.flatnonzero(later)[::2], np.flatnonzero(later)[1::2]
    centred = lambda x: x.double() - basis.mean
    up = height(states[-1, fitted], basis)
    up = up * (centred(states[-1, i]) @ up).sign()
    frame = torch.cat([basis.axes[:, :2], up[:, None]], 1)
    above = lambda x: centred(x) @ frame
    share = lambda x: above(x)[..., 2].square() / centred(x).square().sum(-1).clamp(min=1e-30)
    return {"plane_direction": up, "plane_path": above(states), "plane_tokens": by_rows(above, E),
            "plane_layers": share(states), "plane_embedding": by_rows(share, E[learned]).median(), "plane_other": other}


def spheres(states, i, final, predicted, every, E, learned, flags):
    """sphere_.. and full_angle of `compute_paths`: directions in three components, of position i and as angles of all."""
    modes = [every[mode] for mode in SPHERES]
    ball = lambda x, b: F.normalize(coordinates(x, b, 3), dim=-1)
    apart = lambda ids, k: torch.stack([angle(coordinates(states[-1], b, k), coordinates(E[ids], b, k)) for b in modes])
    draws = torch.randint(len(learned), (len(predicted),), generator=common.generator(flags.seed, "eval", 1))
    return {"sphere_tokens": torch.stack([by_rows(lambda x: ball(x, b), E) for b in modes]),
            "sphere_path": torch.stack([ball(states[:, i], b) for b in modes]),
            "sphere_final": torch.stack([ball(final, b) for b in modes]), "sphere_angle": apart(predicted, 3),
            "sphere_random": apart(learned[draws], 3), "full_angle": apart(predicted, None)}


def measure(model, tokens, starts, flags):
    """All of the above of one text, as numpy arrays."""
    params, config, at = model.params, model.config, common.device(flags)
    params = {k: v.to(at) for k, v in params.items()}
    tokens = tokens.to(at)
    states, z = read_out(model._replace(params=params), tokens, starts, at)
    found = {"tokens": tokens, "states": states, "final": z, **walk(states), **decode(states, params, config)}
    T, draws = len(tokens), common.generator(flags.seed, "eval")
    first = torch.zeros(T, dtype=torch.bool)
    first[starts] = True
    who = {"predicted": found["predicted"], "input": tokens, "shuffled": found["predicted"].roll(-max(1, T // 2)),
           "random": model.learned[torch.randint(len(model.learned), (T,), generator=draws)].to(at)}
    E, W = held_as(params)("wte.weight"), unembedding(params)
    mean = E[model.learned.to(at)].mean(0)
    found |= cosines(states, params, config, who, mean)
    found |= readings(states[-1], params, config) | selected(z, params, found["predicted"], mean)
    found["cosine_actual"] = cosine(states[:, :-1], E[tokens[1:]])
    log = torch.cat([(part @ W.T).log_softmax(-1) for part in z[:-1].split(256)])
    found["loss"] = -log.gather(1, tokens[1:, None])[:, 0]
    found |= anisotropy(states[:, ~first]) | {"vocab": torch.tensor(config.vocab_size)}
    return {"first": first.numpy()} | {k: v.cpu().numpy() for k, v in found.items()}


# ---- Train ----------------------------------------------------------------------------------------------------------

def mini_config(flags, vocab):
    return Config(flags.n_layers, flags.n_heads or HEADS, flags.d_model, flags.context, vocab)


def schedule(t, steps):
    """The learning rate's factor at step t = 0, 1, ..: up to 1 over a tenth of the steps, then half a cosine down to .1."""
    warm = max(1., steps / 10)
    return torch.minimum((t + 1) / warm, .55 + .45 * torch.cos(math.pi * ((t - warm) / max(steps - warm, 1.)).clamp(0, 1)))


def nll(params, rows, config):
    """Loss [.., T] of rows of tokens [.., T+1], nats."""
    z = final_norm(params, forward(params, rows[..., :-1], config)[-1], config)
    logits = z @ unembedding(params).T
    return F.cross_entropy(logits.flatten(0, -2), rows[..., 1:].flatten(), reduction="none").unflatten(0, rows[..., 1:].shape)


def step_of(flags, config):
    """The training step of ONE run: state and rows [batch, context + 1] -> new state, logs."""
    def step(state, rows, number):
        grads, loss = grad_and_value(lambda params: nll(params, rows, config).mean())(state["params"])
        scale = (1 / common.norm(grads)).clamp(max=1.)  # a gradient is at most 1 long: an early burst costs a seed 100 steps
        grads = {k: g * scale for k, g in grads.items()}
        lr = number["lr"] * schedule(state["t"], flags.steps)
        params, optimiser = common.adamw(state["params"], grads, state, lr, number["weight_decay"], beta2=.99)
        return {"params": params, **optimiser}, {"loss": loss}
    return step


def windows(ids, width):
    """[n, width] pieces of ids, one after the other, each of which begins with the last token of the one before."""
    return ids.unfold(0, width, width - 1)


def rows_of(flags):
    """(Tokenizer, ids to learn, rows [n, context + 1] of held-out ids) of the text that a mini learns."""
    own, learn, held = lesson(flags.file if flags.study == "train-mini" else "", flags.merges)
    if min(len(learn), len(held)) <= flags.context:
        raise common.Stop(f"the text has {len(learn)} tokens to learn and {len(held)} held out: "
                          f"too few for --context {flags.context}")
    return own, learn, windows(held, flags.context + 1)


def train(runs, folder):
    """Train mini models of one shape on random pieces of their text. Returns (Models, metrics, snapshots)."""
    flags = runs[0]
    own, learn, rows = rows_of(flags)
    config = mini_config(flags, len(own.ids))
    params = [init(config, common.generator(run.seed, "init")) for run in runs]
    state = common.stack({"params": p, **common.adam_init(p)} for p in params)

    def draw(r, chunk):
        start = torch.randint(len(learn) - flags.context, (common.CHUNK, flags.batch, 1),
                              generator=common.generator(runs[r].seed, "train", chunk))
        return learn[start + torch.arange(flags.context + 1)]

    def evaluate(r, params):
        with torch.no_grad():
            return {"loss": nll(params, rows, config).mean(), **development(params, rows[:TEXT], config)}
    final, metrics, snapshots = common.train(
        runs, folder, state, common.numbers(runs), step_of(flags, config), draw, evaluate,
        eval_at=[round(i * flags.steps / EVALS) for i in range(EVALS + 1)], label=f"mini d={flags.d_model}")
    models = [Model(common.run_of(final["params"], r), config, own, "mini", learn.unique()) for r in range(len(runs))]
    return models, metrics, snapshots


def development(params, rows, config):
    """Per layer [L+1], medians over positions but the first: lens_kl, cosines of h_l and ln_f(h_l) with the predicted token."""
    states = torch.stack(forward(params, rows[:, :-1], config))[:, :, 1:].flatten(1, 2)
    found = decode(states, params, config)
    found |= cosines(states, params, config, {"predicted": found["predicted"]}, 0.)
    return {k: found[k].median(1).values for k in ("lens_kl", "cosine_predicted", "cosine_predicted_final")}


def export(model, write):
    """Save a model in Hugging Face layout by write(name, bytes)."""
    c, merges = model.config, sorted(model.tokenizer.ranks, key=model.tokenizer.ranks.get)
    settings = c._asdict() | {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": c.eps,
                              "architectures": ["GPT2LMHeadModel"]}
    settings.pop("eps")
    write("config.json", json.dumps(settings, indent=1).encode())
    write("vocab.json", json.dumps(model.tokenizer.ids).encode())
    write("merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]).encode())
    write("model.safetensors", safetensors_of(model.params))
    write("learned.json", json.dumps({"ids": model.learned.tolist()}).encode())  # ours alone: tokens that its text has


def settings(flags):
    """The values of OF_MINI, with the number of heads that they mean."""
    return [getattr(replace(flags, n_heads=flags.n_heads or HEADS), f) for f in OF_MINI]


def mini_folder(flags):
    """Where the mini of these flags is kept: named by all that decides its weights, this script among it."""
    code = [Path(file).read_bytes() for file in (__file__, common.__file__)]
    made_of = repr((code, settings(flags), corpus(""), torch.__version__))
    return cache() / f"mini-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def mini(flags, folder):
    """The mini model of these flags, from the cache or trained here and put there; always as the loader reads it back."""
    place = mini_folder(flags)
    if any(common.gathered(not place.exists())):  # on any machine, then together
        print("the mini model is trained once, then kept in", place.parent, flush=True)
        models, _, _ = train([flags], folder.scratch("mini"))
        if folder.interrupted:
            return models[0]._replace(name="mini, interrupted")
        if not all(p.isfinite().all() for p in models[0].params.values()):
            raise common.Stop(f"the mini diverged; lower --lr {flags.lr:g}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as there:
            whole = Path(there, "mini")
            whole.mkdir()
            export(models[0], lambda name, data: whole.joinpath(name).write_bytes(data))
            if not place.exists():  # else another process was faster
                os.replace(whole, place)
    try:
        return load(str(place), "mini", flags.dtype)
    except common.Stop as stop:
        raise common.Stop(f"{stop}; delete {place} to train the mini again") from None


# ---- Figures --------------------------------------------------------------------------------------------------------
# pure functions of what `compute_*` saves

GREY, RED = "#b5b5b5", "#D00000"


def plain(text):
    """Text without what a font lacks or a figure takes for a formula."""
    return "".join(c if c.isprintable() and ord(c) < 0x2000 and c != "$" else "?" for c in text)


def written(text, width=12):
    """A token as a figure shows it: visible spaces and line ends."""
    text = plain(str(text).replace("\n", "\\n").replace(" ", "\u00b7"))
    return text if len(text) <= width else text[:width - 1] + ".."


def title(arrays, what, of_token=False):
    """What a figure shows, on which model (a mini is not GPT-2), and after which text if it is about one token."""
    name, i, names = str(arrays["model"]), int(arrays["token"]), arrays["token_text"]
    model = f"{name}, made here; its geometry is not GPT-2's" if name in MINI or name == "mini, interrupted" else \
        name if name in SIZES else f"{name}, weights of unknown origin"
    before = "".join(map(str, names[max(0, i - 8):i + 1]))[-40:].replace("\n", " ")
    moment = f'; after "..{plain(before)}": {written(arrays["predicted_text"][i])} (p = {arrays["final_probability"][i]:.2g})'
    return f"{what}\n{model}{moment * of_token}"


def layers(ax, y, label, colour, x=None, **style):
    """Median over positions of y [layers, T], quartiles as a band; NaN are left out."""
    if not y.size:
        return
    x = np.arange(len(y)) if x is None else x
    ax.fill_between(x, *np.nanquantile(y, [.25, .75], axis=1), color=colour, alpha=.2, lw=0)
    ax.plot(x, np.nanmedian(y, 1), color=colour, lw=1.6, label=label, **dict(marker="o", ms=3) | style)


def label_layers(ax, L, text="layer (0: embedding)"):
    ax.set_xlabel(text)
    ax.set_xticks(range(0, L + 1, max(1, L // 6)))


def draw_path(arrays, flags):
    figure, axes = common.panels(4, title(arrays, "The path of one token's states in the plane of the embeddings", True), flags)
    i, L, predicted = int(arrays["token"]), len(arrays["norm"]) - 1, arrays["predicted"][arrays["token"]]
    tokens, path, end = arrays["pca_tokens"], arrays["pca_path"][:, i], arrays["pca_final"][i]
    for ax, near in zip(axes, (False, True)):
        for met, colour, name in ((True, GREY, "embeddings"), (False, "#E69F00", "of tokens that its text never has")):
            some = tokens[arrays["learned"] == met, :2]
            if len(some):
                ax.scatter(*some.T, s=1 if len(tokens) > 5000 else 4, color=colour, lw=0, rasterized=True, label=name)
        ax.plot(*path[:, :2].T, color=common.COLOURS[0], lw=1, marker="o", ms=3, label="states h_0 .. h_L")
        for l in range(L + 1):
            if not near or abs(path[l, :2]).max() < 1.2 * abs(tokens[:, :2]).max():
                ax.annotate(str(l), path[l, :2], (2, 2), textcoords="offset points", fontsize=6)
        ax.plot(*end[:2], "*", color=common.COLOURS[1], ms=9, label="ln_f(h_L)")
        ax.plot(*tokens[predicted, :2], "o", color=RED, ms=5, label=f"predicted {written(arrays['predicted_text'][i])}")
        ax.add_patch(plt.Rectangle((-1, -1), 2, 2, fill=False, ls="--", lw=.8, color="grey", label="[-1, 1]²"))
        ax.set(xlabel="first component of the embeddings", ylabel="second component")
        if near:
            low, high = tokens[:, :2].min(0), tokens[:, :2].max(0)
            low, high = np.minimum(low, -1), np.maximum(high, 1)
            ax.set(xlim=(low[0] - .1 * (high - low)[0], high[0] + .1 * (high - low)[0]),
                   ylim=(low[1] - .1 * (high - low)[1], high[1] + .1 * (high - low)[1]))
        ax.set_title("near: where the embeddings are" if near else "all of the path", fontsize=8)
    axes[0].legend(fontsize=6)
    later = ~arrays["first"]
    layers(axes[2], arrays["norm"][:, later], "positions after the first", common.COLOURS[0])
    layers(axes[2], arrays["norm"][:, ~later], "first position", common.COLOURS[4], ls=":")
    common.shelf(axes[2], arrays["embedding_norm"][1], "median |embedding|")
    axes[2].set(ylabel="|h_l|", yscale="log")
    label_layers(axes[2], L)
    axes[2].legend(fontsize=7)
    d = arrays["explained_variance"].shape[1]
    for mode, colour, kept in zip(MODES, common.COLOURS, arrays["explained_variance"]):
        axes[3].plot(np.arange(1, d + 1), kept.cumsum(), color=colour, lw=1.2, ls="-" if "centred" in mode else "--",
                     label=f"{mode}: {kept[:3].sum():.1%} in 3")
    axes[3].axvline(3, color="grey", lw=.8, ls=":")
    axes[3].set(xscale="log", xlabel="components of the embeddings' PCA", ylabel="share of variance", ylim=(0, 1))
    axes[3].legend(fontsize=6)
    return figure


def draw_cosines(arrays, flags):
    figure, axes = common.panels(4, title(arrays, "Do the states turn into the next token's embedding?"), flags)
    later, L, V = ~arrays["first"], len(arrays["norm"]) - 1, len(arrays["pca_tokens"])
    who = {"predicted": "predicted token", "input": "input token", "random": "random token",
           "shuffled": "token predicted elsewhere"}
    for ax, end, name in zip(axes, ("", "_final", "_final_centred"),
                             ("h_l and embeddings", "ln_f(h_l) and embeddings", "ln_f(h_l) and embeddings minus their mean")):
        for (key, label), colour in zip(who.items(), common.COLOURS):
            layers(ax, arrays[f"cosine_{key}{end}"][:, later], label, colour)
        common.shelf(ax, 1, "emb(t+1) itself", side="left")
        common.shelf(ax, 0, "orthogonal", side="left")
        ax.set(ylabel="cosine")
        ax.set_title(name, fontsize=8)
        label_layers(ax, L)
    actual = arrays["cosine_actual"][:, later[:-1]]
    layers(axes[0], actual, "the text's next token", common.COLOURS[4], ls=":")
    axes[0].legend(fontsize=6.5)
    for key, label, colour in (("rank_cosine", "by cosine, h_l", 0), ("rank_dot", "by dot product, h_l", 4),
                               ("rank_cosine_final", "by cosine, ln_f(h_l)", 2), ("lens_rank", "by dot product, ln_f(h_l)", 1)):
        layers(axes[3], arrays[key][:, later] + 1., label, common.COLOURS[colour])
    common.shelf(axes[3], V / 2, "chance")
    axes[3].set(yscale="log", ylabel="rank of the predicted token (1: first)")
    axes[3].legend(fontsize=6.5)
    label_layers(axes[3], L)
    return figure


def draw_spike(arrays, flags):
    figure, axes = common.panels(4, title(arrays, "The last state against the whole vocabulary", True), flags)
    predicted = int(arrays["predicted"][arrays["token"]])
    for ax, (key, which), (name, unit) in zip(axes, itertools.product(("dot", "cosine"), (0, 1)), itertools.product(
            ("dot product", "cosine"), ("h_L", "ln_f(h_L)"))):
        values = arrays[f"spike_{key}"][which]
        order = np.argsort(values)
        place = int(np.flatnonzero(order == predicted)[0])
        ax.plot(values[order], color=common.COLOURS[0], lw=1)
        ax.plot(place, values[predicted], "o", color=RED, ms=5)
        ax.annotate(f"predicted: rank {len(values) - place} of {len(values)}", (place, values[predicted]), (-6, -3),
                    textcoords="offset points", ha="right", va="top", fontsize=7, color=RED)
        ax.axhline(0, color="grey", lw=.6)
        ax.set(xlabel="tokens, sorted", ylabel=f"{name} with {unit}")
    return figure


def draw_plane(arrays, flags):
    figure, axes = common.panels(4, title(arrays, "Is the path above a plane of embeddings?", True), flags)
    L, d = len(arrays["norm"]) - 1, arrays["outside"].shape[2] - 1
    k = np.arange(d + 1)
    for l, colour in zip(sorted({0, L // 3, 2 * L // 3, L}), common.COLOURS):
        low, middle, high = arrays["outside"][l]
        axes[0].fill_between(k, low, high, color=colour, alpha=.2, lw=0)
        axes[0].plot(k, middle, color=colour, lw=1.4, label=f"h_{l}")
    kept = arrays["explained_variance"][MODES.index("raw centred")].cumsum()
    axes[0].plot(k, 1 - np.append(0, kept), color="black", lw=1.4, label="embeddings")
    axes[0].plot(k, arrays["outside_centred"][1], color=colour, lw=1, ls=":", label=f"h_{L} minus its mean over positions")
    axes[0].plot(k, 1 - k / d, color="grey", lw=.8, ls="--", label="random direction")
    axes[0].set(xlabel="components k of the embeddings", ylabel="share of |x - mean|² outside their span", ylim=(0, 1.02))
    axes[0].legend(fontsize=6.5)
    i, path, tokens = int(arrays["token"]), arrays["plane_path"], arrays["plane_tokens"]
    some = slice(None, None, max(1, len(tokens) // 5000))
    spot = axes[1].get_subplotspec()
    axes[1].remove()
    ax = figure.add_subplot(spot, projection="3d")
    ax.scatter(*tokens[some].T, s=1, color=GREY, lw=0, rasterized=True)
    ax.plot(*path[:, i].T, color=common.COLOURS[0], marker="o", ms=2.5, lw=1)
    for l in {0, L // 2, L}:
        ax.text(*path[l, i], f"h_{l}", fontsize=7)
    ax.set_xlabel("component 1", fontsize=7)
    ax.set_ylabel("component 2", fontsize=7)
    ax.set_zlabel("orthogonal direction", fontsize=7)
    ax.tick_params(labelsize=6)
    later = ~arrays["first"]
    layers(axes[2], arrays["plane_layers"][:, later], "states", common.COLOURS[0])
    common.shelf(axes[2], arrays["plane_embedding"], f"embeddings: {arrays['plane_embedding']:.3f}", side="left")
    common.shelf(axes[2], .5, "most", side="left")
    axes[2].set(ylabel="share of |h_l - mean|² along that direction", ylim=(0, 1.02))
    label_layers(axes[2], L)
    layers(axes[3], np.abs(path[:, later, 2]), "height above the plane", common.COLOURS[1])
    layers(axes[3], np.hypot(path[:, later, 0], path[:, later, 1]), "distance from its origin within it", common.COLOURS[0])
    axes[3].set(yscale="log", ylabel="length")
    axes[3].legend(fontsize=7)
    label_layers(axes[3], L)
    return figure


def draw_geometry(arrays, flags):
    figure, axes = common.panels(4, title(arrays, "How the path runs"), flags)
    later, L = ~arrays["first"], len(arrays["norm"]) - 1
    layers(axes[0], arrays["step"][:, later], "step |h_l - h_(l-1)|", common.COLOURS[0], np.arange(1, L + 1))
    layers(axes[0], arrays["norm"][:, later], "norm |h_l|", common.COLOURS[2])
    axes[0].set(yscale="log", ylabel="length")
    layers(axes[1], arrays["turning"][:, later], "between consecutive steps", common.COLOURS[0], np.arange(2, L + 1))
    layers(axes[1], arrays["between"][:, later], "between consecutive states", common.COLOURS[1], np.arange(1, L + 1))
    common.shelf(axes[1], 90, "orthogonal (as random directions are)")
    axes[1].set(ylabel="degrees", ylim=(0, 180))
    axes[1].set_title(f"straightness |h_L - h_0| / length: median {np.median(arrays['straightness'][later]):.2f}", fontsize=8)
    axes[2].plot(arrays["anisotropy"], "o-", ms=3, color=common.COLOURS[0], label="mean cosine of two positions")
    axes[2].plot(arrays["standardised"], "o-", ms=3, color=common.COLOURS[2], label="after standardising each dimension")
    common.shelf(axes[2], float(arrays["embedding_anisotropy"]), "embeddings, raw")
    axes[2].set(ylabel="mean cosine")
    top = np.sort(arrays["contribution"], 1)[:, ::-1]
    whole = np.where(arrays["anisotropy"] == 0, np.nan, arrays["anisotropy"])
    for n, colour in ((1, 1), (3, 0), (10, 2)):
        axes[3].plot(top[:, :n].sum(1) / whole, "o-", ms=3, color=common.COLOURS[colour], label=f"{n} largest dimensions")
    axes[3].set(ylabel="share of the mean cosine")
    for ax in axes:
        label_layers(ax, L)
        ax.legend(fontsize=7)
    return figure


def draw_lens(arrays, flags):
    figure, axes = common.panels(4, title(arrays, "Do the states decode through the embedding matrix?"), flags)
    later, L = ~arrays["first"], len(arrays["norm"]) - 1
    layers(axes[0], arrays["lens_kl"][:, later], "positions after the first", common.COLOURS[0])
    uniform = math.log(len(arrays["learned"])) - arrays["lens_entropy"][-1, later]
    common.shelf(axes[0], np.median(uniform), "of a guess in which all tokens are alike")
    axes[0].set_yscale("symlog", linthresh=.1)
    axes[0].set(ylabel="KL to the end from the lens, nats", ylim=(0, None))
    shares = {"lens: same first token as at the end": arrays["lens_top1"],
              "nearest embedding of h_l by cosine: the input token": arrays["nearest"] == arrays["tokens"],
              "nearest embedding of h_l by cosine: the predicted token": arrays["nearest"] == arrays["predicted"]}
    for (label, same), colour in zip(shares.items(), common.COLOURS):
        axes[1].plot(same[:, later].mean(1), "o-", ms=3, color=colour, label=label)
    axes[1].set(ylabel="share of positions", ylim=(-.02, 1.02))
    layers(axes[2], arrays["lens_entropy"][:, later], "lens", common.COLOURS[0])
    common.shelf(axes[2], math.log(len(arrays["pca_tokens"])), "all tokens alike")
    axes[2].set(ylabel="entropy, nats")
    kl, top = arrays["reading_kl"][:, later], arrays["reading_top1"][:, later].mean(1)
    axes[3].bar(range(5), np.median(kl, 1), color=common.COLOURS[0], width=.6)
    for n, (low, high) in enumerate(np.quantile(kl, [.25, .75], axis=1).T):
        axes[3].plot([n, n], [low, high], color="black", lw=1)
        axes[3].annotate(f"same first\ntoken: {top[n]:.0%}", (n, high), (0, 3), textcoords="offset points", ha="center",
                         size=6.5)
    axes[3].set_xticks(range(5), READINGS, fontsize=6.5)
    axes[3].set(ylabel="KL of the final distribution, nats")
    axes[3].margins(y=.2)
    axes[3].set_title("the last step: what LayerNorm's parts do", fontsize=8)
    for ax in axes[:3]:
        label_layers(ax, L)
        ax.legend(fontsize=6.5, loc="lower left" if ax is axes[0] else "best")
    return figure


VIEW = math.radians(80)  # how far around is seen from inside


def camera(look):
    """[3, 3] orthonormal rows right, up, towards: of a camera that looks along `look`."""
    towards = look / np.linalg.norm(look)
    up = np.array([0., 0, 1]) if abs(towards[2]) < .9 else np.array([0., 1, 0])
    right = np.cross(towards, up)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, towards), towards])


def globe(ax, arrays, mode, look, inside):
    """The unit sphere seen from outside (the half that faces us, no perspective) or from its centre (80 degrees around,
    stereographic): tokens coloured by their probability, the predicted one red, states numbered, ln_f(h_L) a star."""
    frame, i, L = camera(look), int(arrays["token"]), len(arrays["norm"]) - 1
    log = np.log10(np.maximum(arrays["probability"], 1e-12))
    predicted = int(arrays["predicted"][i])

    def seen(x):  # [n, 3] -> positions, and which of them are seen
        right, up, deep = (x @ frame.T).T
        if inside:
            front = deep > math.cos(VIEW)
            return np.stack([right, up], 1) / (1 + np.where(front, deep, 1.))[:, None] / math.tan(VIEW / 2), front
        return np.stack([right, up], 1), deep < 0  # we look from -towards: what faces us has deep < 0

    turn = np.linspace(0, 2 * np.pi, 181)
    c, s = np.cos(turn), np.sin(turn)
    for angle in np.radians(np.arange(-60, 61, 30)):
        parallel = np.stack([np.cos(angle) * c, np.cos(angle) * s, np.full_like(turn, np.sin(angle))], 1)
        meridian = np.stack([c * np.cos(angle), c * np.sin(angle), s], 1)
        for circle in (parallel, meridian):
            at, front = seen(circle)
            ax.plot(*np.where(front[:, None], at, np.nan).T, color="#dddddd", lw=.5, zorder=0)
    at, front = seen(arrays["sphere_tokens"][mode])
    order = np.flatnonzero(front)[np.argsort(log[front])]
    shown = ax.scatter(*at[order].T, c=log[order], s=2 if len(at) > 5000 else 8, cmap="viridis", vmin=-8, vmax=0, lw=0,
                       rasterized=True)
    path = arrays["sphere_path"][mode]
    share = np.linspace(0, 1, 21)[:, None]
    for start, stop in zip(path, path[1:]):
        arc = start + share * (stop - start)
        at, front = seen(arc / np.maximum(np.linalg.norm(arc, axis=1, keepdims=True), 1e-9))
        ax.plot(*np.where(front[:, None], at, np.nan).T, color="black", lw=.7)
    at, front = seen(path)
    for l in np.flatnonzero(front):
        ax.annotate(str(l), at[l], fontsize=10 if l == L else 7, fontweight="bold" if l == L else "normal", ha="center",
                    va="center", bbox=dict(boxstyle="circle,pad=.15", fc="white", ec="black", lw=.5, alpha=.8))
    for x, style in ((arrays["sphere_tokens"][mode][predicted], dict(marker="o", color=RED, ms=7)),
                     (arrays["sphere_final"][mode], dict(marker="*", color=common.COLOURS[1], ms=9))):
        at, front = seen(x[None])
        if front[0]:
            ax.plot(*at[0], **style, mec="white", mew=.5, zorder=5)
            if style["marker"] == "o":
                ax.annotate(written(arrays["predicted_text"][i]), at[0], (5, 5), textcoords="offset points", color=RED, size=8)
    ax.add_patch(plt.Circle((0, 0), 1, fill=False, ec="#bbbbbb", lw=.6, zorder=0))
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    ax.spines[:].set_visible(False)
    return shown


def draw_sphere(arrays, flags):
    figure, axes = common.panels(4, title(arrays, "On the sphere of directions, in three components", True), flags,
                                 size=(4.6, 4.2))
    for row, mode in enumerate(SPHERES):
        last, kept = arrays["sphere_path"][row][-1], arrays["explained_variance"][MODES.index(mode)][:3].sum()
        token = arrays["sphere_tokens"][row][int(arrays["predicted"][arrays["token"]])]
        apart = np.degrees(np.arccos(np.clip(last @ token, -1, 1)))
        for ax, inside in zip(axes[2 * row:], (False, True)):
            shown = globe(ax, arrays, row, (last + token + 1e-3) * (1 if inside else -1), inside)
            ax.set_title(f"{mode} ({kept:.1%} of the variance), from {'inside' if inside else 'outside'}"
                         + ("" if inside else f"\nlast state to predicted token: {apart:.0f}°"), fontsize=8)
    bar = figure.colorbar(shown, ax=axes, shrink=.5)
    bar.set_label("log10 p(token); red: predicted; numbers: states; star: ln_f(h_L)", fontsize=7)
    return figure


def draw_turning(arrays, flags, frames=24):
    figure, axes = common.panels(1, title(arrays, "All around the sphere"), flags, size=(6, 6))

    def draw(n):
        axes[0].clear()
        angle = 2 * np.pi * n / frames
        globe(axes[0], arrays, 0, np.array([np.cos(angle), np.sin(angle), -.35]), False)
    return figure, 3 if flags.smoke else frames, draw


def draw_table(arrays, flags, most=16):
    """The lens at up to `most` positions up to the drawn token: the first token of every layer."""
    i, L = int(arrays["token"]), len(arrays["norm"]) - 1
    start = max(np.flatnonzero(arrays["first"][:i + 1])[-1], i + 1 - most)
    show = range(start, i + 1)
    every = sorted({*range(0, L + 1, max(1, L // 16)), L})
    high = np.quantile(arrays["lens_kl"][0], .9)
    figure, axes = common.panels(1, title(arrays, "The logit lens: first token of every layer (bold: as at the end)"), flags,
                                 size=(max(5, .75 * len(show)), 1 + .3 * len(every)))
    common.image(axes[0], arrays["lens_kl"][every][:, show], "KL to the end from the lens, nats", figure,
                 "input token", "layer", origin="lower", cmap="viridis_r", limits=(0, high))
    for y, l in enumerate(every):
        for x, t in enumerate(show):
            dark = arrays["lens_kl"][l, t] > .5 * high
            axes[0].text(x, y, written(arrays["lens_text"][l, t], 9), ha="center", va="center", fontsize=6.5,
                         color="white" if dark else "black", fontweight="bold" if arrays["lens_top1"][l, t] else "normal")
    axes[0].set_xticks(range(len(show)), [written(arrays["token_text"][t], 10) for t in show], rotation=60, size=7, ha="right")
    axes[0].set_yticks(range(len(every)), every)
    return figure


def draw_compare(arrays, flags):
    both = arrays, other(arrays)
    names = "\n".join(title(found, "").strip() for found in both)
    figure, axes = common.panels(4, f"Two models on one text\n{names}", flags)
    measures = {"norm": "|h_l| / |h_0|", "cosine_predicted_final": "cosine of ln_f(h_l) with emb(predicted)",
                "lens_kl": "KL to the end from the lens, nats", "anisotropy": "mean cosine of two positions"}
    for ax, (key, label) in zip(axes, measures.items()):
        for found, colour in zip(both, common.COLOURS):
            y, name = found[key], str(found["model"])
            depth = np.linspace(0, 1, len(y))
            if key == "anisotropy":
                ax.plot(depth, y, "o-", ms=3, color=colour, label=name)
            else:
                y = y[:, ~found["first"]]
                layers(ax, y / np.median(y[0]) if key == "norm" else y, name, colour, depth)
        ax.set(xlabel="depth l / L", ylabel=label)
        ax.legend(fontsize=7)
    axes[0].set_yscale("log")
    axes[2].set_yscale("symlog", linthresh=.1)
    axes[2].set_ylim(bottom=0)
    return figure


def draw_training(arrays, flags):
    figure, axes = common.panels(4, "Mini models of GPT-2's architecture, trained here (their geometry is not GPT-2's)", flags)
    good, step = np.isfinite(arrays["loss"]), arrays["eval_step"]
    swept = list(common.swept(flags))
    words = np.array([", ".join(f"{k} {arrays[k][r]:g}" for k in swept) or "held out" for r in range(len(good))])
    for word, colour in zip(dict.fromkeys(words), itertools.cycle(common.COLOURS)):
        common.band(axes[0], step, arrays["eval_loss"][words == word].T, word, colour)
    good &= words == words[0]
    for name in ("uniform", "unigram", "bigram"):
        common.shelf(axes[0], np.median(arrays[name]), name)
    axes[0].set(xlabel="step", ylabel="loss on held-out text, nats a token")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=7)
    for ax, key, label in zip(axes[1:], ("lens_kl", "cosine_predicted", "cosine_predicted_final"),
                              ("KL to the end from the lens, nats", "cosine of h_l with emb(predicted)",
                               "cosine of ln_f(h_l) with emb(predicted)")):
        x = arrays[f"eval_{key}"][good] if good.any() else arrays[f"eval_{key}"][:1]  # [R, M, L+1]
        x = np.median(x[..., np.isfinite(x[-1, 0])], 0)
        for l in range(x.shape[1]):
            ax.plot(step, x[:, l], color=plt.get_cmap("viridis")(l / max(1, x.shape[1] - 1)), label=f"layer {l}")
        ax.set(xlabel="step", ylabel=label)
        ax.set_title(f"{words[0]}: median of {good.sum()} runs" if swept else f"median of {good.sum()} runs", fontsize=8)
    axes[1].legend(fontsize=6)
    return figure


# ---- Main -----------------------------------------------------------------------------------------------------------

NOTES, OURS = "research notes on the states of GPT-2", "this project"


def tokenizer_of(name, flags):
    """The tokenizer of a model, without the model where that would first be trained."""
    name = flags.model if name == "untrained" else name
    if name not in MINI:
        return get(name, flags).tokenizer
    place = mini_folder(flags)
    return read_tokenizer(place) if place.exists() else lesson("", flags.merges)[0]


def held_in(dtype, params):
    """Parameters as --dtype has them."""
    return {k: x.to(getattr(torch, dtype)) for k, x in params.items()}


def get(name, flags, folder=None):
    """The Model of a name or directory."""
    if name == "mini":
        return mini(flags, folder)
    if name == "untrained" and flags.model not in MINI:
        like = get(flags.model, flags)
        return like._replace(params=held_in(flags.dtype, init(like.config, common.generator(flags.seed, "init"))), name=name)
    if name == "untrained":
        own, learn, _ = lesson("", flags.merges)
        config = mini_config(flags, len(own.ids))
        params = init(config, common.generator(flags.seed, "init"))
        return Model(held_in(flags.dtype, params), config, own, name, learn.unique())
    if name in SIZES:
        return load(str(find(name, flags.download)), name, flags.dtype, flags.n_heads)
    known = Path(name).resolve().name
    return load(name, f"directory {known}" if known in (*SIZES, *MINI) else known, flags.dtype, flags.n_heads)


def reading(name, flags, context):
    """(ids [T], starts of the windows) of the text to look at, checked."""
    own, text, width = tokenizer_of(name, flags), flags.text, flags.window
    if width > context:
        raise common.Stop(f"--window {width} is more than the {context} positions of {name}")
    if flags.file:
        text = read_text(flags.file)
    given = bool(flags.text or flags.file)
    if not given:
        text, width = SENTENCES, width or context
        if {flags.model, flags.other if flags.study == "compare" else flags.model} <= set(MINI):
            text = corpus("")[1][:40 * context * TEXT]
    ids = encode(text, own)
    if not given:
        ids = ids[:context * TEXT]
    if len(ids) < 2:
        raise common.Stop(f"the text has {len(ids)} token{'s' * (len(ids) != 1)}: a path to the next one needs two or more")
    if not width and len(ids) > context:
        raise common.Stop(f"the text has {len(ids)} tokens, {name} has {context} positions: --window {context} cuts it")
    return torch.tensor(ids), list(range(0, len(ids), width or len(ids)))


def finals(found):
    """Columns of the summary: the text's loss, and medians over positions but the first."""
    later = ~found["first"]
    ends = {k: found[k][-1] for k in ("norm", "cosine_predicted", "cosine_predicted_final", "rank_cosine_final")}
    ends["lens_kl_half"] = found["lens_kl"][len(found["lens_kl"]) // 2]
    return {"loss": found["loss"].mean()} | {k: np.median(v[later]) for k, v in ends.items()}


def compute_paths(flags, folder):
    """For one text of T tokens what `measure` names; model; token; token_text, predicted_text [T], lens_text [L+1, T];
    embedding_norm [3]: quartiles; explained_variance [6, d] in the order of MODES; pca_path [L+1, T, 3], pca_final [T, 3],
    pca_tokens [V, 3] (raw centred); spike_dot, spike_cosine [2, V]: of h_L and ln_f(h_L) of the token with every embedding;
    probability [V]; outside [L+1, 3, d+1]: quartiles over positions of the share outside the first k components (raw centred),
    outside_centred [3, d+1]: of h_L minus its mean over positions; outside_k: the k that keeps 90 % of the embeddings'
    variance, outside_at [L+1, T]: the share there, outside_limit: what 95 % of the embeddings stay below; plane_path
    [L+1, T, 3], plane_tokens [V, 3]: coordinates along two components and the direction orthogonal to them that carries most of
    h_L (plane_direction [d], fitted to every second position), plane_layers [L+1, T]: share along it, plane_embedding: the
    median of the embeddings, plane_other: positions it is not fitted to; learned [V]: tokens met in training; and for the modes
    of SPHERES: sphere_tokens [2, V, 3], sphere_path [2, L+1, 3], sphere_final [2, 3], and at every position the angle between
    h_L and the predicted embedding in 3 and in all dimensions, sphere_angle, full_angle [2, T], and in 3 that to a random
    token, sphere_random [2, T] (degrees). other_*: the same, but for states and final, of the model that --other names or, of
    the mini, of its initial weights."""
    models = flags.names + ["untrained"] * (flags.model == "mini" and flags.study != "compare")
    both = [look(name, flags, folder) for name in models]
    asked = both[:len(flags.names)]
    folder.result([replace(flags, model=name) for name in flags.names],
                  {"loss": common.padded([found["loss"][None] for found in asked]).T},
                  common.stacked([finals(found) for found in asked]))
    other = {f"other_{k}": v for found in both[1:] for k, v in found.items() if k not in ("states", "final")}
    return both[0] | other


def look(name, flags, folder):
    """What `compute_paths` saves, of one model."""
    model = get(name, flags, folder)
    found = measure(model, *reading(name, flags, model.config.n_positions), flags)
    if not all(np.isfinite(found[k]).all() for k in ("norm", "final", "lens_kl")):
        raise common.Stop(f"{model.name}: the states of this text are not finite; these are not a trained model's weights")
    i, later, names = flags.token % len(found["tokens"]), ~found["first"], spelled(model.tokenizer)
    found |= {"model": model.name, "token": i, "token_text": names[found["tokens"]].astype(str),
              "predicted_text": names[found["predicted"]].astype(str), "lens_text": names[found["lens_token"]].astype(str),
              "learned": np.isin(np.arange(model.config.vocab_size), model.learned)}
    E, W = held_as(model.params)("wte.weight"), unembedding(model.params)
    states, z, predicted = (torch.as_tensor(found[k]) for k in ("states", "final", "predicted"))
    every, h, final = bases(E[model.learned]), states[:, i], z[i]
    raw = every["raw centred"]
    unit = every["on x centred"].mean  # the mean of the unit vectors tells the mean cosine of two of them
    n = len(model.learned)
    return found | {
        "explained_variance": torch.stack([b.variance / b.variance.sum() for b in every.values()]),
        "embedding_norm": np.quantile(E[model.learned].norm(dim=1), [.25, .5, .75]),
        "embedding_anisotropy": (n * unit @ unit - 1) / (n - 1),
        "pca_path": coordinates(states, raw, 3), "pca_final": coordinates(z, raw, 3),
        "pca_tokens": by_rows(lambda x: coordinates(x, raw, 3), E),
        "spike_dot": torch.stack([E @ h[-1], E @ final]),
        "spike_cosine": torch.stack([by_rows(lambda x: cosine(x, y), E) for y in (h[-1], final)]),
        "probability": (W @ final).softmax(0),
        **spans(states, later, raw, E[model.learned]), **plane(states, i, later, raw, E, model.learned),
        **spheres(states, i, final, predicted, every, E, model.learned, flags)}


def compute_train_mini(flags, folder):
    """With one entry a run: settings; eval_step [M] and, at these steps, eval_loss [R, M] on held-out text and medians over
    positions of lens_kl, cosine_predicted and cosine_predicted_final: eval_* [R, M, L+1]; uniform, unigram, bigram [R]: losses
    of predictors that count; loss [R]; and what `measure` finds in the first held-out windows, but for states. The models lie
    in model*/ (or group*/model*/), one a run, in Hugging Face layout."""
    groups, rows = common.groups_of_runs(flags), []
    for i, runs in enumerate(groups):
        sub = folder.sub(i, len(groups))
        models, metrics, snapshots = train(runs, sub)
        own, learn, held = lesson(flags.file, runs[0].merges)
        known = floors(learn, held, len(own.ids))
        loss = metrics["eval_loss"][-1]
        sub.result(runs, metrics, {"loss": loss}, snapshots)
        for r, (run, model) in enumerate(zip(runs, models)):
            if not folder.interrupted and np.isfinite(loss[r]):
                export(model, sub.scratch(f"model{r}").write)
            ids = held[:run.context * TEXT]
            found = measure(model, ids, list(range(0, len(ids), run.context)), run)
            rows.append({k: v for k, v in found.items() if k not in ("states", "final", "loss")} | known | {
                k: np.moveaxis(v, 1, 0)[r] for k, v in metrics.items() if k.startswith("eval_") and k != "eval_step"} | {
                    "loss": loss[r]} | {k: getattr(run, k) for k in OF_MINI})
        if folder.interrupted:
            break
    return {"eval_step": metrics["eval_step"]} | common.stacked(rows)


def monotone(y):
    """[T] rank correlation of y [layers, T] with the layer (Spearman; ties share their rank), NaN where y is constant."""
    ranks = (y[:, None] > y).sum(1) + (y[:, None] == y).sum(1) / 2
    x, ranks = np.arange(len(y)) - (len(y) - 1) / 2, ranks - ranks.mean(0)
    size = np.sqrt((x @ x) * (ranks ** 2).sum(0))
    return np.divide(x @ ranks, size, out=np.full(y.shape[1], math.nan), where=size > 0)


def sentences(a, say):
    """The sentences of the notes about one model, each with a value and a verdict for every position but the first of a window:
    say(id, statement, source, expected, values [T'], agree [T'], the same of a random token [T'])."""
    l, V = ~a["first"], a["vocab"]
    last = lambda key: a[key][-1, l]
    say("not-embedding", "the last state is not (nor nearly) parallel to the predicted token's embedding: last_state(t) is not "
        "emb(t+1)", NOTES, "cosine of h_L below .9", last("cosine_predicted"), last("cosine_predicted") < .9,
        last("cosine_random"))
    say("not-embedding-normed", "nor is it after ln_f", OURS, "cosine of ln_f(h_L) below .9", last("cosine_predicted_final"),
        last("cosine_predicted_final") < .9, last("cosine_random_final"))
    say("nearer-than-most", "yet the predicted token's embedding is nearer (by cosine) to h_L than 95 % of the vocabulary",
        OURS, "rank below .05 V", last("rank_cosine") / V, last("rank_cosine") < .05 * V)
    rising = monotone(a["cosine_predicted"][:, l])
    say("little-by-little", "the blocks turn the input, little by little, into the embedding of t+1",
        NOTES + " (the hypothesis)", "rank correlation of the cosine with depth at least .9", rising, rising >= .9)
    say("dot-product", "the last operation is the dot product of the last state, divided by its norm, with the embeddings",
        NOTES, "KL of the true distribution below .01 nats", a["reading_kl"][0, l], a["reading_kl"][0, l] < .01)
    say("dot-product-first", "at least it has the same first token", OURS, "same", a["reading_top1"][0, l],
        a["reading_top1"][0, l])
    falling = monotone(a["lens_kl"][:, l])
    say("decodes", "the states decode to logits through the embedding matrix, the better the deeper", NOTES,
        "rank correlation of the lens' KL with depth at most -.9", falling, falling <= -.9)
    uniform = math.log(V) - a["lens_entropy"][-1, l]  # KL of the final distribution from one in which all tokens are alike
    halfway = a["lens_kl"][len(a["lens_kl"]) // 2, l] / uniform
    say("decodes-halfway", "half of the blocks are more than halfway from a uniform guess to the final distribution", OURS,
        "KL of the lens halfway below half of the uniform distribution's", halfway, halfway < .5)
    say("by-cosine", "the last state picks emb(t+1) by cosine similarity (after ln_f)", NOTES, "rank 1 by cosine",
        last("rank_cosine_final") + 1., last("rank_cosine_final") == 0)
    say("by-cosine-raw", "the last state picks emb(t+1) by cosine similarity (h_L itself)", NOTES, "rank 1 by cosine",
        last("rank_cosine") + 1., last("rank_cosine") == 0)
    inner = a["nearest"][1:-1, l]
    strange = ((inner != a["tokens"][l]) & (inner != a["predicted"][l])).mean(0) if len(inner) else np.full(l.sum(), math.nan)
    say("not-interpretable", "states between are not interpretable in the space of the embeddings", NOTES,
        "nearest embedding is neither input nor prediction in more than half of the inner layers", strange, strange > .5)
    say("selects", "the last state selects just the features that tell emb(t+1): with as much taken away along another "
        "prediction's embedding it is still predicted (an intervention; along its own it can't be, an identity)", NOTES,
        "still predicted", a["kept"][l], a["kept"][l] == 1)
    say("selects-little", "these features are a small part of it", OURS, "share of |ln_f(h_L)|² below .1", a["selected"][l],
        a["selected"][l] < .1)
    if "pca_tokens" not in a:
        return
    box = a["pca_tokens"][a["learned"], :2]
    end = a["pca_path"][-1, l, :2]
    out = (np.maximum(end - box.max(0), box.min(0) - end) / np.ptp(box, 0)).max(1)
    say("beyond", "in the plane of two components the last states lie far outside of where all embeddings are", NOTES,
        "outside of their rectangle by more than half of its side", out, out > .5)
    inside = (abs(box) <= 1).all(1)
    say("square", "the embeddings lie within [-1, 1] x [-1, 1]", NOTES, "all of them",
        f"{inside.mean():.2%} of {len(inside)} tokens", bool(inside.all()))
    kept = {mode: v[:3].sum() for mode, v in zip(MODES, a["explained_variance"])}
    say("three-components", "three components keep about 4 % of the information", NOTES, "3.5 to 4.5 %, on dim centred",
        ", ".join(f"{mode} {v:.1%}" for mode, v in kept.items()), bool(.035 <= kept["on dim centred"] < .045))
    say("sphere-apart", "on the sphere of three components the last state is far from the predicted token", NOTES,
        "more than 30 degrees", a["sphere_angle"][0, l], a["sphere_angle"][0, l] > 30)
    bent = abs(a["sphere_angle"][0, l] - a["full_angle"][0, l])
    say("angles-altered", "angles seen in three dimensions are altered", NOTES, "by more than 15 degrees", bent, bent > 15)
    say("outside-embeddings", "the states are not in the space of the embeddings", NOTES,
        f"share outside the {int(a['outside_k'])} components with 90 % of their variance: more than in 95 % of the embeddings",
        a["outside_at"][-1, l], a["outside_at"][-1, l] > a["outside_limit"])
    share = a["plane_layers"][-1, a["plane_other"]]
    say("path-above-plane", "there is a plane of embeddings with the path above it: one direction orthogonal to it carries "
        "most of h_L (fitted to the other positions)", NOTES, "share above .5", share, share > .5)


def other(arrays):
    """The arrays of the second model; {} where there is none."""
    return {k.removeprefix("other_"): v for k, v in arrays.items() if k.startswith("other_")}


def judged(arrays):
    """{id: (statement, source, expected, measured, agree)} of one model: median, quartiles, and positions that agree."""
    found = {}

    def note(id, statement, source, expected, values, agree, null=None):
        if not isinstance(values, str):
            known = np.isfinite(values.astype(float))
            values, agree = values[known], agree[known] == 1
            middle = "" if values.dtype == bool or not len(values) else "{1:.3g} [{0:.3g}, {2:.3g}], ".format(
                *np.quantile(values, [.25, .5, .75]))
            values = f"{middle}{agree.mean():.0%} of {len(agree)} positions" if len(agree) else "at no position"
            values += "" if null is None else f" (a random token's {np.median(null):.3g})"
        found[id] = statement, source, expected, values, agree
    sentences(arrays, note)
    return found


def judge_paths(arrays, flags):
    """The sentences, judged at every position of one text and model: three quarters decide. Of another model than GPT-2 they
    are said twice: about GPT-2, open, and about that model; what a mini's initial weights do stands beside it."""
    name, claims = str(arrays["model"]), []
    as_designed = flags.model not in MINI or settings(flags) == settings(type(flags)(seed=flags.seed))
    enough = as_designed and not flags.smoke and flags.finished
    control = judged(other(arrays)) if other(arrays) else {}
    for id, (statement, source, expected, measured, agree) in judged(arrays).items():
        if name not in SIZES:
            claims.append(common.claim(f"gpt2-{id}", f"GPT-2: {statement}", source, expected, "needs --model gpt2", None))
            if id == "three-components":  # a figure about GPT-2 alone
                continue
        if id in control:
            measured = f"{measured}; untrained: {control[id][3]}"
        claims.append(common.claim(f"{name}-{id}".replace(" ", "-"), f"{name}: {statement}", source, expected, measured, agree,
                                   enough=enough))
    return claims


def judge_compare(arrays, flags):
    """Which sentences are true of the first model and not of the second? What an untrained model has as well is no finding.
    Open where a sentence is not true of the first, or undecided of one of them."""
    names, claims, control = [str(arrays["model"]), str(arrays["other_model"])], [], judged(other(arrays))
    decide = lambda agree: agree if isinstance(agree, bool) else common.vote(agree)
    for id, (statement, source, expected, mine, agree) in judged(arrays).items():
        *_, theirs, theirs_agree = control[id]
        holds, too = decide(agree), decide(theirs_agree)
        claims.append(common.claim(
            f"only-{id}", f"true of {names[0]} and not of {names[1]}: {statement}", source, f"{expected}, in {names[0]} alone",
            f"{names[0]} {mine} ({common.VERDICTS[holds]}); {names[1]} {theirs} ({common.VERDICTS[too]})",
            not too if holds and too is not None else None, enough=not flags.smoke and flags.finished))
    return claims


def always(arrays, say, flags):
    """Claims of every training."""
    say("learned", "the mini knows more than counts of pairs", OURS, "held-out loss below the bigrams'",
        arrays["loss"] - arrays["bigram"], arrays["loss"] < arrays["bigram"])


@functools.partial(common.judged, always=always, columns=OF_MINI)
def judge_train_mini(arrays, say, flags):
    """The same sentences with seeds as what votes: a seed agrees where three quarters of its positions do."""
    said = defaultdict(list)
    for r in np.flatnonzero(np.isfinite(arrays["loss"])):
        def note(id, statement, source, expected, values, agree, null=None):
            agree = agree[np.isfinite(values.astype(float))] == 1
            verdict, share = common.vote(agree), agree.mean() if len(agree) else math.nan
            said[id].append((statement, source, expected, share, math.nan if verdict is None else float(verdict)))
        a = {k: v[r] for k, v in arrays.items() if k != "eval_step"}
        sentences(a | {"first": a["first"] == 1}, note)
    for id, rows in said.items():
        shares, verdicts = (np.array(x) for x in list(zip(*rows))[3:])
        statement, source, expected = rows[0][:3]
        say(f"mini-{id}", f"mini: {statement}", source, f"{expected}, at three quarters of the positions",
            f"at a share of {common.spread(shares)}", verdicts)


FIGURES = {"path": draw_path, "cosines": draw_cosines, "spike": draw_spike, "plane": draw_plane, "geometry": draw_geometry,
           "lens": draw_lens, "sphere": draw_sphere, "turning": draw_turning}
STUDIES = {
    "paths": (compute_paths, judge_paths, FIGURES),
    "lens": (compute_paths, judge_paths, {"lens": draw_lens, "table": draw_table}),
    "sphere": (compute_paths, judge_paths, {"sphere": draw_sphere, "turning": draw_turning}),
    "compare": (compute_paths, judge_compare, {"compare": draw_compare}),
    "train-mini": (compute_train_mini, judge_train_mini, {"training": draw_training}),
}


def main(argv=None):
    return common.main(Flags, STUDIES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
