"""Train the embedded demo model, its tokenizer and its draft, from one plain-text file, on a CPU, with `minillm.train`.

    python tools/train_demo.py --text TRAIN.txt --valid VALID.txt --work WORK --out NEW_FOLDER

The text is any UTF-8 file; records may be separated by a line holding `<|endoftext|>`. Three things
come out, as two ordinary Hugging Face checkpoint folders (OUT and OUT/draft):

1. a byte-level BPE tokenizer of 4,096 entries (or the one given by --tokenizer);
2. the target: a Llama-architecture decoder of about 6 M parameters;
3. the draft: a Llama of 1.3 M parameters on the same tokenizer, for speculative decoding: trained on the target's soft
   labels (distillation, https://arxiv.org/abs/1503.02531), in the end for nothing but that its tokens are accepted
   (https://arxiv.org/abs/2310.08461).

Most of the training is in windows of 512 tokens, the end of it in windows of 2,048: what lies further apart than a
model has seen, it cannot use.

What makes two hours on one core of a CPU enough: bfloat16 matrix products with float32 masters, blocks and head
compiled into a graph each, and Muon for the hidden matrices. The records follow one another in one stream, which is
cut into windows at other places in every epoch.

WORK holds tokens and states. Killed at any moment, the same command goes on, and ends in the same weights if it has as
many threads. On a shared machine one thread is faster than two: `OMP_NUM_THREADS=1`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minillm.llm import LLM
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config, parse_config
from minillm.load.writing import new_folder, write_decoder
from minillm.measure.perplexity import score_text
from minillm.model import Decoder, empty_decoder
from minillm.train.attention import PACKED
from minillm.train.documents import Documents, load_documents, make_documents, save_documents
from minillm.train.initialize import initialize
from minillm.train.loop import Recipe, Training
from minillm.train.loss import NEXT_TOKEN, Objective, ScoredLoss
from minillm.train.packing import cut, fill

END = "<|endoftext|>"  # token id 0: starts every record (bos) and ends it (eos)
VOCAB = 4096
WINDOW, LONG_WINDOW = 512, 2048  # tokens, in training and where it is scored
TOKENS = 4096  # per optimizer step
LONG_RATE = 0.25  # of the learning rates, in long windows

SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
TARGET = SHARED | {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
DRAFT = SHARED | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
    "max_new_tokens": 256,
}
# Co-writing: every message is a passage of one tale, so a turn is its content and a line break, no roles.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ '\\n\\n' }}{% endfor %}"


# --- text to tokens ---------------------------------------------------------------------------------------


def read_examples(path: Path) -> list[str]:
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


def stream(tokenizer: Tokenizer, records: list[str]) -> Documents:
    """All records as one document: END record END record ... END, so that every record is also ended."""
    ids = [token for encoding in tokenizer.encode_batch(records) for token in encoding.ids]
    return make_documents([([*ids, 0], [True] * (len(ids) + 1))], sum(len(record.encode()) for record in records))


def prepare(args) -> tuple[Tokenizer, Documents, Documents]:
    """Tokenizer, training and validation text; made once, then read from `work`."""
    tokenizer_file = args.work / "tokenizer.json"
    if not tokenizer_file.exists():
        made = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(read_examples(args.text))
        made.save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    if tokenizer.get_vocab_size() != VOCAB:
        sys.exit(f"train_demo: the text gave {tokenizer.get_vocab_size()} tokens, {VOCAB} are needed: too short")
    for name, text in (("train", args.text), ("valid", args.valid)):
        if not (args.work / f"{name}.safetensors").exists():
            save_documents(stream(tokenizer, read_examples(text)), args.work / f"{name}.safetensors")
    return tokenizer, *(load_documents(args.work / f"{name}.safetensors") for name in ("train", "valid"))


# --- training ---------------------------------------------------------------------------------------------


def train(name: str, model: Decoder, recipe: Recipe, data, args, objective: Objective = NEXT_TOKEN) -> None:
    """Train the model, going on from the state called `name` in `work` where there is one."""
    _, documents, held_out = data
    training = Training(model, documents, recipe, args.work / f"{name}.pt", save_every=120.0, objective=objective)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {size:,} parameters, {len(documents.ids):,} tokens, from step {training.step}", flush=True)
    scoring = ScoredLoss(model, recipe.length, bfloat16=True, compile=True)  # of the text, whatever the objective
    tokens, seconds = recipe.rows * recipe.length, []
    for step in training:
        seconds = [*seconds[-19:], step.seconds]
        if step.number % 20 == 0:
            speed = tokens * len(seconds) / sum(seconds)
            left = (recipe.steps - step.number) * sum(seconds) / len(seconds) / 60
            place = f"step {step.number} epoch {step.epoch:.2f} loss {step.loss:.3f} gradient {step.gradient_norm:.2f}"
            print(f"{name}: {place} {speed:.0f} tok/s, {left:.1f} min left", flush=True)
        if step.number % args.valid_every == 0 or step.number == recipe.steps:
            bits = scoring.bits_per_byte(held_out, recipe.rows)
            print(f"{name}: step {step.number} valid {bits:.4f} bits/byte ({time.strftime('%H:%M')})", flush=True)


def new_model(config: dict, seed: int) -> Decoder:
    model = empty_decoder(parse_config(config), torch.float32, PACKED, device="cpu")
    initialize(model, seed)
    return model


def of_target(target: Decoder, length: int, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Objective:
    """A loss between the draft's logits `[N, V]` and the distributions `[N, V]` of the target, which is not trained."""
    teacher = ScoredLoss(target.requires_grad_(False), length, bfloat16=True, compile=True)
    return Objective(
        torch.no_grad()(teacher.hidden), lambda logits, hidden: loss(logits, target.logits(hidden).softmax(-1))
    )


