defmodule VLLM.Started do
  @moduledoc false
  # Whether the application runs on this node, for whatever needs its processes.

  alias VLLM.Error

  @doc "The error of whatever needs the application, where it does not run."
  @spec check() :: :ok | {:error, Error.t()}
  def check do
    if yet?(),
      do: :ok,
      else:
        {:error,
         Error.new(
           :not_running,
           "The application `:ex_vllm` does not run on the node #{node()}, and so no engine. It starts " <>
             "with applications that depend on it, or by `Application.ensure_all_started(:ex_vllm)`."
         )}
  end

  @doc "Whether there is a registry of engines, without which nothing of them can be asked."
  @spec yet?() :: boolean()
  def yet?, do: Process.whereis(VLLM.Registry) != nil

  @doc "Whether all of the application has started, which takes longer to find out."
  @spec wholly?() :: boolean()
  def wholly?, do: List.keymember?(Application.started_applications(), :ex_vllm, 0)
end
