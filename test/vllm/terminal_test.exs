defmodule VLLM.TerminalTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO

  alias VLLM.Terminal

  test "what is waited for is shown while it is, where it is to be" do
    shown = fn shown? ->
      with_io(fn -> Terminal.waiting(shown?, "Wait …", fn -> IO.write("done") end) end)
    end

    assert shown.(true) == {:ok, "\r\e[KWait …done\n"}
    assert shown.(false) == {:ok, "done"}
  end
end
