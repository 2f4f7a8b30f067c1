"""The same weights through minillm and through each peer that is installed, turn by turn in one run.

    python tools/bench_peers.py --model 110M --work FOLDER [--threads 2] [--only REGEX] [--json F] [--plot PNG]

`--model` is 15M, 110M or 1.1B (a Llama of that shape with random weights is written into FOLDER) or a
checkpoint folder of a Llama. Peers: transformers (eager; static cache and torch.compile), llama-cpp-python
(f32, bf16, Q8_0, Q4_0, from a GGUF written here), ctranslate2. One that is not installed is named and skipped.

Contestants meet in pairs. Each runs in a process of its own with the same number of threads, and they take
turns, A B A B: a busy moment hits both, and every ratio is of two neighbouring turns. Before the clock runs,
both continue the same prompt greedily: in float32 the ids have to be equal, in other formats it is reported how
long they are. Measured, batch 1: decoding after 64 tokens, the first token after 512, and the time from
process start to the second token (with the files in the page cache).

minillm is measured through `LLM.generate`, everything included; the peers through the shortest loop that
their libraries allow.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata, util
from pathlib import Path

SHAPES = {  # Llamas: llama2.c's stories15M and stories110M, TinyLlama
    "15M": dict(hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6),
    "110M": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "1.1B": dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
PAIRS = [
    ("minillm fp32", "transformers fp32"),
    ("minillm fp32", "transformers fp32 static compile"),
    ("minillm fp32", "ctranslate2 fp32"),
    ("minillm fp32", "llama.cpp f32"),
    ("minillm bf16", "transformers bf16"),
    ("minillm bf16", "transformers bf16 static compile"),
    ("minillm bf16", "llama.cpp bf16"),
    ("minillm int8", "minillm bf16"),
    ("minillm int8", "llama.cpp Q8_0"),
    ("minillm int8 head", "llama.cpp Q8_0"),  # Q8_0 and Q4_0 quantize the output head too
    ("minillm int4-g32", "llama.cpp Q4_0"),
    ("minillm int4-g32 head", "llama.cpp Q4_0"),
]
PACKAGES = {
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
    "ctranslate2": "ctranslate2",
    "minillm": "minillm",
}
DISTRIBUTIONS = {"llama.cpp": "llama-cpp-python"}
POSITION, PROMPT, CHECK = 64, 512, 16  # tokens before the decoding, before the first token, of the greedy check
CONTEXT = 1024


# ---- contestants: each lives in its own process; run(prompt, n) -> (ids, seconds to the first, of the rest) ----


class Minillm:
    def __init__(self, folder: Path, words: list[str], **_):
        from minillm import LLM

        dtype = "float32" if words[0] == "fp32" else "bfloat16"
        quantize = words[0] if words[0].startswith("int") else None
        self.llm = LLM.from_pretrained(
            folder, dtype=dtype, device="cpu", quantize=quantize, quantize_head="head" in words
        )

    def run(self, prompt: list[int], new_tokens: int):
        started = time.perf_counter()
        out = self.llm.generate(
            prompt, max_new_tokens=new_tokens, temperature=0, eos_token_id=[], repetition_penalty=1.0
        )
        seconds = time.perf_counter() - started
        return out.token_ids, seconds - out.stats.decode_seconds, out.stats.decode_seconds


class Transformers:
    def __init__(self, folder: Path, words: list[str], new_tokens: int, **_):
        import torch
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if words[0] == "fp32" else torch.bfloat16
        self.torch, self.model = torch, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.step = self.model
        self.caches, self.capacity = ({} if "compile" in words else None), POSITION + new_tokens + 1
        if "compile" in words:
            self.step = torch.compile(self.model, fullgraph=True, dynamic=False)

    def cache(self, length: int):
        from transformers import DynamicCache, StaticCache

        if self.caches is None:
            return DynamicCache(config=self.model.config)
        capacity = max(length, self.capacity)  # one graph: only this capacity is ever decoded in
        if capacity not in self.caches:
            self.caches[capacity] = StaticCache(config=self.model.config, max_cache_len=capacity)
        self.caches[capacity].reset()
        return self.caches[capacity]

    def run(self, prompt: list[int], new_tokens: int):
        with self.torch.inference_mode():
            started = time.perf_counter()
            cache = self.cache(len(prompt) + new_tokens)
            ids = self.torch.tensor([prompt])  # [1, T]
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]
            found = [token.item()]
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                token = self.step(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                found.append(token.item())
            return found, first - started, time.perf_counter() - first


class LlamaCpp:
    def __init__(self, folder: Path, words: list[str], threads: int, **_):
        import llama_cpp
        import numpy

        self.api, self.numpy = llama_cpp, numpy
        keys = 0 if words[0] == "f32" else 1  # GGML_TYPE_F32, _F16 (the default)
        self.llama = llama_cpp.Llama(
            str(gguf_path(folder, words[0])),
            n_ctx=CONTEXT,
            n_batch=PROMPT,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=keys,
            type_v=keys,
            verbose=False,
        )
        self.vocabulary = self.llama.n_vocab()

    def run(self, prompt: list[int], new_tokens: int):
        started = time.perf_counter()
        self.llama._ctx.kv_cache_clear()
        found = [self.feed(prompt)]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            found.append(self.feed(found[-1:]))
        return found, first - started, time.perf_counter() - first

    def feed(self, ids: list[int]) -> int:
        """llama_decode without the Python around it; the likeliest next token."""
        array = (self.api.llama_token * len(ids))(*ids)
        status = self.api.llama_decode(self.llama.ctx, self.api.llama_batch_get_one(array, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self.api.llama_get_logits_ith(self.llama.ctx, -1)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


class CTranslate2:
    def __init__(self, folder: Path, words: list[str], threads: int, **_):
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(folder / "ctranslate2"), device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads
        )
        self.names = json.loads((folder / "ctranslate2" / "vocabulary.json").read_text())

    def run(self, prompt: list[int], new_tokens: int):
        times = []
        started = time.perf_counter()
        (result,) = self.generator.generate_batch(
            [[self.names[token] for token in prompt]],
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[],
            include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()),
        )
        return result.sequences_ids[0], times[0] - started, times[-1] - times[0]


KINDS = {"minillm": Minillm, "transformers": Transformers, "llama.cpp": LlamaCpp, "ctranslate2": CTranslate2}


def serve(settings: dict) -> None:
    kind, *words = settings["name"].split(" ")

    def make():
        sizes = {name: settings[name] for name in ("threads", "new_tokens")}
        contestant = KINDS[kind](Path(settings["folder"]), words, **sizes)
        contestant.run(settings["prompt"], 2)
        return contestant

    def answer(contestant, order):
        if order == "bandwidth":
            return bandwidth()
        if order == "memory":
            status = Path("/proc/self/status").read_text()
            return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
        return contestant.run(*order)

    serve_orders(make, answer)


def serve_orders(make: Callable, answer: Callable) -> None:
    """A contestant's process: orders come as JSON lines on stdin, answers go to what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    contestant = make()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(contestant, json.loads(line))), file=answers, flush=True)


