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

  alias VLLM.Bridge.{MessagePack, Shape, Writer}
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
          method: String.t(),
          span: Telemetry.span() | nil
        }

  @typedoc "Absolute, in milliseconds of `:erlang.monotonic_time/1`."
  @type deadline :: integer() | :infinity

  # Slots of `counters`.
  @last_id 1
  # 1 in a connection that lets no request in any more.
  @sealed 2
  # How many requests have ended, when the last one did, and how many had, and
  # when, at two marks: the rate at which they end is measured from the older
  # one. Times are moved on by those in which there was nothing to do.
  @ended 3
  @last_end 4
  @older_count 5
  @older_time 6
  @newer_count 7
  @newer_time 8
  # How many were refused since the newer mark.
  @refused 9

  # A mark is set after so many ends.
  @mark_every 16

  # What is advised while nothing has ended yet, and at most; in ms.
  @unknown_wait 1000
  @longest_wait 60_000

  # Bytes that may wait for a worker that does not read.
  @max_unsent 256 * 1024 * 1024

  @doc """
  The connection to `port`, which the calling process owns. Frames have
  `max_frame` bytes at most, and `max_unsent` bytes may wait to be written.
  """
  @spec new(port() | pid(), pos_integer(), pos_integer()) :: t()
  def new(port, max_frame, max_unsent \\ @max_unsent) do
    %__MODULE__{
      owner: self(),
      port: port,
      writer: Writer.start_link(port, max_unsent),
      routes: :ets.new(:routes, [:public, write_concurrency: true]),
      counters: :atomics.new(9, signed: true),
      max_frame: max_frame
    }
  end

  ## The caller's side

  @doc "How many requests are under way; none in a run that is over."
  @spec in_flight(t()) :: non_neg_integer()
  def in_flight(%__MODULE__{routes: routes}) do
    case :ets.info(routes, :size) do
      :undefined -> 0
      size -> size
    end
  end

  @doc """
  Lets no request in any more, if none is under way; says whether that is so.
  Whoever comes later is told that this run is over, and has sent nothing.
  """
  @spec seal(t()) :: boolean()
  def seal(%__MODULE__{counters: counters} = conn) do
    # First the seal and then the look; those who come make their note first and
    # then look for the seal.
    :atomics.put(counters, @sealed, 1)

    if in_flight(conn) == 0 do
      true
    else
      :atomics.put(counters, @sealed, 0)
      false
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

    with {:ok, ref} <- note(conn, id, answers) do
      request = %{id: id, ref: ref, conn: conn, method: method, span: nil}

      with :ok <- admit(conn, limit),
           {:ok, frame} <- encode(conn, [0, id, method, params]),
           :ok <- ask_to_watch(request),
           :ok <- write(conn, frame) do
        {:ok, request}
      else
        {:error, error} ->
          forget(request)
          {:error, error}
      end
    end
  end

  # The note is the place that a request takes, and there is nothing else to
  # give back: however a caller ends, one who looks through the notes sees it.
  defp admit(conn, limit) do
    sealed = :atomics.get(conn.counters, @sealed) == 1

    case in_flight(conn) do
      _any when sealed ->
        {:error, dead()}

      1 ->
        skip_idle_time(conn)

      in_flight when in_flight <= limit ->
        :ok

      _more ->
        {:error,
         overloaded(
           conn,
           "#{limit} requests are in flight or waiting already. Try again later, or start the " <>
             "engine with more `max_queue:` or `replicas:`.",
           %{"limit" => limit}
         )}
    end
  end

  defp skip_idle_time(%{counters: counters}) do
    now = System.monotonic_time()

    if :atomics.get(counters, @ended) == 0 do
      :atomics.put(counters, @older_time, now)
      :atomics.put(counters, @newer_time, now)
    else
      idle = max(now - :atomics.get(counters, @last_end), 0)
      :atomics.add(counters, @older_time, idle)
      :atomics.add(counters, @newer_time, idle)
    end
  end

  defp overloaded(conn, message, details \\ %{}) do
    Error.new(:overloaded, message, Map.put(details, "retry_after_ms", retry_after(conn)))
  end

  # In how many ms there is a place for the caller, if requests go on to end as
  # they lately did and those who were refused before come again first.
  defp retry_after(%{counters: counters}) do
    refused = :atomics.add_get(counters, @refused, 1)
    ended = :atomics.get(counters, @ended) - :atomics.get(counters, @older_count)

    if ended > 0 do
      since = System.monotonic_time() - :atomics.get(counters, @older_time)
      milliseconds = System.convert_time_unit(since * refused, :native, :millisecond)
      milliseconds |> div(ended) |> max(1) |> min(@longest_wait)
    else
      @unknown_wait
    end
  end

  # The note comes before the bytes: an answer, however fast, finds it. A run
  # that has ended has no table any more.
  defp note(conn, id, answers) do
    ref = alias_for(conn.owner, answers)

    try do
      :ets.insert(conn.routes, {id, ref, self(), nil, answers})
      {:ok, ref}
    rescue
      ArgumentError ->
        Process.demonitor(ref, [:flush])
        {:error, dead()}
    end
  end

  # The owner's watch over this process may come after the answer; it looks
  # whether the note is still there. A run that ended after the note was made has
  # another port than the one that the watch names.
  defp ask_to_watch(%{id: id, ref: ref, conn: conn}) do
    send(conn.owner, {:watch, conn.port, id, ref, self()})
    :ok
  end

  # The owner, too, makes requests; nobody can monitor himself.
  defp alias_for(owner, :once) when owner == self(), do: :erlang.alias([:reply])
  defp alias_for(owner, :once), do: :erlang.monitor(:process, owner, alias: :reply_demonitor)
  defp alias_for(owner, :many), do: :erlang.monitor(:process, owner, alias: :demonitor)

  @doc "Waits for the answer to `request` until the deadline; then the request is cancelled."
  @spec await(request(), deadline()) :: {:ok, term()} | {:error, Error.t()}
  def await(%{ref: ref} = request, deadline) do
    receive do
      {^ref, _answer} = last -> answer(request, last)
      {:DOWN, ^ref, :process, _pid, _reason} = last -> answer(request, last)
    after
      remaining(deadline) ->
        cancel(request)
        {:error, timeout()}
    end
  end

  @doc "Sends a request and waits for its answer."
  @spec call(t(), String.t(), map(), deadline()) :: {:ok, term()} | {:error, Error.t()}
  def call(conn, method, params, deadline) do
    with {:ok, request} <- request(conn, method, params) do
      await(request, deadline)
    end
  end

  @typedoc "What comes to a caller at the end of a request; see `request/5`."
  @type last ::
          {reference(), {:response, binary()} | {:error, Error.t()}}
          | {:DOWN, reference(), :process, pid(), term()}

  @doc """
  What the last message of `request` says. It is `:lost` when its worker died
  with it, so that another run may give it what this one did not.
  """
  @spec result(request(), last()) :: {:ok, term()} | {:error, Error.t()} | {:lost, Error.t()}
  def result(_request, {:DOWN, _ref, :process, _pid, reason}) do
    if stop?(reason), do: {:error, stopped()}, else: {:lost, dead()}
  end

  # The owner has no other errors than the reason why the run ended.
  def result(_request, {_ref, {:error, %Error{reason: :shutdown} = error}}), do: {:error, error}
  def result(_request, {_ref, {:error, %Error{} = error}}), do: {:lost, error}

  def result(%{method: method} = request, {_ref, {:response, body}}) do
    case decode_response(body) do
      {:error, {:malformed, reason}} ->
        {:error, malformed(request, reason)}

      # The worker says so before it ends.
      {:error, %Error{reason: :engine_dead} = error} ->
        {:lost, error}

      {:ok, result} ->
        if Shape.answer?(method, result),
          do: {:ok, result},
          else: {:error, malformed(request, "no answer to `#{method}`")}

      {:error, error} ->
        {:error, error}
    end
  end

  @doc """
  Has the run ended whose worker sent `request` something that makes no sense,
  which only its reader sees; the error that the request ends with.
  """
  @spec malformed(request(), String.t()) :: Error.t()
  def malformed(%{conn: conn}, reason) do
    send(conn.owner, {:malformed, conn.port, reason})
    Error.new(:protocol, "The worker's answer is malformed (#{reason}).")
  end

  defp stop?(:normal), do: true
  defp stop?(:shutdown), do: true
  defp stop?({:shutdown, _}), do: true
  defp stop?(_reason), do: false

  @doc "What the last message of `request` says to whoever does not run it again."
  @spec answer(request(), last()) :: {:ok, term()} | {:error, Error.t()}
  def answer(request, last) do
    with {:lost, error} <- result(request, last), do: {:error, error}
  end

  @doc "Waits until the run is over that `request` was lost with."
  @spec await_end(request(), deadline()) :: :ok | {:error, Error.t()}
  def await_end(%{conn: conn} = lost, deadline) do
    id = :atomics.add_get(conn.counters, @last_id, 1)

    # What waits in `routes` is told of the end, sent or not.
    with {:ok, ref} <- note(conn, id, :once) do
      request = %{lost | id: id, ref: ref, span: nil}
      :ok = ask_to_watch(request)

      receive do
        {^ref, _} -> :ok
        {:DOWN, ^ref, :process, _pid, _reason} -> :ok
      after
        remaining(deadline) ->
          forget(request)
          {:error, timeout()}
      end
    else
      {:error, _dead} -> :ok
    end
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
        "(milliseconds), or ask for less (`max_tokens:`).",
      %{"option" => "timeout"}
    )
  end

  @doc "The error of a request that its caller left."
  @spec aborted() :: Error.t()
  def aborted, do: Error.new(:aborted, "The caller stopped waiting for the request.")

  defp dead, do: Error.new(:engine_dead, "The worker ended while the request was in flight.")

  @doc "Stops waiting for `request` and has it aborted. A late answer is dropped."
  @spec cancel(request()) :: :ok
  def cancel(%{id: id, conn: conn} = request) do
    finish(request)
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

  @doc """
  Sends a notification, however much waits to be sent already: requests in
  flight have few of them. Whether it arrives is not known.
  """
  @spec notify(t(), String.t(), map()) :: :ok
  def notify(conn, method, params) do
    {:ok, frame} = encode(conn, [2, method, params])
    Writer.push(conn.writer, frame)
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

  defp write(conn, frame) do
    with :full <- Writer.write(conn.writer, frame) do
      {:error,
       overloaded(
         conn,
         "The worker does not read and too much waits for it already (`max_unsent:`)."
       )}
    end
  end

  # Takes back what `note/3` did, of a request that was not sent.
  defp forget(%{id: id, conn: conn} = request) do
    case take(conn, id) do
      [{^id, _ref, _pid, monitor, _answers}] when monitor != nil ->
        send(conn.owner, {:unwatch, monitor})

      # A watch that has not begun finds no note, and does not begin.
      _ ->
        :ok
    end

    finish(request)
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
      # A timestamp and an extension are maps, too.
      {:ok, [2, method, params]}
      when is_binary(method) and is_map(params) and not is_struct(params) ->
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

    if :ets.update_element(conn.routes, id, {4, monitor}) do
      :ok
    else
      Process.demonitor(monitor, [:flush])
      :ok
    end
  end

  @doc "Has the request `id` aborted, whose caller is dead; it is under way no more."
  @spec caller_down(t(), non_neg_integer()) :: :ok
  def caller_down(conn, id) do
    # Whether the caller still came to send it is not known: there may never be
    # an answer.
    with [_note] <- release(conn, id), do: notify(conn, "cancel", %{"id" => id})
    :ok
  end

  @doc """
  Finds those who died right after they had noted themselves, before they could
  ask to be watched. To be called now and then.
  """
  @spec sweep(t()) :: :ok
  def sweep(conn) do
    unwatched = :ets.match(conn.routes, {:"$1", :_, :"$2", nil, :_})
    for [id, pid] <- unwatched, not Process.alive?(pid), do: caller_down(conn, id)

    :ok
  end

  @doc "Hands an answer to the caller of `id`; false where nobody waits for one of that id."
  @spec deliver(t(), non_neg_integer(), {:response, binary()} | {:error, Error.t()}) :: boolean()
  def deliver(conn, id, answer) do
    case release(conn, id) do
      [{^id, ref, pid, _monitor, _answers}] ->
        count_end(conn, pid)
        send(ref, {ref, answer})
        true

      [] ->
        false
    end
  end

  # The note is gone, and the watch with it.
  defp release(conn, id) do
    with [{^id, _ref, _pid, monitor, _answers}] = taken <- take(conn, id) do
      if monitor, do: unwatch(monitor)
      taken
    end
  end

  # A run that is over has no notes.
  defp take(conn, id) do
    :ets.take(conn.routes, id)
  rescue
    ArgumentError -> []
  end

  @doc "Ends a watch over a caller."
  @spec unwatch(reference()) :: :ok
  def unwatch(monitor) do
    Process.demonitor(monitor, [:flush])
    :ok
  end

  # The owner's own requests are none of the engine's work.
  defp count_end(%{owner: owner}, owner), do: :ok

  defp count_end(%{counters: counters}, _caller) do
    now = System.monotonic_time()
    :atomics.put(counters, @last_end, now)
    ended = :atomics.add_get(counters, @ended, 1)

    if rem(ended, @mark_every) == 0 do
      :atomics.put(counters, @older_count, :atomics.get(counters, @newer_count))
      :atomics.put(counters, @older_time, :atomics.get(counters, @newer_time))
      :atomics.put(counters, @newer_count, ended)
      :atomics.put(counters, @newer_time, now)
      :atomics.put(counters, @refused, 0)
    end
  end

  @doc "Hands deltas to the readers of their streams, where there still are any."
  @spec deliver_deltas(t(), [term()]) :: :ok | {:malformed, String.t()}
  def deliver_deltas(_conn, []), do: :ok

  def deliver_deltas(conn, [[id | [index, text, token_ids, logprobs, _, _ | _] = row] | rows])
      when is_integer(index) and is_binary(text) and rem(byte_size(token_ids), 4) == 0 and
             (is_map(logprobs) or logprobs == nil) do
    case :ets.lookup(conn.routes, id) do
      [{^id, ref, _pid, _monitor, :many}] ->
        send(ref, {ref, {:delta, row}})
        deliver_deltas(conn, rows)

      [] ->
        deliver_deltas(conn, rows)

      # It would be taken for the answer.
      [_once] ->
        {:malformed, "a delta of a request that is no stream"}
    end
  end

  def deliver_deltas(_conn, _rows), do: {:malformed, "a delta of another shape"}

  @doc "Ends the connection: everyone who waits gets `error`."
  @spec close(t(), Error.t()) :: :ok
  def close(conn, error) do
    for {id, _, _, _, _} <- :ets.tab2list(conn.routes), do: deliver(conn, id, {:error, error})
    :ets.delete(conn.routes)
    Process.unlink(conn.writer.pid)
    Process.exit(conn.writer.pid, :kill)
    :ok
  end
end
