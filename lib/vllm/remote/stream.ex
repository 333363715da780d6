defmodule VLLM.Remote.Stream do
  @moduledoc false
  # A stream of an engine on another node, for VLLM.Streaming.Reader: what VLLM.Engine.InFlight is
  # to one of an engine on this node, with one request. What its reader grants goes all the way to
  # the worker, so that no more deltas are on the way than from an engine beside it.

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Engine.{Call, InFlight}
  alias VLLM.Error
  alias VLLM.Remote

  @enforce_keys [:open, :remote, :inbox, :call]
  defstruct [:open, :remote, :inbox, :call, begun?: false, again?: false]

  @type t :: %__MODULE__{}

  @doc "Opens a stream whose messages come to `inbox`."
  @spec open(node(), term(), String.t(), map(), Call.t(), Inbox.t()) :: t()
  def open(node, engine, method, params, call, inbox) do
    open = fn -> Remote.Call.open(node, engine, {:stream, method, params}, call, inbox) end
    %__MODULE__{open: open, remote: open.(), inbox: inbox, call: call}
  end

  @doc "See `InFlight.next/2`."
  @spec next(t(), timeout()) :: {:stream, InFlight.event(), t()} | :stalled
  def next(stream, patience) do
    deadline = stream.call.deadline

    case Inbox.next(stream.inbox, min(Remote.Call.patience(deadline), patience)) do
      :timeout ->
        if Deadline.passed?(deadline) do
          error = Connection.timeout()
          Remote.Call.leave(stream.remote, error)
          {:stream, {:error, error}, stream}
        else
          :stalled
        end

      message ->
        with {:none, stream} <- handle(stream, message), do: next(stream, patience)
    end
  end

  @doc "See `InFlight.handle/2`."
  @spec handle(t(), Inbox.message()) :: {:stream, InFlight.event(), t()} | {:none, t()}
  def handle(%{remote: %{address: {_, ref}}} = stream, {ref, delta})
      when elem(delta, 0) == :delta do
    if stream.begun?,
      do: {:stream, delta, stream},
      else: {:stream, delta, %{stream | begun?: true}}
  end

  def handle(%{remote: %{address: {_, ref}}} = stream, {ref, _} = message) do
    case Remote.Call.last(stream.remote, message) do
      # What the reader has seen already would come twice.
      {:error, %Error{reason: :node_down}}
      when stream.call.retry and not stream.begun? and not stream.again? ->
        Remote.Call.close(stream.remote)
        {:none, %{stream | remote: stream.open.(), again?: true}}

      last ->
        Remote.Call.close(stream.remote)
        {:stream, last, stream}
    end
  end

  # Of the first of two runs.
  def handle(stream, _message), do: {:none, stream}

  @doc "See `InFlight.grant/3`."
  @spec grant(t(), :stream, pos_integer()) :: :ok
  def grant(stream, :stream, count), do: Remote.Call.tell(stream.remote, {:grant, count})

  @doc "See `InFlight.cancel/2`."
  @spec cancel(t(), Error.t()) :: :ok
  def cancel(stream, error \\ Connection.aborted()) do
    Remote.Call.leave(stream.remote, error)
    Inbox.flush(stream.inbox)
  end

  @doc "Whether only a turn is waited for, which is the other side's affair."
  @spec waits_for_turn?(t()) :: false
  def waits_for_turn?(_stream), do: false
end