def cross_entropy(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return -(p * logits.log_softmax(-1)).sum(-1)


def rejection(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The chance that speculative sampling rejects a token: 1 - sum(min(p, q))."""
    return 1 - torch.minimum(p, logits.softmax(-1)).sum(-1)


# --- what comes out ---------------------------------------------------------------------------------------


def export(model: Decoder, config: dict, tokenizer: Tokenizer, folder: Path) -> None:
    """An ordinary Hugging Face checkpoint folder, weights in bfloat16."""
    write_decoder(model, folder, config, torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": SHARED["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", GENERATION)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def agreement(target: Decoder, draft: Decoder, documents: Documents) -> tuple[float, float]:
    """How often the two argmaxes agree, and the mean of sum(min(p, q)): the chance that speculative
    sampling (https://arxiv.org/abs/2211.17192) at temperature 1 keeps a drafted token."""
    scored = [ScoredLoss(model, LONG_WINDOW) for model in (target, draft)]
    same, overlap, count = 0, 0.0, 0
    for piece in cut(documents, LONG_WINDOW):
        batch, length = fill(documents, [[piece]], LONG_WINDOW), piece[1] - piece[0]
        p, q = (one.model.logits(one.hidden(batch)[:length]).softmax(-1) for one in scored)  # [T, VOCAB] each
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        overlap += torch.minimum(p, q).sum().item()
        count += length
    return same / count, overlap / count


def figures(folder: Path, valid: Path, held_out: Documents) -> None:
    """Print what belongs in the model card, measured on the weights as they were written."""
    written = {}
    for name, place in (("target", folder), ("draft", folder / "draft")):
        written[name] = load_decoder(place, load_config(place), torch.float32, attention=PACKED)
        for window in (WINDOW, LONG_WINDOW):
            bits = ScoredLoss(written[name], window).bits_per_byte(held_out)
            print(f"{name}: {bits:.4f} bits/byte in windows of {window}")
        score = score_text(LLM.from_pretrained(place, dtype="float32"), read_examples(valid))
        per_token = f"{score.nats_per_token:.4f} nats/token"
        print(f"{name}: {score.bits_per_byte:.4f} bits/byte, {per_token} in windows of 1,024, half of each context")
    same, overlap = agreement(written["target"], written["draft"], held_out)
    print(f"draft: argmax agrees with the target {same:.1%}, expected acceptance {overlap:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    parser.add_argument("--valid", type=Path, required=True, help="validation text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the target; draft in OUT/draft")
    parser.add_argument("--work", type=Path, default=Path("train_demo_work"), help="tokens and states")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use; default: train one on the text")
    parser.add_argument("--steps", type=int, default=4000, help=f"of the target, {TOKENS} tokens each")
    parser.add_argument("--draft-steps", type=int, default=3000)
    parser.add_argument("--long-steps", type=int, default=500, help="of each in long windows, after those")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--valid-every", type=int, default=250, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    data = prepare(args)

    def recipe(steps: int, length: int = WINDOW, rate: float = 1.0, weight_decay: float = args.weight_decay) -> Recipe:
        return Recipe(
            steps=steps,
            length=length,
            rows=TOKENS // length,
            rows_at_once=TOKENS // length,
            learning_rate=rate * args.adam_lr,
            muon_learning_rate=rate * args.muon_lr,
            weight_decay=weight_decay,
            warmup=0.02,
            bfloat16=True,
            compile=True,
            seed=args.seed,
        )

    target, draft = new_model(TARGET, args.seed), new_model(DRAFT, args.seed)
    train("target", target, recipe(args.steps), data, args)
    objective = of_target(target, WINDOW, cross_entropy)
    train("draft", draft, recipe(args.draft_steps, weight_decay=0.01), data, args, objective)
    long = recipe(args.long_steps, LONG_WINDOW, LONG_RATE)
    train("target-long", target.requires_grad_(True), long, data, args)
    objective = of_target(target, LONG_WINDOW, rejection)
    train("draft-long", draft, replace(long, weight_decay=0.01), data, args, objective)
    with new_folder(args.out) as folder:
        export(target, TARGET, data[0], folder)
        (folder / "draft").mkdir()
        export(draft, DRAFT, data[0], folder / "draft")
    figures(args.out, args.valid, data[2])


if __name__ == "__main__":
    main()
