"""Two tiny real tokenizers, trained on a few sentences with the `tokenizers` library.

`byte_level` is the Llama 3 / Qwen kind (bytes as letters, BOS from the post-processor, ChatML chat
template); `metaspace` the Llama 2 kind (a visible space, unknown characters as byte tokens, a chat
template that writes BOS itself). Both vocabularies are small enough that an emoji or a Chinese
character spans several tokens.
"""

# ruff: noqa: RUF001 (the sentences hold unusual characters on purpose)

import dataclasses
import json
import shutil
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = [
    "Once upon a time there was a little girl who lived near the forest with her grandmother.",
    "The wolf said to the little girl: where are you going so early in the morning?",
    "Then the old king gave his daughter to the tailor, and they lived happily ever after.",
    "Es war einmal ein kleines Mädchen, das hatte jedermann lieb – schöne Grüße!",
    "Il était une fois un roi et une reine; naïve façade, déjà vu.",
    "从前有一个小女孩，她住在森林旁边。",
    "A rocket 🚀 and a family 👨‍👩‍👧 under the sun ☀️.",
]
TRICKY = [
    *SENTENCES,
    "",
    " leading and trailing ",
    "two  spaces\n\nand lines\twith tabs",
    "unseen: Ω≈ç√ 日本語 🦊🧵 🧑\u200d🚀",
    "numbers 1234567890 and snake_case() {braces}",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama 2: BOS is part of the template, a system message is folded into the first turn.
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    folder: Path
    vocabulary: int  # entries, special tokens included

    def copy_to(self, checkpoint: Path) -> None:
        for path in self.folder.iterdir():
            shutil.copy(path, checkpoint / path.name)


def _write(folder: Path, tokenizer: Tokenizer, config: dict) -> TokenizerFiles:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerFiles(folder, tokenizer.get_vocab_size())


def byte_level(folder: Path) -> TokenizerFiles:
    """Byte-level BPE; ids 0..3 are <pad> <bos> <eos> and <|im_end|>, <|im_start|> comes fifth."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return _write(
        folder,
        tokenizer,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "chat_template": CHATML,
            "clean_up_tokenization_spaces": False,
        },
    )


def metaspace(folder: Path) -> TokenizerFiles:
    """SentencePiece-style BPE with byte fallback; ids 0..2 are <unk> <s> </s>, then the 256 bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # pieces like "▁upon"
    latin = sorted({c for text in SENTENCES[:5] for c in text if c.isascii() and c != " "})
    trainer = trainers.BpeTrainer(vocab_size=160, initial_alphabet=[*latin, "▁"], show_progress=False)
    trained.train_from_iterator(SENTENCES[:3], trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _write(
        folder,
        tokenizer,
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            # Older checkpoints write special tokens as objects.
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False},
            "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False},
            "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": False},
            "pad_token": None,
            "chat_template": LLAMA2_CHAT,
            "clean_up_tokenization_spaces": False,
        },
    )
