"""In-place quantization: a plain model that is quantized at its first start, by the quantizing
environment, into a folder that later starts load.

The folder of what was made is named by all that it depends on: the files of the model, the type,
the versions of the libraries. ``registry/in_place.py`` keeps these folders; one is made under
another name and renamed, so that nothing half is ever loaded.
"""

import dataclasses
import glob
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Final, NamedTuple

import vllm_bridge
from vllm_bridge import data
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.hub import cache
from vllm_bridge.quantization import availability, registry
from vllm_bridge.registry import in_place

# Where Elixir says that the Python of the quantizing environment is; empty where there is none.
PYTHON: Final = "EX_VLLM_QUANTIZE_PYTHON"

# The files of a model that count.
_FILES: Final = (".safetensors", ".json", ".jinja", ".model", ".txt")


class Kind(NamedTuple):
    """What a type is made as.

    Args:
        format: the producer's name
        word: what the producer calls it
        libraries: the distributions whose versions tell one from another
        note: what is to be said where it is not what its name says
    """

    format: str
    word: str
    libraries: tuple[str, ...]
    note: str = ""


_LLAMA_CPP: Final = ("llama_cpp_python", "auto_round", "gguf", "transformers")
_HQQ: Final = ("hqq", "torch", "transformers")


def _mix(name: str) -> Kind:
    note = f"`{name}` is llama.cpp's mix {name}_M, which is what it means there too."
    return Kind("gguf", f"{name}_M", _LLAMA_CPP, note)


def _nearest(name: str) -> Kind:
    note = (
        f"No model is stored as `{name}`, which llama.cpp has for what it computes with; Q8_0 is "
        "the nearest that is."
    )
    return Kind("gguf", "Q8_0", _LLAMA_CPP, note)


# The types of the option `isq`.
KINDS: Final[Mapping[str, Kind]] = {
    **{
        name: Kind("gguf", name, _LLAMA_CPP)
        for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K")
    },
    **{name: _mix(name) for name in ("Q3_K", "Q4_K", "Q5_K")},
    **{name: _nearest(name) for name in ("Q8_1", "Q8_K")},
    "HQQ4": Kind("hqq", "4bit", _HQQ),
    "HQQ8": Kind("hqq", "8bit", _HQQ),
}

# What a `dtype` of a method that quantizes online is made as.
_DTYPES: Final[Mapping[str, Kind]] = {
    "bitsandbytes": Kind("bitsandbytes", "nf4", ("bitsandbytes", "torch", "transformers")),
    "torchao": Kind("torchao", "int8", ("torchao", "torch", "transformers")),
}


@dataclasses.dataclass(frozen=True)
class Wish:
    """How a plain model is to be quantized before it is loaded.

    Args:
        option: that asks for it
        name: the value of the option
        kind: what it is made as
        is_kept: whether it is kept for later starts
    """

    option: str
    name: str
    kind: Kind
    is_kept: bool

    @property
    def note(self) -> str:
        said = f"Quantized in place to {self.kind.word} ({self.kind.format})."
        return f"{said} {self.kind.note}".rstrip()


def take(options: dict[str, Any]) -> Wish | None:
    """Takes the options out that ask for it.

    Raises:
        BridgeError: ``invalid_option``
    """
    asked, kept = options.pop("isq", None), options.pop("isq_cache", None)
    if kept is not None and not isinstance(kept, bool):
        raise BridgeError(
            "invalid_option",
            f"`isq_cache` is {kept!r}, not true or false.",
            {"option": "isq_cache", "value": kept},
        )
    if asked is None:
        return _of_dtype(options, kept)
    kind = KINDS.get(asked.strip().upper().replace("-", "_")) if isinstance(asked, str) else None
    if kind is None:
        suggestion = nearest(str(asked), [name.lower() for name in KINDS])
        suggestion = suggestion and suggestion.upper()
        raise BridgeError(
            "invalid_option",
            f"There is no type {asked!r} for `isq`.",
            {"option": "isq", "value": asked, "nearest": suggestion, "allowed": list(KINDS)},
            remedy=f"{did_you_mean(suggestion)}There are: {', '.join(KINDS)}.",
        )
    _refuse_others(options)
    return Wish("isq", asked, kind, kept is not False)


