"""Uploads what has a name here to the hub, in one commit, so that nobody sees half of it there.

Done by ``huggingface_hub``'s own client, over HTTP: what it does by Xet tells how far it is to a
terminal only.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    metadata_load,
)

from vllm_bridge.errors import BridgeError, map_exceptions
from vllm_bridge.hub import errors, names, tokens
from vllm_bridge.hub.download import Progress
from vllm_bridge.registry import card, find
from vllm_bridge.registry.edit import unknown
from vllm_bridge.registry.entry import Entry

_README: Final = "README.md"
_CHUNK: Final = 2**20

# How often progress is told, in seconds.
_TICK: Final = 0.25


def push(
    model: str,
    repository: str,
    options: Mapping[str, Any],
    *,
    private: bool = True,
    progress: Callable[[Progress, int], None] = lambda _progress, _checked: None,
) -> dict[str, str]:
    """Uploads a model or an adapter with a model card. Files that the hub has already are not sent
    again, so that one that was cut off goes on where it was.

    Args:
        model: its name
        repository: ``owner/name``; it is made where there is none
        options: of which ``hf_token`` counts
        private: whether a new repository is seen by its owner only; one that is there stays as it
            is
        progress: told a few times in a second how far it is, and how many bytes were read for
            their checksums, which comes before they are sent

    Returns:
        dict: ``url`` of the repository, and ``commit``

    Raises:
        BridgeError: ``model_not_found``, ``invalid_option``, ``hub_unauthorized``,
            ``hub_unreachable`` or ``rate_limited``
    """
    entry = _entry(model)
    _check_repository(repository)
    token = _token(options)
    files = [_File(path, name) for name, path in _files(entry.path)]
    inherited = _inherited(entry, token)
    readme = CommitOperationAdd(_README, card.card(entry, repository, inherited).encode())

    def upload() -> dict[str, str]:
        for file in files:
            file.hash()
        api = HfApi(token=token)
        url = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository, [readme, *files], commit_message=f"Upload {entry.full_name}"
        )
        return {"url": str(url), "commit": commit.oid}

    total = sum(file.upload_info.size for file in files)
    with _told(repository, token), _by_http(), ThreadPoolExecutor(1) as thread:
        future = thread.submit(upload)
        while not future.done():
            with contextlib.suppress(TimeoutError):
                future.exception(_TICK)
            sent = sum(file.sent for file in files)
            whole = sum(file.sent == file.upload_info.size for file in files)
            checked = sum(file.checked for file in files)
            progress(Progress(sent, total, whole, len(files)), checked)
        result = future.result()
    progress(Progress(total, total, len(files), len(files)), total)
    return result


class _File(CommitOperationAdd):  # type: ignore[misc]
    """A file that is uploaded, which counts how much of it is."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(path_in_repo=name, path_or_fileobj=path)
        self.sent = 0
        self.checked = 0

    def hash(self) -> None:
        """Finds out its checksum, by which the hub tells whether it has the file."""
        digest = hashlib.sha256()
        with open(str(self.path_or_fileobj), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                self.checked += len(chunk)
        self.upload_info.sha256 = digest.digest()

    @contextlib.contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
        """What the client reads; it shows a bar of what it uploads, and of that only."""
        if not with_tqdm:
            with super().as_file() as file:
                yield file
            return
        with _Counted(self) as file:
            yield file


class _Counted(io.BufferedReader):
    """The bytes of a file that is uploaded. One that is sent again is counted again."""

    def __init__(self, file: _File) -> None:
        super().__init__(io.FileIO(str(file.path_or_fileobj)))
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._file.sent = self.tell()
        return data


def _entry(model: str) -> Entry:
    find.path_or_name(model)  # which tells of files that went away
    entry = find.find(model)
    if isinstance(entry, Entry):
        return entry
    if entry is None and names.parse(model) is None and os.path.exists(model):
        raise BridgeError(
            "model_not_found",
            f"`{model}` has no name here.",
            {"model": model},
            remedy="Register it first: `VLLM.Models.register/3`.",
        )
    raise unknown(model)


def _files(path: str) -> Iterator[tuple[str, str]]:
    """The files of a model by their names in the repository, without hidden ones."""
    if not os.path.isdir(path):
        yield os.path.basename(path), path
        return
    for parent, folders, found in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(found):
            file = os.path.join(parent, name)
            relative = os.path.relpath(file, path)
            if not name.startswith(".") and relative != _README:
                yield relative, file


def _check_repository(name: str) -> None:
    parsed = names.parse(name)
    if parsed is None or "/" not in parsed.id or parsed != (name, None, None):
        raise BridgeError(
            "invalid_option",
            f"`{name}` is no name of a repository.",
            {"option": "repository", "value": name},
            remedy="Give one such as `owner/name`; the owner is you, or your organization.",
        )


def _token(options: Mapping[str, Any]) -> str:
    given = options.get("hf_token")
    tokens.check(given)
    if constants.HF_HUB_OFFLINE:
        raise BridgeError(
            "hub_unreachable",
            "`HF_HUB_OFFLINE` is set, and nothing can be uploaded.",
            remedy="Unset it.",
        )
    token = given if isinstance(given, str) else None if given is False else get_token()
    if token is None:
        raise BridgeError(
            "hub_unauthorized",
            "Nothing is uploaded to the hub without an access token, and there is none here.",
            remedy="Make one with the role `write` at https://huggingface.co/settings/tokens, and "
            "give it as `hf_token` or `HF_TOKEN`.",
        )
    return token


def _inherited(entry: Entry, token: str) -> Mapping[str, Any]:
    """What the card of its source says of its license, as far as there is one to be had."""
    found: Any = None
    with contextlib.suppress(Exception):  # whatever it is, the model can do without
        if entry.source is not None and os.path.isdir(entry.source):
            found = metadata_load(os.path.join(entry.source, _README))
        elif (source := card.source_id(entry)) is not None:
            path = hf_hub_download(source, _README, revision=card.commit(entry), token=token)
            found = metadata_load(path)
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _by_http() -> Iterator[None]:
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextlib.contextmanager
def _told(repository: str, token: str) -> Iterator[None]:
    with errors.told(repository, token=token), map_exceptions(_refusal(repository)):
        yield


def _refusal(repository: str) -> Callable[[Exception], BridgeError]:
    def translate(error: Exception) -> BridgeError:
        # The client wraps what goes wrong with a large file.
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status not in (401, 403):
            raise error
        return BridgeError(
            "hub_unauthorized",
            f"The token may not write to `{repository}`."
            if status == 403
            else "The hub does not know the token.",
            {"model": repository, "status": status},
            remedy="Give one with the role `write`, of an account that may write there; see "
            "https://huggingface.co/settings/tokens.",
        )

    return translate
