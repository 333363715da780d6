defmodule VLLM.Engine.Router do
  @moduledoc false
  # What a call asks of an engine: a request for each of a list, or the same of
  # each worker. Sends them from the calling process and collects the
  # answers there.

  alias VLLM.Bridge.{Connection, Inbox}
  alias VLLM.Engine.{Call, Dispatch, InFlight, Table}
  alias VLLM.{Cluster, Error}

  @typedoc "Requests of one engine or of the engines of a cluster; the functions are those of its module."
  @type in_flight :: InFlight.t() | Cluster.InFlight.t()

  @doc """
  A request for each of `params`; the results in their order, or the first
  error, upon which the others are cancelled. Waits for a starting engine.

  As many are under way at once as the workers compute together, so that a long
  list leaves the queue to other callers. `new` makes what they are under way in.
  """
  @spec map((Inbox.t() -> in_flight()), [map()], Call.t()) ::
          {:ok, [term()]} | {:error, Error.t()}
  def map(new, params, call) do
    todo = Enum.with_index(params)

    Inbox.run(fn inbox ->
      with {:ok, done} <- run(new.(inbox), todo, [], call) do
        {:ok, done |> Enum.sort_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1))}
      end
    end)
  end

  @doc "Sends a request with nothing else under way; waits for a starting engine."
  @spec open(in_flight(), InFlight.key(), map(), Call.t(), Connection.answers()) ::
          {:ok, in_flight()} | {:error, Error.t()}
  def open(%via{} = in_flight, key, params, call, answers) do
    with :none_ready <- via.submit(in_flight, key, params, call, answers),
         :ok <- via.await_ready(in_flight, call),
         do: open(in_flight, key, params, call, answers)
  end

  defp run(%via{} = in_flight, [], done, call) do
    if via.count(in_flight) == 0, do: {:ok, done}, else: collect(in_flight, [], done, call)
  end

  defp run(%via{} = in_flight, [{params, index} | rest] = todo, done, call) do
    none? = via.count(in_flight) == 0

    case via.submit(in_flight, index, params, call, :once) do
      {:ok, in_flight} ->
        run(in_flight, rest, done, call)

      :none_ready when none? ->
        case via.await_ready(in_flight, call) do
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

  defp collect(%via{} = in_flight, todo, done, call) do
    case via.next(in_flight, :infinity) do
      {index, {:ok, result}, in_flight} ->
        run(in_flight, todo, [{index, result} | done], Call.queue(call))

      # The deadline is that of the whole call.
      {_index, {:error, %Error{reason: :timeout} = error}, in_flight} ->
        fail(in_flight, error, nil)

      {index, {:error, error}, in_flight} ->
        fail(in_flight, error, index)
    end
  end

  defp fail(%via{} = in_flight, error, index) do
    via.cancel(in_flight, if(index, do: Connection.aborted(), else: error))
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
