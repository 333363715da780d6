defmodule VLLM.SystemEnv do
  @moduledoc "Environment variables for the time of one test, which must not run beside others."

  @doc "Sets a variable, or unsets it with nil, until the test ends."
  @spec put_env(String.t(), String.t() | nil) :: :ok
  def put_env(name, value) do
    before = System.get_env(name)
    # The last one registered runs first, so what was there at first is what is left.
    ExUnit.Callbacks.on_exit(fn -> set(name, before) end)
    set(name, value)
  end

  @doc "Has run folders made in one of the test's own, so that those of others count for nothing."
  @spec put_tmp_dir() :: :ok
  def put_tmp_dir do
    tmp = Path.join(System.tmp_dir!(), "test-#{System.pid()}")
    File.mkdir_p!(tmp)
    ExUnit.Callbacks.on_exit(fn -> File.rm_rf!(tmp) end)
    put_env("TMPDIR", tmp)
  end

  defp set(name, nil), do: System.delete_env(name)
  defp set(name, value), do: System.put_env(name, value)
end
