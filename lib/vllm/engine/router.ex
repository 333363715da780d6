defmodule VLLM.Engine.Router do
  @moduledoc false
  # Sends requests from the calling process to an engine's workers, the least
  # busy one first, and collects the answers. No process stands in between.

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Control, Table}
  alias VLLM.{Error, Telemetry}

  @doc """
  One request to the least busy worker. Waits for a starting engine.
  """
  @spec call(Table.t(), String.t(), map(), Connection.deadline()) ::
          {:ok, term()} | {:error, Error.t()}
  def call(table, method, params, deadline) do
    with {:ok, [result]} <- map(table, method, [params], deadline), do: {:ok, result}
  end

  @doc """
  A request for each of `params`; the results in their order, or the first
  error, upon which the others are cancelled.

  As many are under way at once as the workers compute together, so that a long
  list leaves the queue to other callers.
  """
  @spec map(Table.t(), String.t(), [map()], Connection.deadline()) ::
          {:ok, [term()]} | {:error, Error.t()}
  def map(table, method, params, deadline) do
    todo = Enum.with_index(params)

    with {:ok, done} <- run(table, method, todo, %{}, [], deadline) do
      {:ok, done |> Enum.sort_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1))}
    end
  end

  @doc """
  The same request to every ready worker; their results, or the first error.
  Waits for a starting engine.
  """
  @spec each(Table.t(), String.t(), map(), Connection.deadline()) ::
          {:ok, [term()]} | {:error, Error.t()}
  def each(table, method, params, deadline) do
    case workers(table) do
      :stopped ->
        {:error, Connection.stopped()}

      [] ->
        with :ok <- Control.await(table, :any, deadline),
             do: each(table, method, params, deadline)

      workers ->
        Enum.reduce_while(workers, {:ok, []}, fn worker, {:ok, results} ->
          case Connection.call(worker.conn, method, params, deadline) do
            {:ok, result} -> {:cont, {:ok, [result | results]}}
            {:error, error} -> {:halt, {:error, error}}
          end
        end)
    end
  end

  @doc """
  Opens a stream at the least busy worker. Waits for a starting engine.
  """
  @spec open(Table.t(), String.t(), map(), Connection.deadline()) ::
          {:ok, Connection.request()} | {:error, Error.t()}
  def open(table, method, params, deadline) do
    case submit(table, method, params, 0, :many) do
      :none_ready ->
        with :ok <- Control.await(table, :any, deadline),
             do: open(table, method, params, deadline)

      result ->
        result
    end
  end

  defp run(_table, _method, [], under_way, done, _deadline) when under_way == %{}, do: {:ok, done}

  defp run(table, method, [{params, index} | rest] = todo, under_way, done, deadline) do
    case submit(table, method, params, map_size(under_way)) do
      {:ok, request} ->
        under_way = Map.put(under_way, request.ref, {request, index})
        run(table, method, rest, under_way, done, deadline)

      :none_ready when under_way == %{} ->
        with :ok <- Control.await(table, :any, deadline) do
          run(table, method, todo, under_way, done, deadline)
        end

      # The window is full, or the queue: one's own answers make room.
      full when full in [:none_ready, :window] ->
        collect(table, method, todo, under_way, done, deadline)

      {:error, %Error{reason: :overloaded}} when under_way != %{} ->
        collect(table, method, todo, under_way, done, deadline)

      {:error, error} ->
        fail(under_way, error, index)
    end
  end

  defp run(table, method, [], under_way, done, deadline) do
    collect(table, method, [], under_way, done, deadline)
  end

  @doc """
  One request to the least busy worker; `:window` where `own` requests of the
  caller fill what the workers compute at once, `:none_ready` where no worker is.
  """
  @spec submit(Table.t(), String.t(), map(), non_neg_integer(), :once | :many) ::
          {:ok, Connection.request()} | :none_ready | :window | {:error, Error.t()}
  def submit(table, method, params, own, answers \\ :once) do
    case workers(table) do
      :stopped ->
        {:error, Connection.stopped()}

      [] ->
        :none_ready

      workers ->
        if own > 0 and own >= workers |> Enum.map(& &1.window) |> Enum.sum() do
          :window
        else
          worker = Enum.min_by(workers, &Connection.in_flight(&1.conn))
          started_at = System.monotonic_time()

          # A worker that died just now has taken nothing; another may.
          case Connection.request(worker.conn, method, params, worker.limit, answers) do
            {:ok, request} ->
              {:ok, %{request | span: Telemetry.request_start(table, method, params, started_at)}}

            {:error, %Error{reason: :engine_dead}} ->
              :none_ready

            error ->
              error
          end
        end
    end
  end

  # The table goes with its engine.
  defp workers(table) do
    Table.workers(table)
  rescue
    ArgumentError -> :stopped
  end

  defp collect(table, method, todo, under_way, done, deadline) do
    receive do
      {ref, answer} when is_map_key(under_way, ref) ->
        {{request, index}, under_way} = Map.pop!(under_way, ref)

        case Connection.answer(request, answer) do
          {:ok, result} -> run(table, method, todo, under_way, [{index, result} | done], deadline)
          {:error, error} -> fail(under_way, error, index)
        end

      {:DOWN, ref, :process, _pid, reason} when is_map_key(under_way, ref) ->
        {{request, index}, under_way} = Map.pop!(under_way, ref)
        fail(under_way, Connection.down(request, reason), index)
    after
      Connection.remaining(deadline) ->
        error = Connection.timeout()
        for {_ref, {request, _}} <- under_way, do: Connection.cancel(request, error)
        fail(%{}, error, nil)
    end
  end

  defp fail(under_way, error, index) do
    for {_ref, {request, _}} <- under_way, do: Connection.cancel(request)
    details = if index, do: Map.put_new(error.details, "prompt_index", index), else: error.details
    {:error, %{error | details: details}}
  end
end
