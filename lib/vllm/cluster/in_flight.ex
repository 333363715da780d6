defmodule VLLM.Cluster.InFlight do
  @moduledoc false
  # What VLLM.Engine.InFlight is for the requests that one process has under way at an engine, for
  # those at the engines of a cluster, with the same functions. Each request goes to an engine of its
  # own: on this node by a VLLM.Engine.InFlight, on another one by a VLLM.Remote.Call.
  #
  # A request is given to another engine where one has not begun with it (it is full, drains, was
  # stopped, cannot be reached), and, where its call allows it, also where its node was lost with it.
  # An engine's dead workers are the engine's own affair.

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Cluster.Members
  alias VLLM.{Engine, Error, Remote}
  alias VLLM.Engine.{Balancer, Call, Deadlines}

  @enforce_keys [:members, :method, :inbox]
  defstruct [
    :members,
    :method,
    :inbox,
    # Those on this node, and the engine's table that they are of.
    here: nil,
    table: nil,
    # Of each key: its params, its call, how many answers it has, where it is (`:here`, a remote call, or
    # nil while it is held back) and which member that is; which nodes have refused it and why; whether
    # the first of many answers has come, and how often it was lost.
    requests: %{},
    # The keys of those on other nodes, by the references of their addresses.
    keys: %{},
    deadlines: Deadlines.new(),
    # Those that all members have refused, until another one of ours has ended.
    held: :queue.new()
  ]

  @type t :: %__MODULE__{}

  # What is said of a request that was not begun with.
  @not_begun [:overloaded, :not_running, :failed, :node_incompatible]

  # What is said of one that was lost with its engine.
  @lost [:node_down, :shutdown]

  # How often one is run again. At a cut link Erlang's `:global` cuts others, too, one after another.
  @runs_again 3

  @spec new(Members.t(), String.t(), Inbox.t()) :: t()
  def new(members, method, inbox),
    do: %__MODULE__{members: members, method: method, inbox: inbox}

  @doc "How many have not ended."
  @spec count(t()) :: non_neg_integer()
  def count(%{requests: requests}), do: map_size(requests)

  @doc "See `Engine.InFlight.submit/5`."
  @spec submit(t(), Engine.InFlight.key(), map(), Call.t(), :once | :many) ::
          {:ok, t()} | :none_ready | :window | {:error, Error.t()}
  def submit(in_flight, key, params, call, answers) do
    one = %{params: params, call: call, answers: answers, at: nil, member: nil}
    one = Map.merge(one, %{refused: %{}, begun?: false, lost: 0})

    with {:ok, %{deadlines: deadlines, requests: requests} = in_flight} <-
           give(in_flight, key, one) do
      {:ok, %{in_flight | deadlines: Deadlines.add(deadlines, call.deadline, key, requests)}}
    end
  end

  @doc "Waits for a member; see `Members.await/2`."
  @spec await_ready(t(), Call.t()) :: :ok | {:error, Error.t()}
  def await_ready(in_flight, call), do: Members.await(in_flight.members, call)

  # To the member that is to have it, of those that have not refused it.
  defp give(in_flight, key, one) do
    serving = Members.serving(in_flight.members)
    left = Enum.reject(serving, fn {_load, member} -> is_map_key(one.refused, member.index) end)

    case {left, Enum.filter(left, fn {load, member} -> load < member.limit end)} do
      {[], _none} ->
        nowhere(one.refused)

      # They may have room by now; if not, each says when it will.
      {all, []} ->
        if others?(in_flight, key), do: :window, else: give(in_flight, key, one, all)

      {_all, free} ->
        if others?(in_flight, key) and under_way(in_flight) >= window(serving),
          do: :window,
          else: give(in_flight, key, one, free)
    end
  end

  defp give(in_flight, key, one, candidates) do
    member = Balancer.choose_reported(candidates, one.params, one.call, node())

    case begin(in_flight, key, one, member) do
      {:ok, at, in_flight} -> {:ok, put(in_flight, key, %{one | at: at, member: member})}
      {:refused, why} -> give(in_flight, key, refuse(in_flight, one, member, why))
      {:error, error} -> {:error, error}
    end
  end

  defp nowhere(refused) do
    reasons = Map.values(refused)
    overloaded = Enum.find(reasons, &match?(%Error{reason: :overloaded}, &1))

    cond do
      :window in reasons -> :window
      overloaded -> {:error, overloaded}
      true -> :none_ready
    end
  end

  defp window(serving), do: Enum.sum(for {_load, member} <- serving, do: member.window)

  defp under_way(%{requests: requests, held: held}), do: map_size(requests) - :queue.len(held)

  defp others?(%{requests: requests}, key),
    do: Enum.any?(requests, fn {other, one} -> other != key and one.at != nil end)

  defp begin(in_flight, key, one, %{table: table}) do
    here = here(in_flight, table)

    case here && Engine.InFlight.submit(here, key, one.params, one.call, one.answers) do
      {:ok, here} -> {:ok, :here, %{in_flight | here: here, table: table}}
      {:error, %Error{reason: :overloaded} = error} -> {:refused, error}
      # It was stopped.
      {:error, %Error{reason: :shutdown} = error} -> {:refused, error}
      {:error, error} -> {:error, error}
      :window -> {:refused, :window}
      _none_ready -> {:refused, :not_ready}
    end
  end

  defp begin(in_flight, _key, one, member) do
    %{members: members, method: method, inbox: inbox} = in_flight
    request = {:try, method, one.params, one.answers}
    remote = Remote.Call.open(member.index, members.name, request, one.call, inbox)
    Members.give(members, member, remote.courier, again?(one))
    {:ok, remote, in_flight}
  end

  # An engine that was started anew has another table: what is under way in the old one ends first.
  defp here(%{table: table, here: here}, table), do: here

  defp here(%{here: here} = in_flight, table) do
    if here == nil or Engine.InFlight.count(here) == 0,
      do: Engine.InFlight.new(table, in_flight.method, in_flight.inbox)
  end

  defp put(in_flight, key, one) do
    requests = Map.put(in_flight.requests, key, one)
    %{in_flight | requests: requests, keys: note(in_flight.keys, one.at, key)}
  end

  defp note(keys, %Remote.Call{address: {_inbox, ref}}, key), do: Map.put(keys, ref, key)
  defp note(keys, :here, _key), do: keys

  defp forget(keys, %Remote.Call{address: {_inbox, ref}}), do: Map.delete(keys, ref)
  defp forget(keys, _here_or_held), do: keys

  @doc "See `Engine.InFlight.next/2`."
  @spec next(t(), timeout()) ::
          {Engine.InFlight.key(), Engine.InFlight.event(), t()} | :stalled
  def next(in_flight, patience) do
    {deadline, first, deadlines} = Deadlines.earliest(in_flight.deadlines, in_flight.requests)
    in_flight = %{in_flight | deadlines: deadlines}

    case Inbox.next(in_flight.inbox, min(patience(in_flight.requests[first], deadline), patience)) do
      :timeout ->
        if Deadline.passed?(deadline), do: expire(in_flight, first), else: :stalled

      message ->
        with {:none, in_flight} <- handle(in_flight, message), do: next(in_flight, patience)
    end
  end

  defp patience(%{at: %Remote.Call{}}, deadline), do: Remote.Call.patience(deadline)
  defp patience(_here, deadline), do: Deadline.remaining(deadline)

  defp expire(in_flight, key) do
    error = Connection.timeout()

    case in_flight.requests[key].at do
      nil ->
        ended(in_flight, key, {:error, error})

      :here ->
        {key, event, here} = Engine.InFlight.expire(in_flight.here, key)
        ended(%{in_flight | here: here}, key, event)

      remote ->
        Remote.Call.leave(remote, error)
        ended(in_flight, key, {:error, error})
    end
  end

  @doc "See `Engine.InFlight.handle/2`."
  @spec handle(t(), Inbox.message() | {:held, :try}) ::
          {Engine.InFlight.key(), Engine.InFlight.event(), t()} | {:none, t()}
  def handle(%{keys: keys} = in_flight, {ref, delta})
      when is_map_key(keys, ref) and elem(delta, 0) == :delta,
      do: delta(in_flight, keys[ref], delta)

  def handle(%{keys: keys} = in_flight, {ref, _last} = message) when is_map_key(keys, ref) do
    {key, keys} = Map.pop!(keys, ref)
    in_flight = %{in_flight | keys: keys}
    %{at: remote} = in_flight.requests[key]
    last = Remote.Call.last(remote, message)
    Remote.Call.close(remote)

    case last do
      :none_ready -> move(in_flight, key, :not_ready)
      {:error, error} -> failed(in_flight, key, error, Remote.Call.unsent?(message))
      result -> ended(in_flight, key, result)
    end
  end

  # One of ours has ended, and there may be room for another.
  def handle(in_flight, {:held, :try}) do
    case :queue.out(in_flight.held) do
      {{:value, key}, held} when is_map_key(in_flight.requests, key) ->
        give_again(%{in_flight | held: held}, key, %{in_flight.requests[key] | refused: %{}})

      {{:value, _ended}, held} ->
        handle(%{in_flight | held: held}, {:held, :try})

      {:empty, _held} ->
        {:none, in_flight}
    end
  end

  def handle(%{here: here} = in_flight, message) when here != nil do
    case Engine.InFlight.handle(here, message) do
      {:none, here} ->
        {:none, %{in_flight | here: here}}

      {key, event, here} ->
        in_flight = %{in_flight | here: here}

        case event do
          {:error, error} -> failed(in_flight, key, error, false)
          {:ok, _result} -> ended(in_flight, key, event)
          delta -> delta(in_flight, key, delta)
        end
    end
  end

  # Of a request that has ended, or was given to another one.
  def handle(in_flight, _message), do: {:none, in_flight}

  defp delta(in_flight, key, delta) do
    case in_flight.requests[key] do
      %{begun?: true} ->
        {key, delta, in_flight}

      one ->
        with %Remote.Call{courier: courier} <- one.at, do: Members.keep(one.member, courier)
        {key, delta, put_in(in_flight.requests[key], %{one | begun?: true})}
    end
  end

  defp failed(in_flight, key, error, unsent?) do
    one = in_flight.requests[key]

    cond do
      one.begun? ->
        ended(in_flight, key, {:error, error})

      unsent? or error.reason in @not_begun ->
        move(in_flight, key, error)

      error.reason in @lost and again?(one) ->
        move(put_in(in_flight.requests[key].lost, one.lost + 1), key, error)

      true ->
        ended(in_flight, key, {:error, error})
    end
  end

  defp again?(one), do: one.call.retry and one.lost < @runs_again

  defp move(in_flight, key, why) do
    %{member: member} = one = in_flight.requests[key]
    give_again(in_flight, key, refuse(in_flight, one, member, why))
  end

  defp refuse(in_flight, one, member, why) do
    case why do
      :window -> :ok
      %Error{reason: :overloaded} -> Members.refused(in_flight.members, member, :full)
      _other -> Members.refused(in_flight.members, member, :not_ready)
    end

    put_in(one.refused[member.index], why)
  end

  defp give_again(in_flight, key, one) do
    in_flight = put_in(in_flight.requests[key], %{one | at: nil, member: nil})

    case give(in_flight, key, one) do
      {:ok, in_flight} ->
        {:none, in_flight}

      :none_ready ->
        case Members.await(in_flight.members, one.call) do
          :ok -> give_again(in_flight, key, %{one | refused: %{}})
          {:error, error} -> ended(in_flight, key, {:error, error})
        end

      :window ->
        {:none, hold(in_flight, key)}

      {:error, %Error{reason: :overloaded} = error} ->
        if others?(in_flight, key),
          do: {:none, hold(in_flight, key)},
          else: ended(in_flight, key, {:error, error})

      {:error, error} ->
        ended(in_flight, key, {:error, error})
    end
  end

  defp hold(in_flight, key), do: update_in(in_flight.held, &:queue.in(key, &1))

  defp ended(in_flight, key, result) do
    {one, requests} = Map.pop!(in_flight.requests, key)
    unless :queue.is_empty(in_flight.held), do: send(self(), {in_flight.inbox, :held, :try})

    {key, result, %{in_flight | requests: requests, keys: forget(in_flight.keys, one.at)}}
  end

  @doc "See `Engine.InFlight.grant/3`."
  @spec grant(t(), Engine.InFlight.key(), pos_integer()) :: :ok
  def grant(in_flight, key, count) do
    case in_flight.requests[key].at do
      :here -> Engine.InFlight.grant(in_flight.here, key, count)
      remote -> Remote.Call.tell(remote, {:grant, count})
    end
  end

  @doc "See `Engine.InFlight.waits_for_turn?/1`."
  @spec waits_for_turn?(t()) :: boolean()
  def waits_for_turn?(%{here: here, keys: keys}),
    do: keys == %{} and here != nil and Engine.InFlight.waits_for_turn?(here)

  @doc "See `Engine.InFlight.cancel/2`."
  @spec cancel(t(), Error.t()) :: :ok
  def cancel(in_flight, error \\ Connection.aborted()) do
    for {_key, %{at: %Remote.Call{} = remote}} <- in_flight.requests,
        do: Remote.Call.leave(remote, error)

    if in_flight.here, do: Engine.InFlight.cancel(in_flight.here, error)
    Inbox.flush(in_flight.inbox)
  end
end