def _of_dtype(options: dict[str, Any], kept: bool | None) -> Wish | None:
    """``dtype: "int4"`` is quantized online by each start, unless what it makes is to be kept."""
    if not kept:
        return None
    dtype = options.get("dtype")
    method = registry.online_dtypes().get(dtype.strip().lower() if isinstance(dtype, str) else "")
    if method is None or method.name not in _DTYPES:
        known = ", ".join(f'`dtype: "{name}"`' for name in registry.online_dtypes())
        raise BridgeError(
            "invalid_option",
            "`isq_cache` keeps what a start has quantized, and nothing is to be quantized.",
            {"option": "isq_cache", "value": kept},
            remedy=f"Give `isq` or {known} as well, or leave it out.",
        )
    del options["dtype"]
    _refuse_others(options)
    return Wish("dtype", str(dtype), _DTYPES[method.name], True)


def _refuse_others(options: Mapping[str, Any]) -> None:
    dtype = options.get("dtype")
    others = [name for name in ("quantization", "load_format") if options.get(name) is not None]
    if isinstance(dtype, str) and dtype.strip().lower() in registry.online_dtypes():
        others.append("dtype")
    for name in others:
        raise BridgeError(
            "invalid_option",
            f"`isq` says how the model is quantized, and so does `{name}: {options[name]!r}`.",
            {"option": name, "value": options[name]},
            remedy="Leave out one of the two.",
        )


def check(checkpoint: Checkpoint, wish: Wish | None) -> None:
    """Refuses what cannot be made, as far as can be told without the libraries.

    Raises:
        BridgeError: ``unsupported_quantization``, ``unsupported`` or ``quantize_not_installed``
    """
    if wish is None:
        return
    if checkpoint.quantization is not None:
        raise BridgeError(
            "unsupported_quantization",
            f'`{wish.option}: "{wish.name}"` quantizes a plain model, and this one is quantized '
            f"already, with {checkpoint.description}.",
            {"option": wish.option, "value": wish.name, "checkpoint": checkpoint.quant_method},
            remedy=f"Leave `{wish.option}` out, or use the plain model.",
        )
    if checkpoint.folder is None or not any(f.endswith(".safetensors") for f in checkpoint.files):
        raise BridgeError(
            "unsupported",
            f"`{wish.option}` needs a model in safetensors, and this has none.",
            {"option": wish.option, "value": wish.name},
            remedy="Use a variant that has them.",
        )
    availability.check_packages(wish.kind.format)
    if find(checkpoint, wish) is None:
        _python()


