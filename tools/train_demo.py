"""Train the embedded demo model, its tokenizer and its draft, from one plain-text file, on a CPU.

    python tools/train_demo.py --text TRAIN.txt --valid VALID.txt --out minillm/demo --minutes 70

The text is any UTF-8 file; records may be separated by a line holding `<|endoftext|>`. Three things
come out, as two ordinary Hugging Face checkpoint folders (OUT and OUT/draft):

1. a byte-level BPE tokenizer of 4,096 entries;
2. the target: a Llama-architecture decoder of about 6 M parameters;
3. the draft: a Llama of under 0.8 M parameters on the same tokenizer, trained on the target's soft
   labels (distillation, https://arxiv.org/abs/1503.02531), for speculative decoding.

What makes an hour on a CPU enough:

- bfloat16 matrix products under autocast, float32 master weights, and the whole of forward, loss and
  backward compiled into one graph;
- Muon (https://kellerjordan.github.io/posts/muon/) for the hidden matrices, AdamW for the rest;
- short windows first, long ones last: attention costs more per token as windows grow, and most of what a
  small model learns needs few tokens of context;
- a schedule over the *fraction of the time budget used*, so that the learning rate always reaches zero on
  time, on a slow machine or a busy one.

Everything between lives in --work (tokens, checkpoints); running the same command again continues from
there (a work folder belongs to one text). Steps longer than 30 s, because the process was paused or a
graph was being compiled, count as 30 s. A busy second core makes two threads slower than one: try
`OMP_NUM_THREADS=1` when the machine is shared.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"  # token id 0: starts every record (bos) and ends it (eos)
VOCAB = 4096
BATCH_TOKENS = 8192  # tokens per optimizer step
# (fraction of the time budget, window length): from that fraction on, train on windows of that length.
TARGET_WINDOWS = ((0.0, 256), (0.82, 1024))
DRAFT_WINDOWS = ((0.0, 512), (0.7, 1024))
LONGEST_STEP = 30.0  # seconds one step may add to the elapsed time
CHECKPOINT_EVERY, VALID_EVERY, LOG_EVERY = 120.0, 300.0, 20.0  # seconds of elapsed training time

SHARED = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
TARGET = LlamaConfig(
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    **SHARED,
)
DRAFT = LlamaConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **SHARED,
)
GENERATION = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256}
# Co-writing: every message is a passage of one tale, so a turn is its content and a line break, no roles.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ '\\n\\n' }}{% endfor %}"


# --- text to tokens ---------------------------------------------------------------------------------------


def read_records(path: Path) -> list[str]:
    """The file's records: what stands between lines holding only the separator, stripped, none empty."""
    if not path.is_file():
        sys.exit(f"train_demo: no such text file: {path} (give a UTF-8 text file)")
    records = ("\n" + path.read_text(encoding="utf-8") + "\n").split(f"\n{END}\n")
    records = [record.strip() for record in records if record.strip()]
    if not records:
        sys.exit(f"train_demo: {path} holds no text")
    return records


def train_tokenizer(records: list[str]) -> Tokenizer:
    """Byte-level BPE: 256 bytes, one special token, merges for the rest; any text encodes without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(records, trainer)
    # Encoding a prompt starts a record: the separator is put in front, as it was in training.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def tokenise(tokenizer: Tokenizer, records: list[str]) -> np.ndarray:
    """One stream of uint16 ids: END record END record ... END, so that every record is also ended."""
    ids = [token for encoding in tokenizer.encode_batch(records) for token in encoding.ids]
    return np.array([*ids, 0], dtype=np.uint16)


def prepare(work: Path, text: Path, valid: Path) -> tuple[Tokenizer, torch.Tensor, torch.Tensor, int]:
    """Tokenizer, training ids [N], validation ids [M], bytes of the validation records; cached in `work`."""
    valid_records = read_records(valid)
    tokenizer_file, train_file = work / "tokenizer.json", work / "train.npy"
    if not train_file.exists():
        records = read_records(text)
        tokenizer = train_tokenizer(records)
        tokenizer.save(str(tokenizer_file))
        np.save(train_file, tokenise(tokenizer, records))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    if tokenizer.get_vocab_size() != VOCAB:
        sys.exit(f"train_demo: the text gave {tokenizer.get_vocab_size()} tokens, {VOCAB} are needed: too short")
    train_ids = torch.from_numpy(np.load(train_file).astype(np.int64))
    if len(train_ids) < 2 * BATCH_TOKENS:
        sys.exit(f"train_demo: {len(train_ids):,} training tokens; at least {2 * BATCH_TOKENS:,} are needed")
    valid_ids = torch.from_numpy(tokenise(tokenizer, valid_records).astype(np.int64))
    return tokenizer, train_ids, valid_ids, sum(len(record.encode()) for record in valid_records)


class Windows:
    """Batches of windows over the token stream: every epoch a new random offset and a new order."""

    def __init__(self, ids: torch.Tensor, seed: int):
        self.ids, self.seed, self.epoch, self.cursor, self.length = ids, seed, -1, 0, 0
        self.order = torch.empty(0, dtype=torch.long)

    def start_epoch(self, epoch: int, length: int, cursor: int = 0) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(self.ids) - 1 - offset) // length
        self.order = offset + length * torch.randperm(count, generator=generator)
        self.epoch, self.length, self.cursor = epoch, length, cursor

    def next(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and the tokens that follow them, both [BATCH_TOKENS / length, length]."""
        rows = BATCH_TOKENS // length
        if length != self.length or self.cursor + rows > len(self.order):
            self.start_epoch(self.epoch + 1, length)
        starts = self.order[self.cursor : self.cursor + rows]
        self.cursor += rows
        window = self.ids[starts[:, None] + torch.arange(length + 1)]  # [B, T + 1]
        return window[:, :-1], window[:, 1:]


