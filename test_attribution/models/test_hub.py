"""Loading from the hub, as a user does it: in processes of their own, from a stand-in for the hub on this machine."""

from __future__ import annotations

import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import attribution as at
from attribution.models.registry import registry

# Tests are no package: what stands beside them is found for as long as it is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parent))
    from hub_server import LARGE, Hub, Repository, git_id, served

PROMPT, ANSWER = "The capital of France is", " Paris"
NOISE = re.compile(r"traceback|warning|retry|resum|max retries|unauthenticated", re.IGNORECASE)
# What loads a model and says what came of it, in as many lines as models are given.
LOAD = """
import json, sys, time, attribution as at
at.load  # Reads torch, which takes its time.
for name, arguments in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        model = at.load(name, **arguments)
    except at.AttributionError as error:
        seconds = time.monotonic() - start
        print(json.dumps({"error": str(error), "kind": type(error).__name__, "seconds": seconds}))
        continue
    ranking = at.attribute(model, "The capital of France is", " Paris", k=10)
    found = [[each.layer, each.index] for each in ranking.neurons]
    said = {"neurons": found, "scores": ranking.scores.tolist(), "source": model.source, "revision": model.revision}
    print(json.dumps(said | {"dtype": str(model.anatomy.readout.unembedding.dtype)}))
"""
# Without torch, so that it starts at once.
FETCH = """
import json, sys, time
from attribution.errors import ModelError
from attribution.models.hub import fetch
start = time.monotonic()
try:
    fetched = fetch(sys.argv[1], None, name=sys.argv[1])
    said = {"folder": str(fetched.folder), "commit": fetched.commit}
except ModelError as error:
    said = {"error": str(error)}
print(json.dumps(said | {"seconds": time.monotonic() - start}))
"""
# In seconds: the time to wait for an answer, and for another that the client wants, on a machine with other work. The
# client by itself tries again for 23 seconds, and transformers lets it do so for one file after another.
SOON = 15


class User:
    """Somebody with a cache of their own, who runs Python."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.endpoint = "http://127.0.0.1:9"
        self.extra: dict[str, str] = {}

    def run(self, *arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
        own = {
            key: value
            for key, value in os.environ.items()
            if not re.match(r"HF_|HUGGING|TRANSFORMERS_|ATTRIBUTION_|PYTEST_|.*_proxy$", key, re.IGNORECASE)
        }
        own["PYTHONPATH"] = os.pathsep.join([str(Path(at.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        own |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home / "hf"), "OMP_NUM_THREADS": "1"} | self.extra
        streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(
            [sys.executable, *arguments], env=own, cwd=self.home, text=True, timeout=180, check=False, **streams
        )

    def _say(self, *arguments: str) -> list[dict[str, Any]]:
        done = self.run("-W", "error::UserWarning", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return [json.loads(line) for line in done.stdout.splitlines()]

    def load(self, name: str, **arguments: object) -> dict[str, Any]:
        [said] = self._say("-c", LOAD, json.dumps([[name, arguments]]))
        return said

    def load_each(self, *loads: tuple[str, dict[str, object]]) -> list[dict[str, Any]]:
        return self._say("-c", LOAD, json.dumps(loads))

    def fetch(self, repo: str) -> dict[str, Any]:
        [said] = self._say("-c", FETCH, repo)
        return said

    def cache(self, repo: str) -> Path:
        return self.home / "hf" / "hub" / f"models--{repo.replace('/', '--')}"


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


@pytest.fixture
def hub(user: User) -> Iterator[Hub]:
    with served() as hub:
        user.endpoint = hub.endpoint
        yield hub


def _files(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


@pytest.fixture(scope="session")
def tiny(folders: dict[str, Path]) -> dict[str, bytes]:
    return _files(folders["gpt2"])


@pytest.fixture(scope="session")
def shards(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same weights in several files, with an index."""
    folder = tmp_path_factory.mktemp("shards")
    AutoModelForCausalLM.from_pretrained(folders["gpt2"]).save_pretrained(folder, max_shard_size="60KB")
    files = _files(folder)
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    return files


