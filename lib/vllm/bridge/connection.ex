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
  # call (see VLLM.Bridge.Inbox): a late one is dropped by the VM.

  alias VLLM.Bridge.{Admission, Deadline, Inbox, MessagePack, Shape, Writer}
  alias VLLM.{Error, Telemetry}

  @enforce_keys [:owner, :port, :writer, :routes, :last_id, :admission, :max_frame]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          owner: pid(),
          port: port() | pid(),
          writer: Writer.t(),
          routes: :ets.table(),
          last_id: :atomics.atomics_ref(),
          admission: Admission.t(),
          max_frame: pos_integer()
        }

  @typedoc """
  A request under way: its id on the wire, the address that its answer comes to, and what events
  about it need (nil for none).
  """
  @type request :: %{
          id: non_neg_integer(),
          address: Inbox.address(),
          conn: t(),
          method: String.t(),
          span: Telemetry.span() | nil
        }

  @typedoc """
  Who gets in the place of a request's caller what the owner has for it, and hands it on: a process,
  and the number that it gave to the request. It hears of the request in `{:relay, number, address,
  owner, method}`, before anything comes for it: of deltas (see VLLM.Bridge.Deltas) and at last
  `{:last, number, last}`. That the owner ends it has to see by itself.
  """
  @type relay :: {:relay, pid(), non_neg_integer()}

  @typedoc "How many messages come for a request, and to whom."
  @type answers :: :once | :many | relay()

  # Of guides/protocol.md. It goes up with whatever the other side must understand.
  @protocol 2

  @typedoc "What a stream tells before its last message: a row without its id, or what came in columns."
  @type delta :: {:delta, list()} | {:delta, String.t(), [non_neg_integer()] | binary()}

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
      last_id: :atomics.new(1, signed: false),
      admission: Admission.new(),
      max_frame: max_frame
    }
  end

  ## The caller's side

  @doc "The params of `hello`, by which the two sides find out that they understand each other."
  @spec hello(pos_integer()) :: map()
  def hello(max_frame), do: %{"protocol" => @protocol, "max_frame" => max_frame}

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
  def seal(%__MODULE__{admission: admission} = conn) do
    # Seal first, then count. Callers do it the other way round: they note
    # themselves first, then check for the seal. So one of the two sees the other.
    Admission.seal(admission)
    idle? = in_flight(conn) == 0
    unless idle?, do: Admission.unseal(admission)
    idle?
  end

  @doc """
  Sends a request from the calling process, unless `limit` are under way.

  The answer comes to `inbox`; see `result/2`. Whoever stops waiting calls
  `cancel/1`. With an error nothing was sent.

  A stream is a request with `:many` answers: before the last come deltas, as
  `{:delta, row}` or `{:delta, text, token_ids}`. After the last one its reader calls `finish/1`.
  Of one with a relay everything comes to that.

  One that is `:counted` is counted by its caller, whatever its end; if he dies, `caller_down/2` gives its method.
  """
  @spec request(
          t(),
          Inbox.t(),
          String.t(),
          map(),
          pos_integer() | :infinity,
          answers(),
          :counted | :uncounted
        ) :: {:ok, request()} | {:error, Error.t()}
  def request(
        %__MODULE__{} = conn,
        inbox,
        method,
        params,
        limit \\ :infinity,
        answers \\ :once,
        counted \\ :uncounted
      ) do
    id = next_id(conn)
    counts_as = if counted == :counted, do: method

    with {:ok, address} <- note(conn, id, inbox, answers, counts_as),
         :ok <- introduce(answers, address, conn, method) do
      request = %{id: id, address: address, conn: conn, method: method, span: nil}

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

  defp next_id(conn), do: :atomics.add_get(conn.last_id, 1, 1)

  # The entry in `routes` is what counts as a request in flight, so there is no
  # counter to give back: however a caller ends, its entry is found (see sweep/1).
  defp admit(conn, limit) do
    with :sealed <- Admission.admit(conn.admission, in_flight(conn), limit), do: {:error, dead()}
  end

  # Noted before anything is written, so that even the fastest answer finds the
  # entry. The table of a run that has ended is gone.
  defp note(conn, id, inbox, answers, counts_as) do
    address =
      case answers do
        {:relay, relay, _number} -> Inbox.open(inbox, relay, :many)
        answers -> Inbox.open(inbox, conn.owner, answers)
      end

    try do
      :ets.insert(conn.routes, {id, address, self(), nil, answers, counts_as})
      {:ok, address}
    rescue
      ArgumentError ->
        Inbox.close(address)
        {:error, dead()}
    end
  end

  defp introduce({:relay, relay, number}, address, conn, method) do
    send(relay, {:relay, number, address, conn.owner, method})
    :ok
  end

  defp introduce(_answers, _address, _conn, _method), do: :ok

  # The owner may handle this after the answer, and then finds no entry to watch.
  # The port tells it whether the request belongs to its present run.
  defp ask_to_watch(%{id: id, address: address, conn: conn}) do
    send(conn.owner, {:watch, conn.port, id, address, self()})
    :ok
  end

  @doc "Sends a request and waits for its answer until the deadline."
  @spec call(t(), String.t(), map(), Deadline.t()) :: {:ok, term()} | {:error, Error.t()}
  def call(conn, method, params, deadline) do
    Inbox.run(fn inbox ->
      with {:ok, request} <- request(conn, inbox, method, params),
           do: await(request, inbox, deadline, :infinity, fn _none -> :ok end)
    end)
  end

  @doc """
  Like `call/4`, of a request that says how far it is: `on_progress` is given each of these, and the
  error is `:timeout` where nothing was heard for `patience` milliseconds, too.
  """
  @spec follow(t(), String.t(), map(), Deadline.t(), timeout(), (map() -> term())) ::
          {:ok, term()} | {:error, Error.t()}
  def follow(conn, method, params, deadline, patience, on_progress) do
    Inbox.run(fn inbox ->
      with {:ok, request} <- request(conn, inbox, method, params, :infinity, :many) do
        try do
          await(request, inbox, deadline, patience, on_progress)
        after
          finish(request)
        end
      end
    end)
  end

  defp await(request, inbox, deadline, patience, on_progress) do
    case Inbox.next(inbox, min(Deadline.remaining(deadline), patience)) do
      {_ref, {:progress, progress}} ->
        on_progress.(progress)
        await(request, inbox, deadline, patience, on_progress)

      {_ref, last} ->
        answer(request, last)

      :timeout ->
        cancel(request)
        {:error, timeout()}
    end
  end

  @typedoc "The last message of a request."
  @type last :: {:response, binary()} | {:error, Error.t()} | {:down, term()}

  @doc """
  What the last message of `request` says. It is `:lost` when its worker died
  with it, so that another run may give it what this one did not.
  """
  @spec result(request(), last()) :: {:ok, term()} | {:error, Error.t()} | {:lost, Error.t()}
  def result(_request, {:down, reason}) do
    if stop?(reason), do: {:error, stopped()}, else: {:lost, dead()}
  end

  # An error from the owner is the reason why the run ended.
  def result(_request, {:error, %Error{reason: :shutdown} = error}), do: {:error, error}
  def result(_request, {:error, %Error{} = error}), do: {:lost, error}

  def result(%{method: method} = request, {:response, body}) do
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
  Tells the owner that the worker answered `request` with something that makes no
  sense, which only the caller can see and which ends the run. Returns the error
  that the request ends with.
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

  @doc "Like `result/2`, for requests that are not run again: `:lost` is an error."
  @spec answer(request(), last()) :: {:ok, term()} | {:error, Error.t()}
  def answer(request, last) do
    with {:lost, error} <- result(request, last), do: {:error, error}
  end

  @doc "Waits until the run is over that `request` was lost with."
  @spec await_end(request(), Deadline.t()) :: :ok | {:error, Error.t()}
  def await_end(%{conn: conn} = lost, deadline) do
    id = next_id(conn)

    Inbox.run(fn inbox ->
      # Everyone in `routes` is told of the end, whether a request was sent or not.
      with {:ok, address} <- note(conn, id, inbox, :once, nil) do
        request = %{lost | id: id, address: address, span: nil}
        :ok = ask_to_watch(request)

        with :timeout <- Inbox.next(inbox, Deadline.remaining(deadline)) do
          forget(request)
          {:error, timeout()}
        else
          {_ref, _end} -> :ok
        end
      else
        {:error, _dead} -> :ok
      end
    end)
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
    uncount(conn, id)
    notify(conn, "cancel", %{"id" => id})
  end

  # Its caller has counted it, and may die before the worker answers.
  defp uncount(conn, id) do
    _there? = :ets.update_element(conn.routes, id, {6, nil})
    :ok
  rescue
    ArgumentError -> :ok
  end

  @doc "Nothing comes for `request` any more; what has come stays in its inbox."
  @spec finish(request()) :: :ok
  def finish(%{address: address}), do: Inbox.close(address)

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
       Admission.overloaded(
         conn.admission,
         "The worker does not read and too much waits for it already (`max_unsent:`)."
       )}
    end
  end

  # Takes back what `note/4` did, of a request that was not sent.
  defp forget(%{id: id, conn: conn} = request) do
    case take(conn, id) do
      [{^id, _address, _pid, monitor, _answers, _counts_as}] when monitor != nil ->
        send(conn.owner, {:unwatch, monitor})

      # A watch that has not begun finds no note, and does not begin.
      _ ->
        :ok
    end

    finish(request)
  end

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

  @doc """
  Has the request `id` aborted, whose caller is dead; it is under way no more. Gives its method if that is to
  be counted now, since its caller cannot, else nil.
  """
  @spec caller_down(t(), non_neg_integer()) :: String.t() | nil
  def caller_down(conn, id) do
    # The caller may have died before it wrote the request, so do not wait for an
    # answer.
    case release(conn, id) do
      [{^id, _address, _pid, _monitor, _answers, counts_as}] ->
        notify(conn, "cancel", %{"id" => id})
        counts_as

      [] ->
        nil
    end
  end

  @doc """
  Finds those who died right after they had noted themselves, before they could
  ask to be watched; what each was counted as or not, as of `caller_down/2`. To be called now and then.
  """
  @spec sweep(t()) :: [String.t() | nil]
  def sweep(conn) do
    unwatched = :ets.match(conn.routes, {:"$1", :_, :"$2", nil, :_, :_})
    for [id, pid] <- unwatched, not Process.alive?(pid), do: caller_down(conn, id)
  end

  @doc "Hands an answer to the caller of `id`; false where nobody waits for one of that id."
  @spec deliver(t(), non_neg_integer(), {:response, binary()} | {:error, Error.t()}) :: boolean()
  def deliver(conn, id, answer) do
    case release(conn, id) do
      [{^id, address, pid, _monitor, answers, _counts_as}] ->
        # The owner's own requests do not count as the engine's work.
        if pid != conn.owner, do: Admission.count_end(conn.admission)

        case answers do
          {:relay, relay, number} -> send(relay, {:last, number, answer})
          _one_or_many -> Inbox.send(address, answer)
        end

        true

      [] ->
        false
    end
  end

  # Removes the entry and ends the watch.
  defp release(conn, id) do
    with [{^id, _address, _pid, monitor, _answers, _counts_as}] = taken <- take(conn, id) do
      if monitor, do: unwatch(monitor)
      taken
    end
  end

  # A run that has ended has no table.
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

  @doc "Tells the caller of `id` how far its request is, if it wants to know."
  @spec deliver_progress(t(), non_neg_integer(), map()) :: :ok
  def deliver_progress(conn, id, progress) do
    with [{^id, address, _pid, _monitor, :many, _counts_as}] <- :ets.lookup(conn.routes, id),
         do: Inbox.send(address, {:progress, progress})

    :ok
  end

  @doc "Ends the connection: everyone who waits gets `error`."
  @spec close(t(), Error.t()) :: :ok
  def close(conn, error) do
    for {id, _, _, _, _, _} <- :ets.tab2list(conn.routes), do: deliver(conn, id, {:error, error})
    :ets.delete(conn.routes)
    Process.unlink(conn.writer.pid)
    Process.exit(conn.writer.pid, :kill)
    :ok
  end
end
