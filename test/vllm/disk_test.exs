defmodule VLLM.DiskTest do
  # The system's own df is asked, for once.
  use ExUnit.Case, async: false

  setup do
    VLLM.SystemEnv.put_env("PATH", "/usr/bin:/bin")
  end

  test "the free space of a folder is known" do
    assert {:ok, bytes} = VLLM.Disk.free(File.cwd!())
    assert bytes > 0
    assert VLLM.Disk.free("/nowhere") == :error
  end
end
