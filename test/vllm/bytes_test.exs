defmodule VLLM.BytesTest do
  use ExUnit.Case, async: true
  doctest VLLM.Bytes

  alias VLLM.Bytes

  test "a size is in the unit that it is at least one of" do
    assert Enum.map([0, 1000, 1_000_000, 2.5e12], &Bytes.file/1) ==
             ["0 B", "1.0 kB", "1.0 MB", "2.5 TB"]

    assert Enum.map([0, 1024 * 1024, 1024 * 1024 * 1024], &Bytes.memory/1) ==
             ["0.0 KiB", "1.0 MiB", "1.0 GiB"]
  end
end
