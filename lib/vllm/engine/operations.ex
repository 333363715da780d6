defmodule VLLM.Engine.Operations do
  @moduledoc false
  # What an engine is asked in one question with one answer. An operation is plain data, so that it
  # may come from another node; it is run on the engine's, by the caller or by a VLLM.Remote.Proxy.

  alias VLLM.Engine.{Call, Control, InFlight, Lifecycle, Replicas, Router, Table}
  alias VLLM.Error

  @typedoc "Each is a clause of `run/3`."
  @type t ::
          {:map, method :: String.t(), [params :: map()]}
          | {:each, method :: String.t(), params :: map()}
          | :await_ready
          | :info
          | :labels
          | :stop
          | :replicas
          | {:scale, count :: term(), options :: keyword() | map()}
          | {:drain, index :: term(), options :: keyword() | map()}
          | {:restart, index :: term(), options :: keyword() | map()}
          | {:reload, new_options :: keyword() | map(), options :: keyword() | map()}

  @doc "Runs an operation on an engine of this node."
  @spec run(VLLM.engine(), t(), Call.t()) :: :ok | {:ok, term()} | {:error, Error.t()}
  def run(engine, {:map, method, params}, call) do
    with {:ok, table, _pid} <- Table.lookup(engine),
         do: Router.map(&InFlight.new(table, method, &1), params, call)
  end

  def run(engine, {:each, method, params}, call) do
    with {:ok, table, _pid} <- Table.lookup(engine), do: Router.each(table, method, params, call)
  end

  def run(engine, :await_ready, call), do: Lifecycle.await(engine, :any, call.deadline)
  def run(engine, :info, call), do: Lifecycle.info(engine, call.deadline)

  def run(engine, :labels, _call) do
    with {:ok, table, _pid} <- Table.lookup(engine), do: {:ok, Table.info(table)["labels"]}
  rescue
    # The engine was stopped after it had answered.
    ArgumentError -> {:error, Control.not_running()}
  end

  def run(engine, :stop, _call), do: Lifecycle.stop(engine)
  def run(engine, :replicas, _call), do: Replicas.list(engine)
  def run(engine, {:scale, count, options}, _call), do: Replicas.scale(engine, count, options)
  def run(engine, {:drain, index, options}, _call), do: Replicas.drain(engine, index, options)
  def run(engine, {:restart, index, options}, _call), do: Replicas.restart(engine, index, options)
  def run(engine, {:reload, new, options}, _call), do: Replicas.reload(engine, new, options)
end
