"""Find a checkpoint: the embedded ones, a folder on disk, or an id on the Hugging Face Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from minillm.errors import CheckpointError, first_line, shown

DEMOS = {"demo": Path(__file__).parent.parent / "demo", "demo-draft": Path(__file__).parent.parent / "demo" / "draft"}

# What is asked of the Hub: weights as safetensors and the small files that describe them. Original-format
# copies ("consolidated.safetensors") and pickle files stay where they are.
HUB_PATTERNS = """
    config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja chat_template.json
    model.safetensors model-*.safetensors model.safetensors.index.json
""".split()
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]  # as PEFT calls them


def find_adapter(name: str | Path, token: str | bool | None = None, local_files_only: bool = False) -> Path:
    """The folder of a LoRA adapter; as `find_checkpoint`, whose `revision` is the base's."""
    return find_checkpoint(name, None, token, local_files_only, ADAPTER_FILES)


def find_checkpoint(
    name: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    patterns: Sequence[str] = HUB_PATTERNS,
) -> Path:
    """The folder of a checkpoint: "demo", "demo-draft", a folder on disk, or a Hub id (downloaded if needed).

    `revision`, `token` and `local_files_only` go to `huggingface_hub.snapshot_download`, which also obeys
    HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT; what is downloaded are the files that fit `patterns`.
    Raises `CheckpointError` naming what was looked for.
    """
    if not isinstance(name, str | Path) or not isinstance(revision, str | None):
        raise CheckpointError(f"a name or folder and a revision are texts, not {shown(name)} and {shown(revision)}")
    if str(name) in DEMOS:
        return DEMOS[str(name)]
    try:
        folder = Path(name).expanduser()
        there, holds_files = bool(str(name)) and folder.exists(), folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, nobody's home, a NUL
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(name)!r} cannot be a folder: {why}") from None
    if there and holds_files:
        return folder
    if there:
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the .safetensors files")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
        raise CheckpointError(f"no folder {str(name)!r}, and it is no Hub id (owner/name) nor one of {list(DEMOS)}")
    # Imported here: a folder on disk should not pay for the network client.
    from huggingface_hub import errors, snapshot_download

    options = dict(revision=revision, token=token, local_files_only=local_files_only)
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, **options))
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"no folder {name}, and the Hub id {name} is not in the local cache and cannot be downloaded: "
            f"{first_line(error)}"
        ) from error
    except errors.RepositoryNotFoundError as error:  # also what the Hub answers for a private or gated one
        raise CheckpointError(
            f"the Hub id {name} does not exist or needs another token: check the name, give token=... or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the Hub id {name} has no revision {revision!r}") from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # HTTPError: of whichever client it uses
        raise CheckpointError(
            f"the Hub id {name} cannot be downloaded (another try resumes): {first_line(error)}"
        ) from error


def hub_stored_numbers(name: str, revision: str | None = None) -> dict[str, int]:
    """How many numbers the safetensors files of a Hub id hold, by dtype name: only their headers travel.

    Raises `CheckpointError` if they cannot be had.
    """
    from huggingface_hub import get_safetensors_metadata

    try:
        return get_safetensors_metadata(name, revision=revision).parameter_count
    except Exception as error:  # the network's errors are of many kinds, and headers are a stranger's text, read freely
        raise CheckpointError(
            f"the headers of {name} cannot be read from the Hub: {first_line(error)}; "
            "with local_files_only the sizes follow from config.json alone"
        ) from error
