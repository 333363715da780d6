defmodule VLLM.Engine.Flights do
  @moduledoc false
  # The requests that one process has under way at once, each under a key of its
  # choice, until each has ended: with its answer, with an error, or at its
  # deadline. One whose worker dies is run once more if its call allows it.
  #
  # Deadlines must come in the order in which requests are submitted, as those
  # of one call, or of calls of one timeout, do.

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Call, Router, Suspects, Table}
  alias VLLM.{Error, Telemetry}

  @enforce_keys [:table, :method]
  defstruct [
    :table,
    :method,
    # Of each key: its params, its call, its request, and the error that its
    # first run was lost with.
    flights: %{},
    # The keys of requests, by their refs.
    keys: %{},
    # Deadlines and their keys, the earliest first; also of flights that ended.
    deadlines: :queue.new(),
    # Lost flights that are to run again, and the turn for that.
    suspects: :queue.new(),
    turn: nil,
    # The one that runs again.
    running: nil
  ]

  @type t :: %__MODULE__{}
  @type key :: term()

  @spec new(Table.t(), String.t()) :: t()
  def new(table, method), do: %__MODULE__{table: table, method: method}

  @doc "How many have not ended."
  @spec count(t()) :: non_neg_integer()
  def count(%{flights: flights}), do: map_size(flights)

  @doc "Sends a request; see `Router.submit/5` for what stands in its way."
  @spec submit(t(), key(), map(), Call.t()) ::
          {:ok, t()} | :none_ready | :window | {:error, Error.t()}
  def submit(flights, key, params, call) do
    own = map_size(flights.flights)

    with {:ok, request} <- Router.submit(flights.table, flights.method, params, call, own: own) do
      flight = %{params: params, call: call, request: request, lost: nil}
      flights = put(flights, key, flight)

      if call.deadline == :infinity,
        do: {:ok, flights},
        else: {:ok, update_in(flights.deadlines, &:queue.in({call.deadline, key}, &1))}
    end
  end

  @doc "Waits for the end of one of them, of which there must be one."
  @spec next(t()) :: {key(), {:ok, term()} | {:error, Error.t()}, t()}
  def next(%{keys: keys, turn: turn} = flights) do
    turn_ref = turn && turn.ref
    {deadline, first, flights} = earliest(flights)

    receive do
      {ref, _answer} = last when is_map_key(keys, ref) ->
        landed(flights, keys[ref], last)

      {:DOWN, ref, :process, _pid, _reason} = last when is_map_key(keys, ref) ->
        landed(flights, keys[ref], last)

      {^turn_ref, :granted} when turn_ref != nil ->
        run_again(flights)

      {:DOWN, ^turn_ref, :process, _pid, _reason} when turn_ref != nil ->
        engine_ended(flights)
    after
      Connection.remaining(deadline) ->
        Connection.cancel(flights.flights[first].request)
        ended(flights, first, {:error, Connection.timeout()})
    end
  end

  @doc "Cancels all of them; they end with `error`."
  @spec cancel(t(), Error.t()) :: :ok
  def cancel(flights, error \\ Connection.aborted()) do
    for {_key, %{request: request}} <- flights.flights do
      Connection.cancel(request)
      Telemetry.request_end(request.span, {:error, error})
    end

    Suspects.give_back(flights.table, flights.turn)
  end

  @doc "The error of a request that was there when a worker died, twice."
  @spec poison(Error.t(), Error.t()) :: Error.t()
  def poison(first, second) do
    Error.new(
      :poison,
      "The worker died with the request in flight, and died again when it was run once more. It " <>
        "is not tried a third time: unless something else ended the workers (see the log in " <>
        "`details`), this prompt with these parameters is what vLLM dies of. #{second.message}",
      Map.merge(second.details, %{
        "reason" => Atom.to_string(second.reason),
        "first" => first.message
      })
    )
  end

  defp put(flights, key, %{request: request} = flight) do
    %{
      flights
      | flights: Map.put(flights.flights, key, flight),
        keys: Map.put(flights.keys, request.ref, key)
    }
  end

  defp earliest(%{deadlines: deadlines} = flights) do
    case :queue.peek(deadlines) do
      :empty ->
        {:infinity, nil, flights}

      {:value, {deadline, key}} when is_map_key(flights.flights, key) ->
        {deadline, key, flights}

      {:value, _ended} ->
        earliest(%{flights | deadlines: :queue.drop(deadlines)})
    end
  end

  defp landed(flights, key, last) do
    %{request: request, call: call} = flight = flights.flights[key]
    flights = %{flights | keys: Map.delete(flights.keys, request.ref)}

    case Connection.result(request, last) do
      {:lost, error} when not call.retry ->
        ended(flights, key, {:error, error})

      {:lost, error} when flight.lost == nil ->
        flights = put_in(flights.flights[key], %{flight | lost: error})
        next(ask(%{flights | suspects: :queue.in(key, flights.suspects)}))

      {:lost, error} ->
        ended(flights, key, {:error, poison(flight.lost, error)})

      result ->
        ended(flights, key, result)
    end
  end

  defp ended(flights, key, result) do
    {%{request: request}, rest} = Map.pop!(flights.flights, key)
    Telemetry.request_end(request.span, result)
    flights = %{flights | flights: rest, keys: Map.delete(flights.keys, request.ref)}
    {key, result, if(flights.running == key, do: ask(done(flights)), else: flights)}
  end

  defp done(flights) do
    Suspects.give_back(flights.table, flights.turn)
    %{flights | turn: nil, running: nil}
  end

  # A turn for the suspect that is next; those whose deadline has passed are gone.
  defp ask(%{turn: nil} = flights) do
    case waiting(flights) do
      {:ok, key, flights} ->
        %{flights | turn: Suspects.ask(flights.table, flights.flights[key].call.deadline)}

      :none ->
        flights
    end
  end

  defp ask(flights), do: flights

  defp waiting(%{suspects: suspects} = flights) do
    case :queue.peek(suspects) do
      {:value, key} when is_map_key(flights.flights, key) -> {:ok, key, flights}
      {:value, _ended} -> waiting(%{flights | suspects: :queue.drop(suspects)})
      :empty -> :none
    end
  end

  defp run_again(flights) do
    case waiting(flights) do
      {:ok, key, flights} ->
        flight = flights.flights[key]
        flights = %{flights | suspects: :queue.drop(flights.suspects), running: key}

        case Router.again(
               flights.table,
               flights.method,
               flight.params,
               flight.call,
               flight.request,
               :once
             ) do
          {:ok, request} -> next(put(flights, key, %{flight | request: request}))
          {:error, error} -> ended(flights, key, {:error, error})
        end

      :none ->
        next(done(%{flights | suspects: :queue.new()}))
    end
  end

  # The process that gives turns is there as long as the engine.
  defp engine_ended(flights) do
    case waiting(%{flights | turn: nil}) do
      {:ok, key, flights} -> ended(ask(flights), key, {:error, Connection.stopped()})
      :none -> next(%{flights | turn: nil})
    end
  end
end
