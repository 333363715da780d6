defmodule VLLM.Streaming.Reader do
  @moduledoc false
  # Reads one stream, in the process that opened it: turns the worker's messages
  # into events and acknowledges deltas as they are taken, which is what keeps
  # the mailbox of a slow reader short (see `credit` in guides/protocol.md).

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Router, Table}
  alias VLLM.{Delta, Error, RequestOutput, Telemetry}

  @enforce_keys [:request, :deadline]
  defstruct [:request, :deadline, taken: 0, begun?: false]

  @type t :: %__MODULE__{}
  @type event :: {:delta, Delta.t()} | {:done, RequestOutput.t()} | {:error, Error.t()}

  # Deltas that may be on the way, and after how many of them more are granted.
  @credit 32
  @grant 16

  @spec open(Table.t(), String.t(), map(), Connection.deadline()) ::
          {:ok, t()} | {:error, Error.t()}
  def open(table, method, params, deadline) do
    params = Map.put(params, "credit", @credit)

    with {:ok, request} <- Router.open(table, method, params, deadline) do
      {:ok, %__MODULE__{request: request, deadline: deadline}}
    end
  end

  @doc "The next event; the last one is `:done` or `:error`, and closes the stream."
  @spec next(t()) :: {event(), t()}
  def next(%__MODULE__{request: %{ref: ref}} = reader) do
    receive do
      {^ref, _} = message -> handle(reader, message)
      {:DOWN, ^ref, :process, _, _} = message -> handle(reader, message)
    after
      Connection.remaining(reader.deadline) -> {expire(reader), reader}
    end
  end

  @doc "The event that a message of this stream stands for."
  @spec handle(t(), tuple()) :: {event(), t()}
  def handle(%{begun?: false} = reader, {_ref, {:delta, _row}} = first) do
    Telemetry.first_token(reader.request.span)
    handle(%{reader | begun?: true}, first)
  end

  def handle(reader, {_ref, {:delta, row}}) do
    {{:delta, Delta.from_wire(row)}, acknowledge(reader)}
  end

  def handle(reader, {_ref, answer}) do
    Connection.finish(reader.request)

    case Connection.answer(reader.request, answer) do
      {:ok, output} -> {{:done, RequestOutput.from_wire(output)}, reader}
      {:error, error} -> {{:error, error}, reader}
    end
  end

  def handle(reader, {:DOWN, _ref, :process, _pid, reason}) do
    {{:error, Connection.down(reader.request, reason)}, reader}
  end

  @doc "The event at the deadline."
  @spec expire(t()) :: event()
  def expire(reader) do
    error = Connection.timeout()
    Connection.cancel(reader.request, error)
    {:error, error}
  end

  @doc "Leaves the stream; vLLM aborts what it still computes for it."
  @spec close(t()) :: :ok
  def close(reader), do: Connection.cancel(reader.request)

  defp acknowledge(%{taken: taken} = reader) when taken + 1 < @grant do
    %{reader | taken: taken + 1}
  end

  defp acknowledge(%{request: request} = reader) do
    Connection.notify(request.conn, "credit", %{"id" => request.id, "count" => @grant})
    %{reader | taken: 0}
  end
end
