"""What ``measuring`` starts ends with the process of the tests, also with one that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import measuring
from test_guard import until_readable

# Tells its process and one in a session of its own, as engines may have.
SCRIPT = """
import os, sys, time
child = os.fork()
if child == 0:
    os.setsid()
else:
    with open(sys.argv[2], "w") as told:
        told.write(f"{os.getpid()} {child}")
time.sleep(600)
"""

TESTS = """
import sys
from pathlib import Path
import measuring
measuring.results(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
"""


def test_lines_are_found_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    line = """print('{"name": "%s", "is": "measured"}' % name, file=file)"""
    script.write_text(
        f"import sys\nprint('begun')\nwith open(sys.argv[1], 'w') as file:\n"
        f"    for name in sys.argv[2:]:\n        {line}\n"
    )

    found = measuring.results(str(script), tmp_path, "one", "two")

    assert found == {name: {"name": name, "is": "measured"} for name in ("one", "two")}
    assert "begun" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whose_tests_end_ends(tmp_path: Path, number: signal.Signals) -> None:
    script, told = tmp_path / "script.py", tmp_path / "told"
    script.write_text(SCRIPT)
    os.mkfifo(told)
    heard = os.open(told, os.O_RDWR)
    tests = subprocess.Popen(
        [sys.executable, "-c", TESTS, script, tmp_path, told],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    until_readable(heard, "the processes")
    processes = [os.pidfd_open(int(pid)) for pid in os.read(heard, 100).split()]

    tests.send_signal(number)

    assert tests.wait() == -number
    for process in processes:
        until_readable(process, "the end of the script")
    for fd in (heard, *processes):
        os.close(fd)
