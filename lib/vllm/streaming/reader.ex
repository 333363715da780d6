defmodule VLLM.Streaming.Reader do
  @moduledoc false
  # Reads one stream, in the process that opened it: turns what comes to its
  # inbox into events and acknowledges deltas as they are taken, which is what
  # keeps the mailbox of a slow reader short (see `credit` in guides/protocol.md).

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Engine.{Call, InFlight, Router, Table}
  alias VLLM.{Cluster, Delta, Error, Remote, RequestOutput}

  # `source` is an InFlight, of an engine or a cluster, or a Remote.Stream, as `via` says.
  @enforce_keys [:via, :source, :method, :call, :inbox]
  defstruct @enforce_keys ++ [patience: nil, alarm: nil, taken: 0, begun?: false]

  @type t :: %__MODULE__{}

  @typedoc """
  What came. Of an answer over HTTP a delta is `[status, headers]`, once, or `[piece]` of the body, and
  the end is the map of the wire.
  """
  @type event ::
          {:delta, Delta.t() | list()} | {:done, RequestOutput.t() | map()} | {:error, Error.t()}

  # Deltas that may be on the way, and after how many of them more are granted.
  @credit 128
  @grant 64

  # The one request that a reader has in flight.
  @stream :stream

  @doc "Opens a stream whose messages come to `inbox`. Waits for a starting engine."
  @spec open(VLLM.engine(), String.t(), map(), Call.t(), Inbox.t()) ::
          {:ok, t()} | {:error, Error.t()}
  def open(engine, method, params, call, inbox) do
    params = Map.put(params, "credit", @credit)

    with {:ok, %via{} = source} <- source(Remote.find(engine), method, params, call, inbox),
         do:
           {:ok, %__MODULE__{via: via, source: source, method: method, call: call, inbox: inbox}}
  end

  defp source({:here, id}, method, params, call, inbox) do
    with {:ok, table, _pid} <- Table.lookup(id),
         do: open_in(InFlight.new(table, method, inbox), params, call)
  end

  defp source({:there, node, id}, method, params, call, inbox),
    do: {:ok, Remote.Stream.open(node, id, method, params, call, inbox)}

  defp source({:cluster, members}, method, params, call, inbox),
    do: open_in(Cluster.InFlight.new(members, method, inbox), params, call)

  defp open_in(in_flight, params, call),
    do: Router.open(in_flight, @stream, params, call, :many)

  @doc "The next event; the last one is `:done` or `:error`, and closes the stream."
  @spec next(t()) :: {event(), t()}
  def next(%{begun?: false} = reader) do
    case reader.via.next(reader.source, stall(reader)) do
      {@stream, event, source} -> begin(read(event, %{reader | source: source}))
      :stalled -> {expire(reader), reader}
    end
  end

  def next(%{inbox: inbox, patience: patience} = reader),
    do: take(reader, Inbox.next(inbox, patience || patience(reader)))

  @doc """
  The next event of a stream that has begun, where `message` is what came first. It is not run again after
  that: nothing comes but more deltas, and the end.
  """
  @spec take(t(), Inbox.message() | :timeout) :: {event(), t()}
  def take(reader, {_ref, {:delta, text, token_ids}}),
    do: {{:delta, Delta.of_text(text, token_ids)}, acknowledge(reader)}

  def take(reader, at_the_end) when at_the_end in [:timeout, {:alarm, :over}],
    do: {expire(reader), reader}

  def take(reader, message) do
    with {:none, reader} <- handle(reader, message), do: next(reader)
  end

  @doc """
  How many deltas come until more are granted, for who takes all but the last of them without `next/1` and
  says with `left/2` how many of these are left. None where a wait for one is limited.
  """
  @spec free(t()) :: non_neg_integer()
  def free(%{patience: :infinity, taken: taken}), do: @grant - taken
  def free(_limited), do: 0

  @doc "The reader when `free` deltas are left until more are granted."
  @spec left(t(), pos_integer()) :: t()
  def left(reader, free), do: %{reader | taken: @grant - free}

  # From the first delta on one timer stands for the deadline, where nothing else limits a wait.
  defp begin({{:delta, _delta}, %{call: %{inter_token_timeout: :infinity} = call}} = begun) do
    {event, reader} = begun
    alarm = if call.deadline != :infinity, do: Inbox.alarm(reader.inbox, call.deadline)
    {event, %{reader | patience: :infinity, alarm: alarm}}
  end

  defp begin(other), do: other

  defp cancel_alarm(%{alarm: nil}), do: :ok
  defp cancel_alarm(%{alarm: alarm}), do: Inbox.cancel_alarm(alarm)

  @doc "The event that has come with a message to the inbox; `:none` where it is for nobody outside."
  @spec handle(t(), Inbox.message()) :: {event() | :none, t()}
  # See `take/2`.
  def handle(%{begun?: true} = reader, {_ref, {:delta, text, token_ids}}),
    do: {{:delta, Delta.of_text(text, token_ids)}, acknowledge(reader)}

  def handle(reader, message) do
    case reader.via.handle(reader.source, message) do
      {@stream, event, source} -> read(event, %{reader | source: source})
      {:none, source} -> {:none, %{reader | source: source}}
    end
  end

  @doc "Whether the request was lost and waits for its turn to run again."
  @spec waits_for_turn?(t()) :: boolean()
  def waits_for_turn?(reader), do: reader.via.waits_for_turn?(reader.source)

  # As it travels.
  defp read({:delta, row}, %{method: "http_request"} = reader),
    do: {{:delta, row}, acknowledge(reader)}

  defp read({:ok, answer}, %{method: "http_request"} = reader) do
    cancel_alarm(reader)
    {{:done, answer}, reader}
  end

  # In columns, whose shape the owner of the port has seen.
  defp read({:delta, text, token_ids}, reader),
    do: {{:delta, Delta.of_text(text, token_ids)}, acknowledge(reader)}

  defp read({:delta, row}, reader), do: {{:delta, Delta.from_wire(row)}, acknowledge(reader)}

  defp read({:ok, output}, reader) do
    cancel_alarm(reader)
    {{:done, RequestOutput.from_wire(output)}, reader}
  end

  defp read({:error, error}, reader) do
    cancel_alarm(reader)
    {{:error, error}, reader}
  end

  @doc "For how many milliseconds a message may be waited for."
  @spec patience(t()) :: timeout()
  def patience(reader), do: min(Deadline.remaining(reader.call.deadline), stall(reader))

  defp stall(%{begun?: true, call: call}), do: call.inter_token_timeout
  defp stall(_not_begun), do: :infinity

  @doc "The event when nothing has come for as long as `patience/1` says."
  @spec expire(t()) :: event()
  def expire(%{call: call} = reader) do
    if Deadline.passed?(call.deadline),
      do: leave(reader, Connection.timeout()),
      else: leave(reader, Call.stalled(call))
  end

  @doc "Leaves the stream; vLLM aborts what it still computes for it."
  @spec close(t()) :: :ok
  def close(reader) do
    cancel_alarm(reader)
    reader.via.cancel(reader.source)
  end

  defp leave(reader, error) do
    cancel_alarm(reader)
    reader.via.cancel(reader.source, error)
    {:error, error}
  end

  defp acknowledge(%{taken: taken} = reader) when taken + 1 < @grant do
    %{reader | taken: taken + 1, begun?: true}
  end

  defp acknowledge(reader) do
    reader.via.grant(reader.source, @stream, @grant)
    %{reader | taken: 0, begun?: true}
  end
end