def bandwidth() -> float:
    import torch

    from minillm.measure.bench import memory_bandwidth

    return memory_bandwidth(torch.device("cpu"))


# ---- the referee ----


class Contestant:
    """The referee's end of a contestant's process."""

    def __init__(self, name: str, folder: Path, threads: int, program: str = __file__, **settings):
        self.name = name
        settings |= dict(name=name, folder=str(folder), threads=threads)
        environment = os.environ | {f"{lib}_NUM_THREADS": str(threads) for lib in ("OMP", "MKL", "OPENBLAS")}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, program, "--serve", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.answer()
        self.start_seconds = time.perf_counter() - started

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; its message is above")
        return line

    def ask(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def meet(names: tuple[str, str], folder: Path, args) -> dict:
    """Everything measured about one pair."""
    ids = [(7 * i * i + 3 * i) % 251 + 5 for i in range(PROMPT)]  # any tokens but special ones
    for name in names:
        warm_files(folder, name)
    contestants = [Contestant(name, folder, args.threads, new_tokens=args.new_tokens, prompt=ids[:8]) for name in names]
    try:
        answers = [one.ask([ids[:CHECK], CHECK])[0] for one in contestants]
        same = next((i for i in range(CHECK) if answers[0][i] != answers[1][i]), CHECK)
        if all(name.split()[1] in ("fp32", "f32") for name in names) and same < CHECK:
            raise RuntimeError(f"greedy ids differ in float32: {names[0]} {answers[0]}, {names[1]} {answers[1]}")
        for one in contestants:  # whatever the first request of a kind still builds
            one.ask([ids[:POSITION], args.new_tokens + 1])
            one.ask([ids, 1])
        peaks = [one.ask("memory") for one in contestants]
        decode, first, bandwidths = ([], []), ([], []), []
        for _ in range(args.rounds):
            bandwidths.append(contestants[0].ask("bandwidth"))
            for one, times in zip(contestants, decode, strict=True):
                times.append(one.ask([ids[:POSITION], args.new_tokens + 1])[2] / args.new_tokens)
            for one, times in zip(contestants, first, strict=True):
                times.append(one.ask([ids, 1])[1])
        return {
            "pair": names,
            "greedy_ids_equal": same,
            "greedy_ids_compared": CHECK,
            "tokens_per_second": [spread([1 / t for t in times]) for times in decode],
            "decode_ratio": spread([b / a for a, b in zip(*decode, strict=True)]),
            "first_token_seconds": [spread(times) for times in first],
            "first_token_ratio": spread([b / a for a, b in zip(*first, strict=True)]),
            "start_to_second_token_seconds": [one.start_seconds for one in contestants],
            "peak_memory_bytes": peaks,
            "read_bandwidth": spread(bandwidths),
        }
    finally:
        for one in contestants:
            one.close()


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def missing(name: str) -> str | None:
    """Why this contestant cannot come, or None."""
    kind = name.split()[0]
    if util.find_spec(PACKAGES[kind]) is None:
        return f"{DISTRIBUTIONS.get(kind, kind)} is not installed"
    if kind == "llama.cpp" and util.find_spec("gguf") is None:
        return "gguf is not installed (it writes the file that llama.cpp reads)"
    return None


def warm_files(folder: Path, name: str) -> None:
    """Read a contestant's files once, so that nobody's start waits for the disk."""
    kind, *words = name.split()
    paths = {"llama.cpp": lambda: [gguf_path(folder, words[0])], "ctranslate2": lambda: [*folder.glob("ct*/model.bin")]}
    for path in paths.get(kind, lambda: folder.glob("*.safetensors"))():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


# ---- the same weights for everybody ----


def random_checkpoint(shape: str, folder: Path) -> None:
    """A Llama of the shape with random bfloat16 weights, and a byte-level tokenizer for its first ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = dict(vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True) | SHAPES[shape]
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(bos_token_id=1, eos_token_id=2, **settings))
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = dict(tokenizer_class="PreTrainedTokenizerFast", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def gguf_path(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.gguf"


def write_gguf(folder: Path, kind: str) -> None:
    """The checkpoint as a GGUF file: f32 and bf16 from the safetensors, the others by llama.cpp's own quantizer."""
    path = gguf_path(folder, kind)
    if path.exists():
        return
    unfinished = path.with_suffix(".part")
    if kind in ("f32", "bf16"):
        write_plain_gguf(folder, kind, unfinished)
    else:
        import llama_cpp

        write_gguf(folder, "f32")
        silence = llama_cpp.llama_log_callback(lambda *message: None)  # a line per tensor
        llama_cpp.llama_log_set(silence, None)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
        names = str(gguf_path(folder, "f32")).encode(), str(unfinished).encode()
        if llama_cpp.llama_model_quantize(*names, settings):
            raise RuntimeError(f"llama.cpp could not quantize {folder} to {kind}")
    unfinished.replace(path)


def write_plain_gguf(folder: Path, kind: str, path: Path) -> None:
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")  # it is fed ids
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    half = gguf.GGMLQuantizationType.BF16
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
                tensor = handle.get_tensor(name).to(torch.float32)
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    tensor = interleave(tensor, heads if "q_proj" in name else kv_heads)
                array, target = tensor.numpy(), names.get_name(name, try_suffixes=(".weight", ".bias"))
                if kind == "bf16" and tensor.ndim == 2:  # as llama.cpp's converter: vectors stay float32
                    writer.add_tensor(target, gguf.quants.quantize(array, half), raw_dtype=half)
                else:
                    writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight, heads: int):
    """Rows of q and k reordered: llama.cpp rotates neighbouring pairs, the checkpoint has halves of a head."""
    rows, inputs = weight.shape
    return weight.view(heads, 2, rows // heads // 2, inputs).transpose(1, 2).reshape(rows, inputs).contiguous()


def write_ctranslate2(folder: Path) -> None:
    import ctranslate2

    out = folder / "ctranslate2"
    if not (out / "model.bin").exists():
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out), force=True)


