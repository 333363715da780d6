# The package is not there when the library is tested alone. As in the package, one process of the
# application holds the handlers, and without it each event makes a warning.
unless Code.ensure_loaded?(:telemetry) do
  defmodule :telemetry do
    require Logger

    def execute(event, measurements, metadata) do
      unless Process.whereis(:telemetry_handler_table),
        do: Logger.warning("Failed to lookup telemetry handlers.")

      for {_, listener} <- Application.get_env(:ex_vllm, :telemetry_listeners, []) do
        send(listener, {event, measurements, metadata})
      end

      :ok
    end
  end

  defmodule :telemetry_handler_table do
    def list_for_event(_event), do: Application.get_env(:ex_vllm, :telemetry_listeners, [])
  end

  {:ok, _} = Agent.start(fn -> nil end, name: :telemetry_handler_table)
end

# Of the fake worker, see test/support/fake_python.
with {:ok, python} <- VLLM.Python.executable(), do: System.put_env("EX_VLLM_TEST_PYTHON", python)

# Of the disk, see test/support/bin/df.
System.put_env("PATH", Path.expand("support/bin", __DIR__) <> ":" <> System.get_env("PATH"))

VLLM.TestData.use()
ExUnit.after_suite(fn _result -> VLLM.TestData.remove() end)

# What a machine needs minutes for is left to the full tier (bin/test --all).
ExUnit.start(
  exclude: [:slow],
  assert_receive_timeout: 10_000,
  capture_log: true,
  formatters: [ExUnit.CLIFormatter, VLLM.Failures]
)
