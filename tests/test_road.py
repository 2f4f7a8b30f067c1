"""The road from a prompt to a token: short, and the same as the one-screen version of it."""

import sys
from pathlib import Path

import pytest
import torch

import minillm
from minillm.decode import generate_plain
from minillm.options import GenerationConfig

PACKAGES = [str(Path(minillm.__file__).parent), "minillm_kernels"]


@pytest.mark.parametrize("prompt", ["Once upon a time", "The", "从前有一个小女孩 🚀"])
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0),
        dict(temperature=0.9, seed=3),
        dict(temperature=1.2, seed=4, top_k=50, top_p=0.9, min_p=0.01),
        dict(temperature=0.8, seed=5, repetition_penalty=1.3),
        dict(temperature=0, stop_strings=["e", "the"]),
    ],
    ids=str,
)
def test_the_one_screen_version_says_what_generate_says(prompt, options, llm):
    for eos in ([], [2]):
        config = GenerationConfig(max_new_tokens=30, eos_token_id=eos, **options)
        with torch.inference_mode():
            plain = generate_plain(llm.model, llm.tokenizer, prompt, config)
        assert plain == llm.generate(prompt, config).text


class FirstProduct(Exception):
    """Carries the stack at the first multiplication by a weight."""


@pytest.mark.parametrize("length", [3, 40], ids=["few rows", "many"])
def test_nine_frames_from_generate_to_the_first_product(length, llm, monkeypatch):
    """Frames of this project alone: PyTorch's own, two for every call of a module, are its business."""

    def stop(*arguments, **keywords):
        frame, names = sys._getframe(1), []
        while frame is not None:
            if any(package in frame.f_code.co_filename for package in PACKAGES):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        raise FirstProduct(names[::-1])

    import minillm_kernels.cpu

    monkeypatch.setattr(minillm_kernels.cpu, "product", stop)
    with pytest.raises(FirstProduct) as caught:
        llm.generate([5] * length, max_new_tokens=2)
    (names,) = caught.value.args
    print(" -> ".join(names))
    assert names[0] == "LLM.generate"
    assert len(names) <= 9, names