def prepare(name: str, folder: Path) -> None:
    kind, *words = name.split()
    if kind == "llama.cpp":
        write_gguf(folder, words[0])
    elif kind == "ctranslate2":
        write_ctranslate2(folder)


# ---- what is printed ----


def as_text(results: list[dict], skipped: dict[str, str], heading: str) -> str:
    lines = [heading, ""]
    lines.append(
        f"{'A':<22}{'B':<34}{'decode, tokens/s':^38}{'first token of ' + str(PROMPT) + ', ms':^38}"
        f"{'start, s':^14}{'MiB':^14}{'ids':>6}"
    )
    side = f"{'A':>9}{'B':>9}{'B/A time (range)':>20}"
    lines.append(f"{'':<56}{side}{side}{'A':>7}{'B':>7}{'A':>7}{'B':>7}")
    for one in results:
        a, b = one["tokens_per_second"]
        c, d = one["first_token_seconds"]
        lines.append(
            f"{one['pair'][0]:<22}{one['pair'][1]:<34}"
            f"{a['median']:>9.1f}{b['median']:>9.1f}{ratio(one['decode_ratio']):>20}"
            f"{c['median'] * 1e3:>9.0f}{d['median'] * 1e3:>9.0f}{ratio(one['first_token_ratio']):>20}"
            + "".join(f"{seconds:>7.1f}" for seconds in one["start_to_second_token_seconds"])
            + "".join(f"{size / 2**20:>7.0f}" for size in one["peak_memory_bytes"])
            + f"{one['greedy_ids_equal']:>3}/{one['greedy_ids_compared']}"
        )
    lines += [f"not measured: {name}: {reason}" for name, reason in skipped.items()]
    speeds = [one["read_bandwidth"]["median"] / 1e9 for one in results]
    if speeds:
        lines.append(f"memory read at {statistics.median(speeds):.1f} GB/s ({min(speeds):.1f}-{max(speeds):.1f})")
    return "\n".join(lines)