# --- measuring --------------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(model: LlamaForCausalLM, inputs: torch.Tensor) -> torch.Tensor:
    """float32 log-probabilities [B, T, VOCAB] of the next token, with bfloat16 matrix products."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return logits.float().log_softmax(-1)


def scored_windows(ids: torch.Tensor, length: int, overlap: int):
    """Windows [1, <= length + 1] that advance by length - overlap, and how many targets are new in each.

    Every token after the first is scored exactly once, with at least `overlap` tokens of context where
    the stream has them. The stream is one: context crosses record borders, as it did in training.
    """
    done = 1  # ids[0] opens the first record and is given, not predicted
    while done < len(ids):
        start = max(0, done - 1 - overlap)
        stop = min(start + length + 1, len(ids))
        yield ids[start:stop][None], stop - done
        done = stop


def validation_bits(model: LlamaForCausalLM, ids: torch.Tensor, length: int, overlap: int = 0) -> float:
    """Bits of all validation tokens, record ends included."""
    model.eval()
    bits = 0.0
    for window, fresh in scored_windows(ids, length, overlap):
        scores = log_probs(model, window[:, :-1]).gather(-1, window[:, 1:, None])  # [1, T, 1]
        bits -= scores[0, -fresh:].double().sum().item() / math.log(2)
    model.train()
    return bits


def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, ids: torch.Tensor) -> tuple[float, float]:
    """How often the two argmaxes agree, and the mean of sum(min(p, q)): the chance that speculative
    sampling (https://arxiv.org/abs/2211.17192) at temperature 1 keeps a drafted token."""
    target.eval(), draft.eval()
    same, overlap, count = 0, 0.0, 0
    for window, _ in scored_windows(ids, 512, 0):
        p, q = log_probs(target, window[:, :-1]), log_probs(draft, window[:, :-1])  # [1, T, VOCAB] each
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        overlap += torch.minimum(p, q).exp().sum().item()
        count += p.shape[1]
    return same / count, overlap / count


# --- training ---------------------------------------------------------------------------------------------


def make_loss(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None):
    """Mean cross-entropy in nats, against the text or against the teacher's full distribution."""

    def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits  # [B, T, VOCAB]
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(input_ids=inputs, use_cache=False).logits  # [B, T, VOCAB]
        if teacher is None:
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return -(wanted.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1).mean()

    return torch.compile(loss, dynamic=False)


def make_optimizers(model: LlamaForCausalLM, muon_lr: float, adam_lr: float, decay: float) -> list:
    """Muon for the hidden matrices; AdamW for the embedding (also the head: they are tied) and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight] + [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(hidden, lr=muon_lr, momentum=0.95, weight_decay=decay),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def lr_factor(fraction: float) -> float:
    """Learning-rate factor: 2 % linear warm-up, then half a cosine down to zero."""
    if fraction < 0.02:
        return max(fraction, 0.001) / 0.02
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (fraction - 0.02) / 0.98))


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(name, config, schedule, data, args, minutes, decay, teacher=None) -> tuple[LlamaForCausalLM, dict]:
    """Train `name` for `minutes`, continuing from its checkpoint in args.work where there is one.

    `schedule` gives the window lengths, `decay` is Muon's weight decay. With a `teacher` the labels are its
    distributions. Returns the model as it was at the best validation, and how far training went.
    """
    _, train_ids, valid_ids, valid_bytes = data
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    model.train()
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr, decay)
    base_lr = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    windows = Windows(train_ids, args.seed)
    now = {"step": 0, "tokens": 0, "elapsed": 0.0, "best": math.inf, "best_step": 0}
    latest, best = args.work / f"{name}.pt", args.work / f"{name}-best.pt"
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        now = saved["now"]
        windows.start_epoch(*saved["windows"])
        print(f"{name}: continuing from step {now['step']}, {now['elapsed'] / 60:.1f} min", flush=True)
    else:
        sizes = f"{len(train_ids):,} training tokens, {valid_bytes:,} validation bytes"
        print(f"{name}: {model.num_parameters():,} parameters, {sizes}", flush=True)
    loss_fn = make_loss(model, teacher)

    def keep_checkpoint() -> None:
        position = (windows.epoch, windows.length, windows.cursor)
        states = [optimizer.state_dict() for optimizer in optimizers]
        weights = model.state_dict()
        save_atomically({"model": weights, "optimizers": states, "now": now, "windows": position}, latest)

    def validate() -> None:
        bpb = validation_bits(model, valid_ids, schedule[-1][1]) / valid_bytes  # windows as long as the last
        if bpb < now["best"]:
            now.update(best=bpb, best_step=now["step"])
            save_atomically(model.state_dict(), best)
        print(f"{name}: step {now['step']} valid {bpb:.4f} bits/byte (best {now['best']:.4f})", flush=True)

    budget = 60 * minutes
    last_save, last_valid, last_log = now["elapsed"], now["elapsed"], (now["elapsed"], now["tokens"])
    while now["elapsed"] < budget:
        began = time.perf_counter()
        fraction = now["elapsed"] / budget
        length = [length for start, length in schedule if fraction >= start][-1]
        loss = loss_fn(*windows.next(length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(optimizers, base_lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr * lr_factor(fraction)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now["step"] += 1
        now["tokens"] += BATCH_TOKENS
        if now["elapsed"] - last_valid >= VALID_EVERY:
            last_valid = now["elapsed"]
            validate()
        now["elapsed"] += min(time.perf_counter() - began, LONGEST_STEP)
        if now["elapsed"] - last_log[0] >= LOG_EVERY:
            speed = (now["tokens"] - last_log[1]) / (now["elapsed"] - last_log[0])
            last_log = (now["elapsed"], now["tokens"])
            place = f"step {now['step']} epoch {now['tokens'] / len(train_ids):.2f} window {length}"
            left = (budget - now["elapsed"]) / 60
            print(f"{name}: {place} loss {loss.item():.3f} {speed:.0f} tok/s eta {left:.1f} min", flush=True)
        if now["elapsed"] - last_save >= CHECKPOINT_EVERY:
            last_save = now["elapsed"]
            keep_checkpoint()
    validate()
    keep_checkpoint()
    model.load_state_dict(torch.load(best, weights_only=True))
    return model, now


# --- writing checkpoints ----------------------------------------------------------------------------------


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """An ordinary Hugging Face checkpoint folder, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, **GENERATION)
    model.save_pretrained(folder)  # one shard: model.safetensors
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": SHARED["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def figures(name: str, model: LlamaForCausalLM, now: dict, data) -> str:
    """The lines of measured figures that belong in the model card."""
    _, train_ids, valid_ids, valid_bytes = data
    rounded = copy.deepcopy(model).to(torch.bfloat16).float()  # the weights as they are written
    tokens, elapsed = now["tokens"], now["elapsed"]
    lines = [
        f"{name}: {model.num_parameters():,} parameters, best of {now['step']:,} steps: {now['best_step']:,}",
        f"{name}: {tokens:,} tokens, {tokens / len(train_ids):.1f} epochs, {elapsed / 60:.1f} min",
    ]
    for length, overlap in ((512, 0), (1024, 512)):
        bits = validation_bits(rounded, valid_ids, length, overlap)
        nats = bits * math.log(2) / (len(valid_ids) - 1)
        lines.append(f"{name}: window {length}, overlap {overlap}: {bits / valid_bytes:.4f} bits/byte, "
                     f"loss {nats:.4f} nats/token")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    parser.add_argument("--valid", type=Path, required=True, help="validation text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder for the target; draft in OUT/draft")
    parser.add_argument("--work", type=Path, default=Path("train_demo_work"), help="tokens and checkpoints")
    parser.add_argument("--minutes", type=float, default=70, help="training time of the target")
    parser.add_argument("--draft-minutes", type=float, default=15, help="training time of the draft")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    data = prepare(args.work, args.text, args.valid)
    tokenizer, _, valid_ids, _ = data
    target, target_run = train("target", TARGET, TARGET_WINDOWS, data, args, args.minutes, 0.1)
    export(target, tokenizer, args.out)
    target.eval().requires_grad_(False)
    draft, draft_run = train("draft", DRAFT, DRAFT_WINDOWS, data, args, args.draft_minutes, 0.01, target)
    export(draft, tokenizer, args.out / "draft")
    print(figures("target", target, target_run, data), flush=True)
    print(figures("draft", draft, draft_run, data), flush=True)
    same, overlap = agreement(target, draft, valid_ids)
    print(f"draft: argmax agrees with the target {same:.1%}, expected acceptance {overlap:.1%}")


if __name__ == "__main__":
    main()
