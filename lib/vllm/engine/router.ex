defmodule VLLM.Engine.Router do
  @moduledoc false
  # Sends requests from the calling process to an engine's workers and collects
  # the answers. No process stands in between.

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Affinity, Call, Control, Flights, Table}
  alias VLLM.{Error, Telemetry}

  @doc """
  One request to one worker. Waits for a starting engine.
  """
  @spec call(Table.t(), String.t(), map(), Call.t()) :: {:ok, term()} | {:error, Error.t()}
  def call(table, method, params, call) do
    with {:ok, [result]} <- map(table, method, [params], call), do: {:ok, result}
  end

  @doc """
  A request for each of `params`; the results in their order, or the first
  error, upon which the others are cancelled.

  As many are under way at once as the workers compute together, so that a long
  list leaves the queue to other callers.
  """
  @spec map(Table.t(), String.t(), [map()], Call.t()) :: {:ok, [term()]} | {:error, Error.t()}
  def map(table, method, params, call) do
    todo = Enum.with_index(params)

    with {:ok, done} <- run(Flights.new(table, method), todo, [], call) do
      {:ok, done |> Enum.sort_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1))}
    end
  end

  defp run(flights, [], done, call) do
    if Flights.count(flights) == 0, do: {:ok, done}, else: collect(flights, [], done, call)
  end

  defp run(flights, [{params, index} | rest] = todo, done, call) do
    none? = Flights.count(flights) == 0

    case Flights.submit(flights, index, params, call) do
      {:ok, flights} ->
        run(flights, rest, done, call)

      :none_ready when none? ->
        case await_ready(flights.table, call) do
          :ok -> run(flights, todo, done, call)
          {:error, error} -> fail(flights, error, nil)
        end

      # The window is full, or the queue: one's own answers make room.
      full when full in [:none_ready, :window] ->
        collect(flights, todo, done, call)

      {:error, %Error{reason: :overloaded}} when not none? ->
        collect(flights, todo, done, call)

      {:error, error} ->
        fail(flights, error, index)
    end
  end

  defp collect(flights, todo, done, call) do
    case Flights.next(flights) do
      {index, {:ok, result}, flights} ->
        run(flights, todo, [{index, result} | done], Call.queue(call))

      # The time is up for all of them.
      {_index, {:error, %Error{reason: :timeout} = error}, flights} ->
        fail(flights, error, nil)

      {index, {:error, error}, flights} ->
        fail(flights, error, index)
    end
  end

  defp fail(flights, error, index) do
    Flights.cancel(flights, if(index, do: Connection.aborted(), else: error))
    details = if index, do: Map.put_new(error.details, "prompt_index", index), else: error.details
    {:error, %{error | details: details}}
  end

  @doc """
  The same request to every ready worker; their results, or the first error.
  Waits for a starting engine.
  """
  @spec each(Table.t(), String.t(), map(), Call.t()) :: {:ok, [term()]} | {:error, Error.t()}
  def each(table, method, params, call) do
    case workers(table) do
      :stopped ->
        {:error, Connection.stopped()}

      [] ->
        with :ok <- await_ready(table, call), do: each(table, method, params, call)

      workers ->
        Enum.reduce_while(workers, {:ok, []}, fn worker, {:ok, results} ->
          case Connection.call(worker.conn, method, params, call.deadline) do
            {:ok, result} -> {:cont, {:ok, [result | results]}}
            {:error, error} -> {:halt, {:error, error}}
          end
        end)
    end
  end

  @doc "Opens a stream at a worker. Waits for a starting engine."
  @spec open(Table.t(), String.t(), map(), Call.t()) ::
          {:ok, Connection.request()} | {:error, Error.t()}
  def open(table, method, params, call) do
    case submit(table, method, params, call, answers: :many) do
      :none_ready ->
        with :ok <- await_ready(table, call), do: open(table, method, params, call)

      result ->
        result
    end
  end

  @doc """
  Runs a request again that was `lost`, once another worker is there, or the same
  one again. What counted for the first run counts for this one.
  """
  @spec again(Table.t(), String.t(), map(), Call.t(), Connection.request(), :once | :many) ::
          {:ok, Connection.request()} | {:error, Error.t()}
  def again(table, method, params, call, lost, answers) do
    case submit(table, method, params, Call.queue(call), answers: answers, lost: lost) do
      :none_ready ->
        with :ok <- Connection.await_end(lost, call.deadline),
             :ok <- Control.await(table, :any, call.deadline),
             do: again(table, method, params, call, lost, answers)

      result ->
        result
    end
  end

  @doc """
  One request to one worker; `:none_ready` where there is none.

  Options: `own`, how many requests the caller has under way (with as many as the
  workers compute at once the answer is `:window`); `answers` (see
  `Connection.request/5`); `lost`, the request that is run again, which was let
  in once.
  """
  @spec submit(Table.t(), String.t(), map(), Call.t(), keyword()) ::
          {:ok, Connection.request()} | :none_ready | :window | {:error, Error.t()}
  def submit(table, method, params, call, opts) do
    own = Keyword.get(opts, :own, 0)

    case workers(table) do
      :stopped ->
        {:error, Connection.stopped()}

      workers ->
        if own > 0 and own >= workers |> Enum.map(& &1.window) |> Enum.sum() and workers != [],
          do: :window,
          else: workers |> without(opts[:lost]) |> send_to_one(table, method, params, call, opts)
    end
  end

  # The run that a request was lost with may not know of its end yet.
  defp without(workers, nil), do: workers
  defp without(workers, %{conn: lost}), do: Enum.reject(workers, &(&1.conn.routes == lost.routes))

  defp send_to_one([], _table, _method, _params, _call, _opts), do: :none_ready

  defp send_to_one(workers, table, method, params, call, opts) do
    worker = Affinity.choose(workers, params, call)
    lost = opts[:lost]
    limit = if lost, do: :infinity, else: worker.limit
    answers = Keyword.get(opts, :answers, :once)
    started_at = System.monotonic_time()

    case Connection.request(worker.conn, method, timed(params, call), limit, answers) do
      {:ok, request} when lost == nil ->
        {:ok, %{request | span: Telemetry.request_start(table, method, params, started_at)}}

      {:ok, request} ->
        {:ok, %{request | span: lost.span}}

      # A worker that died just now has taken nothing; another may.
      {:error, %Error{reason: :engine_dead}} ->
        workers
        |> List.delete(worker)
        |> send_to_one(table, method, params, call, opts)

      error ->
        error
    end
  end

  defp timed(params, %Call{queue_deadline: :infinity}), do: params

  defp timed(params, call) do
    Map.put(params, "queue_timeout", Connection.remaining(call.queue_deadline) / 1000)
  end

  @doc "Waits for a worker, for as long as the call may wait to be scheduled."
  @spec await_ready(Table.t(), Call.t()) :: :ok | {:error, Error.t()}
  def await_ready(table, %Call{queue_deadline: queue, deadline: deadline} = call) do
    # An atom is more than any number.
    with {:error, %Error{reason: :timeout}} when queue < deadline <-
           Control.await(table, :any, min(queue, deadline)) do
      {:error, Call.queue_timeout(call)}
    end
  end

  # The table goes with its engine.
  defp workers(table) do
    Table.workers(table)
  rescue
    ArgumentError -> :stopped
  end
end
