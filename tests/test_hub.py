"""A Hub id, through the real huggingface_hub, from a small server on loopback; then from its cache.

The server speaks the few endpoints `snapshot_download` needs and writes down every request. The
client runs in a process of its own, because huggingface_hub reads its environment when imported.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from families import FAMILIES, load_reference, reference_greedy, save_checkpoint

REPO = "tiny/llama"
TOKEN = "hf_secretsecretsecret"
# What a real repository also holds and nobody here may fetch: pickles, a second copy of the
# weights, other runtimes' formats, pictures. Their bytes would fail to load, too.
UNWANTED = [
    "pytorch_model.bin",
    "training_args.bin",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "original/params.json",
    "original/model.safetensors",
    "onnx/model.onnx",
    "model-q4.gguf",
    "tf_model.h5",
    "assets/picture.png",
]


class Hub:
    """Revisions (name -> (commit, folder)) of one repository, and a log of (method, path, token)."""

    def __init__(self):
        self.revisions: dict[str, tuple[str, Path]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.needs_token = False
        self.faults: dict[str, list[str]] = {}  # file name -> what goes wrong at each GET of it: "cut", "short", "long"
        self.when_asked_for: dict[str, Callable[[], None]] = {}  # file name -> what happens at its first GET
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def publish(self, revision: str, folder: Path) -> None:
        commit = hashlib.sha1(revision.encode()).hexdigest()
        self.revisions[revision] = self.revisions[commit] = (commit, folder)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def fetched(self) -> set[str]:
        """Names of files that were asked for, by HEAD or GET."""
        paths = [path.split("/resolve/", 1)[1] for _, path, _ in self.requests if "/resolve/" in path]
        return {path.split("/", 1)[1] for path in paths}


def _handler_of(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", headers=None):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).lstrip("/")
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            if hub.needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            parts = path.split("/")
            if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) == REPO:
                return self.api(parts[4:])
            if "/".join(parts[:2]) == REPO and parts[2] == "resolve":
                return self.file(parts[3], "/".join(parts[4:]))
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def api(self, parts):
            kind, revision = (parts[0], parts[1]) if parts else ("revision", "main")
            if revision not in hub.revisions:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            commit, folder = hub.revisions[revision]
            names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
            if kind == "tree":
                body = [
                    {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": _etag(folder / n)}
                    for n in names
                ]
            else:
                body = {"id": REPO, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def file(self, revision, name):
            commit, folder = hub.revisions.get(revision, (None, None))
            if commit is None or not (folder / name).is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            headers = {"ETag": f'"{_etag(folder / name)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            content = (folder / name).read_bytes()
            if self.command == "GET" and name in hub.when_asked_for:
                hub.when_asked_for.pop(name)()
            if self.command == "GET" and hub.faults.get(name):
                return self.fail(hub.faults[name].pop(), content, headers)
            if self.headers.get("Range") is None:
                return self.answer(200, content, headers)
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], headers)

        def fail(self, fault, content, headers):
            self.close_connection = True
            if fault == "cut":  # the length is right, and half of it comes
                self.send_response(200)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "short":  # a whole answer, of half the file
                self.answer(200, content[: len(content) // 2], headers)
            else:
                self.answer(200, content + content, headers)

    return Handler


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def repository(tmp_path_factory, text_tokenizer_files):
    """A checkpoint folder dressed up as a full repository, and a second revision with other weights."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("repository") / "files"
        config = FAMILIES["llama2"].with_changes({"vocab_size": text_tokenizer_files.vocabulary})
        save_checkpoint(folder, config, seed)
        text_tokenizer_files.copy_to(folder)
        for name in UNWANTED:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"not for you: " + name.encode())
        folders.append(folder)
    return folders


@pytest.fixture
def hub(repository):
    hub = Hub()
    hub.publish("main", repository[0])
    hub.publish("v2", repository[1])
    yield hub
    hub.close()


