defmodule VLLM.ModulesTest do
  use ExUnit.Case, async: true

  # Where two modules know each other, neither can be read alone. One that has to be is listed here
  # with the reason; there is none.
  test "no module depends on itself by way of others" do
    report =
      ExUnit.CaptureIO.capture_io(fn ->
        Mix.Task.rerun("xref", ["graph", "--format", "cycles"])
      end)

    assert report =~ "No cycles found", report
  end
end
