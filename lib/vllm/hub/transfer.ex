defmodule VLLM.Hub.Transfer do
  @moduledoc false
  # A download or an upload: shown on the terminal, told to whoever asked for it by
  # `:progress` and `:notify`, and as telemetry.

  alias VLLM.Hub.Progress
  alias VLLM.{Error, Telemetry, Terminal}

  @doc """
  Has a worker do it: `fun` is given what is to be called with what the worker tells, and returns what
  came of it, which is metadata of its end. `about` is that of all of its events, with the `:model`.
  """
  @spec run(:pull | :push, map(), map(), ((map() -> term()) -> result)) :: result
        when result: {:ok, map()} | {:error, Error.t()}
  def run(kind, about, options, fun) do
    started_at = System.monotonic_time()
    Telemetry.transfer_start(kind, about)

    result =
      Terminal.line(options.progress, fn show ->
        fun.(fn wire ->
          with {:ok, progress} <- Progress.from_wire(wire) do
            notify(options.notify, about.model, progress)
            show.(fn -> Progress.bar(progress, Terminal.columns() || 80) end)
            Telemetry.transfer_progress(kind, started_at, about, Map.from_struct(progress))
          end
        end)
      end)

    Telemetry.transfer_end(kind, started_at, about, result)
    result
  end

  defp notify(nil, _model, _progress), do: :ok
  defp notify({pid, ref}, _model, progress), do: send(pid, {ref, progress})
  defp notify(pid, model, progress), do: send(pid, {model, progress})
end