@pytest.fixture(scope="session")
def pickled(folders: dict[str, Path]) -> dict[str, bytes]:
    stream = io.BytesIO()
    torch.save(load_file(folders["gpt2"] / "model.safetensors"), stream)
    files = {name: content for name, content in _files(folders["gpt2"]).items() if name != "model.safetensors"}
    return files | {"pytorch_model.bin": stream.getvalue()}


@pytest.fixture(scope="session")
def expected(folders: dict[str, Path]) -> at.Ranking:
    return at.attribute(at.load(str(folders["gpt2"])), PROMPT, ANSWER, k=10)


def _same(said: dict[str, Any], expected: at.Ranking) -> None:
    assert "error" not in said, said["error"]
    assert said["neurons"] == [[each.layer, each.index] for each in expected.neurons]
    assert said["scores"] == pytest.approx(expected.scores.tolist(), abs=1e-7)


def _is_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    assert not NOISE.search(message), message


SETTINGS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_model_is_downloaded_once_and_ranks_as_its_folder_does(
    hub: Hub, user: User, tiny: dict[str, bytes], expected: at.Ranking
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny)
    for said in user.load_each(("org/tiny", {}), ("org/tiny", {})):
        _same(said, expected)
        assert (said["source"], said["revision"]) == ("org/tiny", hub.repositories["org/tiny"].head)
    assert hub.lists == 2
    assert sorted(hub.files()) == sorted({*SETTINGS, "model.safetensors"} & set(tiny))
    # Weights last: a copy with weights is whole.
    assert hub.files()[-1] == "model.safetensors"


def test_a_downloaded_model_needs_no_hub(user: User, tiny: dict[str, bytes], expected: at.Ranking) -> None:
    repository = Repository.of(tiny)
    with served(**{"org/tiny": repository}) as hub:
        user.endpoint = hub.endpoint
        first = user.fetch("org/tiny")
        assert first["commit"] == repository.head
        hub.requests.clear()
        user.extra["HF_HUB_OFFLINE"] = "1"
        assert user.fetch("org/tiny")["folder"] == first["folder"]
        assert hub.requests == []
    user.extra.clear()
    assert user.fetch("org/tiny")["seconds"] < SOON
    *loaded, absent = user.load_each(("org/tiny", {}), ("org/tiny", {"revision": repository.head}), ("org/absent", {}))
    for said in loaded:
        _same(said, expected)
        assert said["revision"] == repository.head
    assert "cannot be reached" in absent["error"]
    assert absent["seconds"] < SOON


def test_a_hub_that_does_not_answer_is_not_waited_for(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        user.endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = user.fetch("org/tiny")
    assert said["seconds"] < SOON
    _is_sentence(said["error"])
    assert "cannot be reached (timed out)" in said["error"]


def test_a_copy_that_is_not_whole_is_not_used_without_the_hub(
    user: User, shards: dict[str, bytes], tiny: dict[str, bytes]
) -> None:
    files = tiny | shards
    del files["model.safetensors"]
    with served(**{"org/tiny": Repository.of(files)}) as hub:
        user.endpoint = hub.endpoint
        folder = Path(user.fetch("org/tiny")["folder"])
    next(folder.glob("model-00002-*")).unlink()
    assert "has no whole copy of 'org/tiny'" in user.fetch("org/tiny")["error"]


def test_only_what_transformers_reads_is_downloaded(
    hub: Hub, user: User, tiny: dict[str, bytes], shards: dict[str, bytes]
) -> None:
    clutter = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.gguf"),
        *("consolidated.safetensors", "original/model.safetensors", "model.fp16.safetensors", "onnx/model.onnx"),
        *("onnx/config.json", "README.md", "modeling_tiny.py", ".gitattributes"),
    ]
    hub.repositories["org/tiny"] = Repository.of(dict.fromkeys(clutter, b"{}") | shards | tiny)
    said = user.fetch("org/tiny")
    assert sorted(hub.files()) == sorted({*SETTINGS, "model.safetensors"} & set(tiny))
    assert sorted(each.name for each in Path(said["folder"]).rglob("*")) == sorted(hub.files())


