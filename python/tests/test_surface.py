"""That what Elixir is compared with is what the installed vLLM offers."""

import surface
from conftest import ROOT


def test_the_file_is_of_the_installed_vllm() -> None:
    written = (ROOT / "test" / "support" / "surface.tsv").read_text().splitlines()
    # A difference is looked at, the file made anew by surface.py, and Elixir tested with it.
    assert written == list(surface.lines())
