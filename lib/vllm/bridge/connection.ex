defmodule VLLM.Bridge.Connection do
  @moduledoc false
  # One run of a worker program, as its callers see it: where to write requests
  # and how their answers find the way back. A new run gets a new connection, so
  # that nothing of a dead run (an id, a counter, a late answer) can reach a
  # request of the next.
  #
  # A caller encodes its request, notes itself in `routes` and writes to the
  # port itself; no process stands in between. The owner (VLLM.Engine.Worker)
  # receives the answers, finds the caller in `routes` and hands on the bytes,
  # which the caller decodes. Answers go to a process alias that ends with the
  # call: a late one is dropped by the VM.

  alias VLLM.Bridge.{MessagePack, Writer}
  alias VLLM.{Error, Telemetry}

  @enforce_keys [:owner, :port, :writer, :routes, :counters, :max_frame]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          owner: pid(),
          port: port() | pid(),
          writer: Writer.t(),
          routes: :ets.table(),
          counters: :atomics.atomics_ref(),
          max_frame: pos_integer()
        }

  @typedoc """
  A request under way: its id on the wire, the alias that its answer comes to,
  and what events about it need (nil for none).
  """
  @type request :: %{
          id: non_neg_integer(),
          ref: reference(),
          conn: t(),
          span: Telemetry.span() | nil
        }

  @typedoc "Absolute, in milliseconds of `:erlang.monotonic_time/1`."
  @type deadline :: integer() | :infinity

  # Slots of `counters`.
  @last_id 1
  @in_flight 2

  # What in_flight is from when the connection was sealed: more than there can be.
  @sealed 0x1000_0000_0000

  @doc "The connection to `port`, which the calling process owns."
  @spec new(port() | pid(), pos_integer()) :: t()
  def new(port, max_frame) do
    %__MODULE__{
      owner: self(),
      port: port,
      writer: Writer.start_link(port),
      routes: :ets.new(:routes, [:public, write_concurrency: true]),
      counters: :atomics.new(2, signed: true),
      max_frame: max_frame
    }
  end

  ## The caller's side

  @doc "How many requests are under way."
  @spec in_flight(t()) :: non_neg_integer()
  def in_flight(%__MODULE__{counters: counters}) do
    case :atomics.get(counters, @in_flight) do
      sealed when sealed >= div(@sealed, 2) -> 0
      count -> count
    end
  end

  @doc """
  Lets no request in any more, if none is under way; says whether that is so. Whoever comes later
  is told that this run is over, and has sent nothing.
  """
  @spec seal(t()) :: boolean()
  def seal(%__MODULE__{counters: counters}) do
    case :atomics.compare_exchange(counters, @in_flight, 0, @sealed) do
      :ok -> true
      count -> count >= div(@sealed, 2)
    end
  end

  @doc """
  Sends a request from the calling process, unless `limit` are under way.

  The answer comes as `{ref, answer}`, to be read with `answer/2`; should the
  owner end first, `{:DOWN, ref, :process, _, reason}` comes instead (see
  `down/2`). Whoever stops waiting calls `cancel/2`. With an error nothing was
  sent.

  A stream is a request with `:many` answers: before the last come deltas, as
  `{ref, {:delta, row}}`. After the last one, or the owner's end, its reader
  calls `finish/1`.
  """
  @spec request(t(), String.t(), map(), pos_integer() | :infinity, :once | :many) ::
          {:ok, request()} | {:error, Error.t()}
  def request(%__MODULE__{} = conn, method, params, limit \\ :infinity, answers \\ :once) do
    id = :atomics.add_get(conn.counters, @last_id, 1)

    with :ok <- admit(conn, limit),
         {:ok, frame} <- encode(conn, [0, id, method, params]),
         {:ok, ref} <- note(conn, id, answers),
         :ok <- write(conn, frame, id, ref) do
      {:ok, %{id: id, ref: ref, conn: conn, span: nil}}
    else
      {:error, error} ->
        :atomics.sub(conn.counters, @in_flight, 1)
        {:error, error}
    end
  end

  # The owner gives the place back when the request has ended.
  defp admit(conn, limit) do
    case :atomics.add_get(conn.counters, @in_flight, 1) do
      sealed when sealed >= div(@sealed, 2) ->
        {:error, dead()}

      count when count <= limit ->
        :ok

      _too_many ->
        {:error,
         Error.new(
           :overloaded,
           "#{limit} requests are in flight or waiting already. Try again later, or start the " <>
             "engine with more `max_queue:` or `replicas:`.",
           %{"limit" => limit}
         )}
    end
  end

  # The note comes before the bytes: an answer, however fast, finds it. The
  # owner's watch over this process may come after the answer; it looks whether
  # the note is still there. A run that ended meanwhile has no table any more,
  # or another port than the one that the watch names.
  defp note(conn, id, answers) do
    ref = alias_for(conn.owner, answers)

    try do
      :ets.insert(conn.routes, {id, ref, nil})
      send(conn.owner, {:watch, conn.port, id, ref, self()})
      {:ok, ref}
    rescue
      ArgumentError ->
        Process.demonitor(ref, [:flush])
        {:error, dead()}
    end
  end

  # The owner, too, makes requests; nobody can monitor himself.
  defp alias_for(owner, :once) when owner == self(), do: :erlang.alias([:reply])
  defp alias_for(owner, :once), do: :erlang.monitor(:process, owner, alias: :reply_demonitor)
  defp alias_for(owner, :many), do: :erlang.monitor(:process, owner, alias: :demonitor)

  @doc "Waits for the answer to `request` until the deadline; then the request is cancelled."
  @spec await(request(), deadline()) :: {:ok, term()} | {:error, Error.t()}
  def await(%{ref: ref} = request, deadline) do
    receive do
      {^ref, answer} -> answer(request, answer)
      {:DOWN, ^ref, :process, _pid, reason} -> {:error, down(request, reason)}
    after
      remaining(deadline) ->
        error = timeout()
        cancel(request, error)
        {:error, error}
    end
  end

  @doc "Sends a request and waits for its answer."
  @spec call(t(), String.t(), map(), deadline()) :: {:ok, term()} | {:error, Error.t()}
  def call(conn, method, params, deadline) do
    with {:ok, request} <- request(conn, method, params) do
      await(request, deadline)
    end
  end

  @doc "What the answer to `request` says."
  @spec answer(request(), {:response, binary()} | {:error, Error.t()}) ::
          {:ok, term()} | {:error, Error.t()}
  def answer(request, answer) do
    result = result(request.conn, answer)
    Telemetry.request_end(request.span, result)
    result
  end

  defp result(_conn, {:error, %Error{}} = error), do: error

  defp result(conn, {:response, body}) do
    with {:error, {:malformed, reason}} <- decode_response(body) do
      # Only here is it seen that the bytes make no sense; that run must end.
      send(conn.owner, {:malformed, conn.port, reason})
      {:error, Error.new(:protocol, "The worker's answer is malformed (#{reason}).")}
    end
  end

  @doc "The error of a request whose connection's owner ended with `reason`."
  @spec down(request(), term()) :: Error.t()
  def down(request, reason) do
    error =
      case reason do
        :normal -> stopped()
        :shutdown -> stopped()
        {:shutdown, _} -> stopped()
        _ -> dead()
      end

    Telemetry.request_end(request.span, {:error, error})
    error
  end

  @doc "The error of a request that was under way when its engine was stopped."
  @spec stopped() :: Error.t()
  def stopped, do: Error.new(:shutdown, "The engine was stopped while the request was in flight.")

  @doc "The error of a call whose deadline passed."
  @spec timeout() :: Error.t()
  def timeout do
    Error.new(
      :timeout,
      "The deadline passed before the answer came. Give the call more time with `timeout:` " <>
        "(milliseconds), or ask for less (`max_tokens:`)."
    )
  end

  defp aborted, do: Error.new(:aborted, "The caller stopped waiting for the request.")
  defp dead, do: Error.new(:engine_dead, "The worker ended while the request was in flight.")

  @doc """
  Stops waiting for `request`, which ends with `error` to its caller, and has it
  aborted. A late answer is dropped.
  """
  @spec cancel(request(), Error.t()) :: :ok
  def cancel(%{id: id, conn: conn} = request, error \\ aborted()) do
    finish(request)
    Telemetry.request_end(request.span, {:error, error})
    notify(conn, "cancel", %{"id" => id})
  end

  @doc "Closes the way by which answers to `request` come, and drops those that are here."
  @spec finish(request()) :: :ok
  def finish(%{ref: ref}) do
    Process.demonitor(ref, [:flush])
    flush(ref)
  end

  defp flush(ref) do
    receive do
      {^ref, _} -> flush(ref)
    after
      0 -> :ok
    end
  end

  @doc "Sends a notification. Whether it arrives is not known."
  @spec notify(t(), String.t(), map()) :: :ok
  def notify(conn, method, params) do
    {:ok, frame} = encode(conn, [2, method, params])
    _ = Writer.write(conn.writer, frame)
    :ok
  end

  defp encode(conn, message) do
    with {:ok, frame} <- MessagePack.encode(message) do
      case IO.iodata_length(frame) do
        size when size <= conn.max_frame ->
          {:ok, frame}

        size ->
          {:error,
           Error.new(
             :invalid_option,
             "The request has #{size} bytes, and a frame may have #{conn.max_frame}. Send less " <>
               "at once, or start the engine with a larger `max_frame:`.",
             %{"bytes" => size, "max_frame" => conn.max_frame}
           )}
      end
    else
      {:error, reason} ->
        {:error,
         Error.new(
           :invalid_option,
           "The request holds what cannot be sent: #{MessagePack.format_error(reason)}."
         )}
    end
  end

  defp write(conn, frame, id, ref) do
    with :full <- Writer.write(conn.writer, frame) do
      :ets.delete(conn.routes, id)
      Process.demonitor(ref, [:flush])

      {:error,
       Error.new(:overloaded, "The worker does not read and too much waits for it already.")}
    end
  end

  @doc "Milliseconds until the deadline, for a receive."
  @spec remaining(deadline()) :: timeout()
  def remaining(:infinity), do: :infinity
  def remaining(deadline), do: max(deadline - :erlang.monotonic_time(:millisecond), 0)

  @doc "The deadline that is `timeout` milliseconds away."
  @spec deadline(timeout()) :: deadline()
  def deadline(:infinity), do: :infinity
  def deadline(timeout), do: :erlang.monotonic_time(:millisecond) + timeout

  ## The owner's side

  @doc """
  Reads the head of a frame from the worker. A response keeps its body as it
  came: its caller decodes it.
  """
  @spec parse(binary()) ::
          {:response, non_neg_integer(), binary()}
          | {:notification, String.t(), map()}
          | {:malformed, String.t()}
  def parse(<<0x94, 0x01, rest::binary>>) do
    case MessagePack.decode_prefix(rest) do
      {:ok, id, body} when is_integer(id) and id >= 0 -> {:response, id, body}
      _ -> {:malformed, "a response without an id"}
    end
  end

  def parse(frame) do
    case MessagePack.decode(frame) do
      {:ok, [2, method, params]} when is_binary(method) and is_map(params) ->
        {:notification, method, params}

      {:ok, _} ->
        {:malformed, "neither a response nor a notification"}

      {:error, reason} ->
        {:malformed, MessagePack.format_error(reason)}
    end
  end

  @doc "Splits the body of a response into its result or its error."
  @spec decode_response(binary()) ::
          {:ok, term()} | {:error, Error.t() | {:malformed, String.t()}}
  def decode_response(body) do
    with {:ok, error, rest} <- MessagePack.decode_prefix(body),
         {:ok, result} <- MessagePack.decode(rest) do
      if is_nil(error), do: {:ok, result}, else: {:error, Error.from_wire(error)}
    else
      {:error, reason} -> {:error, {:malformed, MessagePack.format_error(reason)}}
    end
  end

  @doc "Has the owner hear of the death of `pid`, as `{{:caller_down, id}, …}`, while `id` is unanswered."
  @spec watch(t(), non_neg_integer(), pid()) :: :ok
  def watch(conn, id, pid) do
    monitor = :erlang.monitor(:process, pid, tag: {:caller_down, id})

    if :ets.update_element(conn.routes, id, {3, monitor}) do
      :ok
    else
      Process.demonitor(monitor, [:flush])
      :ok
    end
  end

  @doc "Hands an answer to the caller of `id`; false where nobody waits for one of that id."
  @spec deliver(t(), non_neg_integer(), {:response, binary()} | {:error, Error.t()}) :: boolean()
  def deliver(conn, id, answer) do
    case :ets.take(conn.routes, id) do
      [{^id, ref, monitor}] ->
        if monitor, do: Process.demonitor(monitor, [:flush])
        :atomics.sub(conn.counters, @in_flight, 1)
        send(ref, {ref, answer})
        true

      [] ->
        false
    end
  end

  @doc "Hands a delta to the reader of the stream `id`, if there still is one."
  @spec deliver_delta(t(), non_neg_integer(), list()) :: :ok
  def deliver_delta(conn, id, row) do
    with [{^id, ref, _monitor}] <- :ets.lookup(conn.routes, id),
         do: send(ref, {ref, {:delta, row}})

    :ok
  end

  @doc "Ends the connection: everyone who waits gets `error`."
  @spec close(t(), Error.t()) :: :ok
  def close(conn, error) do
    for {id, _ref, _monitor} <- :ets.tab2list(conn.routes), do: deliver(conn, id, {:error, error})
    :ets.delete(conn.routes)
    Process.unlink(conn.writer.pid)
    Process.exit(conn.writer.pid, :kill)
    :ok
  end
end
