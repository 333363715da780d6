defmodule VLLM.Bridge.LogTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.Log

  @moduletag :tmp_dir

  defp append(dir, text), do: File.write!(Path.join(dir, "log"), text, [:append])

  test "lines come once, whole, and in order", %{tmp_dir: dir} do
    log = Log.new(dir)
    assert {[], log} = Log.read(log)
    append(dir, "one\ntw")
    assert {["one"], log} = Log.read(log)
    append(dir, "o\nthree\n")
    assert {["two", "three"], log} = Log.read(log)
    assert {[], _} = Log.read(log)
  end

  test "a progress bar's steps are lines", %{tmp_dir: dir} do
    append(dir, "0%\r50%\r100%\r\n")
    assert {["0%", "50%", "100%"], _} = Log.read(Log.new(dir))
  end

  test "reading goes on in the new file when the guard begins one", %{tmp_dir: dir} do
    append(dir, "one\n")
    {["one"], log} = Log.read(Log.new(dir))
    append(dir, "two\n")
    File.rename!(Path.join(dir, "log"), Path.join(dir, "log.1"))
    append(dir, "three\n")
    assert {["two", "three"], log} = Log.read(log)
    append(dir, "four\n")
    assert {["four"], log} = Log.read(log)
    assert Log.recent(log) == ["one", "two", "three", "four"]
  end

  test "only the last lines are kept", %{tmp_dir: dir} do
    append(dir, Enum.map(1..100, &"#{&1}\n"))
    {lines, log} = Log.read(Log.new(dir))
    assert length(lines) == 100
    assert Log.recent(log) == Enum.map(61..100, &"#{&1}")
  end

  test "colours and bytes that are no text are left out", %{tmp_dir: dir} do
    append(dir, "\e[31mred\e[0m\nbad\xFFbyte\n\n  \n")
    assert {["red", "badbyte"], _} = Log.read(Log.new(dir))
  end

  test "a line has the level that vLLM gave it" do
    assert Log.level("INFO 11-20 19:02:41 [llm.py:1] text") == :info
    assert Log.level("(EngineCore pid=7) WARNING 11-20 19:02:41 [x.py:1] text") == :warning
    assert Log.level("(Worker_TP1 pid=9) ERROR 11-20 19:02:41 [x.py:1] Traceback") == :error
    assert Log.level("CRITICAL 11-20 [x.py:1] text") == :error
    assert Log.level("DEBUG 11-20 [x.py:1] text") == :debug
    assert Log.level("/lib/x.py:3: UserWarning: old") == :warning
    assert Log.level("INFORMATION is no level") == :info
  end
end
