"""exp_gpt2_paths: states against transformers, ids against GPT-2's tokenizer, every measure against a loop, controls of known
answer, floors by hand, a mini that learns and resumes, files from strangers, a download from a bad server, every study,
verdicts on made-up numbers."""
import functools
import http.server
import inspect
import itertools
import json
import math
import pickle
import random
import re
import shlex
import threading
import time
import urllib.request
import warnings
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common_v1 as common
import exp_gpt2_paths as exp
from conftest import stopped

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
HERE = Path(__file__).resolve().parent
GOLDEN, VOCAB = HERE / "gpt2_golden", HERE.parent.parent / "shared/data/gpt2-vocab"
real = pytest.mark.skipif(not VOCAB.exists(), reason="needs GPT-2's vocabulary")
SMOKE = ["--smoke", "--study", "lens", "--figures", "lens"]
LONG = "A state is a list of numbers. It has as many as the model is wide, and each block adds to it."
g = lambda seed=0: torch.Generator().manual_seed(seed)
randn = lambda *shape, seed=1: torch.randn(*shape, generator=g(seed), dtype=torch.float64)
far = lambda a, b: np.abs(np.asarray(a, float) - np.asarray(b, float)).max(initial=0)
same = lambda a, b: a.keys() == b.keys() and all(np.array_equal(
    a[k], b[k], equal_nan=np.asarray(a[k]).dtype.kind == "f") for k in a)
flags_of = lambda line: common.cli(exp.Flags, line.split() if isinstance(line, str) else line)
cos = lambda a, b: a @ b / math.sqrt((a @ a) * (b @ b))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Empty caches, and no network but this machine."""
    def near(request, *args, **more):
        assert request.full_url.startswith("http://127.0.0.1:"), request.full_url
        return there(request, *args, **more)
    there = urllib.request.urlopen
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT"):
            patch.delenv(name, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(urllib.request, "urlopen", near)
        yield


def small(n_layer=2, n_head=3, n_embd=12, n_positions=16, vocab_size=19, scale=.4, seed=0, **more):
    """(params, config): random float64 parameters, also of what starts at 0 or 1."""
    config = exp.Config(n_layer, n_head, n_embd, n_positions, vocab_size, **more)
    return {k: scale * randn(*shape, seed=seed + i) + ("ln" in k and k.endswith("weight"))
            for i, (k, shape) in enumerate(exp.shapes(config).items())}, config


def bytewise(merges=(), **fields):
    """A float32 Model whose tokenizer is that of bytes and these merges."""
    own = exp.tokenizer(list(merges))
    params, config = small(**{"vocab_size": len(own.ids), **fields})
    return exp.Model({k: v.float() for k, v in params.items()}, config, own, "m", torch.arange(len(own.ids)))


def files_of(model):
    """{name: bytes} of a directory in Hugging Face layout."""
    files = {}
    exp.export(model, files.__setitem__)
    return files


def put(path, files):
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def folder(path, flags):
    flags.argv = []
    path.mkdir(parents=True, exist_ok=True)
    return common.Folder(path, flags)


def pack(tensors, change=lambda header: None, spaces=0, tail=b""):
    """A safetensors file, written here and not by the script. change: what is done to its header before."""
    names = {getattr(torch, v): k for k, v in dict(
        F32="float32", F64="float64", F16="float16", BF16="bfloat16", U8="uint8", I64="int64", BOOL="bool").items()}
    header, data = {}, b""
    for name, x in tensors.items():
        raw = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    return (len(text) + spaces).to_bytes(8, "little") + text + b" " * spaces + data + tail


def unpack(path):
    """{name: float64 array} of a safetensors file of float32 tensors, read here and not by the script."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return {k: np.frombuffer(data[8 + length:][slice(*v["data_offsets"])], "<f4").reshape(v["shape"]).astype(float)
            for k, v in json.loads(data[8:8 + length]).items() if k != "__metadata__"}


def saved_by_torch(tensors, **more):
    f = BytesIO()
    torch.save(tensors, f, **more)
    return f.getvalue()


# ---- model ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, least", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_states_are_those_of_transformers(dtype, least):
    """Made with transformers' GPT2LMHeadModel, all its parameters overwritten by random ones (one embedding and one position
    nearly zero, so that eps counts), which computed in float64 what is expected: states by hooks on its blocks."""
    tensors, z = exp.read_weights(GOLDEN), np.load(GOLDEN / "expected.npz")
    config = exp.read_config(GOLDEN, tensors, 0)
    assert config == exp.Config(3, 3, 12, 24, 37, 1e-5) == exp.read_config(GOLDEN, tensors, 3)
    assert {k: tuple(x.shape) for k, x in tensors.items()} == exp.shapes(config)
    params = {k: x.to(dtype) for k, x in tensors.items()}
    for i in (0, 1):
        states = exp.forward(params, torch.tensor(z[f"tokens{i}"]), config)
        final = exp.final_norm(params, states[-1], config)
        for x, name in ((torch.stack(states), "states"), (final, "final"), (final @ exp.unembedding(params).T, "logits")):
            assert x.dtype == dtype and far(x, z[f"{name}{i}"]) < least, name


def test_no_state_sees_what_comes_later_and_rows_do_not_see_each_other():
    params, config = small()
    rows = torch.randint(19, (3, 16), generator=g())
    states = torch.stack(exp.forward(params, rows, config))
    for t in (0, 5, 15):
        other = torch.stack(exp.forward(params, rows.index_fill(1, torch.tensor(t), 18), config))
        assert far(states[:, :, :t], other[:, :, :t]) < 1e-12 and far(states[-1, :, t:], other[-1, :, t:]) > 1e-3
    for i, row in enumerate(rows):
        assert far(torch.stack(exp.forward(params, row, config)), states[:, i]) < 1e-12
        assert far(torch.stack(exp.forward(params, row[:7], config)), states[:, i, :7]) < 1e-12


def test_initial_values():
    params = exp.init(config := exp.Config(8, 2, 64, 50, 300), g())
    assert {k: tuple(p.shape) for k, p in params.items()} == exp.shapes(config)
    for name, p in params.items():
        if p.ndim == 1:
            assert (p == float(bool(re.search(r"ln_.\.weight", name)))).all(), name
        else:
            expected = .02 / (4 if "c_proj" in name else 1)  # sqrt(2 layers) = 4
            assert p.std().item() == pytest.approx(expected, rel=.05) and abs(p.mean()) < 5 * expected / p.numel() ** .5, name


