defmodule VLLM.Engine.InFlight do
  @moduledoc false
  # The requests that one process has under way at once, each under a key of its
  # choice, until each has ended: with its answer, with an error, or at its
  # deadline. One whose worker dies is run once more if its call allows it.
  #
  # All that may come for them comes to one inbox, and `handle/2` has a clause
  # for each: answers, deltas, the end of a worker, and turns (see
  # VLLM.Engine.Turns). `next/2` waits for it; a process that gets its messages
  # otherwise calls `handle/2` itself.
  #
  # VLLM.Cluster.InFlight has the same functions, for the engines of a cluster.

  alias VLLM.Bridge.{Connection, Deadline, Inbox, Shape}
  alias VLLM.Engine.{Call, Deadlines, Dispatch, Table, Turns}
  alias VLLM.{Error, Telemetry}

  @enforce_keys [:table, :method, :inbox]
  defstruct [
    :table,
    :method,
    :inbox,
    # Of each key: its params, its call, its request, how many answers it has,
    # whether the first of many has come, and the error that its first run was
    # lost with.
    requests: %{},
    # The keys of requests, by the references of their addresses.
    keys: %{},
    deadlines: Deadlines.new(),
    # The keys of lost requests that are to run again, and the turn for that.
    lost: :queue.new(),
    turn: nil,
    # The key of the one that runs again.
    running: nil
  ]

  @type t :: %__MODULE__{}
  @type key :: term()

  @typedoc "What has become of a request: a delta, or its end."
  @type event :: Connection.delta() | {:ok, term()} | {:error, Error.t()}

  @spec new(Table.t(), String.t(), Inbox.t()) :: t()
  def new(table, method, inbox), do: %__MODULE__{table: table, method: method, inbox: inbox}

  @doc "How many have not ended."
  @spec count(t()) :: non_neg_integer()
  def count(%{requests: requests}), do: map_size(requests)

  @doc """
  Sends a request; see `Dispatch.submit/4` for what stands in its way. A stream is one with `:many`
  answers, or with a relay: what that hands on comes here.
  """
  @spec submit(t(), key(), map(), Call.t(), Connection.answers()) ::
          {:ok, t()} | :none_ready | :window | {:error, Error.t()}
  def submit(in_flight, key, params, call, answers \\ :once) do
    opts = [own: count(in_flight), answers: answers]

    with {:ok, request} <- Dispatch.submit(in_flight, params, call, opts) do
      one = %{params: params, call: call, request: request, answers: answers}
      in_flight = put(in_flight, key, Map.merge(one, %{begun?: false, lost: nil}))
      %{deadlines: deadlines, requests: requests} = in_flight
      {:ok, %{in_flight | deadlines: Deadlines.add(deadlines, call.deadline, key, requests)}}
    end
  end

  @doc "Waits for a worker; see `Dispatch.await_ready/2`."
  @spec await_ready(t(), Call.t()) :: :ok | {:error, Error.t()}
  def await_ready(in_flight, call), do: Dispatch.await_ready(in_flight.table, call)

  @doc """
  Waits for the next event of one of them, of which there must be one; `:stalled` after `patience`
  milliseconds in which nothing came.
  """
  @spec next(t(), timeout()) :: {key(), event(), t()} | :stalled
  def next(in_flight, patience \\ :infinity) do
    {deadline, first, deadlines} = Deadlines.earliest(in_flight.deadlines, in_flight.requests)
    in_flight = %{in_flight | deadlines: deadlines}

    case Inbox.next(in_flight.inbox, min(Deadline.remaining(deadline), patience)) do
      :timeout ->
        if Deadline.passed?(deadline), do: expire(in_flight, first), else: :stalled

      message ->
        with {:none, in_flight} <- handle(in_flight, message), do: next(in_flight, patience)
    end
  end

  @doc "Ends one whose deadline has passed."
  @spec expire(t(), key()) :: {key(), event(), t()}
  def expire(in_flight, key) do
    Connection.cancel(fetch!(in_flight, key))
    ended(in_flight, key, {:error, Connection.timeout()})
  end

  @doc "Takes in what has come to the inbox."
  @spec handle(t(), Inbox.message()) :: {key(), event(), t()} | {:none, t()}
  def handle(%{keys: keys} = in_flight, {ref, delta})
      when is_map_key(keys, ref) and elem(delta, 0) == :delta do
    %{^ref => key} = keys

    if delta?(in_flight.method, delta) do
      delta(in_flight, key, delta)
    else
      request = fetch!(in_flight, key)
      Connection.cancel(request)
      ended(in_flight, key, {:error, Connection.malformed(request, "a delta that is none")})
    end
  end

  def handle(%{keys: keys} = in_flight, {ref, last}) when is_map_key(keys, ref) do
    key = keys[ref]
    %{request: request, call: call} = one = in_flight.requests[key]
    Connection.finish(request)

    case Connection.result(request, last) do
      # What the reader of a stream has seen already would come twice.
      {:lost, error} when not call.retry or one.begun? ->
        ended(in_flight, key, {:error, error})

      {:lost, error} when one.lost == nil ->
        in_flight = put_in(in_flight.requests[key], %{one | lost: error})
        in_flight = %{in_flight | keys: Map.delete(keys, ref)}
        {:none, ask_for_turn(update_in(in_flight.lost, &:queue.in(key, &1)))}

      {:lost, error} ->
        ended(in_flight, key, {:error, poison(one.lost, error)})

      result ->
        ended(in_flight, key, result)
    end
  end

  def handle(%{turn: {_, ref}} = in_flight, {ref, :granted}) do
    case next_lost(in_flight) do
      {:ok, key, in_flight} -> run_again(in_flight, key)
      :none -> {:none, give_turn_back(in_flight)}
    end
  end

  # The process that gives turns is there as long as the engine.
  def handle(%{turn: {_, ref}} = in_flight, {ref, {:down, _reason}}) do
    case next_lost(%{in_flight | turn: nil}) do
      {:ok, key, in_flight} ->
        ended(ask_for_turn(in_flight), key, {:error, Connection.stopped()})

      :none ->
        {:none, %{in_flight | turn: nil}}
    end
  end

  # Of a request that has ended meanwhile, or a turn that was given back.
  def handle(in_flight, _message), do: {:none, in_flight}

  @doc "Whether something that came for a stream of `method` can be a delta of it."
  @spec delta?(String.t(), Connection.delta()) :: boolean()
  def delta?("http_request", {:delta, row}), do: Shape.http_delta?(row)
  def delta?("http_request", _columns), do: false
  # Of columns the owner of the port has seen the shape.
  def delta?(_method, {:delta, _text, _token_ids}), do: true
  def delta?(_method, {:delta, row}), do: Shape.delta?(row)

  defp delta(in_flight, key, delta) do
    case in_flight.requests do
      %{^key => %{begun?: true}} ->
        {key, delta, in_flight}

      %{^key => one} ->
        Telemetry.first_token(one.request.span)
        {key, delta, put_in(in_flight.requests[key], %{one | begun?: true})}
    end
  end

  @doc "Allows the worker so many more deltas of a stream."
  @spec grant(t(), key(), pos_integer()) :: :ok
  def grant(in_flight, key, count) do
    %{conn: conn, id: id} = fetch!(in_flight, key)
    Connection.notify(conn, "credit", %{"id" => id, "count" => count})
  end

  defp fetch!(in_flight, key), do: Map.fetch!(in_flight.requests, key).request

  @doc "Whether nothing can come but the turn of a lost request."
  @spec waits_for_turn?(t()) :: boolean()
  def waits_for_turn?(%{keys: keys, turn: turn}), do: keys == %{} and turn != nil

  @doc "Cancels all of them; they end with `error`."
  @spec cancel(t(), Error.t()) :: :ok
  def cancel(in_flight, error \\ Connection.aborted()) do
    for {_key, %{request: request}} <- in_flight.requests do
      Connection.cancel(request)
      count_end(in_flight, {:error, error})
      Telemetry.request_end(request.span, {:error, error})
    end

    Turns.give_back(in_flight.table, in_flight.turn)
    Inbox.flush(in_flight.inbox)
  end

  # The error of a request that was there when a worker died, twice.
  defp poison(first, second) do
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

  defp put(in_flight, key, %{request: %{address: {_inbox, ref}}} = one) do
    %{
      in_flight
      | requests: Map.put(in_flight.requests, key, one),
        keys: Map.put(in_flight.keys, ref, key)
    }
  end

  defp ended(in_flight, key, result) do
    {%{request: request}, rest} = Map.pop!(in_flight.requests, key)
    %{address: {_inbox, ref}} = request
    count_end(in_flight, result)
    Telemetry.request_end(request.span, result)
    in_flight = %{in_flight | requests: rest, keys: Map.delete(in_flight.keys, ref)}

    if in_flight.running == key,
      do: {key, result, ask_for_turn(give_turn_back(in_flight))},
      else: {key, result, in_flight}
  end

  defp count_end(%{table: table, method: method}, result) do
    outcome =
      case result do
        {:ok, _result} -> :ok
        {:error, error} -> error.reason
      end

    Table.count(table, :requests, {method, outcome})
  end

  ## Running lost requests again, one at a time

  defp ask_for_turn(%{turn: nil} = in_flight) do
    case next_lost(in_flight) do
      {:ok, key, in_flight} ->
        deadline = in_flight.requests[key].call.deadline
        %{in_flight | turn: Turns.ask(in_flight.table, in_flight.inbox, deadline)}

      :none ->
        in_flight
    end
  end

  defp ask_for_turn(in_flight), do: in_flight

  defp give_turn_back(in_flight) do
    Turns.give_back(in_flight.table, in_flight.turn)
    %{in_flight | turn: nil, running: nil}
  end

  # The first lost request; those whose deadline has passed are gone.
  defp next_lost(%{lost: lost} = in_flight) do
    case :queue.peek(lost) do
      {:value, key} when is_map_key(in_flight.requests, key) -> {:ok, key, in_flight}
      {:value, _ended} -> next_lost(%{in_flight | lost: :queue.drop(lost)})
      :empty -> :none
    end
  end

  defp run_again(in_flight, key) do
    %{params: params, call: call, request: request, answers: answers} =
      one = in_flight.requests[key]

    in_flight = %{in_flight | lost: :queue.drop(in_flight.lost), running: key}

    case Dispatch.again(in_flight, params, call, request, answers) do
      {:ok, request} -> {:none, put(in_flight, key, %{one | request: request})}
      {:error, error} -> ended(in_flight, key, {:error, error})
    end
  end
end
