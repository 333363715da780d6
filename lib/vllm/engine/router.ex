defmodule VLLM.Engine.Router do
  @moduledoc false
  # What a call asks of an engine: a request for each of a list, or the same of
  # each worker. Sends them from the calling process and collects the
  # answers there.

  alias VLLM.Bridge.{Connection, Inbox}
  alias VLLM.Engine.{Call, Dispatch, InFlight, Table}
  alias VLLM.Error

  @doc """
  A request for each of `params`; the results in their order, or the first
  error, upon which the others are cancelled. Waits for a starting engine.

  As many are under way at once as the workers compute together, so that a long
  list leaves the queue to other callers.
  """
  @spec map(Table.t(), String.t(), [map()], Call.t()) :: {:ok, [term()]} | {:error, Error.t()}
  def map(table, method, params, call) do
    todo = Enum.with_index(params)

    Inbox.run(fn inbox ->
      with {:ok, done} <- run(InFlight.new(table, method, inbox), todo, [], call) do
        {:ok, done |> Enum.sort_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1))}
      end
    end)
  end

  defp run(in_flight, [], done, call) do
    if InFlight.count(in_flight) == 0, do: {:ok, done}, else: collect(in_flight, [], done, call)
  end

  defp run(in_flight, [{params, index} | rest] = todo, done, call) do
    none? = InFlight.count(in_flight) == 0

    case InFlight.submit(in_flight, index, params, call) do
      {:ok, in_flight} ->
        run(in_flight, rest, done, call)

      :none_ready when none? ->
        case Dispatch.await_ready(in_flight.table, call) do
          :ok -> run(in_flight, todo, done, call)
          {:error, error} -> fail(in_flight, error, nil)
        end

      # The window or the queue is full: wait for one of our own answers.
      full when full in [:none_ready, :window] ->
        collect(in_flight, todo, done, call)

      {:error, %Error{reason: :overloaded}} when not none? ->
        collect(in_flight, todo, done, call)

      {:error, error} ->
        fail(in_flight, error, index)
    end
  end

  defp collect(in_flight, todo, done, call) do
    case InFlight.next(in_flight) do
      {index, {:ok, result}, in_flight} ->
        run(in_flight, todo, [{index, result} | done], Call.queue(call))

      # The deadline is that of the whole call.
      {_index, {:error, %Error{reason: :timeout} = error}, in_flight} ->
        fail(in_flight, error, nil)

      {index, {:error, error}, in_flight} ->
        fail(in_flight, error, index)
    end
  end

  defp fail(in_flight, error, index) do
    InFlight.cancel(in_flight, if(index, do: Connection.aborted(), else: error))
    details = if index, do: Map.put_new(error.details, "prompt_index", index), else: error.details
    {:error, %{error | details: details}}
  end

  @doc """
  The same request to every ready worker; their results, or the first error.
  Waits for a starting engine.
  """
  @spec each(Table.t(), String.t(), map(), Call.t()) :: {:ok, [term()]} | {:error, Error.t()}
  def each(table, method, params, call) do
    case Dispatch.workers(table) do
      :stopped ->
        {:error, Connection.stopped()}

      [] ->
        with :ok <- Dispatch.await_ready(table, call), do: each(table, method, params, call)

      workers ->
        Enum.reduce_while(workers, {:ok, []}, fn worker, {:ok, results} ->
          case Connection.call(worker.conn, method, params, call.deadline) do
            {:ok, result} -> {:cont, {:ok, [result | results]}}
            {:error, error} -> {:halt, {:error, error}}
          end
        end)
    end
  end
end
