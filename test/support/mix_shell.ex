defmodule VLLM.MixShell do
  @moduledoc """
  What mix tasks print, for tests. Mix's shell is the same for all processes, so that such tests are
  not `async`.
  """

  @doc "Has what is printed come to the test: `setup :capture_shell`."
  def capture_shell(_context) do
    shell = Mix.shell()
    Mix.shell(Mix.Shell.Process)
    ExUnit.Callbacks.on_exit(fn -> Mix.shell(shell) end)
  end

  @doc "The texts that were printed since the last time, errors among them."
  def lines do
    receive do
      {:mix_shell, _kind, [text]} -> [text | lines()]
    after
      0 -> []
    end
  end

  @doc "The same as a text."
  def printed, do: Enum.map_join(lines(), &(&1 <> "\n"))
end
