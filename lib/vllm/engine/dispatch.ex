defmodule VLLM.Engine.Dispatch do
  @moduledoc false
  # Sends one request from the calling process to one of an engine's workers. No
  # process stands in between.

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Engine.{Balancer, Call, Control, Table}
  alias VLLM.{Error, Telemetry}

  @typedoc "What requests of one call have in common: an engine, where the answers come to, a method."
  @type target :: %{
          :table => Table.t(),
          :inbox => Inbox.t(),
          :method => String.t(),
          optional(atom()) => term()
        }

  @doc """
  Runs a request again that was `lost`, once another worker is there, or the same
  one again. What counted for the first run counts for this one.
  """
  @spec again(target(), map(), Call.t(), Connection.request(), Connection.answers()) ::
          {:ok, Connection.request()} | {:error, Error.t()}
  def again(target, params, call, lost, answers) do
    case submit(target, params, Call.queue(call), answers: answers, lost: lost) do
      :none_ready ->
        with :ok <- Connection.await_end(lost, call.deadline),
             :ok <- Control.await(target.table, :any, call.deadline),
             do: again(target, params, call, lost, answers)

      result ->
        result
    end
  end

  @doc """
  One request to one worker; `:none_ready` where there is none.

  Options: `own`, how many requests the caller has under way (with as many as the
  workers compute at once the answer is `:window`); `answers` (see
  `Connection.request/7`); `lost`, the request that is run again, which was let
  in once.
  """
  @spec submit(target(), map(), Call.t(), keyword()) ::
          {:ok, Connection.request()} | :none_ready | :window | {:error, Error.t()}
  def submit(target, params, call, opts) do
    own = Keyword.get(opts, :own, 0)

    case workers(target.table) do
      :stopped ->
        {:error, Connection.stopped()}

      workers ->
        if own > 0 and own >= workers |> Enum.map(& &1.window) |> Enum.sum() and workers != [],
          do: :window,
          else: workers |> without(opts[:lost]) |> send_to_one(target, params, call, opts)
    end
  end

  # The run that lost the request may still be listed for a moment.
  defp without(workers, nil), do: workers
  defp without(workers, %{conn: lost}), do: Enum.reject(workers, &(&1.conn.routes == lost.routes))

  defp send_to_one([], _target, _params, _call, _opts), do: :none_ready

  defp send_to_one(workers, target, params, call, opts) do
    %{table: table, inbox: inbox, method: method} = target
    loads = for worker <- workers, do: {Connection.in_flight(worker.conn), worker}
    worker = Balancer.choose(loads, params, call)
    lost = opts[:lost]
    limit = if lost, do: :infinity, else: worker.limit
    answers = Keyword.get(opts, :answers, :once)
    started_at = System.monotonic_time()
    params_in_time = timed(params, call)

    case Connection.request(worker.conn, inbox, method, params_in_time, limit, answers, :counted) do
      {:ok, request} when lost == nil ->
        {:ok, %{request | span: Telemetry.request_start(table, method, params, started_at)}}

      {:ok, request} ->
        {:ok, %{request | span: lost.span}}

      # This worker has just died and took nothing; try another.
      {:error, %Error{reason: :engine_dead}} ->
        workers |> List.delete(worker) |> send_to_one(target, params, call, opts)

      # A caller with others under way waits for one of them to end; the rest are told.
      {:error, %Error{reason: :overloaded}} = refused ->
        if Keyword.get(opts, :own, 0) == 0, do: Table.count(table, :refused, {worker.index})
        refused

      error ->
        error
    end
  end

  defp timed(params, %Call{queue_deadline: :infinity}), do: params

  defp timed(params, call) do
    Map.put(params, "queue_timeout", Deadline.remaining(call.queue_deadline) / 1000)
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

  @doc "The workers that take requests; `:stopped` where the engine has ended."
  @spec workers(Table.t()) :: [Table.worker()] | :stopped
  def workers(table) do
    Table.workers(table)
  rescue
    # The table goes with its engine.
    ArgumentError -> :stopped
  end
end
