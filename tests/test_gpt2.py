"""The science of exp_gpt2_paths.py: states against transformers, ids against GPT-2's tokenizer, measures against loops, files from
strangers, the folders that people have, a mini that learns, verdicts."""
import http.server
import json
import math
import random
import re
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import exp_gpt2_paths as exp
from conftest import judged, ledger, run

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
GOLDEN, VOCAB = HERE / "gpt2_golden", HERE.parent.parent / "shared/data/gpt2-vocab"
real = pytest.mark.skipif(not VOCAB.exists(), reason="needs GPT-2's vocabulary")
g = lambda seed=0: torch.Generator().manual_seed(seed)
randn = lambda *shape, seed=1: torch.randn(*shape, generator=g(seed), dtype=torch.float64)
far = lambda a, b: np.abs(np.asarray(a, float) - np.asarray(b, float)).max(initial=0)
cos = lambda a, b: a @ b / math.sqrt((a @ a) * (b @ b))


def small(n_layer=2, n_head=3, n_embd=12, n_positions=16, vocab_size=19, scale=.4, **more):
    """(params, config): random float64 parameters, also of what starts at 0 or 1."""
    config = exp.Config(n_layer, n_head, n_embd, n_positions, vocab_size, **more)
    params = {k: scale * randn(*shape, seed=i) + ("ln" in k and "weight" in k) for i, (k, shape) in enumerate(exp.shapes(config).items())}
    return params, config


def a_model(untied=False, **fields):
    """A float64 Model of bytes, with an unembedding of its own."""
    params, config = small(**{"vocab_size": 258, **fields})
    if untied:
        params["lm_head.weight"] = randn(config.vocab_size, config.n_embd, seed=77)
    tokens = [*exp.ALPHABET.values(), "ab", "abc", *map(str, range(100, 1000))][:config.vocab_size]
    return exp.Model(params, config, exp.Tokenizer({t: i for i, t in enumerate(tokens)}, {("a", "b"): 0, ("ab", "c"): 1}, ""), "m")


# ---- Model ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, least", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_states_are_those_of_transformers(dtype, least):
    """Made with transformers' GPT2LMHeadModel, all its parameters random, which computed in float64 what is expected."""
    tensors, z, (config, tied) = exp.read_weights(GOLDEN), np.load(GOLDEN / "expected.npz"), exp.read_config(GOLDEN)
    assert config == exp.Config(3, 3, 12, 24, 37, 1e-5) and tied
    params = {k: tensors[k].to(dtype) for k in exp.shapes(config)}
    for i in (0, 1):
        states = exp.forward(params, torch.tensor(z[f"tokens{i}"]), config)
        final = exp.final_norm(params, states[-1], config)
        for x, name in ((torch.stack(states), "states"), (final, "final"), (final @ exp.unembedding(params).T, "logits")):
            assert x.dtype == dtype and far(x, z[f"{name}{i}"]) < least, name


def test_no_state_sees_what_comes_later():
    params, config = small()
    rows = torch.randint(19, (3, 16), generator=g())
    states = torch.stack(exp.forward(params, rows, config))
    other = torch.stack(exp.forward(params, rows.index_fill(1, torch.tensor(5), 18), config))
    assert far(states[:, :, :5], other[:, :, :5]) < 1e-12 and far(states[-1, :, 5:], other[-1, :, 5:]) > 1e-3
    assert far(torch.stack(exp.forward(params, rows[1, :7], config)), states[:, 1, :7]) < 1e-12