def test_shards_are_found_by_their_index(
    hub: Hub, user: User, tiny: dict[str, bytes], shards: dict[str, bytes], expected: at.Ranking
) -> None:
    files = tiny | shards
    del files["model.safetensors"]
    hub.repositories["org/tiny"] = Repository.of(files | {"extra-00001-of-00002.safetensors": b"none of the model's"})
    _same(user.load("org/tiny"), expected)
    wanted = [name for name in shards if name.startswith("model")]
    assert len(wanted) > 2
    assert sorted(hub.files()) == sorted({*SETTINGS & set(files), *wanted})


def test_the_commit_that_is_asked_for_is_the_one_that_is_loaded(
    hub: Hub, user: User, tiny: dict[str, bytes], folders: dict[str, Path], expected: at.Ranking
) -> None:
    old, new = Repository.of(tiny), Repository.of(_files(folders["llama"]))
    both = Repository(old.commits | new.commits, {"main": new.head, "v1": old.head})
    hub.repositories["org/tiny"] = both
    by_commit, by_tag, newest = user.load_each(
        ("org/tiny", {"revision": old.head}), ("org/tiny", {"revision": "v1"}), ("org/tiny", {})
    )
    _same(by_commit, expected)
    _same(by_tag, expected)
    assert (by_commit["revision"], by_tag["revision"], newest["revision"]) == (old.head, old.head, new.head)
    assert newest["neurons"] != by_tag["neurons"]

    # A pinned commit of the registry, and its dtype, count as if they had been given.
    entry = registry()["smollm2-135m"]
    both.commits[entry.revision] = both.commits[old.head]
    hub.repositories[entry.source] = both
    pinned, given = user.load_each((entry.name, {}), (entry.name, {"revision": "main", "dtype": "float32"}))
    assert (pinned["source"], pinned["revision"], pinned["dtype"]) == (entry.source, entry.revision, "torch.bfloat16")
    assert (given["revision"], given["dtype"]) == (new.head, "torch.float32")


def test_a_cut_connection_is_taken_up_where_it_was_cut(hub: Hub, user: User) -> None:
    # The client writes blocks of this size, and takes up the connection behind the last whole one.
    block = DOWNLOAD_CHUNK_SIZE
    weights = random.Random(0).randbytes(2 * block + 5)
    hub.repositories["org/large"] = Repository.of({"config.json": b"{}", "model.safetensors": weights})
    hub.cut_at["model.safetensors"], hub.cuts = block + 1000, 1
    said = user.fetch("org/large")
    assert Path(said["folder"], "model.safetensors").read_bytes() == weights
    assert hub.ranges("model.safetensors") == [None, f"bytes={block}-"]
    assert hub.bytes_sent["model.safetensors"] == len(weights) + 1000


def test_a_connection_that_stays_cut_is_one_sentence_and_whole_files_stay(
    hub: Hub, user: User, tiny: dict[str, bytes]
) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny)
    hub.cut_at["model.safetensors"] = 20_000
    message = user.fetch("org/tiny")["error"]
    _is_sentence(message)
    assert "model.safetensors of model 'org/tiny' did not arrive whole" in message
    for remedy in ("run this again", "--models-dir=DIR", "ATTRIBUTION_MODELS=DIR", "-m bundled"):
        assert remedy in message
    # What is cut off does not count as a copy, and what is whole is not downloaded again.
    user.extra["HF_HUB_OFFLINE"] = "1"
    assert "has no whole copy" in user.fetch("org/tiny")["error"]
    user.extra.clear()
    hub.requests.clear()
    hub.cuts = 0
    assert Path(user.fetch("org/tiny")["folder"], "model.safetensors").read_bytes() == tiny["model.safetensors"]
    assert hub.files() == ["model.safetensors"]