def ratio(values: dict) -> str:
    return f"{values['median']:.2f}x ({values['lowest']:.2f}-{values['highest']:.2f})"


def save_plot(path: Path, results: list[dict], heading: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.55 * len(results)), layout="constrained")
    axes = figure.subplots()
    for side, color in ((0, "tab:blue"), (1, "tab:gray")):
        speeds = [one["tokens_per_second"][side] for one in results]
        middle = [speed["median"] for speed in speeds]
        errors = [[s["median"] - s["lowest"] for s in speeds], [s["highest"] - s["median"] for s in speeds]]
        axes.barh([i + 0.38 * side for i in range(len(results))], middle, 0.36, xerr=errors, color=color)
    axes.set_yticks([i + 0.19 for i in range(len(results))], ["\n".join(one["pair"]) for one in results], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="decode, tokens/s (median; bars: lowest and highest)", title=heading.replace(": ", "\n", 1))
    figure.savefig(path, dpi=120)


def versions() -> str:
    found = {}
    for name in ("torch", "transformers", "llama-cpp-python", "ctranslate2"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in found.items())


def processor() -> str:
    """The processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="110M", help="15M, 110M, 1.1B, or the folder of a Llama checkpoint")
    parser.add_argument("--work", type=Path, default=Path("bench_peers_work"), help="folder for what is written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded per turn")
    parser.add_argument("--only", default="", help='only pairs "A / B" that match this regular expression')
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the decode speeds into this PNG")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(json.loads(args.serve))
        return

    folder = Path(args.model)
    if args.model in SHAPES:
        folder = args.work / args.model
        if not (folder / "tokenizer_config.json").exists():  # written last
            random_checkpoint(args.model, folder)
    heading = f"{args.model}, {args.threads} threads, {platform.machine()}, {date.today()}: {versions()}"
    results, skipped = [], {}
    for names in PAIRS:
        if not re.search(args.only, " / ".join(names)):
            continue
        try:
            for name in names:
                if reason := missing(name):
                    raise RuntimeError(reason)
                prepare(name, folder)
            results.append(meet(names, folder, args))
        except Exception as error:  # one peer's failure must not cost the others' figures; it is named below
            skipped[" / ".join(names)] = f"{type(error).__name__}: {error}"
        print(f"{' / '.join(names)}: {skipped.get(' / '.join(names), 'done')}", file=sys.stderr, flush=True)
    print(as_text(results, skipped, heading))
    if args.json:
        args.json.write_text(json.dumps({"heading": heading, "results": results, "skipped": skipped}, indent=1))
    if args.plot:
        save_plot(args.plot, results, heading)
    if any("differ in float32" in reason for reason in skipped.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
