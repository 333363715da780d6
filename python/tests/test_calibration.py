"""Calibration texts: where they come from, how many of them are used, and what is said of data that
is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import producing
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import calibration
from vllm_bridge.jobs.quantize.calibration import Calibration, Texts

DEMO = str(Path(__file__).resolve().parents[2] / "priv" / "models" / "demo")


def _given(path: Path | None, given: list[Any] | None) -> Calibration:
    return Calibration(given, None if path is None else str(path))


def texts(path: Path | None = None, given: list[Any] | None = None) -> tuple[str, ...]:
    return calibration.read(_given(path, given), DEMO).texts


def refused(path: Path | None = None, given: list[Any] | None = None) -> str:
    with pytest.raises(BridgeError) as caught:
        texts(path, given)
    assert caught.value.reason == "invalid_option"
    assert caught.value.details["option"] == "calibration"
    with pytest.raises(BridgeError):
        calibration.check(_given(path, given), DEMO)
    return caught.value.message


def test_a_list_may_have_every_shape_of_text() -> None:
    given = ["One.", {"text": "Two."}, {"prompt": "Three", "completion": " four."}]
    assert texts(given=given) == ("One.", "Two.", "Three four.")


def test_conversations_are_written_with_the_models_template() -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    (text,) = texts(given=[{"messages": messages}])
    assert re.search(r"user.*Hello\?.*assistant.*Hi\.", text, re.DOTALL)


def test_a_text_file_has_a_text_in_each_paragraph_or_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("One\ntwo.\n\n\nThree.\n", encoding="utf-8")
    assert texts(file) == ("One\ntwo.", "Three.")
    file.write_text("One.\nTwo.\n", encoding="utf-8")
    assert texts(file) == ("One.", "Two.")


def test_jsonl_has_a_text_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows: list[Any] = ["One.", {"text": "Two.", "id": 7}, {"prompt": "A", "completion": "B"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert texts(file) == ("One.", "Two.", "AB")


def test_of_a_dataset_its_part_for_training_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("What it is.", encoding="utf-8")
    for name, text in (("test.txt", "No."), ("train-1.txt", "One."), ("train-2.txt", "Two.")):
        (tmp_path / "data" / name).write_text(text, encoding="utf-8")
    assert texts(tmp_path) == ("One.", "Two.")


# Run where models are quantized, which has pyarrow: writes files and tells what is read of them.
_PARQUET = """
import json, sys
from pathlib import Path

import pyarrow
from pyarrow import parquet

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import calibration

folder, model = Path(sys.argv[1]), sys.argv[2]
for name, rows in json.load(sys.stdin).items():
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(rows, str):
        path.write_text(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
told = []
for path in (folder, folder / "rows.parquet", folder / "broken.parquet"):
    try:
        told.append(calibration.read(calibration.Calibration(None, str(path)), model).texts)
    except BridgeError as error:
        told.append(error.message)
print(json.dumps(told))
"""


@pytest.mark.slow
def test_files_of_a_dataset_may_be_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    files = {
        "data/train-1.parquet": [{"id": 1, "text": "One."}, {"id": 2, "text": "Two."}],
        "data/train-2.parquet": [{"messages": messages}, {"messages": messages[:1]}],
        "data/test-1.parquet": [{"text": "No."}],
        "rows.parquet": [{"text": "One."}, {"body": "Two."}],
        "broken.parquet": "of another kind",
    }
    done = subprocess.run(
        [producing.interpreter(), "-c", _PARQUET, tmp_path, DEMO],
        input=json.dumps(files),
        env=os.environ | {"PYTHONPATH": str(producing.PYTHON), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    dataset, row, broken = json.loads(done.stdout)
    assert dataset[:2] == ["One.", "Two."]
    assert len(dataset) == 4
    assert re.search(r"user.*Hello\?.*assistant.*Hi\.", dataset[2], re.DOTALL)
    assert f"`{tmp_path}/rows.parquet`, row 2: there is no text in it" in row
    assert f"`{tmp_path}/broken.parquet`: it cannot be read" in broken


def test_without_what_reads_parquet_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(tmp_path)
    assert f"`{tmp_path}/a.parquet`: there is no pyarrow here to read it. " in message
    assert "Give it as JSONL" in message


def test_what_is_wrong_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "One."}\n{"text": \n', encoding="utf-8")
    assert f"`{file}`, line 2: " in refused(file)
    file.write_text('{"text": "One."}\n\n{"body": "Two.", "id": 1}\n', encoding="utf-8")
    message = refused(file)
    assert f"`{file}`, line 3: there is no text in it: it has `body`, `id`." in message
    file.write_text('{"messages": [{"role": "user"}]}', encoding="utf-8")
    assert f"`{file}`, line 1: " in refused(file)
    file.write_bytes(b'{"text": "\xff"}')
    assert f"`{file}`: it cannot be read" in refused(file)
    assert "text 2 of the list: there is no text in it: it is 7" in refused(given=["One.", 7])


def test_where_there_is_no_text_it_is_said(tmp_path: Path) -> None:
    assert "there is no text in it" in refused(given=[])
    assert "no files that end with" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    assert "there is no text in it" in refused(tmp_path / "empty.txt")


def test_a_list_and_a_path_are_too_much(tmp_path: Path) -> None:
    assert "both a list of texts and a path" in refused(tmp_path, ["One."])


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((Path(DEMO) / name).read_bytes())
    said = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    said.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    given = Calibration([{"messages": [{"role": "user", "content": "Hello?"}]}])
    for look in (calibration.read, calibration.check):
        with pytest.raises(BridgeError, match=r"text 1 of the list: .* no chat template"):
            look(given, str(model))


def test_no_more_is_used_than_asked_for_and_it_is_from_all_over() -> None:
    found = Texts("list", [str(number) for number in range(100)], max_samples=4)
    assert found.texts == ("0", "25", "50", "75")
    assert found.to_wire() == {"source": "list", "texts": 4, "tokens": None}


def test_long_texts_become_several() -> None:
    found = Texts("list", ["a b c d e", "f"], max_samples=3, max_length=2)
    rows = found.ids(lambda text: {"input_ids": [ord(word) for word in text.split()]})
    assert rows == [[97, 98], [99, 100], [101]] or rows[-1] == [102]
    assert len(rows) == 3
    assert max(map(len, rows)) == 2
    assert found.tokens == sum(map(len, rows))


def test_the_default_set_is_prose_in_several_languages_and_code() -> None:
    found = texts()
    whole = "\n\n".join(found)
    assert len(found) > 60
    assert 40_000 < len(whole.encode()) < 90_000
    assert len(set(found)) == len(found)
    for sample in ("def ", "SELECT", "的", "и ", "の", " und ", " les ", "ال"):
        assert sample in whole


def test_what_will_be_read_is_counted_before() -> None:
    given = Calibration(["One two three. " * 40, "Four."])
    tokenized = calibration.count(given, DEMO, 256, 2048)
    assert calibration.count(given, DEMO, 256, 16) == tokenized
    assert calibration.count(given, DEMO, 1, 16) == 16
    # Of a model that is not here yet there is no tokenizer: four bytes are a token.
    assert calibration.count(given, None, 256, 2048) == 151 + 2
    assert calibration.count(given, None, 2, 16) == 32
    talk = [{"role": "user", "content": "A" * 100}, {"role": "assistant", "content": "B" * 100}]
    assert calibration.count(Calibration([{"messages": talk}]), None, 256, 2048) == 51