def test_wrong_bytes_are_named_removed_and_downloaded_again(hub: Hub, user: User, tiny: dict[str, bytes]) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny)
    right = tiny["model.safetensors"]
    hub.wrong["model.safetensors"] = right[:-8] + bytes(8 * [1])
    message = user.fetch("org/tiny")["error"]
    _is_sentence(message)
    assert "model.safetensors of model 'org/tiny' arrived from the hub with another checksum" in message
    assert "download it again" in message
    left = [each.name for each in user.cache("org/tiny").rglob("*") if each.is_file() or each.is_symlink()]
    assert "config.json" in left
    assert "model.safetensors" not in left
    assert not [each for each in (user.cache("org/tiny") / "blobs").iterdir() if each.stat().st_size == len(right)]
    # Not taken for whole without the hub either.
    user.extra["HF_HUB_OFFLINE"] = "1"
    assert "has no whole copy" in user.fetch("org/tiny")["error"]
    user.extra.clear()
    hub.wrong.clear()
    assert Path(user.fetch("org/tiny")["folder"], "model.safetensors").read_bytes() == right


def test_small_files_are_verified_too(hub: Hub, user: User, tiny: dict[str, bytes]) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny)
    hub.wrong["config.json"] = tiny["config.json"].replace(b"3", b"4")
    assert "config.json of model 'org/tiny' arrived" in user.fetch("org/tiny")["error"]


def _refused(**refusal: tuple[int, str]) -> Repository:
    repository = Repository.of({"config.json": b"{}", "model.safetensors": b""})
    for name, answer in refusal.items():
        setattr(repository, name, answer)
    return repository


