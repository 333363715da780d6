defmodule VLLM.Python.PipTest do
  use ExUnit.Case, async: true

  alias VLLM.Python.Pip

  doctest Pip

  test "a line that tells no progress is no event" do
    assert Pip.event("  Downloading anyio-4.16.0-py3-none-any.whl (110 kB)") == nil
    assert Pip.event("Looking in indexes: https://user:secret@example.org/simple") == nil
    assert Pip.event("Processing ./folder") == nil
    assert Pip.event("") == nil
  end

  test "a package that is there already counts" do
    line = "Requirement already satisfied: torch==2.13.0+cpu in ./lib (from -r cpu.txt (line 9))"
    assert Pip.event(line) == {:package, "torch 2.13.0+cpu"}
  end

  test "a lost network is told from a version that does not exist" do
    not_found = [
      "ERROR: Could not find a version that satisfies the requirement idna==3.20 (from versions: none)",
      "ERROR: No matching distribution found for idna==3.20"
    ]

    retry =
      "WARNING: Retrying (Retry(total=0)) after connection broken by " <>
        "'NewConnectionError('Failed to establish a new connection: [Errno -3] Temporary failure " <>
        "in name resolution')': /simple/idna/"

    assert Pip.cause(not_found) == :version
    assert Pip.missing(not_found) == "idna==3.20"
    assert Pip.cause([retry | not_found]) == :network
  end

  test "each cause is known by what pip says of it" do
    for {cause, line} <- [
          disk:
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
          permission:
            "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'",
          certificate:
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))",
          compiler: "        No CMAKE_CXX_COMPILER could be found.",
          network: "pip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.",
          unknown: "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"
        ] do
      assert Pip.cause([line]) == cause
    end
  end

  test "lines with an address are not shown" do
    lines = ["Looking in indexes: https://user:secret@example.org/simple", "ERROR: no"]
    assert Pip.printable(lines) == ["ERROR: no"]
  end
end
