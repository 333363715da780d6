defmodule VLLM.Streaming.Reader do
  @moduledoc false
  # Reads one stream, in the process that opened it: turns the worker's messages
  # into events and acknowledges deltas as they are taken, which is what keeps
  # the mailbox of a slow reader short (see `credit` in guides/protocol.md).

  alias VLLM.Bridge.{Connection, Shape}
  alias VLLM.Engine.{Call, Flights, Router, Suspects, Table}
  alias VLLM.{Delta, Error, RequestOutput, Telemetry}

  @enforce_keys [:table, :method, :params, :call, :request]
  defstruct [:table, :method, :params, :call, :request, :lost, :turn, taken: 0, begun?: false]

  @type t :: %__MODULE__{}
  @type event :: {:delta, Delta.t()} | {:done, RequestOutput.t()} | {:error, Error.t()}

  # Deltas that may be on the way, and after how many of them more are granted.
  @credit 32
  @grant 16

  @spec open(Table.t(), String.t(), map(), Call.t()) :: {:ok, t()} | {:error, Error.t()}
  def open(table, method, params, call) do
    params = Map.put(params, "credit", @credit)

    with {:ok, request} <- Router.open(table, method, params, call) do
      {:ok,
       %__MODULE__{table: table, method: method, params: params, call: call, request: request}}
    end
  end

  @doc "The next event; the last one is `:done` or `:error`, and closes the stream."
  @spec next(t()) :: {event(), t()}
  def next(%__MODULE__{request: %{ref: ref}} = reader) do
    receive do
      {^ref, _} = message -> reader |> handle(message) |> or_next()
      {:DOWN, ^ref, :process, _, _} = message -> reader |> handle(message) |> or_next()
    after
      patience(reader) -> {expire(reader), reader}
    end
  end

  defp or_next({:again, reader}), do: next(reader)
  defp or_next(event), do: event

  @doc "For how many milliseconds a message may be waited for."
  @spec patience(t()) :: timeout()
  def patience(%{call: call} = reader) do
    stall = if reader.begun?, do: call.inter_token_timeout, else: :infinity
    min(Connection.remaining(call.deadline), stall)
  end

  @doc "The event that a message of this stream stands for; `:again` when it has begun anew."
  @spec handle(t(), tuple()) :: {event() | :again, t()}
  def handle(%{begun?: false} = reader, {_ref, {:delta, _row}} = first) do
    Telemetry.first_token(reader.request.span)
    handle(%{reader | begun?: true}, first)
  end

  def handle(reader, {_ref, {:delta, row}}) do
    if Shape.delta?(row) do
      {{:delta, Delta.from_wire(row)}, acknowledge(reader)}
    else
      error = Connection.malformed(reader.request, "a delta that is none")
      Connection.cancel(reader.request)
      {fail(reader, error), reader}
    end
  end

  def handle(%{request: request} = reader, last) do
    Connection.finish(request)

    case Connection.result(request, last) do
      {:ok, output} ->
        Telemetry.request_end(request.span, {:ok, output})
        Suspects.give_back(reader.table, reader.turn)
        {{:done, RequestOutput.from_wire(output)}, reader}

      {:error, error} ->
        {fail(reader, error), reader}

      # What the reader has seen already would come twice.
      {:lost, error} when not reader.call.retry or reader.begun? ->
        {fail(reader, error), reader}

      {:lost, error} when reader.lost == nil ->
        run_again(%{reader | lost: error})

      {:lost, error} ->
        {fail(reader, Flights.poison(reader.lost, error)), reader}
    end
  end

  @doc "The event when nothing has come for as long as `patience/1` says."
  @spec expire(t()) :: event()
  def expire(%{call: call} = reader) do
    Connection.cancel(reader.request)

    if Connection.remaining(call.deadline) == 0,
      do: fail(reader, Connection.timeout()),
      else: fail(reader, Call.stalled(call))
  end

  @doc "Leaves the stream; vLLM aborts what it still computes for it."
  @spec close(t()) :: :ok
  def close(reader) do
    Connection.cancel(reader.request)
    {:error, _} = fail(reader, Connection.aborted())
    :ok
  end

  defp fail(reader, error) do
    Telemetry.request_end(reader.request.span, {:error, error})
    Suspects.give_back(reader.table, reader.turn)
    {:error, error}
  end

  defp run_again(%{call: call, request: lost} = reader) do
    reader = %{reader | turn: Suspects.ask(reader.table, call.deadline)}

    with :ok <- Suspects.await(reader.turn, call.deadline),
         {:ok, request} <-
           Router.again(reader.table, reader.method, reader.params, call, lost, :many) do
      {:again, %{reader | request: request, taken: 0}}
    else
      {:error, error} -> {fail(reader, error), reader}
    end
  end

  defp acknowledge(%{taken: taken} = reader) when taken + 1 < @grant do
    %{reader | taken: taken + 1}
  end

  defp acknowledge(%{request: request} = reader) do
    Connection.notify(request.conn, "credit", %{"id" => request.id, "count" => @grant})
    %{reader | taken: 0}
  end
end