LOG_IN = ["log in by 'hf auth login' or set HF_TOKEN"]
# What the hub has, what is asked for, and words of the answer.
REFUSALS: dict[str, tuple[Repository | None, dict[str, object], list[str]]] = {
    "org/missing": (None, {}, ["is not on the hub as 'org/missing' (HTTP 404)", "check its id", *LOG_IN]),
    "org/private": (
        _refused(refuse_list=(401, "")),
        {},
        ["(HTTP 401)", "private, gated or does not exist", "check its id", *LOG_IN],
    ),
    # The list of a gated model is public, its files are not.
    "org/gated": (
        _refused(refuse_files=(403, "GatedRepo")),
        {},
        ["is gated on the hub (HTTP 403)", "accept its licence on", "/org/gated", *LOG_IN],
    ),
    "org/gated-without-account": (
        _refused(refuse_files=(401, "GatedRepo")),
        {},
        ["is gated on the hub (HTTP 401)", "accept its licence on", *LOG_IN],
    ),
    "org/forbidden": (
        _refused(refuse_files=(403, "")),
        {},
        ["(HTTP 403)", "private, gated or does not exist", "check its id", *LOG_IN],
    ),
    "org/tagged": (_refused(), {"revision": "v9"}, ["has no revision 'v9' on the hub", "leave the revision out"]),
    "org/down": (
        _refused(refuse_list=(503, "")),
        {},
        ["cannot be reached (HTTP 503 Service Unavailable)", "go online", "--models-dir=DIR"],
    ),
    "org/bad--id": (None, {}, ["'org/bad--id', which the hub does not allow", "use one such as 'org/name'"]),
    "org/large": (
        Repository.of({"config.json": b"{}", "model.safetensors": b""}),
        {},
        ["needs 1,000,000,000.0 GB more in the hub's cache", "GB left; make room, or set HF_HOME"],
    ),
    "org/adapter": (
        Repository.of({"config.json": b"{}", "adapter_model.safetensors": b""}),
        {},
        ["has no weights in safetensors at the default branch", "choose another revision", "or another model."],
    ),
    "org/lost-shard": (
        Repository.of({"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'}),
        {},
        ["has no ../x on the hub, which its model.safetensors.index.json names", "choose another revision"],
    ),
    "org/broken-index": (
        Repository.of({"config.json": b"{}", "model.safetensors.index.json": b"{"}),
        {},
        ["has an unreadable model.safetensors.index.json", "choose another revision"],
    ),
    "org/not-a-model": (
        Repository.of({"config.json": b"{}", "model.safetensors": b"\xff" * 99, "tokenizer.json": b"{}"}),
        {},
        ["cannot be loaded from its copy in the hub's cache", "remove", "to download it again"],
    ),
}
REFUSALS["org/large"][0].sizes["model.safetensors"] = 10**18  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each load of ``REFUSALS`` said, all in one process."""
    user = User(tmp_path_factory.mktemp("refused"))
    with served(**{name: each for name, (each, _, _) in REFUSALS.items() if each is not None}) as hub:
        user.endpoint = hub.endpoint
        said = user.load_each(*((name, arguments) for name, (_, arguments, _) in REFUSALS.items()))
    return dict(zip(REFUSALS, said, strict=True))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_fetched_is_one_sentence_with_a_remedy(refusals: dict[str, dict[str, Any]], name: str) -> None:
    message = refusals[name]["error"]
    _is_sentence(message)
    assert message.startswith(f"model '{name}' ")
    for word in REFUSALS[name][2]:
        assert word in message
    assert refusals[name]["kind"] == "ModelError"


def test_the_token_is_shown_to_the_hub_and_not_to_its_store(hub: Hub, user: User, tiny: dict[str, bytes]) -> None:
    hub.repositories["org/tiny"] = Repository.of(tiny)
    user.extra["HF_TOKEN"] = "hf_secret"
    assert "error" not in user.fetch("org/tiny")
    shown = {(each.method, each.file): each.authorization for each in hub.requests}
    assert shown["GET", "/api/models/org/tiny"] == "Bearer hf_secret"
    assert shown["HEAD", "model.safetensors"] == "Bearer hf_secret"
    assert shown["GET", "model.safetensors"] is None


def test_pickled_weights_are_read_only_when_asked_for(
    hub: Hub, user: User, pickled: dict[str, bytes], tiny: dict[str, bytes], expected: at.Ranking
) -> None:
    hub.repositories["org/old"] = Repository.of(pickled)
    # Where there are safetensors, they are taken all the same.
    hub.repositories["org/both"] = Repository.of(pickled | tiny)
    refused, allowed, both = user.load_each(
        ("org/old", {}), ("org/old", {"allow_pickle": True}), ("org/both", {"allow_pickle": True})
    )
    _is_sentence(refused["error"])
    assert "only pickled ones (pytorch_model.bin)" in refused["error"]
    for remedy in ("choose another revision that has model.safetensors", "allow_pickle=True or --allow-pickle"):
        assert remedy in refused["error"]
    _same(allowed, expected)
    _same(both, expected)
    assert [each for each in hub.files() if each.endswith(LARGE)] == ["pytorch_model.bin", "model.safetensors"]
    done = user.run("-m", "attribution", "preflight", "org/old", "--allow-pickle", "--dtype=float64")
    assert (done.returncode, done.stderr) == (0, "")
    assert "identities hold on org/old" in done.stdout


def test_a_folder_of_pickled_weights_is_read_only_when_asked_for(
    pickled: dict[str, bytes], tmp_path: Path, expected: at.Ranking
) -> None:
    for name, content in pickled.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(at.AttributionError, match=r"no weights in safetensors .*only pickled ones .*allow_pickle=True"):
        at.load(str(tmp_path))
    model = at.load(str(tmp_path), allow_pickle=True)
    assert at.attribute(model, PROMPT, ANSWER, k=10).neurons == expected.neurons
    assert (model.source, model.revision) == (str(tmp_path), "")


def test_code_of_a_repository_is_never_run(hub: Hub, user: User, tiny: dict[str, bytes], expected: at.Ranking) -> None:
    code = {"code.py": b"open('executed', 'w')"}
    mapped = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine", "AutoTokenizer": ["code.Mine", None]}

    def with_code(file: str, **others: object) -> Repository:
        changed = json.loads(tiny[file]) | {"auto_map": mapped} | others
        return Repository.of(tiny | code | {file: json.dumps(changed).encode()})

    # An architecture or tokenizer that transformers has too is taken from there.
    hub.repositories["org/known"] = with_code("config.json")
    hub.repositories["org/unknown"] = with_code("config.json", model_type="mine")
    hub.repositories["org/tokenizer"] = with_code("tokenizer_config.json", tokenizer_class="Mine")
    known, unknown, tokenizer = user.load_each(("org/known", {}), ("org/unknown", {}), ("org/tokenizer", {}))
    _same(known, expected)
    assert unknown["kind"] == "UnsupportedModelError"
    assert "needs code of its own repository (auto_map in its config.json), which is never run" in unknown["error"]
    _is_sentence(unknown["error"])
    _same(tokenizer, expected)
    assert not (user.home / "executed").exists()
    assert "code.py" not in hub.files()


def test_a_disk_that_takes_no_more_is_one_sentence(hub: Hub, user: User, tiny: dict[str, bytes]) -> None:
    pytest.importorskip("resource", reason="there is no limit of file sizes on this system")
    hub.repositories["org/tiny"] = Repository.of(tiny)
    # Python ignores the signal, so writing fails as it does on a full disk.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    done = user.run("-c", limit + FETCH, "org/tiny")
    message = json.loads(done.stdout)["error"]
    _is_sentence(message)
    assert "cannot be written to the hub's cache" in message
    assert "make room, or set HF_HOME to a folder on another disk" in message


def test_without_a_hub_the_command_line_says_so_in_one_line(user: User) -> None:
    done = user.run("-m", "attribution", "preflight", "org/tiny", "--revision=v1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: model 'org/tiny' cannot be fetched")
    _is_sentence(done.stderr.removeprefix("error: ").rstrip("\n"))
    for word in (
        "Connection refused",
        "no whole copy of 'org/tiny' at v1",
        "go online",
        "put its files in DIR/org/tiny",
        "--models-dir=DIR",
        "ATTRIBUTION_MODELS=DIR",
        "-m bundled",
    ):
        assert word in done.stderr


SUITE = """
def test_claim(attribution_model):
    print("revision", attribution_model.revision)
"""
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "-s", "test_suite.py")


@pytest.mark.parametrize("option", [("-m", "gpt2"), ("--model=openai-community/gpt2",)], ids=" ".join)
def test_claims_run_on_a_model_of_the_hub(
    hub: Hub, user: User, tiny: dict[str, bytes], option: tuple[str, ...]
) -> None:
    entry, repository = registry()["gpt2"], Repository.of(tiny)
    # The registry pins what its name stands for; a hub id stands for its newest commit.
    repository.commits[entry.revision] = tiny
    hub.repositories[entry.source] = repository
    (user.home / "test_suite.py").write_text(SUITE, encoding="utf-8")
    done = user.run(*PYTEST, *option)
    assert done.returncode == 0, done.stdout
    assert f"revision {entry.revision if option[0] == '-m' else repository.head}" in done.stdout
    # A fresh download shows the client's bars, and nothing else.
    assert not NOISE.search(done.stderr)
    again = user.run(*PYTEST, *option)
    assert (again.returncode, again.stderr) == (0, "")


def test_claims_on_a_model_that_cannot_be_fetched_end_in_one_error(user: User) -> None:
    (user.home / "test_suite.py").write_text(SUITE, encoding="utf-8")
    done = user.run(*PYTEST, "-m", "gpt2")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    [message] = [line for line in done.stderr.splitlines() if line]
    assert re.fullmatch(r"ERROR: model 'gpt2' cannot be fetched, .*\. 1 test waits for it\.", message)
    for remedy in ("go online", "log in", "--models-dir=DIR", "-m bundled"):
        assert remedy in message
    assert not NOISE.search(done.stdout + done.stderr)
    assert "Captured" not in done.stdout


def test_a_download_shows_its_progress_on_a_terminal(hub: Hub, user: User, tiny: dict[str, bytes]) -> None:
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this system")
    hub.repositories["org/tiny"] = Repository.of(tiny)
    why = "there are no terminals to set up on this system"
    fcntl, termios = pytest.importorskip("fcntl", reason=why), pytest.importorskip("termios", reason=why)
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    done = user.run("-c", FETCH, "org/tiny", stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as terminal:
        shown = terminal.read(1 << 16).decode()
    assert "error" not in json.loads(done.stdout)
    assert re.search(r"model\.safetensors: 100%", shown)


def test_git_ids_of_the_stand_in_are_those_of_git() -> None:
    assert git_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
