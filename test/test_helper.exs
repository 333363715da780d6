# The package is not there when the library is tested alone.
unless Code.ensure_loaded?(:telemetry) do
  defmodule :telemetry do
    def execute(event, measurements, metadata) do
      for {_, listener} <- Application.get_env(:ex_vllm, :telemetry_listeners, []) do
        send(listener, {event, measurements, metadata})
      end

      :ok
    end
  end
end

# What a machine needs minutes for is left to the full tier (bin/test --all).
ExUnit.start(
  exclude: [:slow],
  assert_receive_timeout: 10_000,
  capture_log: true,
  formatters: [ExUnit.CLIFormatter, VLLM.Failures]
)