@pytest.mark.parametrize("name, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_published_sizes(tmp_path, name, count):
    """Their number of parameters; their number of heads, d / 64, also where no config.json says it."""
    layers, d = exp.SIZES[name]
    shapes = exp.shapes(exp.Config(layers, 1, d, 1024, 50257))
    assert sum(map(math.prod, shapes.values())) == count
    tensors = {k: torch.zeros(()).expand(shape) for k, shape in shapes.items()}
    assert exp.read_config(tmp_path, tensors, 0) == exp.Config(layers, d // 64, d, 1024, 50257, 1e-5)
    with pytest.raises(common.Stop, match="--n-heads 3 contradicts"):
        exp.read_config(tmp_path, tensors, 3)


def test_heads_and_eps_are_those_of_the_config(tmp_path):
    config = lambda **fields: put(tmp_path / str(len(list(tmp_path.iterdir()))), {"config.json": json.dumps(fields).encode()})
    params, _ = small()
    assert exp.read_config(tmp_path, params, 6) == exp.Config(2, 6, 12, 16, 19, 1e-5)
    assert exp.read_config(config(n_head=4, layer_norm_epsilon=.01), params, 0) == exp.Config(2, 4, 12, 16, 19, .01)
    assert exp.read_config(config(n_head=4, activation_function="gelu_pytorch_tanh", n_layer=2), params, 4).n_head == 4
    for fields, heads, words in (({"n_head": 4}, 6, "contradicts"), ({}, 0, "give --n-heads"), ({"n_head": 5}, 0, "divisible"),
                                 ({"n_head": -3}, 0, "divisible"), ({"n_head": True}, 0, "divisible"), ({}, 5, "divisible"),
                                 ({"n_head": 3., "n_layer": 2}, 0, "divisible"), ({"n_head": "3"}, 0, "divisible"),
                                 *(({"n_head": 3, "layer_norm_epsilon": eps}, 0, "eps") for eps in (0., 1., -1., "x", None))):
        with pytest.raises(common.Stop, match=words):
            exp.read_config(config(**fields), params, heads)


# ---- files ----------------------------------------------------------------------------------------------------------

MODEL = bytewise(merges=[("a", "b"), ("ab", "c")])
PARAMS, FILES = MODEL.params, files_of(MODEL)
OTHER = {"lm_head.weight": PARAMS["wte.weight"].flip(0)}
MASKS = {"h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool), "h.1.attn.masked_bias": torch.tensor(-1e4)}
cast = lambda dtype: {k: v.to(dtype) for k, v in PARAMS.items()}
halves = lambda suffix, pack: {f"{n}.{suffix}": pack({k: v for i, (k, v) in enumerate(PARAMS.items()) if i % 2 == n})
                               for n in (0, 1)}
index = lambda suffix: json.dumps({"weight_map": {k: f"{i % 2}.{suffix}" for i, k in enumerate(PARAMS)}}).encode()
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


@pytest.mark.parametrize("files, expected", [
    ({SAFE: pack(PARAMS)}, PARAMS),
    ({SAFE: pack({f"transformer.{k}": v for k, v in PARAMS.items()})}, PARAMS),
    ({SAFE: pack(PARAMS | MASKS)}, PARAMS),
    ({SAFE: pack(PARAMS | {"lm_head.weight": PARAMS["wte.weight"]})}, PARAMS),
    ({SAFE: pack(PARAMS | OTHER)}, PARAMS | OTHER),
    ({SAFE: pack(PARAMS, lambda header: header.update(__metadata__={"format": "pt"}))}, PARAMS),
    ({SAFE: pack(PARAMS, spaces=1)}, PARAMS),
    ({SAFE: pack(PARAMS, spaces=2)}, PARAMS),
    *(({SAFE: pack(cast(dtype), spaces=1)}, {k: v.float() for k, v in cast(dtype).items()})
      for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    ({"model.safetensors.index.json": index("safetensors"), **halves("safetensors", pack)}, PARAMS),
    ({BIN: saved_by_torch(PARAMS)}, PARAMS),
    ({BIN: saved_by_torch(PARAMS, _use_new_zipfile_serialization=False)}, PARAMS),
    ({BIN: saved_by_torch({f"transformer.{k}": torch.nn.Parameter(v) for k, v in PARAMS.items()} | OTHER | MASKS)},
     PARAMS | OTHER),
    ({BIN: saved_by_torch(cast(torch.float16))}, {k: v.float() for k, v in cast(torch.float16).items()}),
    ({"pytorch_model.bin.index.json": index("bin"), **halves("bin", saved_by_torch)}, PARAMS),
    ({SAFE: pack(PARAMS), BIN: b"never read", "model.safetensors.index.json": b"nor this"}, PARAMS),
], ids=itertools.count())
def test_layouts(tmp_path, files, expected):
    """Names with and without prefix, masks, a second unembedding, shards, tensors that lie askew, pickles old and new."""
    there = put(tmp_path / "m", {k: v for k, v in FILES.items() if k != SAFE} | files)
    model = exp.load(str(there), "m")
    assert same(model.params, expected) and all(x.dtype == torch.float32 for x in model.params.values())
    assert model.config == MODEL.config and model.tokenizer[:2] == MODEL.tokenizer[:2] and model.name == "m"
    assert torch.equal(model.learned, MODEL.learned) and not any(x.requires_grad for x in model.params.values())
    found = exp.measure(model, torch.arange(90, 100), [0, 5], exp.Flags())
    states = torch.stack(exp.forward(expected, torch.arange(90, 95), MODEL.config))
    assert far(found["states"][:, :5], states) < 1e-6
    z = exp.final_norm(expected, states[-1], MODEL.config)
    logits = z @ expected.get("lm_head.weight", expected["wte.weight"]).T
    assert found["predicted"][:5].tolist() == logits.argmax(-1).tolist()


def test_half_precision_is_only_how_weights_are_held(tmp_path):
    there = put(tmp_path / "m", FILES | {SAFE: pack(PARAMS | OTHER)})
    model, rounded = exp.load(str(there), "m", "bfloat16"), {k: v.bfloat16().float() for k, v in (PARAMS | OTHER).items()}
    assert all(x.dtype == torch.bfloat16 for x in model.params.values())
    assert not torch.equal(rounded["h.0.ln_1.weight"], PARAMS["h.0.ln_1.weight"])
    found, expected = (exp.measure(m, torch.arange(90, 100), [0], exp.Flags()) for m in (model, model._replace(params=rounded)))
    assert found["states"].dtype == np.float32 and all(
        far(*(np.nan_to_num(x[k]) for x in (found, expected))) < 1e-5 for k in found if found[k].dtype.kind == "f")
    line = [*SMOKE, "--model", str(there), "--dtype", "bfloat16", "--text", "abcab"]
    assert exp.main([*line, "--out", str(tmp_path / "r")]) == 0
    assert np.load(tmp_path / "r" / "arrays.npz")["states"].dtype == np.float32


def test_what_is_exported_is_read_elsewhere(tmp_path):
    there = put(tmp_path / "m", FILES)
    assert same(unpack(there / SAFE), {k: v.double() for k, v in PARAMS.items()})
    for ids in ([3, 64, 258], range(259)):  # what its training has met comes back; of a directory that says nothing: all
        some = put(tmp_path / str(len(ids)), files_of(MODEL._replace(learned=torch.tensor(ids))))
        assert json.loads((some / "learned.json").read_text()) == {"ids": [*ids]}
        assert exp.load(str(some), "m").learned.tolist() == [*ids]
    (some / "learned.json").unlink()
    exp.load.cache_clear()
    assert exp.load(str(some), "m").learned.tolist() == [*range(259)]
    raw = (there / SAFE).read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0 and json.loads(FILES["config.json"])["model_type"] == "gpt2"


def test_mutated_safetensors_are_read_or_refused(tmp_path):
    """2,000 files with flipped bits, other numbers, missing or additional bytes: tensors of the file's own size, or Stop."""
    r, path, accepted, start = random.Random(0), tmp_path / "x.safetensors", 0, time.perf_counter()
    whole = pack({"a": torch.arange(6.).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(()),
                  "e": torch.ones(0, 4), "u": torch.ones(3, dtype=torch.uint8)}, spaces=3)
    length = int.from_bytes(whole[:8], "little")
    numbers = ["0", "1", "2", "6", "-1", "3.0", "1e3", "4294967296", "9223372036854775807", "1" * 30, "true", "null", "[]",
               '"a"', "NaN"]
    for n in range(2000):
        data = bytearray(whole)
        for _ in range(r.choice((1, 1, 2, 3))):
            kind, at = r.randrange(6), r.randrange(8, 8 + length)
            if kind == 0:
                data[r.randrange(len(data))] ^= 1 << r.randrange(8)
            elif kind == 1:
                data[r.randrange(min(8, len(data)))] ^= 1 << r.randrange(8)
            elif kind == 2:
                del data[r.randrange(len(data)):]
                data = data or bytearray(8)
            elif kind == 3:
                data[at:at] = bytes(r.randrange(256) for _ in range(r.randrange(1, 5)))
            else:  # swap a number of the header, and tell its length
                head = bytes(data[8:8 + length]).decode("latin1")
                spots = list(re.finditer(r"\d+", head))
                if spots:
                    spot = r.choice(spots)
                    head = head[:spot.start()] + r.choice(numbers) + head[spot.end():]
                    data = bytearray(len(head).to_bytes(8, "little") + head.encode("latin1") + bytes(data[8 + length:]))
        path.write_bytes(data)
        try:
            found = exp.read_safetensors(path)
        except common.Stop as stop:
            assert len(str(stop).splitlines()) == 1
            continue
        accepted += 1
        assert sum(x.numel() * x.itemsize for x in found.values()) == len(data) - 8 - int.from_bytes(data[:8], "little")
    assert 20 < accepted < 1000 and time.perf_counter() - start < 20


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def naive_merged(word, ranks):
    """The reference: in every round all places of the pair that was learned first."""
    parts = list(word)
    while pairs := [pair for pair in zip(parts, parts[1:]) if pair in ranks]:
        parts = joined(parts, min(pairs, key=ranks.get))
    return parts


def joined(parts, pair):
    """Every place of the pair merged, from the left."""
    out, i = [], 0
    while i < len(parts):
        both = tuple(parts[i:i + 2]) == pair
        out.append("".join(pair) if both else parts[i])
        i += 2 if both else 1
    return out


@real
def test_ids_are_those_of_gpt2():
    """The list was made with transformers 4 and 5 and tokenizers, slow and fast, which agree on it (no recent Unicode)."""
    own, merges = exp.read_tokenizer(VOCAB), (VOCAB / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    for text, ids in json.loads((GOLDEN / "tokenizer.json").read_text()):
        assert exp.encode(text, own) == ids, ascii(text)
    for text, ids in (("Hello world", [15496, 995]), ("I'm sure you'll don't I'M",
                                                      [40, 1101, 1654, 345, 1183, 836, 470, 314, 6, 44])):
        assert exp.encode(text, own) == ids
    assert exp.tokenizer([tuple(line.split()) for line in merges]).ids == json.loads((VOCAB / "vocab.json").read_text())
    assert len(own.ranks) == 50000 and own.ids[exp.END] == 50256 and exp.spelled(own)[[15496, 995, 188, 50256]].tolist() == [
        "Hello", " world", "\x00", exp.END]


def test_words_are_cut_as_gpt2_cuts_them():
    """Its white space lacks U+001C .. U+001F, its numbers have all that Unicode calls so, a contraction is in small letters."""
    words = exp.words_of().findall
    for text, expected in {
            "I'm we'LL it's": ["I", "'m", " we", "'", "LL", " it", "'s"], "a  b   c": ["a", " ", " b", "  ", " c"],
            "end  ": ["end", "  "],
            "x\n\n y": ["x", "\n\n", " y"], "a\x1cb\x1f c\x1f?": ["a", "\x1c", "b", "\x1f", " c", "\x1f?"],
            "a\x85?\u3000b": ["a", "\x85", "?", "\u3000", "b"],
            "x²½Ⅷ１２ 3": ["x", "²½Ⅷ１２", " 3"], "e\u0301 n\u200bo": ["e", "\u0301", " n", "\u200b", "o"],
            "a_b __c": ["a", "_", "b", " __", "c"],
            " ?!'re": [" ?!'", "re"], "\t\tx": ["\t", "\t", "x"], "你好,世界": ["你好", ",", "世界"],
            "don't've": ["don", "'t", "'ve"]}.items():
        assert words(text) == expected


def text_of(r, count, letters):
    return " ".join("".join(r.choice(letters) for _ in range(r.randint(1, 9))) for _ in range(count))


def test_merges_are_those_of_a_recount():
    """Sennrich et al. 2016 by counting again before every merge; of pairs as frequent the last in the alphabet."""
    for seed, letters in enumerate(("ab", "abc", "aé", "abcd'", "a")):
        text = text_of(random.Random(seed), 60, letters)
        words = Counter(tuple(exp.ALPHABET[b] for b in word.encode()) for word in exp.words_of().findall(text))
        expected = []
        for _ in range(40):
            pairs = Counter()
            for word, n in words.items():
                for pair in zip(word, word[1:]):
                    pairs[pair] += n
            if not pairs:
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            expected.append(best)
            words = Counter({tuple(joined(word, best)): n for word, n in words.items()})
        assert exp.learn_merges(text, 40) == expected and exp.learn_merges(text, 3) == expected[:3] and len(expected) > 3
        own = exp.tokenizer(expected)
        assert sorted(own.ids.values()) == list(range(257 + len(expected))) and own.ids[exp.END] == 256 + len(expected)
        for word in (text_of(random.Random(9), 1, letters * 3) * 5, "aaaaaaa", text.replace(" ", "")):
            word = "".join(exp.ALPHABET[b] for b in word.encode())
            assert exp.merged(word, own.ranks) == naive_merged(word, own.ranks)


def test_a_long_word_is_merged_in_no_time():
    ranks = exp.tokenizer(exp.learn_merges(text_of(random.Random(1), 500, "abcde"), 300)).ranks
    word, start = "".join(random.Random(2).choices("abcde", k=20_000)), time.perf_counter()
    parts = exp.merged(word, ranks)
    assert time.perf_counter() - start < 2 and "".join(parts) == word and len(parts) < 10_000
    assert exp.merged(word[:400], ranks) == naive_merged(word[:400], ranks) and exp.merged("", ranks) == []


def test_any_text_comes_back():
    r, own = random.Random(3), MODEL.tokenizer
    backwards = {i: t for t, i in own.ids.items()}
    ranges = [(0, 128), (0x80, 0x800), (0x800, 0xd800), (0xe000, 0x10000), (0x10000, 0x110000)]
    for n in range(200):
        text = "".join(chr(r.randrange(*r.choice(ranges))) for _ in range(r.randrange(30)))
        ids = exp.encode(text, own)
        assert bytes(exp.BYTES[c] for i in ids for c in backwards[i]).decode() == text and own.ids[exp.END] not in ids
    assert own.ids[exp.END] not in exp.encode(f"a{exp.END} {exp.END}", own) and exp.encode("", own) == []
    names = exp.spelled(own)
    assert names[exp.encode("abc d", own)].tolist() == ["abc", " ", "d"] and names[own.ids[exp.END]] == exp.END
    assert names[exp.encode("é", own)].tolist() == ["\\xc3", "\\xa9"] and len(names) == 259
    for surrogate in ("\ud800", "a\udfff"):
        with pytest.raises(common.Stop, match="lone surrogate"):
            exp.encode(surrogate, own)


# ---- measures: each against a loop -------------------------------------------------------------------------------------

def example(untied=False, **fields):
    """(params, config, states [L+1, T, d], numpy ln_f) of one random model and text."""
    params, config = small(**fields)
    if untied:
        params["lm_head.weight"] = randn(config.vocab_size, config.n_embd, seed=77)
    states = torch.stack(exp.forward(params, torch.randint(config.vocab_size, (11,), generator=g(3)), config))

    def normed(h):
        return (h - h.mean()) / math.sqrt(h.var() + config.eps) * params["ln_f.weight"].numpy() + params["ln_f.bias"].numpy()
    return params, config, states, normed


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_the_path_by_a_loop():
    h = example()[2]
    found, degrees = exp.walk(h), lambda a, b: math.degrees(math.acos(cos(a, b)))
    for t, path in enumerate(h.numpy().swapaxes(0, 1)):
        steps = [b - a for a, b in zip(path, path[1:])]
        length = sum(map(np.linalg.norm, steps))
        expected = {"norm": [np.linalg.norm(x) for x in path], "step": [np.linalg.norm(x) for x in steps], "length": length,
                    "straightness": np.linalg.norm(path[-1] - path[0]) / length, "turning": [degrees(*steps)],
                    "between": [degrees(a, b) for a, b in zip(path, path[1:])]}
        assert found.keys() == expected.keys() and all(far(found[k][..., t], v) < 1e-9 for k, v in expected.items())
    still = exp.walk(torch.zeros(3, 2, 4))
    assert (still["straightness"] == 0).all() and far(still["turning"], 90) < 1e-4
    assert (still["between"] - 90).abs().max() < 1e-4


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("block", [None, 4])
def test_the_lens_by_a_loop(monkeypatch, untied, block):
    params, config, states, normed = example(untied)
    if block:  # so many positions and tokens at once
        monkeypatch.setattr(exp, "max", lambda *_: block, raising=False)
        monkeypatch.setattr(exp, "PIECE", block, raising=False)
    found = exp.decode(states, params, config)
    monkeypatch.undo()
    E, W = params["wte.weight"].numpy(), params["lm_head.weight" if untied else "wte.weight"].numpy()
    for t in range(states.shape[1]):
        end = softmax(W @ normed(states[-1, t].numpy()))
        chosen = end.argmax()
        assert found["predicted"][t] == chosen and found["final_probability"][t].item() == pytest.approx(end.max())
        for l, h in enumerate(states[:, t].numpy()):
            z = normed(h)
            p, logits = softmax(W @ z), W @ z
            by = {"lens_rank": logits, "rank_cosine": [cos(h, e) for e in E], "rank_dot": E @ h,
                  "rank_cosine_final": [cos(z, e) for e in E]}
            expected = {k: sum(s > scores[chosen] for s in scores) for k, scores in by.items()} | {
                "lens_kl": sum(a * math.log(a / b) for a, b in zip(end, p)), "lens_token": logits.argmax(),
                "lens_entropy": -sum(a * math.log(a) for a in p), "lens_top1": logits.argmax() == chosen,
                "nearest": np.argmax(by["rank_cosine"])}
            assert {k for k in found} == expected.keys() | {"predicted", "final_probability"}
            assert all(far(found[k][l, t], v) < 1e-9 for k, v in expected.items())
    assert len(set(found["predicted"].tolist())) > 1 and found["lens_kl"][0].min() > 0 and (found["rank_cosine"] > 0).any()


def test_the_lens_in_float32():
    """Logits of a hundred and more, of tokens that have much in common, cost it no more than their rounding."""
    params, config = small(n_embd=128, n_head=4, vocab_size=3000, scale=.1)
    params["wte.weight"] += .3 * randn(128)
    params["ln_f.weight"] *= 4
    states = torch.stack(exp.forward(params, torch.arange(16), config))
    true = exp.decode(states, params, config)
    found = exp.decode(states.float(), {k: v.float() for k, v in params.items()}, config)
    logits = exp.final_norm(params, states, config) @ params["wte.weight"].T
    assert 100 < logits.abs().max() < 400 and true["lens_entropy"].max() > 1
    for k, v in true.items():
        assert far(found[k], v) < (2 if "rank" in k else 2e-4), k
    assert (found["lens_rank"][-1] == 0).all() and found["lens_top1"][-1].all() and far(found["lens_kl"][-1], 0) < 1e-4
    assert (found["lens_token"][-1] == found["predicted"]).all() and (found["lens_kl"] >= 0).all()


def test_cosines_by_a_loop():
    params, config, states, normed = example()
    who = {"a": torch.arange(11), "b": torch.arange(11).flip(0)}
    E = params["wte.weight"].numpy()
    of_some = E[[3, 5, 8]].mean(0)
    found = exp.cosines(states, params, config, who, torch.tensor(of_some))
    assert found.keys() == {f"cosine_{k}{end}{way}" for k in who for end in ("", "_final") for way in ("", "_centred")}
    for (name, ids), l, t in itertools.product(who.items(), range(3), range(11)):
        for end, x in (("", states[l, t].numpy()), ("_final", normed(states[l, t].numpy()))):
            for way, mean in (("", 0), ("_centred", of_some)):
                assert far(found[f"cosine_{name}{end}{way}"][l, t], cos(x, E[ids[t]] - mean)) < 1e-9
    assert exp.cosine(torch.zeros(2), torch.ones(2)) == 0


def by_svd(E, mode):
    """(scaled E minus mean, axes, variance) of a PCA of the whole matrix."""
    x = E / np.linalg.norm(E, axis=1, keepdims=True) if "on x" in mode else E / E.std(0) if "on dim" in mode else E
    x = x - x.mean(0) if "centred" in mode else x
    _, s, axes = np.linalg.svd(x, full_matrices=False)
    return x, np.array([a * np.sign(a[np.abs(a).argmax()]) for a in axes]).T, s * s / len(E)


def test_bases_by_singular_values():
    E = (randn(500, 9) @ randn(9, 9, seed=2) * torch.linspace(.2, 3, 9) + 1.5)
    found = exp.bases(E.float().double())
    assert tuple(found) == exp.MODES and len(exp.MODES) == 6 and set(exp.SPHERES) < set(exp.MODES)
    for mode, basis in found.items():
        x, axes, variance = by_svd(E.float().double().numpy(), mode)
        assert far(basis.variance, variance) < 1e-9 * variance[0] and far(basis.axes, axes) < 1e-7
        assert far(exp.coordinates(E.float(), basis), x @ axes) < 1e-6
        assert far(exp.coordinates(E.float(), basis, 3), (x @ axes)[:, :3]) < 1e-6
        rest = exp.outside(E.float(), basis)
        assert rest.shape == (500, 10) and (rest[:, 0] == 1).all() and rest[:, -1].abs().max() < 1e-9
        assert (rest.diff(dim=1) < 1e-12).all()
        for i, k in itertools.product((0, 7), range(10)):
            kept = sum((x[i] @ axes[:, j]) ** 2 for j in range(k))
            assert rest[i, k].item() == pytest.approx(1 - kept / (x[i] @ x[i]), abs=1e-6)
        # the axes are those of the second moment: explained variance is that of the coordinates
        assert far((exp.coordinates(E, basis) ** 2).mean(0), basis.variance) < 1e-5 * variance[0]
    many = exp.bases(randn(9000, 3).float())["raw centred"]  # more rows than are taken at once
    assert far(many.variance, by_svd(randn(9000, 3).float().double().numpy(), "raw centred")[2]) < 1e-9


def test_a_planted_direction_above_the_plane_is_found():
    basis = exp.bases(randn(200, 7))["raw centred"]
    up = F.normalize(basis.axes[:, 2:] @ randn(5), dim=0)
    h = basis.mean + 30 * randn(20, 2, seed=4) @ basis.axes[:, :2].T + (5 + randn(20, 1, seed=5)) * up + .1 * randn(20, 7,
        seed=6)
    found = exp.height(h, basis)
    assert abs(found @ up) > .99 and abs(found.norm() - 1) < 1e-9 and (found @ basis.axes[:, :2]).abs().max() < 1e-9
    assert abs(exp.height(2 * basis.mean - h, basis) @ found) > 1 - 1e-9  # of the states below as of those above


def test_anisotropy_by_all_pairs():
    x = randn(3, 8, 5) + randn(3, 1, 5, seed=2)
    found, pairs = exp.anisotropy(x), list(itertools.permutations(range(8), 2))
    assert found.keys() == {"anisotropy", "contribution", "standardised"}
    for l, layer in enumerate(x.numpy()):
        unit = layer / np.linalg.norm(layer, axis=1, keepdims=True)
        standard = (layer - layer.mean(0)) / layer.std(0)
        assert far(found["anisotropy"][l], np.mean([cos(layer[i], layer[j]) for i, j in pairs])) < 1e-9
        assert far(found["contribution"][l], np.mean([unit[i] * unit[j] for i, j in pairs], 0)) < 1e-9
        assert far(found["standardised"][l], np.mean([cos(standard[i], standard[j]) for i, j in pairs])) < 1e-9


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("block", [None, 4])
def test_readings_by_a_loop(monkeypatch, untied, block):
    params, config, states, normed = example(untied)
    if block:
        monkeypatch.setattr(exp, "max", lambda *_: block, raising=False)
    found = exp.readings(states[-1], params, config)
    monkeypatch.undo()
    gain, W = params["ln_f.weight"].numpy(), params["lm_head.weight" if untied else "wte.weight"].numpy()
    for t, h in enumerate(states[-1].numpy()):
        plain = (h - h.mean()) / math.sqrt(h.var() + config.eps)
        end = softmax(W @ normed(h))
        unit = h / np.linalg.norm(h)
        for i, way in enumerate((unit, unit * math.sqrt(12), plain, plain * gain, normed(h))):
            p = softmax(W @ way)
            assert far(found["reading_kl"][i, t], sum(end * np.log(end / p))) < 1e-9
            assert found["reading_top1"][i, t] == (p.argmax() == end.argmax())
    assert len(exp.READINGS) == 5 == len(found["reading_kl"]) == len(found["reading_top1"])
    assert found["reading_kl"][:4].min() > 1e-6 and not found["reading_top1"].all()


@pytest.mark.parametrize("untied", [False, True])
def test_taking_a_direction_away_by_a_loop(untied):
    params, config, states, normed = example(untied, n_embd=6, n_head=2)
    E, W = params["wte.weight"].numpy(), params["lm_head.weight" if untied else "wte.weight"].numpy()
    z = np.array([normed(h) for h in states[-1].numpy()])
    predicted = (z @ W.T).argmax(1)
    predicted[4] = predicted[5]  # two that are told from no other
    mean = E[[3, 5, 8]].mean(0)
    found = exp.selected(torch.tensor(z), params, torch.tensor(predicted), torch.tensor(mean))
    assert found.keys() == {"selected", "kept"}
    for t in range(11):
        u, v = ((E[i] - mean) / np.linalg.norm(E[i] - mean) for i in (predicted[t], predicted[(t + 1) % 11]))
        assert found["selected"][t].item() == pytest.approx((z[t] @ u) ** 2 / (z[t] @ z[t]))
        other = (W @ (z[t] - (z[t] @ u) * v)).argmax() == predicted[t] if predicted[t] != predicted[(t + 1) % 11] else math.nan
        assert np.array_equal(found["kept"][t], float(other), equal_nan=True)
    assert {*found["kept"].nan_to_num(7).tolist()} >= {1., 7.} and found["selected"].max() < 1


def test_rank_correlation():
    y, expected = np.random.default_rng(0).normal(size=(6, 5)), []
    for column in y.T:
        d = [sum(column < v) - i for i, v in enumerate(column)]
        expected.append(1 - 6 * sum(x * x for x in d) / (6 * 35))
    assert far(exp.monotone(y), expected) < 1e-12 and np.isnan(exp.monotone(y[:1])).all()
    assert exp.monotone(np.cumsum(np.abs(y), 0)).tolist() == pytest.approx([1] * 5)
    assert exp.monotone(-np.cumsum(np.abs(y[:2]), 0)).tolist() == pytest.approx([-1] * 5)
    tied = np.random.default_rng(1).integers(0, 3, (6, 40)).astype(float)  # those that tie share their mean rank
    tied[:, 7] = 2
    found = exp.monotone(tied)
    for t, column in enumerate(tied.T):
        rank = [np.mean([i for i, x in enumerate(sorted(column)) if x == v]) for v in column]
        if len(set(column)) == 1:
            assert math.isnan(found[t])
        else:
            assert found[t] == pytest.approx(np.corrcoef(range(6), rank)[0, 1], abs=1e-12)
    assert np.isnan(found).sum() == 1


@pytest.mark.parametrize("untied", [False, True])
def test_all_measures_of_a_text_in_windows(untied):
    params, config, *_ = example(untied, vocab_size=40)
    tokens, starts, learned = torch.randint(40, (13,), generator=g(3)), [0, 5, 10], torch.tensor([3, 5, 8])
    model = exp.Model(params, config, None, "m", learned)
    found = exp.measure(model, tokens, starts, flags := exp.Flags(device="cpu"))
    E, W = params["wte.weight"], params["lm_head.weight" if untied else "wte.weight"]
    for a, b in ((0, 5), (5, 10), (10, 13)):
        alone = torch.stack(exp.forward(params, tokens[a:b], config))
        assert far(found["states"][:, a:b], alone) < 1e-12
        assert far(found["final"][a:b], exp.final_norm(params, alone[-1], config)) < 1e-12
    states, z, predicted = (torch.tensor(found[k]) for k in ("states", "final", "predicted"))
    assert found["tokens"].tolist() == tokens.tolist() and found["first"].nonzero()[0].tolist() == starts
    assert found["vocab"] == 40
    assert predicted.tolist() == (z @ W.T).argmax(1).tolist()
    some, mean = {"predicted": predicted, "input": tokens, "shuffled": predicted.roll(-6)}, E[learned].mean(0)
    expected = {**exp.walk(states), **exp.decode(states, params, config), **exp.cosines(states, params, config, some, mean),
                **exp.readings(states[-1], params, config), **exp.selected(z, params, predicted, mean),
                **exp.anisotropy(states[:, ~torch.tensor(found["first"])])}
    assert all(far(np.nan_to_num(found[k]), np.nan_to_num(v.numpy())) < 1e-9 for k, v in expected.items())
    rows = range(12)
    assert far(found["loss"], [-math.log(softmax((W @ z[t]).numpy())[tokens[t + 1]]) for t in rows]) < 1e-9
    assert far(found["cosine_actual"], [[cos(h[t], E[tokens[t + 1]]) for t in rows] for h in states]) < 1e-9
    ids = [[i for i in learned.tolist() if abs(cos(states[0, t], E[i]) - found["cosine_random"][0, t]) < 1e-9]
           for t in range(13)]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == 3  # of tokens that were met
    again, other = (exp.measure(model, tokens, starts, replace(flags, seed=s)) for s in (0, 1))
    assert same(found, again) and not np.array_equal(found["cosine_random"], other["cosine_random"])
    assert all(isinstance(v, np.ndarray) for v in found.values())


# -- controls whose answer is known

def test_blocks_that_do_nothing():
    params, config = small(vocab_size=30)
    params = {k: v * 0 if k.startswith("h.") or k == "wpe.weight" else v for k, v in params.items()}
    found = exp.measure(exp.Model(params, config, None, "m", torch.arange(30)), torch.arange(9), [0], exp.Flags())
    assert far(found["length"], 0) == far(found["step"], 0) == 0 and far(found["lens_kl"], 0) < 1e-12
    assert found["lens_top1"].all()
    assert far(found["cosine_input"], 1) < 1e-12 and (found["nearest"] == np.arange(9)).all()
    assert far(found["between"], 0) < 1e-5


def test_a_state_that_is_an_embedding():
    params, config = small(n_embd=48, n_head=3, vocab_size=40, eps=0.)
    params |= {"ln_f.weight": torch.ones(48).double(), "ln_f.bias": torch.zeros(48).double()}
    E = params["wte.weight"] = F.normalize(randn(40, 48) - randn(40, 48).mean(1, keepdim=True), dim=1)
    states = torch.stack([randn(40, 48, seed=5), 7 * E])
    found = exp.decode(states, params, config)
    assert found["predicted"].tolist() == list(range(40)) == found["nearest"][-1].tolist()
    for name in ("rank_cosine", "rank_cosine_final", "rank_dot", "lens_rank", "lens_kl"):
        assert far(found[name][-1], 0) < 1e-12 and found[name][0].abs().max() > 1e-3
    cosines = exp.cosines(states, params, config, {"predicted": found["predicted"]}, E.mean(0))
    assert far(cosines["cosine_predicted"][-1], 1) < 1e-12 and far(cosines["cosine_predicted_final"][-1], 1) < 1e-12


def test_scale_and_rotation():
    """Longer states change no lens and no cosine; a rotation of states and embeddings together no coordinate but its sign."""
    params, config, states, _ = example(eps=0.)
    mean = params["wte.weight"].mean(0)
    a, b = (exp.decode(x, params, config) | exp.cosines(x, params, config, {"a": torch.arange(11)}, mean)
            for x in (states, 8 * states))
    assert all(far(a[k], b[k]) < 1e-9 for k in a)
    a, b = exp.walk(states), exp.walk(8 * states)
    assert all(far(8 * a[k], b[k]) < 1e-9 for k in ("norm", "step", "length"))
    assert all(far(a[k], b[k]) < 1e-4 for k in ("straightness", "turning", "between"))
    E, turn = randn(60, 12), torch.linalg.qr(randn(12, 12, seed=9))[0]
    before, after = exp.bases(E), exp.bases(E @ turn)
    for mode in ("raw", "raw centred", "on x", "on x centred"):
        a, b = exp.coordinates(states, before[mode]), exp.coordinates(states @ turn, after[mode])
        assert far(a.abs(), b.abs()) < 1e-9 and far(before[mode].variance, after[mode].variance) < 1e-9
        assert far(a * b, (a * b).abs()) > 1e-9 or far(a, b) < 1e-9


# ---- text and floors ------------------------------------------------------------------------------------------------

def test_floors_by_hand():
    learn, held = [0, 1, 0, 1, 0, 1, 1, 2], [0, 1, 0, 1, 0, 2]
    one = [4 / 12, 5 / 12, 2 / 12, 1 / 12]  # each token once more than it was seen
    pairs, before = Counter(zip(learn, learn[1:])), Counter(learn[:-1])
    backed = [-np.mean([math.log((pairs[a, b] + w * one[b]) / (before[a] + w)) for a, b in zip(held, held[1:])])
              for w in (.25, .5, *2. ** np.arange(12))]
    found = exp.floors(torch.tensor(learn), torch.tensor(held), 4)
    assert found == pytest.approx({"uniform": math.log(4), "bigram": min(backed),
                                   "unigram": -np.mean([math.log(one[b]) for b in held[1:]])}, rel=1e-5)
    assert backed.index(min(backed)) not in (0, 13) and all(isinstance(x, float) for x in found.values())


def test_floors_of_a_known_law():
    P = np.random.default_rng(0).dirichlet(np.ones(5) * .4, 5)
    r, chain = np.random.default_rng(1), [0]
    for u in r.random(40_000):
        chain.append(min(4, int(np.searchsorted(P[chain[-1]].cumsum(), u))))
    values, vectors = np.linalg.eig(P.T)
    share = np.real(vectors[:, values.real.argmax()])
    share /= share.sum()
    entropy = lambda p: -sum(x * math.log(x) for x in p if x > 1e-12)
    found = exp.floors(*map(torch.tensor, (chain[:30_000], chain[30_000:])), 5)
    assert found["bigram"] == pytest.approx(sum(share * list(map(entropy, P))), abs=.02)
    assert found["unigram"] == pytest.approx(entropy(share), abs=.02) and found["bigram"] < found["unigram"] - .1


def test_what_is_held_out_is_not_learned(tmp_path):
    paragraphs = [f"paragraph {i}" for i in range(450)]
    (tmp_path / "t.txt").write_text("\n\n".join([*paragraphs, *paragraphs[:50], "paragraph 3"]).replace("\n\nparagraph 7\n",
        "\n \n\nparagraph 7\n"))
    learn, held = (text.split("\n\n") for text in exp.corpus(str(tmp_path / "t.txt")))
    assert held == paragraphs[180:200] + paragraphs[380:400]
    assert learn == paragraphs[:180] + paragraphs[200:380] + paragraphs[400:]
    learn, held = (set(re.split(r"\n\s*\n", text)) for text in exp.corpus(""))
    assert len(learn) > 1000 and len(held) > 100 and not learn & held


def test_rows_overlap_by_one_token(tmp_path):
    assert exp.windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    flags = replace(learner(tmp_path), merges=5)
    own, learn, rows = exp.rows_of(flags)
    _, learn_again, held = exp.lesson(flags.file, 5)
    assert rows.shape == (len(held[:-1]) // 16, 17) and rows[:, 1:].flatten().tolist() == held[1:1 + 16 * len(rows)].tolist()
    assert torch.equal(learn, learn_again) and own.ids == exp.tokenizer(exp.learn_merges(exp.corpus(flags.file)[0], 5)).ids
    assert learn.tolist() == exp.encode(exp.corpus(flags.file)[0], own)
    assert held.tolist() == exp.encode(exp.corpus(flags.file)[1], own)
    text = replace(flags, study="lens", context=64)  # of another study: the text to look at, not to learn
    assert torch.equal(exp.rows_of(text)[1], exp.lesson("", 5)[1])


# ---- training -------------------------------------------------------------------------------------------------------

def learner(path, **fields):
    """Flags of a mini that learns lines of random words out of twelve, byte by byte."""
    r, file = random.Random(0), path / "words.txt"
    words = ["".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=r.randint(4, 7))) for _ in range(12)]
    if not file.exists():
        file.write_text("\n\n".join(" ".join(r.choices(words, k=8)) for _ in range(400)))
    return exp.Flags(**{**dict(study="train-mini", file=str(file), merges=0, n_layers=2, n_heads=2, d_model=16, context=16,
                               batch=4,
                               steps=20, compile="off"), **fields})


def test_schedule():
    """Up to 1 over a tenth of the steps, then half a cosine down to a tenth."""
    factor = [exp.schedule(torch.tensor(float(t)), 100).item() for t in range(101)]
    assert factor[:10] == pytest.approx([(t + 1) / 10 for t in range(10)]) and max(factor) == pytest.approx(1)
    assert factor[10:] == pytest.approx([.55 + .45 * math.cos(math.pi * (t - 10) / 90) for t in range(10, 101)])
    assert factor[55] == pytest.approx(.55) and factor[100] == pytest.approx(.1)
    assert exp.schedule(torch.tensor(0.), 1) == 1 and exp.schedule(torch.tensor(3.), 4) < .4


def test_the_step_is_that_of_torch_optim(tmp_path):
    flags, (params, config) = learner(tmp_path, steps=12), small()
    theirs = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
    optimiser = torch.optim.AdamW(theirs.values(), lr=1., betas=(.9, .99), eps=1e-8, weight_decay=.3)
    state, step = {"params": params, **common.adam_init(params)}, exp.step_of(flags, config)
    number = {k: torch.tensor(v, dtype=torch.float64) for k, v in (("lr", .02), ("weight_decay", .3))}
    lengths = []
    for t in range(12):
        rows = torch.randint(19, (3, 9), generator=g(t))
        z = exp.final_norm(theirs, exp.forward(theirs, rows[:, :-1], config)[-1], config)
        each = -(z @ theirs["wte.weight"].T).log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
        assert far(exp.nll(theirs, rows, config).detach(), each.detach()) < 1e-9 and each.shape == (3, 8)
        optimiser.param_groups[0]["lr"] = .02 * exp.schedule(torch.tensor(t).double(), 12).item()
        optimiser.zero_grad()
        each.mean().backward()
        size = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.values()))
        lengths.append(size)
        for p in theirs.values():
            p.grad /= max(1., size)  # at most 1 long
        optimiser.step()
        state, logs = step(state, rows, number)
        assert logs["loss"].item() == pytest.approx(each.mean().item(), abs=1e-9)
    assert all(far(state["params"][k], p.detach()) < 1e-9 for k, p in theirs.items())
    assert min(lengths) < 1 < max(lengths)
    assert far(state["params"]["wte.weight"], params["wte.weight"]) > .01


def test_a_mini_learns_more_than_pairs(tmp_path):
    flags = learner(tmp_path, steps=250, d_model=32, lr=1e-2, batch=8)
    (model,), metrics, _ = exp.train([flags], folder(tmp_path / "r", flags))
    known, loss = exp.floors(*exp.lesson(flags.file, 0)[1:], 257), metrics["eval_loss"][:, 0]
    assert abs(loss[0] - known["uniform"]) < .05 and loss[-1] < known["bigram"] - .2 < known["unigram"] - .5
    rows = exp.rows_of(flags)[2]
    assert loss[-1] == pytest.approx(exp.nll(model.params, rows, model.config).mean().item(), rel=1e-5)
    assert metrics["eval_step"].tolist() == [round(i * 250 / 16) for i in range(17)]
    assert model.learned.tolist() == exp.rows_of(flags)[1].unique().tolist()
    for k, v in exp.development(model.params, rows[:8], model.config).items():
        assert far(metrics[f"eval_{k}"][-1, 0], v) < 1e-5 and metrics[f"eval_{k}"].shape == (17, 1, 3)


def test_development_is_of_positions_after_the_first():
    params, config = small()
    rows = torch.randint(19, (4, 9), generator=g())
    found, states = exp.development(params, rows, config), torch.stack(exp.forward(params, rows[:, :-1], config))
    later = [exp.decode(states[:, i, 1:], params, config)["lens_kl"] for i in range(4)]
    assert far(found["lens_kl"], torch.cat(later, 1).median(1).values) < 1e-12
    assert found.keys() == {"lens_kl", "cosine_predicted", "cosine_predicted_final"}


def test_a_mini_draws_from_its_own_seed(tmp_path):
    """Eager runs have the same bits again and in company; each row is a piece of what is learned."""
    runs = [learner(tmp_path, seed=s) for s in (4, 5)]
    both, metrics, _ = exp.train(runs, folder(tmp_path / "both", runs[0]))
    for r, run in enumerate(runs):
        (alone,), logs, _ = exp.train([run], folder(tmp_path / f"alone{r}", run))
        assert same(alone.params, both[r].params) and np.array_equal(logs["loss"][:, 0], metrics["loss"][:, r])
    assert not same(both[0].params, both[1].params) and both[0].name == "mini"
    still = replace(runs[1], lr=0., weight_decay=0., steps=1)
    (start,), *_ = exp.train([still], folder(tmp_path / "still", still))
    assert same(start.params, exp.init(start.config, common.generator(5, "init")))


def test_two_halves_are_a_whole(tmp_path):
    flags = learner(tmp_path, snapshots=3)
    whole = exp.train([flags], folder(tmp_path / "whole", flags))
    with stopped(lambda step: step == 10):
        assert len(exp.train([flags], folder(tmp_path / "cut", flags))[1]["step"]) == 10
    again = exp.train([flags], folder(tmp_path / "cut", flags))
    assert same(whole[0][0].params, again[0][0].params) and same(whole[1], again[1])
    assert whole[2].keys() == again[2].keys() and all(same(whole[2][k], again[2][k]) for k in whole[2])


# -- the mini is trained once

def test_ctrl_c_while_the_mini_is_trained(tmp_path, monkeypatch, capsys):
    """Nothing half-trained is kept or judged; --resume ends with the same bits as a run in one piece."""
    line = [*SMOKE, "--compile", "off", "--out"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    assert exp.main([*line, str(tmp_path / "whole")]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    with stopped(lambda step: step == 2):
        assert exp.main([*line, str(tmp_path / "cut")]) == 130 and not list((tmp_path / "b").rglob("mini-*"))
    assert np.load(tmp_path / "cut" / "arrays.npz")["model"] == "mini, interrupted"
    assert exp.main([*line, str(tmp_path / "cut")]) == 2 and "--resume" in capsys.readouterr().err
    assert exp.main([*line, str(tmp_path / "cut"), "--resume"]) == 0
    kept = [sorted((p.name, p.read_bytes()) for p in next((tmp_path / c).rglob("mini-*")).iterdir()) for c in "ab"]
    assert kept[0] == kept[1] and [name for name, _ in kept[0]] == sorted(FILES)
    assert same(*(dict(np.load(tmp_path / r / "arrays.npz")) for r in ("whole", "cut")))


def test_the_mini_of_the_cache_is_the_one_that_was_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = flags_of("--smoke --compile off")
    (trained,), *_ = exp.train([flags], folder(tmp_path / "t", flags))
    models = []
    for name in ("first", "second"):
        models.append(exp.mini(flags, folder(tmp_path / name, flags)))
        assert files_of(trained) == {p.name: p.read_bytes() for p in exp.mini_folder(flags).iterdir()}
        monkeypatch.setattr(common, "train", None)  # it is not trained again
    assert all(same(m.params, trained.params) and m.config == trained.config for m in models)
    assert torch.equal(models[0].learned, trained.learned) and models[1].name == "mini"
    assert models[1].tokenizer[:2] == trained.tokenizer[:2]


def test_another_mini_has_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = flags_of("--smoke")
    changed = [replace(flags, **{k: v}) for k, v in dict(seed=1, steps=5, n_layers=3, n_heads=3, d_model=24, context=17,
                                                         merges=21,
                                                         batch=3, lr=1e-3, weight_decay=.2).items()]
    places = [exp.mini_folder(f) for f in (flags, *changed)]
    assert len(set(places)) == 11 and all(p.parent == tmp_path / "small-networks" / "gpt2" for p in places)
    assert places[0] == exp.mini_folder(replace(flags, token=3, study="lens", text="x", dtype="bfloat16", threads=2))
    assert places[0] == exp.mini_folder(replace(flags, n_heads=6)) and exp.HEADS == 6  # said or not
    for module in (exp, common):  # other code, other mini; the same code elsewhere, the same
        for end in (b"", b"\n"):
            copy = tmp_path / "copy.py"
            copy.write_bytes(Path(module.__file__).read_bytes() + end)
            with monkeypatch.context() as patch:
                patch.setattr(module, "__file__", str(copy))
                assert (exp.mini_folder(flags) == places[0]) == (not end)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        assert exp.mini_folder(flags) != places[0]
    monkeypatch.setattr(exp, "corpus", inspect.unwrap(exp.corpus))
    assert exp.mini_folder(flags) == places[0]


def test_two_trainings_at_once(tmp_path, monkeypatch):
    """The one that comes second finds the first one's mini, reads that, and leaves nothing behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags, train, other = flags_of("--smoke --compile off"), common.train, []

    def slow(*args, **more):
        monkeypatch.setattr(common, "train", train)
        other.append(exp.mini(flags, folder(tmp_path / "faster", flags)))
        return train(*args, **more)
    monkeypatch.setattr(common, "train", slow)
    mine = exp.mini(flags, folder(tmp_path / "slower", flags))
    assert same(mine.params, other[0].params) and list(exp.cache().iterdir()) == [exp.mini_folder(flags)]


# ---- files from strangers -------------------------------------------------------------------------------------------

class Code:
    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def without(*names):
    return lambda files: [files.pop(name) for name in names]


def set_to(name, data):
    return lambda files: files.update({name: data})


def config(**fields):
    return lambda files: files.update({"config.json": json.dumps(json.loads(files["config.json"]) | fields).encode()})


def weights(change, /, **more):
    """Another safetensors file: change(tensors) gives what is put in their place (None: nothing)."""
    return set_to(SAFE, pack({k: v for k, v in (PARAMS | change).items() if v is not None}, **more))


def header(name="ln_f.bias", **fields):
    return weights({}, change=lambda header: header[name].update(fields))


def vocab(change):
    def write(files):
        ids = json.loads(files["vocab.json"])
        change(ids)
        files["vocab.json"] = json.dumps(ids).encode()
    return write


def only_bin(data):
    return lambda files: (files.pop(SAFE), files.update({BIN: data}))


def indexed(data):
    return lambda files: (files.pop(SAFE), files.update({"model.safetensors.index.json": data}))


END_OF = len(pack(PARAMS)) - 8 - int.from_bytes(pack(PARAMS)[:8], "little")  # bytes of data
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 5\n"
HTML = b"<!DOCTYPE html><html>\n<body>404</body></html>"
bad_number = lambda x: PARAMS["h.1.ln_2.bias"].index_fill(0, torch.tensor(3), x)
STRANGE = {
    "no vocab": (without("vocab.json"), "/vocab.json"), "no merges": (without("merges.txt"), "/merges.txt"),
    "no weights": (without(SAFE), "neither model.safetensors nor"),
    "empty weights": (set_to(SAFE, b""), "is no safetensors file"),
    **{f"lfs {name}": (set_to(name, LFS), "git-LFS pointer") for name in (SAFE, "config.json", "vocab.json")},
    **{f"html {name}": (set_to(name, HTML), "web page") for name in (SAFE, "config.json", "vocab.json")},
    "lfs bin": (only_bin(LFS), "git-LFS pointer"), "html bin": (only_bin(HTML), "web page"),
    "html index": (indexed(HTML), "web page"),
    "lfs merges": (set_to("merges.txt", LFS), "is no pair of tokens"),
    "empty vocab": (set_to("vocab.json", b"{}"), "vocab.json"),
    "truncated": (set_to(SAFE, pack(PARAMS)[:-1]), "is no safetensors file"),
    "truncated in header": (set_to(SAFE, pack(PARAMS)[:99]), "its header would be"),
    "seven bytes": (set_to(SAFE, b"1234567"), "is no safetensors file"), "tail": (weights({}, tail=b"x"), "gaps"),
    "long header": (set_to(SAFE, (10 ** 9).to_bytes(8, "little") + b"{}"), "its header would be 1000000000 bytes long"),
    "past the end": (header(data_offsets=[END_OF, END_OF + 48]), "do not fit"),
    "overlapping": (header(data_offsets=[0, 48]), "overlap or leave gaps"),
    "negative": (header(data_offsets=[-48, 0]), "two offsets"), "float": (header(data_offsets=[0., 48.]), "two offsets"),
    "huge": (header(data_offsets=[2 ** 63, 2 ** 63 + 48]), "is no safetensors file"),
    "three offsets": (header(data_offsets=[0, 1, 2]), "two offsets"),
    "no offsets": (header(data_offsets=None), "two offsets"), "true": (header(shape=[True] * 12), "two offsets"),
    "huge shape": (header(shape=[10 ** 30]), "is no safetensors"), "negative shape": (header(shape=[-3, -4]), "two offsets"),
    "other shape": (header(shape=[3, 4]), "ln_f.bias is (3, 4)"), "dtype": (header(dtype="F8_E4M3"), "no known dtype"),
    "dtype of another size": (header(dtype="F64"), "do not fit"), "list as dtype": (header(dtype=["F32"]), "no known dtype"),
    "nothing in a huge shape": (weights({"x": torch.zeros(0)}, change=lambda h: h["x"].update(shape=[0, 10 ** 30])), ""),
    "nothing in a shape that overflows": (weights({"x": torch.zeros(0)},
                                                  change=lambda h: h["x"].update(shape=[0, 2 ** 62, 2 ** 62])), ""),
    "nothing askew": (weights({"x": torch.zeros(0)}, spaces=1), "unexpected x"),
    "header is a list": (weights({}, change=lambda h: b"[]" + b" " * 90), "no JSON object"),
    "entry is a number": (weights({}, change=lambda h: h.update(x=3)), "'x' has no known dtype"),
    "same tensor twice": (weights({}, change=lambda h: json.dumps(h).encode()[:-1] + b', "ln_f.bias": {}}'), "comes twice"),
    "deep header": (weights({}, change=lambda h: b"[" * 100_000), "is not JSON"),
    "header no UTF-8": (weights({}, change=lambda h: b'{"\xff": 1}'), "is not JSON"),
    "gap": (set_to(SAFE, pack(PARAMS | {"x": torch.ones(2)}, lambda h: h.pop("x") and None)), "gaps"),
    "missing": (weights(dict.fromkeys(("ln_f.bias", "h.0.ln_1.bias", "h.0.ln_2.bias", "h.1.ln_1.bias"))),
                "lacks h.0.ln_1.bias, h.0.ln_2.bias, h.1.ln_1.bias and 1 more"),
    "missing one": (weights({"ln_f.bias": None}), "lacks ln_f.bias"),
    "unexpected": (weights({k: torch.ones(1) for k in "dcab"}), "has unexpected a, b, c and 1 more"),
    "no embedding": (weights({"wte.weight": None}), "wte.weight or wpe.weight is missing"),
    "embedding no matrix": (weights({"wpe.weight": torch.ones(16)}), "wte.weight or wpe.weight is missing or no matrix"),
    "whole numbers": (weights({"ln_f.bias": torch.ones(12, dtype=torch.int64)}), "expected (12,) of floats"),
    "nan": (weights({"h.1.ln_2.bias": bad_number(math.nan)}), "h.1.ln_2.bias holds NaN or infinity"),
    "infinity": (weights({"h.1.ln_2.bias": bad_number(-math.inf)}), "h.1.ln_2.bias holds NaN or infinity"),
    "too large": (weights({"h.1.ln_2.bias": bad_number(1.).double() * 1e300}), "h.1.ln_2.bias holds NaN or infinity"),
    "another unembedding": (weights({"lm_head.weight": torch.ones(5, 12)}), "lm_head.weight is (5, 12)"),
    "comes twice": (weights({"transformer.ln_f.bias": torch.ones(12)}), "comes twice"),
    "another model": (config(model_type="llama"), "another architecture than GPT-2: model_type 'llama'"),
    "another activation": (config(activation_function="relu"), "activation_function 'relu'"),
    "layer scale": (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True"),
    "other layers": (config(n_layer=3), "n_layer 3 (weights: 2)"),
    "other width": (config(n_embd=24), "n_embd 24 (weights: 12)"),
    "other positions": (config(n_positions=1024), "n_positions 1024 (weights: 16)"), "heads": (config(n_head=5), "divisible"),
    "config is a list": (set_to("config.json", b"[]"), "no JSON object"),
    "config twice": (set_to("config.json", b'{"n_head": 3, "n_head": 4}'), "a key comes twice"),
    "config no UTF-8": (set_to("config.json", b'{"n_head\xff": 3}'), "is not JSON"),
    "deep config": (set_to("config.json", b'{"a":' * 100_000), "is not JSON"),
    "config cut": (set_to("config.json", b'{"n_h'), "is not JSON"),
    "vocabulary": (vocab(lambda ids: ids.update(x1=259)), "vocab.json has 260 tokens, wte.weight 259"),
    "id too large": (vocab(lambda ids: ids.update(a=259)), "the ids must be 0 .. 258"),
    "id twice": (vocab(lambda ids: ids.update(a=3)), "the ids must be"),
    "id negative": (vocab(lambda ids: ids.update(a=-1)), "the ids must be"),
    "id text": (vocab(lambda ids: ids.update(a="64")), "the ids must be"),
    "id true": (vocab(lambda ids: ids.update({'"': True})), "the ids must be"),
    "vocab twice": (set_to("vocab.json", b'{"a": 0, "a": 1}'), "a key comes twice"),
    "deep vocab": (set_to("vocab.json", b"[" * 100_000), "is not JSON"),
    "vocab list": (set_to("vocab.json", b"[1]"), "no JSON object"),
    "byte lacking": (vocab(lambda ids: ids.update(zz=ids.pop("Q"))), "lacks the byte 81 ('Q')"),
    "CRLF": (set_to("merges.txt", b"#version: 0.2\r\na b\r\n"), "Windows line ends"),
    "one part": (set_to("merges.txt", b"ab\n"), "'ab' is no pair"),
    "three parts": (set_to("merges.txt", b"a b c\n"), "'a b c' is no pair"),
    "merges no UTF-8": (set_to("merges.txt", b"a \xff\n"), "no UTF-8"),
    "union lacking": (set_to("merges.txt", b"a b\nx y\n"), "'x y' is no pair"),
    "path in index": (indexed(json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode()),
                      "has no weight_map of files beside it"),
    "absolute path": (indexed(json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode()),
                      "has no weight_map of files beside it"),
    "no map": (indexed(b"{}"), "has no weight_map"),
    "number in map": (indexed(b'{"weight_map": {"a": 3}}'), "has no weight_map"),
    "parent in map": (indexed(b'{"weight_map": {"a": ".."}}'), ""),
    "shard lacking": (indexed(b'{"weight_map": {"a": "bb"}}'), "/m/bb"),
    "empty map": (indexed(b'{"weight_map": {}}'), "it has no tensor"), "a text": (only_bin(b"hello"), "holds no weights"),
    "truncated bin": (only_bin(saved_by_torch(PARAMS)[:3000]), "holds no weights"),
    "a list": (only_bin(saved_by_torch([1, 2])), "holds no weights"),
    "a number beside": (only_bin(saved_by_torch(PARAMS | {"x": 3})), "no weights"),
    "complex": (only_bin(saved_by_torch(PARAMS | {"ln_f.bias": torch.ones(12) * 1j})), "expected (12,) of floats"),
    "sparse": (only_bin(saved_by_torch(PARAMS | {"wpe.weight": torch.ones(16, 12).to_sparse()})), ""),
    "without storage": (only_bin(saved_by_torch(PARAMS | {"wpe.weight": torch.ones(16, 12, device="meta")})), ""),
    **{f"learned {n}": (set_to("learned.json", data), words) for n, (data, words) in enumerate((
        (HTML, "web page"), (b"[1, 2]", "no JSON object"), (b"{}", "no list of tokens"),
        (b'{"ids": [3]}', "no list of tokens"), (b'{"ids": [1, true]}', "no list of tokens"),
        (b'{"ids": [1, 259]}', "no list of tokens"), (b'{"ids": [1, -1]}', "no list of tokens"),
        (b'{"ids": [1, [2]]}', "no list of tokens"), (b'{"ids": "12"}', "no list of tokens")))},
    "many blocks": (lambda files: (config(n_layer=10 ** 5)(files), weights({"h.99999.ln_1.bias": torch.ones(12)})(files)),
                    ""),
}


def refused(capsys, tmp_path, *line):
    """The one line on stderr with which the script ends; nothing was made."""
    assert exp.main([*line, "--out", str(tmp_path / "r")]) == 2 and not (tmp_path / "r").exists()
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("exp_gpt2_paths.py: ")
    return error


@pytest.mark.parametrize("name", STRANGE)
def test_files_from_strangers(tmp_path, capsys, name):
    change, words = STRANGE[name]
    files = dict(FILES)
    change(files)
    start = time.perf_counter()
    assert words in refused(capsys, tmp_path, *SMOKE, "--model", str(put(tmp_path / "m", files)))
    assert time.perf_counter() - start < 2


def test_a_pickle_runs_no_code(tmp_path, capsys):
    code = Code()
    code.path = str(tmp_path / "ran")
    for n, data in enumerate((pickle.dumps({"wte.weight": code}), saved_by_torch(PARAMS | {"x": code}))):
        files = {k: v for k, v in FILES.items() if k != SAFE} | {BIN: data}
        assert "holds no weights, or code beside them" in refused(capsys, tmp_path, *SMOKE, "--model",
                                                                  str(put(tmp_path / f"m{n}", files)))
    assert not (tmp_path / "ran").exists()


def test_finite_weights_whose_states_are_not(tmp_path, capsys):
    """Weights so large that states overflow: a run, or one line; no traceback."""
    for name in ("h.1.mlp.c_proj.weight", "wte.weight", "wpe.weight"):
        there = put(tmp_path / name, FILES | {SAFE: pack(PARAMS | {name: PARAMS[name] * 1e38 / PARAMS[name].abs().max()})})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = exp.main([*SMOKE, "--model", str(there), "--out", str(tmp_path / f"r{name}")])
        error = capsys.readouterr().err.strip().splitlines()
        assert status == 0 or status == 2 and len(error) == 1


def test_states_that_are_not_finite_are_refused(tmp_path, capsys):
    """Each weight is finite, and so are the states; their squares are not."""
    huge = {k: v * 1e30 if k in ("wte.weight", "wpe.weight") else v for k, v in PARAMS.items()}
    there = put(tmp_path / "m", FILES | {SAFE: pack(huge)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert exp.main([*SMOKE, "--model", str(there), "--text", "abcd", "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "the states of this text are not finite" in error
    assert not (tmp_path / "r" / "arrays.npz").exists()


@pytest.mark.parametrize("line, words", [
    ("--model nowhere", "nowhere is no directory; --model takes mini, untrained, gpt2"),
    ("--model {m}/config.json", "is no directory"),
    ("--model gpt2", "gpt2 is neither in"), ("--model gpt2-xl", "--download fetches it"),
    ("--study compare --other gpt2", "gpt2 is neither in"),
    ("--model {m} --n-heads 5", "--n-heads 5 contradicts"), ("--n-heads 5", "--d-model 12 must be divisible by --n-heads 5"),
    ("--model {m} --steps 3", "--steps has no part in --study lens of "),
    ("--model {m} --d-model 12", "--d-model has no part in --study "),
    ("--runs 2", "--runs has no part in --study lens of mini"), ("--sweep steps=1,2", "--sweep has no part in --study "),
    ("--snapshots 3", "--snapshots has no part in --study "),
    ("--study train-mini --sweep steps=1,2", "--sweep steps=1,2: use --name"),
    ("--study compare --other mini", "--other mini is the model itself"),
    ("--study compare --model untrained", "--other untrained is the model itself"),
    ("--study compare --model {m} --other {m}", "--other {m} is the model itself"),
    ("--other {m}", "--other has no part in --study "),
    ("--study paths --other untrained", "--other has no part in --study paths of "),
    ("--study train-mini --model mini", "--model has no part in --study train-mini of "),
    ("--study train-mini --text a", "--text has no part in --study "),
    ("--model {m} --text {empty}", "empty"), ("--model {m} --file {m}/empty.txt", "the text has 0 tokens"),
    ("--model {m} --text a", "the text has 1 token: a path"), ("--model {m} --text abc", "the text has 1 token: a path"),
    ("--model {m} --text {long}", "tokens, {m} has 16 positions: --window 16 cuts it"),
    ("--text ab --file {m}/empty.txt", "not both"),
    ("--model {m} --window 17", "--window 17 is more than the 16 positions"),
    ("--window 17", "--window 17 is more than the 16 positions"),
    ("--window 1", "--window 1"), ("--model {m} --window -1", "--window -1 must be at least 0"),
    ("--model {m} --text abcd --token 2", "--token 2: the text has 2 tokens"),
    ("--model {m} --text abcd --token -3", "--token -3: the text has 2"),
    ("--token 1000", "--token 1000: the text has"), ("--file nowhere.txt", "cannot read nowhere.txt"),
    ("--file {m}", "cannot read"),
    ("--file {m}/latin.txt", "is no UTF-8 text (byte 3)"), ("--study train-mini --file {m}/empty.txt",
                                                            "too few for --context 16"),
    ("--study train-mini --file {m}/latin.txt", "is no UTF-8 text"), ("--dtype float16", "is not one of float32, bfloat16"),
    ("--study compare --model {m} --other nowhere", "nowhere is no directory"), ("--d-model 0", "must be at least 3"),
    ("--study paths --figures sky", "the study paths draws path, cosines"),
    ("--model {m} --figures plane", "the study lens draws"),
])
def test_bad_flags_are_one_line(tmp_path, capsys, line, words):
    m = put(tmp_path / "m", FILES | {"empty.txt": b"", "latin.txt": "caf\xe9".encode("latin1")})
    words = words.replace("{m}", str(m))
    parts = [p.format(m=m, empty="", long=LONG) for p in line.split()]
    study = ["--smoke", *(() if "--study" in parts else ("--study", "lens"))]
    assert words in refused(capsys, tmp_path, *study, *parts)


def test_a_model_that_fits_in_no_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exp, "available", lambda: 2 ** 30 + sum(2 * x.numel() for x in PARAMS.values()))
    there = put(tmp_path / "m", FILES)
    assert "--dtype bfloat16" in refused(capsys, tmp_path, *SMOKE, "--model", str(there))
    assert exp.load(str(there), "m", "bfloat16").config == MODEL.config


def test_what_is_right_is_not_refused(tmp_path):
    """Five heads though a mini's default width is not divisible by them; no config.json; a token that is not made of bytes."""
    model = bytewise(n_embd=10, n_head=5)
    files = files_of(model)
    files.pop("config.json")
    there = put(tmp_path / "five", files | {"merges.txt": b"", "README.md": b"hello", "generation_config.json": b"{}"})
    assert exp.main([*SMOKE, "--model", str(there), "--n-heads", "5", "--text", "abc", "--out", str(tmp_path / "r")]) == 0
    states = np.load(tmp_path / "r" / "arrays.npz")["states"]
    assert far(states, torch.stack(exp.forward(model.params, torch.tensor([64, 65, 66]), model.config))) < 1e-5
    ids = MODEL.tokenizer.ids | {"\u2581the": 259}
    other = bytewise(vocab_size=260)._replace(tokenizer=exp.Tokenizer(ids, MODEL.tokenizer.ranks, {}))
    assert exp.main([*SMOKE, "--model", str(put(tmp_path / "foreign", files_of(other))), "--text", "abcd", "--out",
                     str(tmp_path / "f")]) == 0


@pytest.mark.parametrize("fields", [dict(n_layer=1), dict(n_embd=3), dict(n_embd=2, n_head=1), dict(n_embd=1, n_head=1)],
                         ids=str)
def test_the_smallest_models(tmp_path, monkeypatch, capsys, fields):
    """One block or hardly any dimension: a run, or one line before anything is made."""
    monkeypatch.setattr(common, "save_figure", lambda folder, name, figure: figure)
    there = put(tmp_path / "m", files_of(bytewise(**fields)))
    status = exp.main(["--smoke", "--model", str(there), "--text", "some text", "--out", str(tmp_path / "r")])
    exp.plt.close("all")
    assert status == 0 or not (tmp_path / "r").exists() and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text, window", [
    ("He", 0), ("Hello", 2), ("Hello!", 5), ("\x00$\\frac{^_ \x1b", 0), ("日本語 ∂😀", 8)], ids=ascii)
def test_the_shortest_and_strangest_texts(tmp_path, text, window):
    there = put(tmp_path / "m", FILES)
    line = ["--smoke", "--study", "paths", "--model", str(there), "--text", text, "--window", str(window), "--figures", "path"]
    assert exp.main([*line, "--out", str(tmp_path / "r")]) == 0
    z = np.load(tmp_path / "r" / "arrays.npz")
    assert z["tokens"].tolist() == exp.encode(text, MODEL.tokenizer)
    assert z["first"].nonzero()[0].tolist() == list(range(0, len(z["tokens"]), window or 99))


# ---- download -------------------------------------------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; what it does wrong, and what it was asked, are attributes."""
    def __init__(self):
        self.files, self.etag, self.cut, self.ranges, self.extra, self.asked, self.sent = {}, '"v1"', None, True, 0, [], 0
        self.other_range = False
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, have = self.server, 0
        server.asked.append((self.path, self.headers["Range"], self.headers["If-Range"]))
        if self.path not in server.files:
            return self.send_error(404)
        data = server.files[self.path]
        if server.ranges and self.headers["Range"] and self.headers["If-Range"] in (None, server.etag):
            have = 0 if server.other_range else int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if have >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {have}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.extra is not None:
            self.send_header("Content-Length", str(len(data) - have + server.extra))
        self.end_headers()
        part = data[have:have + server.cut] if server.cut is not None else data[have:]
        server.sent += len(part)
        self.wfile.write(part)


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        server.files["/f"] = random.Random(0).randbytes(50_000)
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server
        server.shutdown()


def test_a_broken_download_goes_on(tmp_path, server):
    target, part = tmp_path / "f", tmp_path / "f.part"
    for cut, size in ((20_000, 20_000), (10_000, 30_000)):
        server.cut = cut
        with pytest.raises(common.Stop, match=f"{size} of 50000") as stop:
            exp.fetch(f"{server.url}/f", target)
        assert len(str(stop.value).splitlines()) == 1 and part.read_bytes() == server.files["/f"][:size] and not target.exists()
    server.cut = None
    exp.fetch(f"{server.url}/f", target)
    assert target.read_bytes() == server.files["/f"] and server.sent == 50_000
    assert [r for _, *r in server.asked] == [[None, None], ["bytes=20000-", '"v1"'], ["bytes=30000-", '"v1"']]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("change", [
    lambda server: setattr(server, "etag", '"v2"'), lambda server: setattr(server, "ranges", False),
    lambda server: server.files.update({"/f": server.files["/f"][:20_000]}), lambda server: setattr(server, "etag", ""),
    lambda server: setattr(server, "other_range", True)], ids=["other ETag", "no ranges", "shorter", "no ETag", "other range"])
def test_a_download_that_cannot_go_on_starts_over(tmp_path, server, change):
    server.cut = 20_000
    with pytest.raises(common.Stop):
        exp.fetch(f"{server.url}/f", tmp_path / "f")
    server.files["/f"] = random.Random(1).randbytes(50_000)  # another file: none of the old may be kept
    change(server)
    server.cut = None
    exp.fetch(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.files["/f"] and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("etag", ["", '"v1"'])
def test_a_part_without_its_tag_is_not_trusted(tmp_path, server, etag):
    (tmp_path / "f.part").write_bytes(b"x" * 70)
    if not etag:
        (tmp_path / "f.etag").write_text("")
    server.etag = etag
    exp.fetch(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.files["/f"] and server.asked[0][1] is None


def test_a_server_that_lies_or_is_gone(tmp_path, server):
    url, part = f"{server.url}/f", tmp_path / "f.part"
    for extra, words in ((7, "broke off after 50000 of 50007"), (None, "does not say how long")):
        server.extra = extra
        with pytest.raises(common.Stop, match=words):
            exp.fetch(url, tmp_path / "f")
        assert not (tmp_path / "f").exists()
    server.extra = 0
    part.unlink(missing_ok=True)
    exp.fetch(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.files["/f"]
    for url, words in ((f"{server.url}/g", "404"), ("http://127.0.0.1:1/f", "goes on from what has come")):
        with pytest.raises(common.Stop, match=words) as stop:
            exp.fetch(url, tmp_path / "g")
        assert len(str(stop.value).splitlines()) == 1 and not (tmp_path / "g").exists()


def test_a_name_is_looked_up_then_downloaded(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = [*SMOKE, "--model", "gpt2-medium", "--text", "abcd", "--download"]
    assert "404" in refused(capsys, tmp_path, *line)
    server.files = {f"/openai-community/gpt2-medium/resolve/main/{k}": v for k, v in FILES.items()}
    server.cut = 1000
    assert exp.main([*line, "--out", str(tmp_path / "r")]) == 2 and not (tmp_path / "r").exists()
    server.cut, server.asked = None, []
    assert exp.main([*line, "--out", str(tmp_path / "r")]) == 0
    there = tmp_path / "cache" / "small-networks" / "gpt2" / "gpt2-medium"
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {k: FILES[k] for k in exp.FILES}
    assert [path.split("/")[-1] for path, *_ in server.asked] == [*exp.FILES][1:]  # config.json had come before
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert {c["id"] for c in summary["claims"]} == {f"gpt2-medium-{k}" for k in SENTENCES}
    assert all(c["statement"].startswith("gpt2-medium: ") and c["holds"] is None for c in summary["claims"])
    asked = len(server.asked)
    assert exp.main([*line[:-1], "--out", str(tmp_path / "again")]) == 0 and len(server.asked) == asked
    assert same(*(dict(np.load(tmp_path / r / "arrays.npz")) for r in ("r", "again")))


@pytest.mark.parametrize("variable, repository", [
    ("HF_HOME", "hub/models--gpt2"), ("HF_HOME", "hub/models--openai-community--gpt2"), ("HF_HUB_CACHE", "models--gpt2"),
    ("XDG_CACHE_HOME", "huggingface/hub/models--gpt2")])
def test_the_cache_of_hugging_face(tmp_path, monkeypatch, variable, repository):
    """Snapshots are links to blobs; no network is asked."""
    monkeypatch.setattr(urllib.request, "urlopen", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "else"))
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    blobs, snapshot = put(tmp_path / "home" / repository / "blobs",
                          FILES), tmp_path / "home" / repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for name in FILES:
        (snapshot / name).symlink_to(blobs / name)
    assert exp.find("gpt2", True) == snapshot and same(exp.get("gpt2", exp.Flags()).params, PARAMS)
    with pytest.raises(common.Stop, match="gpt2-large is neither in"):
        exp.find("gpt2-large", False)
    assert exp.get("gpt2", exp.Flags()).name == "gpt2"


def test_which_snapshot_is_taken(tmp_path, monkeypatch):
    """One that is whole: refs/main names it, or it is any; else what was downloaded."""
    monkeypatch.setattr(urllib.request, "urlopen", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository, own = tmp_path / "models--gpt2", put(exp.cache() / "gpt2", {k: FILES[k] for k in exp.FILES})
    whole = {k: FILES[k] for k in ("config.json", "vocab.json", "merges.txt")}
    assert exp.find("gpt2", True) == own
    for name in (*whole, SAFE):  # each of them lacks one
        put(repository / "snapshots" / f"no {name}", {k: v for k, v in (whole | {SAFE: b""}).items() if k != name})
    assert exp.find("gpt2", True) == own
    for name in ("b", "c", "a"):
        put(repository / "snapshots" / name, whole | {SAFE: b""})
    for main in ("a", "c", "b"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(main + "\n")
        assert exp.find("gpt2", False) == repository / "snapshots" / main
    (repository / "refs" / "main").write_text(f"no {SAFE}")
    assert exp.find("gpt2", False).name in ("a", "b", "c")
    for name, file in zip(exp.SIZES, (SAFE, BIN, f"{SAFE}.index.json", f"{BIN}.index.json")):
        there = put(tmp_path / f"models--openai-community--{name}" / "snapshots" / "x", whole | {file: b""})
        assert exp.find(name, False) == there


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "mini", "untrained"])
def test_a_directory_never_speaks_for_gpt2(tmp_path, name):
    there = put(tmp_path / name, FILES)
    assert exp.get(str(there), flags_of(["--smoke", "--model", str(there)])).name == f"directory {name}"
    assert exp.main([*SMOKE, "--model", str(there), "--text", "abcd", "--out", str(tmp_path / "r")]) == 0
    claims = json.loads((tmp_path / "r" / "summary.json").read_text())["claims"]
    assert {c["id"] for c in claims} == {f"gpt2-{k}" for k in SENTENCES} | {
        f"directory-{name}-{k}" for k in SENTENCES - {"three-components"}}
    assert all((c["measured"] == "needs --model gpt2") == c["statement"].startswith("GPT-2: ") for c in claims)
    assert all(c["statement"].startswith((f"directory {name}: ", "GPT-2: ")) and c["holds"] is None for c in claims)


# ---- studies --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """study -> (its run folder, its arrays); each is run once."""
    @functools.lru_cache
    def run(study):
        path = tmp_path_factory.mktemp("runs") / study
        assert exp.main(["--smoke", "--study", study, "--out", str(path)]) == 0
        return path, dict(np.load(path / "arrays.npz"))
    return run


CLAIMS = {"paths": 39, "lens": 39, "sphere": 39, "compare": 20, "train-mini": 1}


@pytest.mark.parametrize("study", list(exp.STUDIES))
def test_smoke(ran, monkeypatch, study):
    out, arrays = ran(study)
    summary, figures = json.loads((out / "summary.json").read_text()), exp.STUDIES[study][2]
    assert len(summary["claims"]) == CLAIMS[study] == len({c["id"] for c in summary["claims"]})
    assert all(c["holds"] is None and c["source"] for c in summary["claims"])  # in four steps nothing can be said
    drawn = {p.stem: p for p in out.iterdir() if p.suffix in (".png", ".gif")}
    assert set(drawn) == set(figures) and all(p.stat().st_size > 1000 for p in drawn.values())
    assert {"config.json", "metrics.npz", "arrays.npz", "summary.csv", "checksums.json",
            "script.py"} <= {p.name for p in out.iterdir()}
    row, *more = summary["runs"]
    if study == "train-mini":
        assert row == {"seed": 0, "diverged": False, "loss": pytest.approx(arrays["loss"][0])}
        assert arrays["eval_loss"][0, -1] == arrays["loss"][0]
    else:
        for a, row in zip((arrays, exp.other(arrays)), summary["runs"]):
            later = ~a["first"]
            expected = {"loss": a["loss"].mean(), "lens_kl_half": np.median(a["lens_kl"][1, later])} | {k: np.median(
                a[k][-1, later]) for k in ("norm", "cosine_predicted", "cosine_predicted_final", "rank_cosine_final")}
            assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-6) and not row["diverged"]
        assert len(more) == (study == "compare") and (study == "compare" or Counter(
            c["id"].split("-")[0] for c in summary["claims"]) == {"gpt2": 20, "mini": 19})
    for name in ("train", "load", "forward"):
        monkeypatch.setattr(exp, name, None)  # no model is needed
    first = list(figures)[0]
    drawn[first].unlink()
    assert exp.main(["--smoke", "--study", study, "--out", str(out), "--plot-only", "--figures", first]) == 0
    assert drawn[first].exists()
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_stranger_recomputes_a_path_from_its_folder(ran):
    """Arrays have the shapes that are promised, and what the states and the model's file say in plain numpy."""
    out, a = ran("paths")
    (T,), L1, d, V, modes = a["tokens"].shape, 3, 12, 277, 6
    shapes = {"states": (L1, T, d), "final": (T, d), "lens_kl": (L1, T), "lens_top1": (L1, T), "cosine_predicted": (L1, T),
              "cosine_predicted_final": (L1, T), "cosine_actual": (L1, T - 1), "norm": (L1, T), "pca_path": (L1, T, 3),
              "pca_final": (T, 3),
              "explained_variance": (modes, d), "pca_tokens": (V, 3), "token_text": (T,), "predicted_text": (T,),
              "lens_text": (L1, T),
              "embedding_norm": (3,), "spike_dot": (2, V), "spike_cosine": (2, V), "probability": (V,),
              "outside": (L1, 3, d + 1),
              "outside_centred": (3, d + 1), "outside_at": (L1, T), "plane_path": (L1, T, 3), "plane_tokens": (V, 3),
              "plane_layers": (L1, T),
              "sphere_tokens": (2, V, 3), "sphere_path": (2, L1, 3), "sphere_final": (2, 3), "sphere_angle": (2, T),
              "full_angle": (2, T),
              "reading_kl": (5, T), "reading_top1": (5, T), "kept": (T,), "selected": (T,),
              "sphere_random": (2, T), "loss": (T - 1,), "plane_direction": (d,), "learned": (V,)}
    assert {k: a[k].shape for k in shapes} == shapes and 100 < T <= 128
    assert a["first"].nonzero()[0].tolist() == list(range(0, T, 16))
    flags = flags_of("--smoke")
    p, tokens, text = unpack(exp.mini_folder(flags) / SAFE), a["tokens"], exp.corpus("")[1]
    assert "".join(a["token_text"]) == text[:len("".join(a["token_text"]))] and a["token"] == T - 1
    E, h = p["wte.weight"], a["states"].astype(float)
    assert far(h[0], E[tokens] + p["wpe.weight"][np.arange(T) % 16]) < 1e-6
    normed = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1,
        keepdims=True) + 1e-5) * p["ln_f.weight"] + p["ln_f.bias"]
    assert far(a["final"], normed(h[-1])) < 1e-5
    log = normed(h) @ E.T
    log -= np.log(np.exp(log).sum(-1, keepdims=True))
    predicted = a["predicted"]
    assert far(a["lens_kl"], (np.exp(log[-1]) * (log[-1] - log)).sum(-1)) < 1e-5
    assert (a["lens_rank"][-1] == 0).all() and a["lens_top1"][-1].all()
    assert far(a["loss"], -log[-1, range(T - 1), tokens[1:]]) < 1e-5 and (predicted == log[-1].argmax(-1)).mean() > .98
    assert far(a["norm"], np.sqrt((h * h).sum(-1))) < 1e-5
    cosines = lambda x, e: (x * e).sum(-1) / np.sqrt((x * x).sum(-1) * (e * e).sum(-1))
    assert far(a["cosine_predicted"], cosines(h, E[predicted])) < 1e-5
    assert far(a["cosine_predicted_final"], cosines(normed(h), E[predicted])) < 1e-5
    assert far(a["cosine_actual"], cosines(h[:, :-1], E[tokens[1:]])) < 1e-5
    assert a["explained_variance"].sum(1) == pytest.approx([1] * 6) and (np.diff(a["explained_variance"]) < 1e-9).all()


def test_what_is_drawn_of_a_path(ran):
    """The rest of `look` by loops over a model whose embeddings are not round."""
    _, a = ran("paths")
    p = unpack(exp.mini_folder(flags_of("--smoke")) / SAFE)
    E, h, z, i = p["wte.weight"], a["states"].astype(float), a["final"].astype(float), int(a["token"])
    K = E[exp.lesson("", 20)[1].unique()]  # the embeddings of the tokens that its text has: the others stay as they began
    later, pca, middle = ~a["first"], {mode: by_svd(K, mode) for mode in exp.MODES}, K.mean(0)
    assert far(a["explained_variance"], [v / v.sum() for *_, v in pca.values()]) < 1e-5
    _, axes, variance = pca["raw centred"]
    for name, x in (("pca_path", h), ("pca_final", z), ("pca_tokens", E)):
        assert far(a[name], (x - middle) @ axes[:, :3]) < 1e-4
    assert far(a["embedding_norm"], np.quantile(np.linalg.norm(K, axis=1), [.25, .5, .75])) < 1e-6
    unit = K / np.linalg.norm(K, axis=1, keepdims=True)
    assert far(a["embedding_anisotropy"], ((unit @ unit.T).sum() - len(K)) / (len(K) * (len(K) - 1))) < 1e-6
    assert far(a["spike_dot"], [E @ h[-1, i], E @ z[i]]) < 1e-5 and far(a["probability"], softmax(E @ z[i])) < 1e-6
    assert far(a["spike_cosine"], [[cos(e, x) for e in E] for x in (h[-1, i], z[i])]) < 1e-5
    energy = ((h - middle) @ axes) ** 2
    share = 1 - np.concatenate([0 * energy[..., :1], energy.cumsum(-1)], -1) / energy.sum(-1, keepdims=True)
    assert far(a["outside"], np.quantile(share[:, later], [.25, .5, .75], axis=1).swapaxes(0, 1)) < 1e-4
    k = next(k for k in range(13) if variance[:k].sum() >= .9 * variance.sum())
    assert a["outside_k"] == k and far(a["outside_at"], share[..., k]) < 1e-4
    own = ((K - middle) @ axes) ** 2
    assert far(a["outside_limit"], np.quantile(1 - own[:, :k].sum(1) / own.sum(1), .95)) < 1e-4
    centred = ((h[-1, later] - h[-1, later].mean(0)) @ axes) ** 2
    centred = 1 - np.concatenate([0 * centred[:, :1], centred.cumsum(1)], 1) / centred.sum(1, keepdims=True)
    assert far(a["outside_centred"], np.quantile(centred, [.25, .5, .75], axis=0)) < 1e-4
    places = np.flatnonzero(later)
    up, fitted = a["plane_direction"], (h[-1, places[::2]] - middle) @ axes[:, 2:]
    _, _, best = np.linalg.svd(fitted)
    assert a["plane_other"].tolist() == places[1::2].tolist() and abs(up @ axes[:, 2:] @ best[0]) > .9999
    assert (h[-1, i] - middle) @ up > 0  # the drawn path goes up
    frame = np.stack([axes[:, 0], axes[:, 1], up], 1)
    assert far(a["plane_path"], (h - middle) @ frame) < 1e-4 and far(a["plane_tokens"], (E - middle) @ frame) < 1e-4
    along = lambda x: ((x - middle) @ up) ** 2 / ((x - middle) ** 2).sum(-1)
    assert far(a["plane_layers"], along(h)) < 1e-4
    assert far(a["plane_embedding"], np.quantile(along(K), .5, method="lower")) < 1e-4
    fits = np.ones((len(z), len(E)), bool)  # [T, V] the tokens that may be the random one
    for n, mode in enumerate(exp.SPHERES):
        _, axes, _ = pca[mode]
        scaled = (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)) if "on x" in mode else (lambda x: x / K.std(0))
        at = lambda x: (scaled(x) - scaled(K).mean(0)) @ axes
        ball = lambda x: at(x)[..., :3] / np.linalg.norm(at(x)[..., :3], axis=-1, keepdims=True)
        for name, x in (("sphere_tokens", E), ("sphere_path", h[:, i]), ("sphere_final", z[i])):
            assert far(a[name][n], ball(x)) < 1e-3, name
        end, aim = at(h[-1]), at(E[a["predicted"]])
        for name, depth in (("sphere_angle", 3), ("full_angle", 12)):
            assert far(a[name][n], [np.degrees(np.arccos(cos(x[:depth], y[:depth]))) for x, y in zip(end, aim)]) < .1
        angles = np.degrees(np.arccos(np.clip([[cos(x[:3], y[:3]) for y in at(E)] for x in end], -1, 1)))
        fits = fits & (np.abs(angles - a["sphere_random"][n][:, None]) < 1e-2)
    _, learn, _ = exp.lesson("", 20)
    assert a["learned"].nonzero()[0].tolist() == learn.unique().tolist()
    assert (fits & a["learned"]).any(1).all() and (~a["learned"]).sum() > 20
    assert fits[range(len(z)), a["predicted"]].mean() < .2


def test_studies_of_one_model_save_the_same(ran):
    (_, a), (_, b), (_, c), (_, both) = map(ran, ("paths", "lens", "sphere", "compare"))
    assert same(a, b) and same(a, c) and same(a, both)
    other = exp.other(both)  # of paths: the control
    assert both["model"] == "mini" and other["model"] == "untrained"
    assert other.keys() == {k for k in both if not k.startswith("other_")} - {"states", "final"}
    assert exp.other(other) == {}
    untrained = exp.init(exp.Config(2, 6, 12, 16, 277), common.generator(0, "init"))
    states = exp.forward(untrained, torch.tensor(other["tokens"][:16]), exp.Config(2, 6, 12, 16, 277))
    assert far(other["norm"][:, :16], torch.stack(states).norm(dim=-1)) < 1e-6
    third = exp.get("untrained", flags_of("--smoke --model untrained --seed 3"))
    assert same(third.params, exp.init(third.config, common.generator(3, "init")))


def test_untrained_is_what_the_model_was(tmp_path):
    """Its configuration and tokenizer, not those of a mini, with GPT-2's start."""
    there = put(tmp_path / "m", FILES | {"learned.json": b'{"ids": [64, 65, 66]}'})
    for study in ("compare", "lens"):
        flags = replace(exp.Flags(), study=study, model=str(there), seed=3)
        found = exp.get("untrained", flags)
        assert found.config == MODEL.config and found.tokenizer[:2] == MODEL.tokenizer[:2] and found.name == "untrained"
        assert same(found.params, exp.init(MODEL.config, common.generator(3, "init")))
        assert exp.tokenizer_of("untrained", flags)[:2] == MODEL.tokenizer[:2]
    line = ["--smoke", "--study", "compare", "--model", str(there), "--text", "abcd abcd", "--seed", "3"]
    assert exp.main([*line, "--out", str(tmp_path / "r")]) == 0
    a = dict(np.load(tmp_path / "r" / "arrays.npz"))
    states = torch.stack(exp.forward(found.params, torch.tensor(a["tokens"]), MODEL.config))
    assert far(exp.other(a)["norm"], states.norm(dim=-1)) < 1e-6 and a["model"] == "m"


def test_a_long_text_in_windows(tmp_path):
    there = put(tmp_path / "m", FILES)
    runs = {}
    for name, text, window in (("long", LONG, "8"), ("part", "".join(LONG[8:16]), "0")):
        assert exp.main([*SMOKE, "--model", str(there), "--text", text, "--window", window, "--out", str(tmp_path / name)]) == 0
        runs[name] = dict(np.load(tmp_path / name / "arrays.npz"))
    long, part = runs["long"], runs["part"]
    assert len(long["tokens"]) == len(LONG) and long["first"].nonzero()[0].tolist() == list(range(0, len(LONG), 8))
    assert far(long["states"][:, 8:16], part["states"]) < 1e-6 and long["tokens"][8:16].tolist() == part["tokens"].tolist()
    (tmp_path / "text.txt").write_text(LONG)
    assert exp.main([*SMOKE, "--model", str(there), "--file", str(tmp_path / "text.txt"), "--window", "8", "--out",
                     str(tmp_path / "file")]) == 0
    assert same(long, dict(np.load(tmp_path / "file" / "arrays.npz")))
    for name, window in (("own", "0"), ("cut", "4")):  # built-in sentences, as many as fit
        assert exp.main([*SMOKE, "--model", str(there), "--window", window, "--out", str(tmp_path / name)]) == 0
        own = np.load(tmp_path / name / "arrays.npz")
        assert len(own["tokens"]) == 8 * 16 and "".join(own["token_text"]) == exp.SENTENCES[:128]
        assert own["first"].nonzero()[0].tolist() == list(range(0, 128, int(window) or 16))


def test_an_exported_mini_is_the_mini(ran, tmp_path):
    ran("lens")
    there = exp.mini_folder(flags_of("--smoke"))
    for name, model in (("mini", ()), ("directory", ("--model", str(there)))):
        assert exp.main([*SMOKE, *model, "--text", "The model reads.", "--out", str(tmp_path / name)]) == 0
    a, b = (dict(np.load(tmp_path / r / "arrays.npz")) for r in ("mini", "directory"))
    a = {k: v for k, v in a.items() if not k.startswith("other_")}  # the control of the mini alone
    assert a.keys() == b.keys() and {k for k in a if not same({k: a[k]}, {k: b[k]})} == {"model"}
    assert not a["learned"].all() and a["model"] == "mini" and b["model"] == there.name
    claims = json.loads((tmp_path / "directory" / "summary.json").read_text())["claims"]
    assert {c["holds"] for c in claims} == {None}
    assert all((c["measured"] == "needs --model gpt2") == c["id"].startswith("gpt2-") for c in claims)
    assert Counter(c["id"].split("-")[0] for c in claims) == {"gpt2": 20, "mini": 19}


@pytest.mark.parametrize("token", [0, -1, 3])
def test_every_figure_of_any_token(ran, tmp_path, token):
    there = put(tmp_path / "stranger", FILES | {SAFE: pack(PARAMS | OTHER)})
    flags = flags_of(["--smoke", "--study", "lens", "--model", str(there), "--text", "abcabc ab", "--token", str(token)])
    arrays = {k: np.asarray(v) for k, v in exp.look(str(there), flags, None).items()}
    assert arrays["token"] == token % 4
    assert far(arrays["probability"], softmax((OTHER["lm_head.weight"] @ torch.tensor(arrays["final"][token])).numpy())) < 1e-5
    for name, draw in {**exp.FIGURES, "table": exp.draw_table}.items():
        figure = draw(arrays, flags)
        figure = figure[0] if isinstance(figure, tuple) else figure
        assert figure.axes and "\nstranger, weights of unknown origin" in figure.get_suptitle()
    assert arrays["plane_path"][-1, token, 2] > 0  # the drawn path goes up
    shown = [t.get_text() for t in exp.draw_table(arrays, flags).axes[0].texts]  # a row for each layer, up to the token
    assert shown == [exp.written(text, 9) for text in arrays["lens_text"][:, :token % 4 + 1].flatten()]
    moving, frames, draw = exp.draw_turning(arrays, flags)
    before = [len(ax.lines) for ax in moving.axes]
    draw(1)
    assert frames == 3 and before != [len(ax.lines) for ax in moving.axes]
    exp.plt.close("all")


def seen_from(look, points, inside):
    """{what: positions} of the artists that `globe` draws of these points: as tokens, states, ln_f(h_L) and prediction."""
    n, (figure, ax) = len(points), exp.plt.subplots()
    arrays = {"token": 0, "norm": np.ones((n, 1)), "probability": np.linspace(.1, .9, n), "predicted": np.array([0]),
              "predicted_text": np.array(["a"]), "sphere_tokens": points[None], "sphere_path": points[None],
              "sphere_final": points[:1]}
    tokens = exp.globe(ax, arrays, 0, look, inside).get_offsets().data
    states = {int(t.get_text()): t.xy for t in ax.texts if t.get_text().isdigit()}
    marked = {line.get_marker(): line.get_xydata()[0] for line in ax.lines if line.get_marker() in ("o", "*")}
    exp.plt.close(figure)
    return tokens, states, marked


@pytest.mark.parametrize("inside", [False, True])
def test_the_sphere_is_seen_as_it_is(inside):
    """A camera at +x with z up sees +y on its right; one in the centre that looks to +x sees it on its left, up to 80 degrees
    around, at tan(angle / 2), the outermost at 1."""
    angle, round_ = (x.flatten() for x in np.meshgrid(np.radians([5, 40, 79, 81, 89, 91, 130, 175]), np.arange(6) + .3))
    points = np.stack([np.cos(angle), np.sin(angle) * np.cos(round_), np.sin(angle) * np.sin(round_)], 1)
    far_out = np.tan(angle / 2) / math.tan(math.radians(40)) if inside else np.sin(angle)
    expected = far_out[:, None] * np.stack([(-1 if inside else 1) * np.cos(round_), np.sin(round_)], 1)
    visible = np.degrees(angle) < (80 if inside else 90)
    assert 0 < visible.sum() < len(points) - 6 and len(set(visible[:8])) == 2
    look = np.array([1. if inside else -1., 0, 0])
    tokens, states, marked = seen_from(look, points, inside)
    assert far(tokens, expected[visible]) < 1e-9 and list(states) == np.flatnonzero(visible).tolist()
    assert all(far(at, expected[i]) < 1e-9 for i, at in states.items())
    assert marked.keys() == {"o", "*"} and all(far(at, expected[0]) < 1e-9 for at in marked.values())
    behind = seen_from(-look, points, inside)
    assert len(behind[0]) == (np.degrees(angle) > (100 if inside else 90)).sum() and behind[2] == {}
    turn = np.array([[0., -1, 0], [1, 0, 0], [0, 0, 1]])  # all of it turned about z is seen as before
    assert far(seen_from(turn @ look, points @ turn.T, inside)[0], tokens) < 1e-9


def test_a_camera_keeps_up_above():
    for look in 3 * randn(50, 3).numpy():
        right, up, towards = exp.camera(look)
        assert far(np.stack([right, up, towards]) @ np.stack([right, up, towards]).T, np.eye(3)) < 1e-12
        assert far(towards * np.linalg.norm(look), look) < 1e-12 and far(np.cross(right, up), -towards) < 1e-12
        assert abs(towards[2]) >= .9 or abs(right[2]) < 1e-12 and up[2] > 0
    assert far(exp.camera(np.array([0., 0, 2]))[2], [0, 0, 1]) < 1e-12


def test_what_a_figure_says_of_its_model(ran):
    _, a = ran("paths")
    for name, words in (("mini", "mini, made here; its geometry is not GPT-2's"), ("gpt2-xl", "gpt2-xl"),
                        ("untrained", "untrained, made here; its geometry is not GPT-2's"),
                        ("directory gpt2", "directory gpt2, weights of unknown origin")):
        assert exp.title(a | {"model": np.array(name)}, "What").split("\n") == ["What", words]


def test_three_minis_are_exported(tmp_path):
    """train-mini's models are read by every other study."""
    file = learner(tmp_path).file
    line = ["--smoke", "--study", "train-mini", "--runs", "3", "--seed", "5", "--file", file, "--sweep", "n_layers=1,2",
            "--compile", "off"]
    assert exp.main([*line, "--out", str(tmp_path / "r")]) == 0
    z = np.load(tmp_path / "r" / "arrays.npz")
    assert z["seed"].tolist() == [5, 6, 7] * 2 and z["n_layers"].tolist() == [1] * 3 + [2] * 3
    assert z["eval_step"].tolist() == [0, 1, 2, 3, 4]
    own, learn, held = exp.lesson(file, 20)
    assert {k: z[k][0] for k in ("uniform", "unigram", "bigram")} == pytest.approx(exp.floors(learn, held, len(own.ids)))
    for r, (group, seed) in enumerate(itertools.product((0, 1), (5, 6, 7))):
        model = exp.load(str(tmp_path / "r" / f"group{group}" / f"model{seed - 5}"), "m")
        rows = exp.windows(held, 17)
        assert model.config == exp.Config(group + 1, 6, 12, 16, len(own.ids)) and model.tokenizer[:2] == own[:2]
        assert z["loss"][r] == pytest.approx(exp.nll(model.params, rows, model.config).mean().item(), rel=1e-5)
        assert model.learned.tolist() == learn.unique().tolist() and len(model.learned) < len(own.ids)
        found = exp.measure(model, held[:128], list(range(0, 128, 16)), exp.Flags(seed=seed))
        for k in found.keys() - {"states", "final", "loss"}:  # padded where the other models have more layers
            saved = z[k][r][tuple(map(slice, np.shape(found[k])))]
            assert far(np.nan_to_num(saved), np.nan_to_num(found[k])) < 1e-5, k
        late = exp.development(model.params, rows[:8], model.config)
        assert far(z["eval_lens_kl"][r, -1, :group + 2], late["lens_kl"]) < 1e-5


@pytest.mark.filterwarnings("error")
def test_a_diverged_mini(tmp_path, capsys):
    """It is marked, exported nowhere, and has no vote; where a mini is needed that is one line."""
    line = ["--smoke", "--lr", "1e38", "--weight-decay", "1e38", "--compile", "off", "--out"]
    assert exp.main([*line, str(tmp_path / "r"), "--study", "train-mini", "--file", learner(tmp_path).file]) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert [run["diverged"] for run in summary["runs"]] == [True] and not list((tmp_path / "r").rglob(SAFE))
    assert exp.main([*line, str(tmp_path / "m")]) == 2
    assert "diverged" in capsys.readouterr().err


# ---- claims ---------------------------------------------------------------------------------------------------------

T, LAYERS, V = 12, 5, 1000
SENTENCES = {"not-embedding", "not-embedding-normed", "nearer-than-most", "little-by-little", "dot-product",
             "dot-product-first", "decodes",
             "decodes-halfway", "by-cosine", "by-cosine-raw", "not-interpretable", "selects", "selects-little", "beyond",
             "square",
             "three-components", "sphere-apart", "angles-altered", "outside-embeddings", "path-above-plane"}
verdicts = lambda claims: {c["id"]: c["holds"] for c in claims}


def planted(good, model="gpt2"):
    """Arrays of which all sentences are true, or (good=False) none, by hardly more than it needs."""
    pick = lambda yes, no: yes if good else no
    by_layer = lambda *values: np.repeat(np.array(values, float)[:, None], T, 1)
    at_end = lambda value: by_layer(*[.5] * (LAYERS - 1), value)
    r = np.random.default_rng(0)
    tokens, variance = np.arange(T), np.full((6, 10), .1)
    variance[exp.MODES.index("on dim centred")] = [.015, .015, pick(.006, .0151), *[.1] * 7]
    box = r.uniform(-1, 1, (V, 3))
    box[:3] = [[-1, -1, 0], [1, pick(1, 1.001), 0], [9, 9, 0]]  # the last is no token of the text: it is not asked
    rising, inner = by_layer(.1, .2, .3, .4, .89), np.repeat((tokens if not good else tokens + 99)[None], LAYERS, 0)
    end = np.array([1 + 2 * pick(.51, .49), 0, 0])
    return {"model": np.array(model), "first": np.arange(T) == 0, "vocab": np.array(V), "tokens": tokens,
            "predicted": tokens + 50,
            "cosine_predicted": rising if good else by_layer(.99, .98, .97, .96, .91),
            "cosine_random": at_end(.25), "cosine_random_final": at_end(.125), "cosine_predicted_final": at_end(pick(.89, .91)),
            "rank_cosine": at_end(pick(0, 50)), "rank_cosine_final": at_end(pick(0, 1)),
            "reading_kl": np.full((5, T), pick(.009, .011)),
            "reading_top1": np.full((5, T), good), "lens_entropy": by_layer(0, 1, 2, 0, math.log(V) - 4),
            "lens_kl": by_layer(*pick((4, 3, 1.9, 1, 0), (4, 3, 2.1, 2.5, 3))),
            "nearest": inner,
            "kept": np.full(T, float(good)), "selected": np.full(T, pick(.09, .11)),
            "pca_tokens": box, "learned": np.arange(V) != 2,
            "pca_path": np.tile(end, (LAYERS, T, 1)), "explained_variance": variance,
            "sphere_angle": np.full((2, T), pick(31., 29)),
            "full_angle": np.full((2, T), pick(47., 30)), "outside_k": np.array(pick(6, 5)),
            "outside_at": at_end(pick(.41, .39)),
            "outside_limit": np.array(.4), "plane_layers": at_end(pick(.51, .49)), "plane_other": np.array([2, 4, 6, 8, 10])}


def judged(arrays, **fields):
    flags = replace(exp.Flags(), **fields)
    flags.finished = True
    return verdicts(exp.judge_paths(arrays, flags))


@pytest.mark.parametrize("good", [True, False])
def test_judges_say_true_and_false_of_a_path(good):
    """Of GPT-2 where it is GPT-2, else of the model; open where that can't be said."""
    a = planted(good)
    assert judged(a) == {f"gpt2-{k}": good for k in SENTENCES}
    assert judged(a, smoke=True) == {f"gpt2-{k}": None for k in SENTENCES}
    own = SENTENCES - {"three-components"}  # a figure about GPT-2 alone
    for model in ("mini", "model0", "untrained", "directory gpt2"):
        name = model.replace(" ", "-")
        assert judged(planted(good, model)) == {f"gpt2-{k}": None for k in SENTENCES} | {f"{name}-{k}": good for k in own}
    for model in exp.SIZES:
        assert judged(planted(good, model), model=model) == {f"{model}-{k}": good for k in SENTENCES}
    flags = exp.Flags()
    flags.finished = False
    assert set(verdicts(exp.judge_paths(a, flags)).values()) == {None}
    heads, b = np.arange(T) % 2 == 0, planted(not good)  # in windows of two, what is true of the first has no vote
    mixed = {k: np.where(heads, b[k], v) if v.shape[-1:] == (T,) and k != "tokens" else v for k, v in a.items()}
    mixed |= {"first": heads, "plane_other": np.arange(1, T, 2)}
    assert judged(mixed | {"pca_path": np.where(heads[:, None], b["pca_path"], a["pca_path"])}) == judged(a)


def test_a_random_token_stands_beside_a_cosine():
    found = exp.judged(planted(True))
    assert "(a random token's 0.25)" in found["not-embedding"][3] and "0.125)" in found["not-embedding-normed"][3]
    assert not any("random token's" in row[3] for id, row in found.items() if "embedding" not in id)


@pytest.mark.parametrize("good", [True, False])
def test_a_mini_of_other_settings_is_not_judged(good):
    """Only the default mini has verdicts, from any seed; what its initial weights do stands beside it and has no vote."""
    a, own = planted(good, "mini"), SENTENCES - {"three-components"}
    both = a | {f"other_{k}": v for k, v in planted(not good, "untrained").items()}
    for arrays, fields, holds in ((a, {}, good), (both, {}, good), (a, dict(seed=7), good), (a, dict(d_model=48), None),
                                  (both, dict(steps=5), None), (a, dict(merges=5), None), (a, dict(lr=1.), None),
                                  (a, dict(model="m", steps=5), good), (a, dict(model="untrained", context=9), None)):
        assert judged(arrays, **fields) == {f"gpt2-{k}": None for k in SENTENCES} | {f"mini-{k}": holds for k in own}
    flags = exp.Flags()
    flags.finished = True
    alone, beside = ({c["id"]: c["measured"] for c in exp.judge_paths(x, flags)} for x in (a, both))
    control = exp.judged(planted(not good, "untrained"))
    for k in SENTENCES:
        assert beside[f"gpt2-{k}"] == alone[f"gpt2-{k}"] == "needs --model gpt2"
    for k in own:
        assert beside[f"mini-{k}"] == f"{alone[f'mini-{k}']}; untrained: {control[k][3]}"


def test_judges_of_a_divided_text():
    """Half of the positions against half: open; what is said of all tokens is not; positions without a value have no vote."""
    a, b = planted(True), planted(False)
    mixed = {k: np.where(np.arange(T) % 4 < 2, v, b[k]) if v.shape[-1:] == (T,) else v for k, v in a.items()}
    found = judged(mixed)
    assert {k for k, v in found.items() if v is None} >= {f"gpt2-{k}" for k in SENTENCES - {
        "square", "three-components", "beyond", "nearer-than-most"}} and found["gpt2-square"] is True
    few = a | {"kept": np.where(np.arange(T) < 10, np.nan, 1.)}
    assert judged(few)["gpt2-selects"] is None
    assert judged(a | {"kept": np.where(np.arange(T) < 5, np.nan, 1.)})["gpt2-selects"] is True
    assert judged(a | {"kept": np.zeros(T)})["gpt2-selects"] is False
    assert judged(a | {"lens_entropy": a["lens_entropy"] + .3})["gpt2-decodes-halfway"] is False
    assert judged(a | {"rank_cosine": a["rank_cosine"] + 49})["gpt2-nearer-than-most"] is True
    low = a["explained_variance"].copy()
    low[exp.MODES.index("on dim centred"), 2] = .004
    assert judged(a | {"explained_variance": low})["gpt2-three-components"] is False
    assert judged(a | {"pca_path": -a["pca_path"]})["gpt2-beyond"] is True
    by_layer = lambda *values: np.repeat(np.array(values, float)[:, None], T, 1)
    assert judged(a | {"cosine_predicted": by_layer(.1, .3, .2, .5, .4)})["gpt2-little-by-little"] is False
    assert judged(a | {"lens_kl": by_layer(4, 1, 2, 0, .5)})["gpt2-decodes"] is False
    found = judged(a | {"lens_kl": by_layer(4, 3, 2.1, 1, 0)})
    assert found["gpt2-decodes-halfway"] is False and found["gpt2-decodes"] is True
    some = a["nearest"].copy()
    some[1] = a["predicted"]  # one of three
    assert judged(a | {"nearest": some})["gpt2-not-interpretable"] is True
    some[1:3] = a["predicted"]
    assert judged(a | {"nearest": some})["gpt2-not-interpretable"] is False
    assert judged(a | {"full_angle": a["sphere_angle"] - 16})["gpt2-angles-altered"] is True


def test_compare_asks_what_is_true_of_the_first_alone():
    flags = replace(exp.Flags(), study="compare")
    flags.finished = True
    pair = lambda a, b: a | {f"other_{k}": v for k, v in b.items()}
    only = lambda a, b: {k.removeprefix("only-"): v for k, v in verdicts(exp.judge_compare(pair(a, b), flags)).items()}
    good, bad = planted(True), planted(False, "untrained")
    assert only(good, bad) == dict.fromkeys(SENTENCES, True)
    assert only(good, good) == dict.fromkeys(SENTENCES, False)
    for b in (good, bad):  # what is not true of the first is not asked
        assert only(bad, b) == dict.fromkeys(SENTENCES, None)
    open_ = good | {"selected": np.where(np.arange(T) % 2, .01, .5)}
    assert only(open_, bad)["selects-little"] is None is only(good, open_)["selects-little"]
    claims = exp.judge_compare(pair(good, bad), flags)
    assert all(c["statement"].startswith("true of gpt2 and not of untrained: ") for c in claims)
    assert all(re.fullmatch(r"gpt2 .*\(holds\); untrained .*\(FALSE\)", c["measured"]) for c in claims)
    flags.smoke = True
    assert set(only(good, bad).values()) == {None}


def test_three_seeds_vote():
    """Each for what is true of most of its positions, in the study's own settings; there is a claim for every training."""
    flags = exp.Flags(study="train-mini", **exp.Flags.per_study["train-mini"])
    keep = [k for k in planted(True) if not k.startswith(
        ("pca", "sphere", "full", "outside", "plane", "explained", "model", "learned"))]

    def arrays(*goods):
        each = [planted(good) for good in goods]
        a = {k: np.stack([np.asarray(x[k]) for x in each]) for k in keep}
        a |= {k: np.full(len(goods), getattr(flags, k)) for k in ("steps", "n_layers", "n_heads",
                                                                  "d_model")} | {"seed": np.arange(len(goods))}
        return a | {"loss": np.array([2. + (not good) for good in goods]), "bigram": np.full(len(goods), 2.5),
                    "eval_step": np.arange(3)}
    own = {f"mini-{k}" for k in SENTENCES - {"beyond", "square", "three-components", "sphere-apart", "angles-altered",
                                             "outside-embeddings",
                                             "path-above-plane"}}
    judge = lambda a, **fields: verdicts(exp.judge_train_mini(a, replace(flags, **fields)))
    for good in (True, False):
        assert judge(arrays(good, good, good)) == {"learned": good} | dict.fromkeys(own, good)
    assert set(judge(arrays(True, False, True)).values()) == {None}
    for fields in (dict(smoke=True), dict(d_model=48), dict(sweep=["lr=1,2"]), dict(runs=4)):
        assert judge(arrays(True, True, True), **fields) == {"learned": True}
    assert set(judge(arrays(True, True, True), steps=5).values()) <= {None, True}
    few = arrays(True, True, True)
    few["kept"][:, :5] = np.nan  # positions that cannot tell have no vote
    assert judge(few)["mini-selects"] is True
    lost = arrays(True, True, True, True)
    lost["loss"][0] = np.nan
    assert judge(lost, runs=4)["learned"] is True


def test_every_documented_command_parses(monkeypatch):
    monkeypatch.setattr(exp, "get", lambda *_: MODEL)  # of a model that is not here
    monkeypatch.setattr(exp, "read_text", lambda file: LONG)
    monkeypatch.setattr(exp, "reading", lambda *_: (torch.arange(20), [0]))
    monkeypatch.setattr(exp, "rows_of", lambda flags: None)
    text = (HERE.parent / "README.md").read_text() + exp.__doc__
    commands = re.findall(r"^\s*(?:\.venv/bin/)?python3? (exp_gpt2_paths\.py.*?)(?:\s{2,}.*|\s*#.*|\s*)$", text, re.M)
    assert len(commands) >= 3 and all(common.cli(exp.Flags, shlex.split(command)[1:]) for command in commands)