@pytest.mark.parametrize("L, d, count", [(12, 768, 124_439_808), (24, 1024, 354_823_168), (36, 1280, 774_030_080), (48, 1600, 1_557_611_200)])
def test_published_sizes(L, d, count):
    assert sum(map(math.prod, exp.shapes(exp.Config(L, d // 64, d, 1024, 50257)).values())) == count


def test_initial_values():
    for name, p in exp.init(exp.Config(8, 2, 64, 50, 300), g()).items():
        if p.ndim == 1:
            assert (p == float(bool(re.search(r"ln_.\.weight", name)))).all(), name
        else:
            assert p.std().item() == pytest.approx(.02 / (4 if "c_proj" in name else 1), rel=.05), name


# ---- Tokenizer --------------------------------------------------------------------------------------------------------

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
def test_ids_are_those_of_gpt2(tmp_path):
    """The list was made with transformers 4 and 5 and tokenizers, slow and fast, which agree on it (no recent Unicode)."""
    own = exp.read_tokenizer(VOCAB)
    golden = json.loads((GOLDEN / "tokenizer.json").read_text())
    for text, ids in golden + [("Hello world", [15496, 995])]:
        assert exp.encode(text, own) == ids, ascii(text)
    assert exp.spelled(own)[[15496, 995, 188, 50256]].tolist() == ["Hello", " world", "", "<|endoftext|>"]
    ids, merges = json.loads((VOCAB / "vocab.json").read_text()), (VOCAB / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    for n, pairs in enumerate((merges, [line.split() for line in merges])):  # as tokenizers wrote them, and write them
        one = {"model": {"type": "BPE", "vocab": {k: i for k, i in ids.items() if i < 50256}, "merges": pairs},
               "added_tokens": [{"id": 50256, "content": "<|endoftext|>"}, {"id": 50257, "content": "[PAD]"}],
               "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": bool(n)}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(one))
        fast = exp.read_tokenizer(tmp_path)
        assert len(fast.ids) == 50258 and fast.ranks == own.ranks
        assert exp.encode("Hello world", fast) == ([18435, 995] if n else [15496, 995])  # " Hello" with a space before
        assert exp.encode(" Hello world", fast) == [18435, 995]  # one that is there is not doubled


def test_words_are_cut_as_gpt2_cuts_them():
    words = exp.words_of().findall
    for text, expected in {
            "I'm we'LL it's": ["I", "'m", " we", "'", "LL", " it", "'s"], "a  b   c": ["a", " ", " b", "  ", " c"], "end  ": ["end", "  "],
            "x\n\n y": ["x", "\n\n", " y"], "a\x1cb\x1f c\x1f?": ["a", "\x1c", "b", "\x1f", " c", "\x1f?"], "don't've": ["don", "'t", "'ve"],
            "a\x85?\u3000b": ["a", "\x85", "?", "\u3000", "b"], "x²½Ⅷ１２ 3": ["x", "²½Ⅷ１２", " 3"], "你好,世界": ["你好", ",", "世界"],
            "e\u0301 n\u200bo": ["e", "\u0301", " n", "\u200b", "o"], " ?!'re": [" ?!'", "re"]}.items():
        assert words(text) == expected


def text_of(r, count, letters):
    return " ".join("".join(r.choice(letters) for _ in range(r.randint(1, 9))) for _ in range(count))


@pytest.mark.parametrize("letters", ["ab", "abc", "aé", "abcd'", "a"])
def test_merges_are_those_of_a_recount(letters):
    text = text_of(random.Random(1), 60, letters)
    words = Counter(tuple(exp.ALPHABET[b] for b in word.encode()) for word in exp.words_of().findall(text))
    expected = []
    for _ in range(40):
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        expected.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = Counter({tuple(joined(word, expected[-1])): n for word, n in words.items()})
    assert exp.learn_merges(text, 40) == expected and exp.learn_merges(text, 3) == expected[:3] and len(expected) > 3
    own = exp.learned_tokenizer(text, expected)
    assert sorted(own.ids.values()) == list(range(len({*text.encode()}) + len(expected)))
    for word in text_of(random.Random(9), 1, letters * 3) * 5, "aaaaaaa", text.replace(" ", ""):
        word = "".join(exp.ALPHABET[b] for b in word.encode())
        assert exp.merged(word, own.ranks) == naive_merged(word, own.ranks)
    assert "".join(exp.spelled(own)[exp.encode(text, own)]) == text or "é" in text
    with pytest.raises(common.Stop, match="no token for"):
        exp.encode("xyz", own)


def test_a_long_word_takes_no_rounds():
    """20,000 letters of some hundred merges: the heap does not look at the whole word for each."""
    ranks = exp.learned_tokenizer("abcde", exp.learn_merges(text_of(random.Random(1), 500, "abcde"), 300)).ranks
    looks = []
    class Counted(dict):
        def get(self, *a):
            looks.append(1)
            return dict.get(self, *a)
    word = "".join(random.Random(2).choices("abcde", k=20_000))
    parts = exp.merged(word, Counted(ranks))
    assert "".join(parts) == word and len(parts) < 10_000 and len(looks) < 100_000
    assert exp.merged(word[:400], ranks) == naive_merged(word[:400], ranks) and exp.merged("", ranks) == []


def test_any_text_comes_back():
    r, own = random.Random(3), a_model().tokenizer
    backwards = {i: t for t, i in own.ids.items()}
    ranges = [(0, 128), (0x80, 0x800), (0x800, 0xd800), (0xe000, 0x10000), (0x10000, 0x110000)]
    for _ in range(200):
        text = "".join(chr(r.randrange(*r.choice(ranges))) for _ in range(r.randrange(30)))
        assert bytes(exp.BYTES[c] for i in exp.encode(text, own) for c in backwards[i]).decode() == text
    with pytest.raises(common.Stop, match="no token for"):
        exp.encode("a\udfff", own)
    assert exp.spelled(own)[exp.encode("abc é", own)].tolist() == ["abc", " ", "\\xc3", "\\xa9"]


# ---- Files ------------------------------------------------------------------------------------------------------------

def pack(tensors, change=None, tail=b""):
    """A safetensors file, written here and not by the script. change: what is done to its header before."""
    names = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    header, data = {}, b""
    for name, x in tensors.items():
        raw = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = change and change(header) or json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data + tail


MODEL = a_model()
PARAMS = {k: x.float() for k, x in MODEL.params.items()}
SETTINGS = MODEL.config._asdict() | {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
SAFE, SHARDS = "model.safetensors", "model.safetensors.index.json"
FILES = {"config.json": json.dumps(SETTINGS).encode(), "vocab.json": json.dumps(MODEL.tokenizer.ids).encode(),
         "merges.txt": b"#version: 0.2\na b\nab c\n", SAFE: pack(PARAMS)}
MASKS = {"h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool), "h.1.attn.masked_bias": torch.tensor(-1e4)}
HEAD = {"lm_head.weight": PARAMS["wte.weight"].flip(0)}
config = lambda **fields: {"config.json": json.dumps(SETTINGS | fields).encode()}
named = lambda before, **more: {SAFE: pack({before + k: x for k, x in PARAMS.items()} | more)}
halves = {f"{n}.safetensors": pack({k: x for i, (k, x) in enumerate(PARAMS.items()) if i % 2 == n}) for n in (0, 1)}
PADDED = {k: torch.cat([x, x[:6]]) if k == "wte.weight" else x for k, x in PARAMS.items()}


def put(path, files):
    path.mkdir(parents=True)
    for name, data in files.items():
        if data is not None:
            (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("files, head, said", [
    ({}, {}, ""), (named("transformer."), {}, ""), (named("_orig_mod.transformer."), {}, ""), ({SAFE: pack(PARAMS | MASKS)}, {}, "masked"),
    ({SAFE: pack(PARAMS | {"lm_head.weight": PARAMS["wte.weight"]})}, {}, ""), ({SAFE: pack(PARAMS | HEAD)} | config(
        tie_word_embeddings=False), HEAD, ""), (named("transformer.", **{"score.weight": torch.ones(3, 12)}), {}, "score.weight"),
    ({SAFE: None, SHARDS: json.dumps({"weight_map": {k: f"{i % 2}.safetensors" for i, k in enumerate(PARAMS)}}).encode(), **halves}, {}, ""),
    ({SAFE: pack(PADDED)} | config(vocab_size=264), {}, "258 of 264 rows"), (config(activation_function="gelu_fast", n_ctx=16), {}, ""),
    ({"merges.txt": b"#version: 0.2\r\na b\r\nab c\r\n"}, {}, "")], ids=str)
def test_folders_that_people_have(files, head, said, tmp_path, capsys):
    """Prefixes of training programs, masks, a head of its own, one beside the model, shards, a padded vocabulary, CRLF."""
    model = exp.load(put(tmp_path / "m", FILES | files), "m")
    assert model.config == MODEL.config and model.tokenizer == MODEL.tokenizer
    assert all(torch.equal(x, (PARAMS | head)[k]) for k, x in model.params.items()) and len(model.params) == len(PARAMS | head)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    found = exp.read_weights(put(tmp_path / "m", {SAFE: pack({k: x.to(dtype) for k, x in PARAMS.items()})}))
    assert all(torch.equal(found[k], x.to(dtype).float()) for k, x in PARAMS.items())


def header(name="ln_f.bias", **fields):
    return {SAFE: pack(PARAMS, lambda head: head[name].update(fields))}


LFS, HTML = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 5\n", b"<!DOCTYPE html><html>\n<body>404</body></html>"
vocab = lambda **ids: {"vocab.json": json.dumps(MODEL.tokenizer.ids | ids).encode()}
tensor = lambda **more: {SAFE: pack({k: x for k, x in (PARAMS | more).items() if x is not None})}
STRANGE = [
    ({SAFE: LFS}, "git lfs pull"), ({"config.json": LFS}, "git lfs pull"), ({"vocab.json": LFS}, "git lfs pull"), ({"config.json": HTML}, "JSON"),
    ({SAFE: HTML}, "JSON"), ({SAFE: b""}, "JSON"), ({SAFE: b"1234567"}, "JSON"), ({SAFE: pack(PARAMS)[:-1]}, "outside of the file"),
    ({SAFE: pack(PARAMS)[:99]}, "JSON"), ({SAFE: (10 ** 15).to_bytes(8, "little") + b"{}"}, "JSON"), ({SAFE: None}, "--download fetches"),
    (header(data_offsets=[-48, 0]), "outside"), (header(data_offsets=[0., 48.]), "can't be read"), (header(data_offsets=[0, 1, 2]), "can't be"),
    (header(data_offsets=None), "can't be"), (header(shape=[10 ** 30]), "can't be"), (header(shape=[3, 4]), "ln_f.bias must be"),
    (header(shape=[-1, 4]), "ln_f.bias must be"), (header(dtype=["F32"]), "can't be"), (header(dtype="F8"), "ln_f.bias must be"),
    ({SAFE: pack(PARAMS, lambda head: b"[]")}, "wte.weight"), ({SAFE: pack(PARAMS, lambda head: b"[" * 100_000)}, "JSON"),
    ({SAFE: pack(PARAMS, lambda head: head.update(x=3))}, "can't be"), (tensor(**{"ln_f.bias": None}), "ln_f.bias must be"),
    (tensor(**{"wte.weight": None}), "0 tensors named wte.weight"), (tensor(**{"x.wte.weight": torch.ones(2)}), "2 tensors"),
    (tensor(**{"h.1.ln_2.bias": torch.full((12,), math.nan)}), "h.1.ln_2.bias must be"),
    (tensor(**{"h.1.ln_2.bias": torch.full((12,), -math.inf)}), "h.1.ln_2.bias must be"),
    (config(model_type="llama"), "architecture than GPT-2: model_type 'llama'"), (config(activation_function="relu"), "'relu'"),
    (config(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx"), (config(n_layer=3), "h.2."), (config(n_embd=24), "must be"),
    (config(n_head=5), "no GPT-2's"), (config(n_head=True), "no GPT-2's"), (config(n_head="3"), "no GPT-2's"), (config(n_layer=-1), "no GPT-2's"),
    (config(layer_norm_epsilon=0), "no GPT-2's"), (config(layer_norm_epsilon="x"), "can't be"), (config(n_positions=2 ** 40), "no GPT-2's"),
    (config(tie_word_embeddings=False), "lm_head.weight must be"), ({"config.json": b"[1]"}, "JSON"), ({"config.json": b'{"n_h'}, "JSON"),
    (vocab(x1=258), "the tokenizer has 259 tokens"), (vocab(a=300), "ids must be"), (vocab(a=3), "ids must be"), (vocab(a="64"), "can't be"), (vocab(a=64.), "ids must be"), (vocab(a=True), "ids must be"),
    (vocab(a=None), "can't be"), ({"vocab.json": b"[" * 100_000}, "JSON"), ({"merges.txt": b"ab\n"}, "can't be"), ({"merges.txt": None}, "can't"),
    ({"merges.txt": b"a b c\n"}, "can't be"), ({"merges.txt": b"a \xff\n"}, "can't be"), ({"merges.txt": b"a b\nx y\n"}, "without one: ['xy']"),
    ({SAFE: None, SHARDS: b'{"weight_map": {"a": "../../etc/passwd"}}'}, "has no ../../etc/passwd"),
    ({SAFE: None, SHARDS: b'{"weight_map": {"a": 3}}'}, "can't be"), ({SAFE: None, SHARDS: b'{}'}, "can't be"),
    ({SAFE: None, SHARDS: b'{"weight_map": {}}'}, "0 tensors"), ({"tokenizer.json": b'{"model": {}}'}, "can't be"),
    ({"tokenizer.json": b'{"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}'}, "no byte-level BPE"),
    ({"tokenizer.json": b'{"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}, "normalizer": {"type": "NFC"}}'}, "no byte-level")]


@pytest.mark.parametrize("files, words", STRANGE)
def test_files_from_strangers(files, words, tmp_path, capsys):
    line = ["--study", "lens", "--smoke", "--model", str(put(tmp_path / "m", FILES | files))]
    assert common.main(exp.Flags, exp.STUDIES, [*line, "--text", "abcd x", "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and len(error) < 900


def test_mutated_safetensors_are_read_or_refused(tmp_path):
    """1,000 files with flipped bits, missing or additional bytes: tensors, or one line."""
    r, whole, accepted = random.Random(0), pack({"a": torch.arange(6.).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}), 0
    for n in range(1000):
        data = bytearray(whole)
        at = r.randrange(len(data)) if n % 2 else r.randrange(8)
        if n % 3 == 0:
            del data[at:]
        elif n % 3 == 1:
            data[at] ^= 1 << r.randrange(8)
        else:
            data[at:at] = bytes(r.randrange(256) for _ in range(r.randrange(1, 5)))
        (tmp_path / "x.safetensors").write_bytes(data)
        try:
            accepted += bool(exp.trusted(exp.read_safetensors, tmp_path / "x.safetensors"))
        except common.Stop as stop:
            assert str(stop).count("\n") == 0
    assert 20 < accepted < 900


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """A hub on this machine: paths -> bytes."""
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_):
            pass
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{web.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    yield files
    web.shutdown()


def test_a_name_is_looked_up_then_fetched(server, tmp_path, capsys):
    line = ["--study", "lens", "--model", "gpt2", "--text", "abcab", "--figures"]
    call = lambda *more: common.main(exp.Flags, exp.STUDIES, [*line, *more])
    assert call("--out", str(tmp_path / "r")) == 2 and "--download" in capsys.readouterr().err
    assert call("--download", "--out", str(tmp_path / "r")) == 2 and "no folder of" not in capsys.readouterr().err
    server |= {f"/openai-community/gpt2/resolve/main/{name}": data[:len(data) // 2 if name == SAFE else None] for name, data in FILES.items()}
    assert call("--download", "--out", str(tmp_path / "half")) == 2 and not [*exp.cache().glob("*gpt2/config.json")]
    server |= {f"/openai-community/gpt2/resolve/main/{name}": data for name, data in FILES.items()}
    assert call("--download", "--out", str(tmp_path / "a")) == 0
    server.clear()
    assert call("--out", str(tmp_path / "b")) == 0  # from our own cache
    hub = Path(exp.os.environ["HF_HOME"]) / "hub" / "models--openai-community--gpt2"
    put(hub / "snapshots" / "old", {"config.json": b"{}"}), put(hub / "snapshots" / "new", FILES), put(hub / "refs", {"main": b"new"})
    for name in "gpt2", "openai-community/gpt2":
        assert exp.find(exp.Flags(model=name)).name == "new"


# ---- Measures: each against a loop --------------------------------------------------------------------------------------

def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("piece", [2048, 7])
def test_what_is_seen_by_a_loop(monkeypatch, untied, piece):
    monkeypatch.setattr(exp, "PIECE", piece)
    monkeypatch.setattr(exp, "STATES", 12)
    model = a_model(untied, vocab_size=41)
    params, eps, ids, starts = model.params, model.config.eps, torch.randint(41, (11,), generator=g(3)), [0, 4, 8]
    found = {k: np.asarray(x) for k, x in exp.look(model, ids, starts, 0).items()}
    E, W = params["wte.weight"].numpy(), exp.unembedding(params).numpy()
    normed = lambda h: (h - h.mean()) / math.sqrt(h.var() + eps) * params["ln_f.weight"].numpy() + params["ln_f.bias"].numpy()
    assert found["first"].nonzero()[0].tolist() == starts and found["states"].shape == (3, 11, 12)
    for a, b in (0, 4), (4, 8), (8, 11):
        assert far(found["states"][:, a:b], torch.stack(exp.forward(params, ids[a:b], model.config))) < 1e-12
    for t in range(11):
        end = softmax(W @ normed(found["states"][-1, t]))
        chosen = end.argmax()
        assert found["predicted"][t] == chosen and found["entropy"][t] == pytest.approx(-(end * np.log(end)).sum())
        for l, h in enumerate(found["states"][:, t]):
            z = normed(h)
            by = {"lens_rank": W @ z, "rank_cosine": [cos(h, e) for e in E], "rank_cosine_final": [cos(z, e) for e in E]}
            expected = {k: sum(s > scores[chosen] for s in scores) for k, scores in by.items()} | {
                "lens_kl": sum(end * np.log(end / softmax(W @ z))), "lens_token": (W @ z).argmax(), "nearest": np.argmax(by["rank_cosine"]),
                "cosine_predicted": cos(h, E[chosen]), "cosine_input_final": cos(z, E[ids[t]]), "norm": np.linalg.norm(h),
                "cosine_shuffled": cos(h, E[found["predicted"][(t + 5) % 11]])}
            assert all(far(found[k][l, t], v) < 1e-9 for k, v in expected.items()), (l, t)
    assert len({*found["predicted"]}) > 1 and (found["rank_cosine"] > 0).any()


def test_the_lens_in_float32():
    """Logits of a hundred and more, of tokens that have much in common, cost it no more than their rounding."""
    model = a_model(n_embd=128, n_head=4, vocab_size=1000, scale=.1)
    model.params["wte.weight"] += .3 * randn(128)
    model.params["ln_f.weight"] *= 4
    states = torch.stack(exp.forward(model.params, torch.arange(16), model.config))
    single = model._replace(params={k: x.float() for k, x in model.params.items()})
    true, found = exp.decode(states, model), exp.decode(states.float(), single)
    for k, v in true.items():
        assert far(found[k], v) < (2 if "rank" in k else 2e-4), k
    assert (found["lens_rank"][-1] == 0).all() and far(found["lens_kl"][-1], 0) < 1e-4


def test_bases_by_singular_values():
    E = (randn(500, 9) @ randn(9, 9, seed=2) * torch.linspace(.2, 3, 9) + 1.5)
    for mode in exp.MODES:
        basis = exp.basis_of(E, mode)
        x = E.numpy() / {"raw": 1, "on x": E.norm(dim=1, keepdim=True).numpy(), "on dim": E.std(0, correction=0).numpy()}[mode]
        x = x - x.mean(0)
        _, s, axes = np.linalg.svd(x, full_matrices=False)
        axes = np.array([a * np.sign(a[np.abs(a).argmax()]) for a in axes]).T
        assert far(basis.variance, s * s / 500) < 1e-9 * s[0] ** 2 and far(basis.axes, axes) < 1e-7
        assert far(exp.coordinates(E, basis), x @ axes) < 1e-9 and far(exp.coordinates(E[3], basis, 2), (x @ axes)[3, :2]) < 1e-9
        rest = exp.Plane.outside(E, basis)
        assert (rest[:, 0] == 1).all() and rest[:, -1].abs().max() < 1e-9
        assert far(rest[:, 3], 1 - ((x @ axes)[:, :3] ** 2).sum(1) / (x ** 2).sum(1)) < 1e-9


def seen_of(model, study, flags=None, T=12):
    """What `look` finds of a text of 12 tokens, and what a study measures, as arrays."""
    flags = flags or exp.Flags(token=5)
    seen = exp.look(model, torch.randint(model.config.vocab_size, (T,), generator=g(3)), [0, 6], 0)
    return {k: np.asarray(x) for k, x in (seen | {"token": 5} | study.measure(model, seen, flags)).items()}


def test_a_planted_direction_above_the_plane_is_found(monkeypatch):
    model = a_model(vocab_size=200)
    basis = exp.basis_of(model.params["wte.weight"], "raw")
    up, look = basis.axes[:, 5], exp.look
    def planted(*a):
        seen = look(*a)
        seen["states"][-1] = basis.mean + 20 * randn(12, 2, seed=4) @ basis.axes[:, :2].T + (40 + randn(12, 1, seed=5)) * up
        return seen
    monkeypatch.setattr(exp, "look", planted)
    found = seen_of(model, exp.Plane)
    assert (found["above"][-1] > .3).all() and far(found["plane_states"][-1, :, 2], 40 + randn(12, 1, seed=5)[:, 0]) < 1
    assert far(np.linalg.norm(found["plane_states"], axis=2)[-1] ** 2 * found["above"][-1], found["plane_states"][-1, :, 2] ** 2) < 1e-6


def test_what_the_last_state_selects_by_a_loop():
    model = a_model(n_embd=6, n_head=2, vocab_size=41)
    found, seen = seen_of(model, exp.Plane), exp.look(model, torch.randint(41, (12,), generator=g(3)), [0, 6], 0)
    E, z, chosen = model.params["wte.weight"].numpy(), seen["final"].numpy(), seen["predicted"].numpy()
    unit = lambda i: (E[i] - E.mean(0)) / np.linalg.norm(E[i] - E.mean(0))
    for t in range(12):
        taken = z[t] - (z[t] @ unit(chosen[t])) * unit(chosen[(t + 1) % 12])
        assert found["kept_other"][t] == ((E @ taken).argmax() == chosen[t])


def test_angles_on_the_sphere_by_a_loop():
    model = a_model(vocab_size=41)
    found = seen_of(model, exp.Sphere)
    basis, E = exp.basis_of(model.params["wte.weight"], "on dim"), model.params["wte.weight"]
    states = exp.look(model, torch.tensor(found["tokens"]), [0, 6], 0)["states"]
    for t in range(12):
        a, b = (exp.coordinates(x, basis).numpy() for x in (states[-1, t], E[found["predicted"][t]]))
        assert found["angle"][t] == pytest.approx(math.degrees(math.acos(cos(a[:3], b[:3])))) and found["full_angle"][t] == pytest.approx(
            math.degrees(math.acos(cos(a, b))))
    assert far(np.linalg.norm(found["path_3"], axis=2), 1) < 1e-9 and np.exp(found["log_p"] * math.log(10)).sum() == pytest.approx(1)


@pytest.mark.parametrize("untied", [False, True])
def test_parts_of_blocks_by_hand(untied):
    """What a part adds, how far it turns the state, and the run without it, from a model whose part is zero."""
    model = a_model(untied, vocab_size=41)
    found, T = seen_of(model, exp.Blocks), slice(0, 6)
    seen = exp.look(model, torch.tensor(found["tokens"]), [0, 6], 0)
    W = exp.unembedding(model.params)
    for part, name in enumerate(("attn", "mlp")):
        silent = {k: x * (k not in (f"h.1.{name}.c_proj.weight", f"h.1.{name}.c_proj.bias")) for k, x in model.params.items()}
        states = exp.forward(silent, seen["tokens"][T], model.config)
        logits = exp.final_norm(silent, states[-1], model.config) @ W.T
        assert np.array_equal(found["kept"][1, part, T], logits.argmax(-1) == seen["predicted"][T])
        if part:  # the last part: what it adds is the difference
            added = seen["states"][-1, T] - states[-1]
            assert far(found["turn"][1, 1, T], [math.degrees(math.acos(cos(a, b))) for a, b in
                                                zip(seen["states"][-1, T].numpy(), states[-1].numpy())]) < 1e-5
            h, c = seen["states"][-1, T], model.params["ln_f.weight"]
            toward = W[seen["predicted"][T]] - W.mean(0)
            scale = (h.var(-1, correction=0) + model.config.eps).sqrt()
            assert far(found["push"][1, 1, T], (((added - added.mean(1, keepdim=True)) * c * toward).sum(1) / scale)) < 1e-9


def test_rank_correlation():
    y = np.random.default_rng(0).normal(size=(6, 5))
    expected = [np.corrcoef(range(6), [sum(column < v) for v in column])[0, 1] for column in y.T]
    assert far(exp.monotone(y), expected) < 1e-12 and far(exp.monotone(np.cumsum(np.abs(y), 0)), 1) < 1e-12


def test_bigrams_of_a_known_law():
    """What counts pairs reaches the entropy of a Markov chain."""
    table = torch.tensor([[.9, .1], [.3, .7]])
    ids = [0]
    for u in torch.rand(60_000, generator=g()).tolist():
        ids.append(int(u > table[ids[-1], 0]))
    ids = torch.tensor(ids)
    entropy = -(torch.tensor([.75, .25]) @ (table * table.log()).sum(1))
    assert abs(exp.TrainMini.bigram(ids[:40_000], ids[40_000:].unfold(0, 65, 64), 2) - entropy) < .01


# ---- The mini, texts, figures ---------------------------------------------------------------------------------------------

def test_what_is_held_out_is_not_learned(tmp_path):
    sentences = [f"This is sentence {n} about {n * 7919 % 10007}." for n in range(3000)]
    for join in "\n", "\n\n", " ":  # a sentence a line, paragraphs, one paragraph
        exp.read_text.cache_clear()
        (tmp_path / "t").write_bytes(b"\xef\xbb\xbf" + join.join(sentences * 2 if join == "\n\n" else sentences).encode())
        learn, held = exp.corpus(str(tmp_path / "t"))
        known, new = {*re.findall(r"sentence (\d+) ", learn)}, {*re.findall(r"sentence (\d+) about \d+\.", held)}
        assert len(known) > 2500 and len(new) > 150 and not known & new and "\ufeff" not in learn
    (tmp_path / "u").write_text("a few words")
    with pytest.raises(common.Stop, match="too few"):
        exp.lesson(str(tmp_path / "u"), 5, 16)


def test_a_pipe_is_read_once(tmp_path):
    import os
    read, write = os.pipe()
    os.write(write, "abc".encode()), os.close(write)
    assert exp.read_text(f"/dev/fd/{read}") == exp.read_text(f"/dev/fd/{read}") == "abc"
    os.close(read)
    exp.read_text.cache_clear()


def test_the_step_is_that_of_torch_optim():
    flags = exp.Flags(**exp.Paths.defaults | exp.Paths.smoke | dict(steps=5, lr=.1), room=exp.Paths, device="cpu")
    number, step = common.run_of(common.numbers([flags], exp.constants), 0), exp.step_of(flags)
    state = common.tree_map(lambda x: x.double() if x.is_floating_point() else x, exp.start(flags))
    params = {k: x.clone().requires_grad_() for k, x in state["params"].items()}
    optimiser = torch.optim.AdamW(params.values(), lr=1., betas=(.9, .99), weight_decay=.1)
    config = exp.taught(flags)[3]
    for t in range(5):
        first = common.integers(common.key(torch.tensor(0), 0, torch.tensor(t)), len(number["learn"]) - 16, 2)
        rows = torch.stack([number["learn"][i:i + 17] for i in first])
        z = exp.final_norm(params, exp.forward(params, rows[:, :-1], config)[-1], config)
        loss = torch.nn.functional.cross_entropy((z @ params["wte.weight"].T).flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.)
        optimiser.param_groups[0]["lr"] = .1 * float(exp.schedule(torch.tensor(t), 5))
        optimiser.step()
        state, logs = step(state, number)
        assert abs(logs["loss"] - loss) < 1e-5 and all(far(state["params"][k], x.detach()) < 1e-5 for k, x in params.items())


def test_a_mini_learns_and_is_kept(tmp_path):
    line = "--study train-mini --runs 1 --steps 150 --n-layers 2 --d-model 48 --merges 100 --lr 1e-2 --batch 8"
    assert run(exp, line, tmp_path / "r") == 0
    assert run(exp, line.replace("train-mini --runs 1", "lens"), tmp_path / "m") == 0
    arrays, again = common.read(tmp_path / "r/arrays.npz"), common.read(tmp_path / "m/mini/metrics.npz")
    assert arrays["loss"][0] > arrays["bigram"][0] > 2 and arrays["eval_loss"][-1, 0] < arrays["eval_loss"][0, 0] - 1
    whole = common.read(tmp_path / "r/metrics.npz")["loss"]
    assert np.array_equal(again["loss"], whole)  # the mini is the run of its seed
    assert run(exp, line.replace("train-mini --runs 1", "lens"), tmp_path / "n") == 0 and not (tmp_path / "n/mini").exists()
    a, b = (common.read(tmp_path / f"{name}/arrays.npz") for name in "mn")
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_text_in_any_font(tmp_path, monkeypatch):
    """No warning of a missing glyph: a model's name, a prompt and tokens that the font lacks."""
    folder = put(tmp_path / "模型$x$", FILES)
    line = ["--model", str(folder), "--text", "世界 $a$ \U0001f600 x", "--window", "9", "--token", "3", "--out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for study in exp.STUDIES[:-1]:
            name = common.study_name(study.__name__)
            assert common.main(exp.Flags, exp.STUDIES, ["--study", name, *line, str(tmp_path / name)]) == 0
    assert exp.shown("$世\n") == "\\$?\\n" and exp.shown("a b", 12) == "a·b"


@pytest.mark.parametrize("line, words", [
    ("--text x --file y", "not both"), ("--text=", "--text must not be empty"),
    ("--n-heads 5", "divisible by --n-heads"), ("--model nonsense", "--download fetches"), ("--window 1", "windows of 1: too few"), ("--runs 2", "--runs has no part"),
    ("--token 10000", "--token 10000"), ("--file /dev/null", "0 tokens"), ("--window 100", "give a smaller --window"), ("--text " + "a" * 200, "give a smaller"),
    ("--file nonsense", "can't be read"), ("--study train-mini --model gpt2", "--model has no part"), ("--text \udcff", "no token for"),
    ("--study train-mini --sweep n_layers=1,2", "numbers alone"), ("--model a/b/c", "--download fetches"), ("--text 世", "no token for")])
def test_bad_flags(line, words, refused):
    assert words in refused(exp, f"--smoke {line}")


# ---- Rules of claims --------------------------------------------------------------------------------------------------------

def test_three_quarters_of_positions_decide():
    say = lambda share, relation, bound: common.judge("", "", "", exp.quartiles(np.arange(100) < 100 * share), relation, bound)["holds"]
    assert [say(share, ">", .5) for share in (1, .8, .7, .3, .2, 0)] == [True, True, None, None, False, False]
    assert common.judge("", "", "", exp.quartiles([]), ">", 0)["holds"] is common.judge("", "", "", exp.quartiles([1, 1]), ">", 0)["holds"] is None


@pytest.mark.parametrize("good", [True, False])
def test_claims_on_paths_and_lenses_can_hold_and_be_false(good):
    T, L = 8, 5
    depth = np.linspace(0, 1, L)[:, None] * np.ones(T)
    first, names = np.arange(T) == 0, np.array(["x"] * 100)
    a = dict(first=first, names=names, model="m", entropy=np.full(T, 1.), predicted=np.ones(T, int), tokens=np.zeros(T, int),
             cosine_predicted=depth * .5 if good else .95 + .04 * (depth > 0), cosine_predicted_final=np.full((L, T), .5 if good else .95),
             rank_cosine=np.full((L, T), 0 if good else 50), rank_cosine_final=np.full((L, T), 0 if good else 3),
             lens_kl=3 * (1 - depth) ** 2 if good else 3 + depth, nearest=np.full((L, T), 5 if good else 1))
    for sentences in exp.path_sentences, exp.lens_sentences:
        found = []
        exp.say_all(lambda *words: found.append(common.judge(*words)), sentences(a), "m")
        assert {claim["holds"] for claim in found} == {good}, found
    parts = dict(first=first, model="m", turn=np.stack([np.full((4, T), 1. + (not good)), np.full((4, T), 1. + good)], 1),
                 kept=np.full((4, 2, T), good), push=np.linspace(0, 1 if good else -1, 4)[:, None, None] * np.ones((2, T)))
    assert {*judged(exp.Blocks, parts).values()} == {good}
    box = np.array([[-.9, -.9], [.9, .9]]) * (1 if good else 9)
    away = dict(pca_tokens=box, pca_states=np.full((L, T, 2), 9. if good else 0.), square=1. if good else .5, three=.04 if good else .2)
    assert {k: v for k, v in judged(exp.Paths, a | away).items() if k in ("beyond", "square", "three-components")} == dict.fromkeys(
        ("beyond", "square", "three-components"), good)
    sphere = dict(first=first, model="m", angle=np.full(T, 60. if good else 20.), full_angle=np.full(T, 30. if good else 21.))
    assert {*judged(exp.Sphere, sphere).values()} == {good}


@pytest.mark.parametrize("study", exp.STUDIES, ids=lambda study: study.__name__)
def test_the_ledger_holds_what_the_code_claims(study, tmp_path):
    """figures/gpt2.md has the ids that a study claims now; README's counts are those of the ledger."""
    name = common.study_name(study.__name__)
    assert run(exp, f"--smoke --study {name}", tmp_path) == 0
    assert [*ledger("gpt2_paths", name, name == "paths")] == [*judged(study, common.read(tmp_path / "arrays.npz"))]
