"""The steps of a job that do what they are told, for tests of jobs; standard library only.

A format is any name. What is done for an output is said by its options: `check`, `quantize`, `measure`
and `register` are steps, parted by ";", each a name and perhaps ":" and an argument: `print:TEXT`, `touch:FILE`,
`wait:FILE` (until it is there), `sleep:SECONDS`, `tell:DONE:TOTAL`, `exit:STATUS`, `refuse:REASON`, `fill:MB` (a file of so many
megabytes beside what is made), `child` (leaves a process in a session of its own that ignores signals), `once:FILE:STEP`
(unless FILE exists, and makes it). `memory`, `disk` and (to measure it) `verification` are what it is planned to take, and
`verdict` what a comparison says of it (`incomparable`: that there is none). The name of a model of the hub is steps, too, for its download, and may end with `@` and the folder that it is
downloaded to. What a model is registered as is written to `registered` in its folder.

Of the questions of the tools kind it answers those about models; the name of one may be `wait:FILE`, and the
repository that one is uploaded to may be steps. A training takes the same, by its options `check`, `train`, `merged` and `register`; a state of it is there once it has
begun.
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time

# Isolated, so that the folder of the program is not among those with modules.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fake_wire import receive, send


class Refused(Exception):
    pass


def steps(script: str, request: int) -> None:
    for step in script.split(";"):
        name, _, argument = step.partition(":")
        take(name, argument, request)


def take(name: str, argument: str, request: int) -> None:
    if name == "print":
        print(argument, flush=True)
    elif name == "touch":
        with open(argument, "w"):
            pass
    elif name == "wait":
        while not os.path.exists(argument):
            time.sleep(0.01)
    elif name == "sleep":
        time.sleep(float(argument))
    elif name == "tell":
        done, total = map(int, argument.split(":"))
        told = {"phase": "layers", "done": done, "total": total, "loss": 0.5}
        send([2, "progress", {"id": request} | told])
    elif name == "exit":
        os._exit(int(argument))
    elif name == "refuse":
        raise Refused(argument)
    elif name == "fill":
        try:
            with open("zeros", "wb", buffering=0) as file:
                for _ in range(int(argument)):
                    file.write(bytes(1_000_000))
        except OSError as error:
            raise Refused("disk_full") from error
    elif name == "child":
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
    elif name == "once":
        path, _, rest = argument.partition(":")
        if not os.path.exists(path):
            take("touch", path, request)
            inner, _, inner_argument = rest.partition(":")
            take(inner, inner_argument, request)
    elif name:
        raise ValueError(name)


def pull(request: int, params: dict) -> object:
    if os.path.exists(params["model"]):
        return {"path": params["model"], "repository": None, "commit": None}
    script, _, folder = params["model"].partition("@")
    steps(script, request)
    return {"path": folder, "repository": "org/name", "commit": "c" * 40}


def taken(_request: int, params: dict) -> object:
    return [
        {"name": ":".join(filter(None, [name, label])), "by": f"`{path}`", "delete": None}
        for name, label, path in params["names"]
        if os.path.exists(path)
    ]


def quantize_formats(request: int, params: dict) -> object:
    found = []
    for name, given in params["outputs"]:
        if name == "unheard-of":
            raise Refused("invalid_option")
        options = {"word": given} if isinstance(given, str) else dict(given or {})
        steps(options.get("check", ""), request)
        if word := options.pop("preset", None):
            options["word"] = word
        label = options.pop("as", None) or options.get("word") or name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", str(label)):
            raise Refused("invalid_option")
        found.append({"label": label, "format": name, "options": options, "texts": "unused"})
    return found


def quantize_options(_request: int, _params: dict) -> object:
    option = {"name": "pure", "types": ["bool"], "default": False, "allowed": [], "doc": "All."}
    known = {"format": "gguf", "types": ["Q4_K_M"], "options": [option], "refused": None}
    return [known, {"format": "awq", "types": [], "options": [], "refused": "It lacks a part."}]


def plan_quantize(_request: int, params: dict) -> object:
    names = ("bytes", "memory", "disk", "verification")
    plans = [
        {name: options.get(name, 0) for name in names}
        | {"minutes": [1, 2], "usual_kl": options.get("usual_kl")}
        for _, options, _tokens in params["outputs"]
    ]
    together = {name: sum(plan[name] for plan in plans) for name in names}
    together["minutes"] = [2, 4] if params.get("verify") else [1, 2]
    source = options_of(params["model"]).get("verification", 0)
    return {"outputs": plans, "together": together, "verification": source}


def quantize(request: int, params: dict) -> object:
    label = params["options"].pop("as")
    about = {"format": params["format"], "label": label, "calibration": None, "notes": []}
    return made(request, params, "quantize") | about


def check_finetune(request: int, params: dict) -> object:
    steps(params["options"].get("check", ""), request)
    options, plan = params["options"], {"bytes": 3, "disk": 30, "minutes": [1, 2]}
    plan["memory"] = options.get("memory", 0)
    labels = ["adapter", "merged"] if options.get("merge") else ["adapter"]
    return {
        "base": "plain",
        "options": options,
        "memory_bytes": plan["memory"],
        "outputs": [{"label": label} | plan for label in labels],
        "together": plan,
    }


def finetune(request: int, params: dict) -> object:
    state = os.path.join(params["states"], "state")
    resumed = os.path.exists(state)
    os.makedirs(params["states"], exist_ok=True)
    take("touch", state, request)
    loss = {"before": 7.5, "after": 0.25}
    kept = {"prompts": 8, "same": 6, "same_tokens": 0.875, "kl": 0.125, "changes": []}
    figures = {"base": "plain", "held_out_loss": loss, "losses": [[1, 4.5]], "kept": kept}
    notes = {"notes": ["Something was forgotten."], "resumed_from": 1 if resumed else None}
    return made(request, params, "train") | figures | notes


def merge(request: int, params: dict) -> object:
    with open(os.path.join(params["adapter"], "model")) as file:
        options = json.load(file)
    return made(request, params | {"options": options}, "merged") | {"dtype": "bfloat16"}


def made(request: int, params: dict, step: str) -> dict:
    """Writes the options to where the output is to be, and takes the steps that they say."""
    os.makedirs(params["out"])
    path = os.path.join(params["out"], "model")
    with open(path, "w") as file:
        json.dump(params["options"], file)
    os.chdir(params["out"])
    steps(params["options"].get(step, ""), request)
    size = os.path.getsize(path)
    return {
        "options": params["options"],
        "libraries": {"fake": "1.0"},
        "files": {"model": size},
        "bytes": size,
        "seconds": 0.5,
        "peak_memory_bytes": 1024,
    }


def options_of(model: str) -> dict:
    path = os.path.join(model, "model")
    if not os.path.exists(path):  # the source
        return {}
    with open(path) as file:
        return json.load(file)


def measure(request: int, params: dict) -> object:
    steps(options_of(params["model"]).get("measure", ""), request)
    with open(params["out"], "w") as file:
        file.write("figures")
    return {"model": params["model"], "perplexity": 2.5}


def compare(_request: int, params: dict) -> object:
    for path in [params["reference"], *params["others"]]:
        with open(path) as file:
            assert file.read() == "figures"
    return [row(options_of(path.removesuffix(".measured"))) for path in params["others"]]


def row(options: dict) -> dict:
    verdict = options.get("verdict", "ok")
    says = ["It is made up."] if verdict != "ok" else []
    if verdict == "incomparable":
        return {"kl_mean": None, "verdict": None, "says": says}
    return {"kl_mean": 0.25, "verdict": verdict, "says": says}


def register(request: int, params: dict) -> object:
    steps(options_of(params["path"]).get("register", ""), request)
    with open(os.path.join(params["path"], "registered"), "w") as file:
        file.write(f"{params['source']} {params['revision']}")
    name = ":".join(params[key] for key in ("name", "label") if key in params)
    return {"name": name, "aliases": [], "registered_at": 1.0, "size": 1, "last_used": 1.0}


def check(request: int, params: dict) -> object:
    if params["model"].startswith("wait:"):
        steps(params["model"], request)
    message = "The fake job says that it is no model. Take another."
    finding = {"severity": "error", "reason": "not_a_model", "message": message}
    finding |= {"remedy": "Take another.", "details": {}}
    return {"ok": False, "findings": [finding], "model": params["model"]}


def estimate(_request: int, params: dict) -> object:
    device = {"name": "A", "weights": 7, "left": 3, "budget": 20, "fits": True}
    return {
        "model": params["model"],
        "fits": True,
        "weights": {},
        "kv_cache": {},
        "devices": [device, device],
        "remedies": [],
        "formats": [],
    }


REGISTERED = {"name": "org/llama:Q4", "label": "Q4", "aliases": [], "kind": "model", "size": 7}
REGISTERED |= {"origin": "made", "method": "gguf", "made": {"job": "1"}, "registered_at": 1.0}


def registered(_request: int, _params: dict) -> object:
    return [REGISTERED]


def unregister(_request: int, params: dict) -> object:
    path = params.get("path", "")
    if path and os.path.isdir(path):
        shutil.rmtree(path)
    elif params["name"] != REGISTERED["name"]:
        raise Refused("model_not_found")
    return {"freed": 7, "names": [params["name"]]}


def push(request: int, params: dict) -> object:
    if params["model"] != REGISTERED["name"]:
        raise Refused("model_not_found")
    told = {"bytes": 3, "total_bytes": 7, "files": 0, "total_files": 1}
    send([2, "progress", {"id": request} | told])
    if ":" in params["repository"]:
        steps(params["repository"], request)
    return {"url": "https://hub.example/" + params["repository"], "commit": "c0ffee"}


def plot(_request: int, params: dict) -> object:
    labels = [series["label"] for panel in params["panels"] for series in panel["series"]]
    return " ".join([params["format"], params["title"], *labels])


def workspace(_request: int, _params: dict) -> object:
    return {"path": tempfile.mkdtemp()}


METHODS = [
    *(pull, taken, quantize_options, quantize_formats, plan_quantize, quantize, measure, compare, register),
    *(check_finetune, finetune, merge),
    *(check, estimate, registered, unregister, push, plot, workspace),
]


def main() -> None:
    methods = {method.__name__: method for method in METHODS}
    while True:
        match receive():
            case [0, request, "hello", _]:
                hello = {"protocol": 2, "bridge": "0", "python": "3", "pid": os.getpid()}
                send([1, request, None, hello | {"packages": {}, "methods": list(methods)}])
            case [0, request, method, params]:
                try:
                    send([1, request, None, methods[method](request, params)])
                except Refused as refused:
                    message = f"The fake job says {refused}."
                    error = {"reason": str(refused), "message": message, "details": {}}
                    send([1, request, error, None])
            case [2, "shutdown", _]:
                sys.exit(0)


main()