def try_out(checkpoint: Checkpoint, wish: Wish) -> None:
    """Asks the libraries of the quantizing environment whether they can make it. Takes seconds.

    Raises:
        BridgeError: with their reason
    """
    source = None if checkpoint.repository is not None else checkpoint.folder
    asked = {"outputs": [(wish.kind.format, wish.kind.word)], "source": source}
    done = subprocess.run(  # noqa: S603 - what Elixir says is ours
        _command(),
        input=json.dumps({"check": asked}).encode(),
        stdout=subprocess.PIPE,
        env=_environment(),
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    _result(json.loads(last[0]) if last else None, done.returncode, wish)


def find(checkpoint: Checkpoint, wish: Wish) -> str | None:
    """The model that was made of this one; None where there is none, or it is not to be used."""
    if not wish.is_kept or data.folder() is None or checkpoint.repository is not None:
        return None
    place = _place(checkpoint, wish)
    if not os.environ.get(PYTHON):
        # Whichever libraries have made it.
        place = max(glob.glob(f"{glob.escape(place)}*[0-9a-f]"), default="")
    return place if os.path.exists(os.path.join(place, in_place.MADE)) else None


def made(checkpoint: Checkpoint, wish: Wish, progress: Callable[[Mapping[str, Any]], None]) -> str:
    """The folder of the quantized model: the one that was made before, or one that is made now,
    which blocks for as long as that takes.

    Args:
        progress: told how far it is

    Raises:
        BridgeError: with the reason why it could not be made
    """
    if not wish.is_kept:
        # Among the temporary files of this process, which go with it.
        return _make(checkpoint, wish, tempfile.mkdtemp(prefix="isq-"), progress)
    place = _place(checkpoint, wish)
    if (found := find(checkpoint, wish)) is not None and in_place.hold(found):
        return found
    with in_place.making(place, checkpoint.folder or "", wish.kind.word) as folder:
        if folder is not None:
            whole = _make(checkpoint, wish, folder, progress)
            if _place(checkpoint, wish) != place:
                raise BridgeError(
                    "invalid_checkpoint",
                    f"The files of `{checkpoint.folder}` have changed while they were quantized.",
                    {"model": checkpoint.folder},
                    remedy="Start it again once they are whole.",
                )
            os.rename(whole, place)
    return place


def note(folder: str, wish: Wish) -> str:
    """What is to be said of an engine with a model that was made."""
    told = in_place.told(folder)
    by = ", ".join(f"{name} {version}" for name, version in told.get("libraries", {}).items())
    return " ".join([wish.note, f"Made by {by}.", *told.get("notes", [])])


def options_for(options: Mapping[str, Any], source: Checkpoint, wish: Wish) -> dict[str, Any]:
    """The options of an engine of what was made of ``source``.

    A GGUF file has a tokenizer too; the model's own folder has what it was made from.
    """
    left = {name: options[name] for name in options if name not in ("isq", "isq_cache")}
    if wish.option == "dtype":
        del left["dtype"]
    for name in ("revision", "subfolder"):
        left.pop(name, None)
    if wish.kind.format == "gguf":
        left.setdefault("tokenizer", source.folder)
        left.setdefault("generation_config", source.folder)
    return left


def _make(
    checkpoint: Checkpoint, wish: Wish, folder: str, progress: Callable[[Mapping[str, Any]], None]
) -> str:
    """Makes the model in a folder below ``folder``, and returns that."""
    place, work = os.path.join(folder, "model"), os.path.join(folder, "work")
    os.makedirs(work)
    asked = {
        "source": checkpoint.folder,
        "format": wish.kind.format,
        "options": wish.kind.word,
        "out": place,
        "work": work,
    }
    last: Any = None
    with subprocess.Popen(  # noqa: S603 - what Elixir says is ours
        _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()
    ) as process:
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(json.dumps({"make": asked}).encode())
        process.stdin.close()
        for line in process.stdout:
            last = json.loads(line)
            if figures := last.get("progress"):
                progress(figures)
    repository, commit = cache.seen(checkpoint.folder or "") or (None, None)
    told = _result(last, process.returncode, wish) | {
        "of": {
            "source": checkpoint.folder,
            "repository": repository,
            "commit": commit,
            "format": wish.kind.format,
            "word": wish.kind.word,
            "at": time.time(),
        }
    }
    with open(os.path.join(place, in_place.MADE), "w", encoding="utf-8") as file:
        json.dump(told, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(work)
    return place


def _result(last: Any, status: int, wish: Wish) -> Any:
    match last:
        case {"result": result}:
            return result
        case {"error": {"reason": reason, "message": message, "details": details}}:
            remedy = details.pop("remedy", "")
            # The message has the remedy in it.
            what = message.removesuffix(remedy).rstrip() if remedy else message
            raise BridgeError(reason, what, details, remedy)
    killed = status in (-9, 137)
    raise BridgeError(
        "out_of_memory" if killed else "load_failed",
        f"The process that quantizes to {wish.kind.word} "
        + ("was killed, as the system does where memory is short." if killed else
           f"ended with the status {status}."),
        {"option": wish.option, "value": wish.name, "status": status},
        remedy=(
            "End what else holds memory, or use a machine with more of it."
            if killed
            else "The log has what it said. Run `mix vllm.doctor`."
        ),
    )  # fmt: skip


def _place(checkpoint: Checkpoint, wish: Wish) -> str:
    """The folder of what is made: named by what it is made as, of which files, and by what, which
    is left open where there is nothing to make it."""
    folder = checkpoint.folder or ""
    files = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and name.endswith(_FILES):
            found = os.stat(path)
            files.append((name, found.st_size, found.st_mtime_ns))
    source = _digest([os.path.realpath(folder), files, wish.kind.format])
    by = _digest(_versions(wish)) if os.environ.get(PYTHON) else ""
    name = f"{wish.kind.word.lower()}-{source}-{by}"
    return os.path.join(in_place.folder(), name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _versions(wish: Wish) -> dict[str, str]:
    """Of the libraries in the quantizing environment; none where there is no such environment."""
    venv = os.path.dirname(os.path.dirname(os.environ.get(PYTHON, "")))
    paths = glob.glob(os.path.join(glob.escape(venv), "lib", "python*", "site-packages"))
    found = {}
    for name in wish.kind.libraries:
        for distribution in metadata.distributions(name=name, path=paths) if paths else ():
            found[name] = distribution.version
    return found


def _python() -> str:
    if path := os.environ.get(PYTHON):
        return path
    raise BridgeError(
        "quantize_not_installed",
        "Models are quantized in an environment of its own, and there is none.",
        remedy="Run `mix vllm.setup --with quantize`.",
    )


def _command() -> list[str]:
    return [_python(), "-m", "vllm_bridge.jobs.quantize"]


def _environment() -> dict[str, str]:
    """That of this worker, less what is for its own libraries."""
    ours = os.path.dirname(os.path.dirname(vllm_bridge.__file__))
    left = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return left | {"PYTHONPATH": ours}