# Importing torch takes seconds, so one process does that and forks a child per request; each child
# imports huggingface_hub by itself, with its own environment.
FORKER = """
import contextlib, io, json, os, sys
import torch
from minillm import LLM
from minillm.cli.parser import main
from minillm.errors import MinillmError
torch.set_num_threads(1)
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(request["environ"])
        try:
            if request["command"]:
                output, said = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(said):
                    status = main(request["command"])
                answer = {"status": status, "output": output.getvalue(), "said": said.getvalue()}
            else:
                llm = LLM.from_pretrained(request["name"], dtype="float32", device="cpu", **request["arguments"])
                out = llm.generate([5, 6, 7, 8], max_new_tokens=6, temperature=0.0, eos_token_id=[])
                answer = {"token_ids": out.token_ids}
        except MinillmError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except BaseException as error:
            answer = {"crash": repr(error)}
        print(json.dumps(answer), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def forker():
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKER],
        env={**inherited, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture
def client(forker, hub, tmp_path):
    """client(...) -> what loading and generating gave in a fresh process that sees only this endpoint."""

    def ask(environ=(), endpoint=None, home="home", name=REPO, command=None, **arguments) -> dict:
        environ = {"HF_ENDPOINT": endpoint or hub.endpoint, "HF_HOME": str(tmp_path / home), **dict(environ)}
        forker.stdin.write(
            json.dumps({"environ": environ, "name": name, "command": command, "arguments": arguments}) + "\n"
        )
        forker.stdin.flush()
        answer = json.loads(forker.stdout.readline())
        assert "crash" not in answer, answer
        return answer

    return ask


def expected_tokens(folder: Path) -> list[int]:
    return reference_greedy(load_reference(folder), [5, 6, 7, 8], 6)


def test_download_then_offline_from_the_cache(hub, client, repository, tmp_path):
    first = client()
    assert first == {"token_ids": expected_tokens(repository[0])}
    assert (tmp_path / "home" / "hub" / "models--tiny--llama").is_dir()  # HF_HOME was respected

    shards = {p.name for p in repository[0].glob("model-*.safetensors")}
    assert len(shards) > 1
    assert shards | {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= hub.fetched
    assert not hub.fetched & set(UNWANTED)

    hub.requests.clear()
    assert client({"HF_HUB_OFFLINE": "1"}) == first
    assert client(local_files_only=True) == first
    assert hub.requests == []


def test_a_server_that_is_down_leaves_the_cache_usable(client):
    first = client()
    assert client(endpoint="http://127.0.0.1:1") == first  # nothing listens there


def test_revision_selects_the_weights(client, repository):
    tokens = client(revision="v2")
    assert tokens == {"token_ids": expected_tokens(repository[1])}
    assert tokens != {"token_ids": expected_tokens(repository[0])}
    unknown = client(revision="v3")
    assert unknown["kind"] == "CheckpointError"
    assert "v3" in unknown["error"]


def test_token_argument_and_environment(hub, client):
    hub.needs_token = True
    refused = client(home="a")
    assert refused["kind"] == "CheckpointError"
    assert "token" in refused["error"].lower()
    assert "token_ids" in client({"HF_TOKEN": TOKEN}, home="b")
    assert "token_ids" in client(home="c", token=TOKEN)
    wrong = client(home="d", token="hf_" + "wrong" * 4)
    assert wrong["kind"] == "CheckpointError"
    assert "wrongwrong" not in wrong["error"]  # a token is never shown


def test_unknown_repository_is_one_clear_error(client):
    answer = client(name="tiny/nobody")
    assert answer["kind"] == "CheckpointError"
    assert "tiny/nobody" in answer["error"]


def test_offline_without_a_cache_says_so(hub, client):
    answer = client({"HF_HUB_OFFLINE": "1"})
    assert answer["kind"] == "CheckpointError"
    assert REPO in answer["error"]
    assert hub.requests == []


def test_memory_of_a_hub_id_reads_headers_and_no_weights(hub, client, repository):
    answer = client(command=["memory", REPO, "--json"])
    assert answer["status"] == 0
    report = json.loads(answer["output"])
    assert sum(report["stored"].values()) == report["estimates"]["float32"]["weights"]
    whole = [path for method, path, _ in hub.requests if method == "GET" and path.endswith(".safetensors")]
    shards = list(repository[0].glob("model-*.safetensors"))
    assert len(whole) <= 2 * len(shards)  # a range with the header's length, and at most one with the header
    assert not hub.fetched & set(UNWANTED)
    # The same from the cache, which holds config.json only.
    offline = client({"HF_HUB_OFFLINE": "1"}, command=["memory", REPO, "--json", "--local-files-only"])
    assert json.loads(offline["output"]) == report | {"stored": {}}


def test_headers_that_cannot_be_had_are_one_clear_error(hub, client, repository, tmp_path):
    """Whatever the libraries in between raise: a connection that breaks, an index that is JSON and no index."""
    shutil.copytree(repository[0], tmp_path / "odd")
    (tmp_path / "odd" / "model.safetensors.index.json").write_text("[]")
    hub.publish("odd", tmp_path / "odd")
    hub.faults[a_shard(repository[0])] = ["cut"] * 20
    for revision in ("main", "odd"):
        answer = client(command=["memory", REPO, "--revision", revision])
        assert (answer["status"], answer["output"]) == (1, "")
        assert f"the headers of {REPO} cannot be read from the Hub: " in answer["said"].splitlines()[-1]


# -- a bad day of the network ---------------------------------------------------------------------


def a_shard(folder: Path) -> str:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))[1]


def test_a_connection_cut_in_mid_shard_is_taken_up_again(hub, client, repository):
    hub.faults[a_shard(repository[0])] = ["cut"]
    assert client() == {"token_ids": expected_tokens(repository[0])}


@pytest.mark.parametrize(
    ("fault", "name"),
    [("cut", "shard"), ("short", "shard"), ("long", "model.safetensors.index.json"), ("short", "tokenizer.json")],
)
def test_half_a_file_is_never_taken_for_whole_and_a_retry_works(fault, name, hub, client, repository):
    """While the fault lasts: one error. Offline after that: one error, too. Once it is gone: the model."""
    name = a_shard(repository[0]) if name == "shard" else name
    expected = {"token_ids": expected_tokens(repository[0])}
    hub.faults[name] = [fault] * 20
    broken = client()
    hub.faults.clear()
    if broken != expected:  # (the client asks again by itself, for the rest alone, and may win)
        assert broken["kind"] == "CheckpointError"
        offline = client({"HF_HUB_OFFLINE": "1"})
        assert offline["kind"] in ("CheckpointError", "TokenizerError")
    assert client() == expected
    assert client({"HF_HUB_OFFLINE": "1"}) == expected


def test_a_server_that_goes_away_in_the_middle(hub, client, repository):
    """Some files are here: without the server that is an error that says what is missing, not half a model."""
    hub.faults[a_shard(repository[0])] = ["short"] * 20
    assert client()["kind"] == "CheckpointError"
    answer = client(endpoint="http://127.0.0.1:1")
    assert answer["kind"] == "CheckpointError"
    assert ".safetensors" in answer["error"] or REPO in answer["error"]


def test_a_revision_that_moves_while_it_is_fetched(hub, client, repository):
    """All files of the commit that "main" was when the download began; the next one sees the new."""
    for name in ("config.json", a_shard(repository[0])):
        hub.publish("main", repository[0])
        hub.when_asked_for[name] = lambda: hub.revisions.update(main=hub.revisions["v2"])
        assert client(home=name) == {"token_ids": expected_tokens(repository[0])}
        assert name not in hub.when_asked_for  # it did move
        assert client(home=name) == {"token_ids": expected_tokens(repository[1])}
