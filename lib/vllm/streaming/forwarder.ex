defmodule VLLM.Streaming.Forwarder do
  @moduledoc false
  # Reads a stream on behalf of a process that wants messages (`VLLM.stream_to`).
  #
  # It is a process because it has to watch the receiver: when that dies, the
  # stream is closed, and while its mailbox is long, deltas are held back. Deltas
  # that are held back are not acknowledged, so the worker merges those that follow.

  use GenServer, restart: :temporary

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Error
  alias VLLM.Streaming.Reader

  # A receiver with this many messages in its mailbox is busy; how often a busy one
  # is checked again, in ms.
  @busy 64
  @look_again 10

  @doc "Starts forwarding to `pid` and returns the stream's reference."
  @spec start(pid(), (() -> term())) :: reference()
  def start(pid, prepare) do
    ref = make_ref()

    {:ok, _} =
      DynamicSupervisor.start_child(VLLM.StreamSupervisor, {__MODULE__, {ref, pid, prepare}})

    ref
  end

  def start_link(arg), do: GenServer.start_link(__MODULE__, arg)

  @doc """
  Ends the stream. When called by its receiver, no message of it comes any more;
  else the receiver is told that it was aborted.
  """
  @spec cancel(reference()) :: :ok
  def cancel(ref) do
    for {pid, receiver} <- Registry.lookup(VLLM.Registry, {:stream, ref}) do
      monitor = Process.monitor(pid)
      # If several processes cancel at once, only the one whose reason it was tells the receiver.
      reason = {:shutdown, {:cancelled, monitor}}
      # The engine's worker monitors readers and aborts the request.
      Process.exit(pid, reason)

      receive do
        {:DOWN, ^monitor, :process, _, ^reason} ->
          send(receiver, {:vllm, ref, {:error, Connection.aborted()}})

        {:DOWN, ^monitor, :process, _, _} ->
          :ok
      end
    end

    flush(ref)
  end

  defp flush(ref) do
    receive do
      {:vllm, ^ref, _} -> flush(ref)
    after
      0 -> :ok
    end
  end

  @impl true
  def init({ref, pid, prepare}) do
    {:ok, _} = Registry.register(VLLM.Registry, {:stream, ref}, pid)
    monitor = Process.monitor(pid)

    state = %{
      ref: ref,
      pid: pid,
      monitor: monitor,
      inbox: Inbox.new(),
      reader: nil,
      # Messages of the stream that are held back from a busy receiver.
      held: :queue.new(),
      looking?: false,
      timer: nil
    }

    {:ok, state, {:continue, prepare}}
  end

  @impl true
  def handle_continue(prepare, state) do
    with {:ok, {table, method, params, call}} <- prepare.(),
         {:ok, reader} <- Reader.open(table, method, params, call, state.inbox) do
      {:noreply, wait(%{state | reader: reader})}
    else
      {:error, error} -> forward({:error, error}, state)
    end
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, _, _}, %{monitor: monitor} = state) do
    {:stop, :normal, state}
  end

  def handle_info({:timeout, timer, :expired}, %{timer: timer} = state) do
    # What is held has come in time.
    if :queue.is_empty(state.held),
      do: forward(Reader.expire(state.reader), state),
      else: drain(%{state | timer: nil})
  end

  def handle_info(:look_again, state), do: drain(%{state | looking?: false})

  def handle_info(message, %{inbox: inbox} = state) when elem(message, 0) == inbox do
    drain(%{state | held: :queue.in(Inbox.read(message), state.held)})
  end

  def handle_info(_message, state), do: {:noreply, state}

  # The receiver waits for a last message, also where something raised here.
  @impl true
  def terminate(:normal, _state), do: :ok

  def terminate(reason, state) do
    error =
      Error.new(
        :internal,
        "The stream ended by a fault#{where(reason)}. Look at what was given as prompt and " <>
          "options; the log has the rest."
      )

    send(state.pid, {:vllm, state.ref, {:error, error}})
  end

  # Without the exception's message, which may contain secrets.
  defp where({%module{}, _stacktrace}), do: " (#{inspect(module)})"
  defp where({kind, _stacktrace}) when is_atom(kind), do: " (#{inspect(kind)})"
  defp where(_reason), do: ""

  # Forwards what is held, as far as the receiver keeps up. How long it takes is
  # its own affair, until the deadline: then it gets all that has come in time.
  defp drain(state) do
    cond do
      :queue.is_empty(state.held) ->
        {:noreply, wait(state)}

      hold_back?(state) ->
        {:noreply, look_again(state)}

      true ->
        {{:value, message}, held} = :queue.out(state.held)
        {event, reader} = Reader.handle(state.reader, message)
        forward(event, %{state | held: held, reader: reader})
    end
  end

  # A turn is for the request and not for the receiver, and others wait for it.
  defp hold_back?(%{pid: pid, reader: reader}) do
    busy?(pid) and not Reader.waits_for_turn?(reader) and
      not Deadline.passed?(reader.call.deadline)
  end

  defp look_again(%{looking?: true} = state), do: state

  defp look_again(state) do
    Process.send_after(self(), :look_again, @look_again)
    %{state | looking?: true}
  end

  # The request was lost, or runs again.
  defp forward(:none, state), do: drain(state)

  defp forward({:delta, delta}, state) do
    send(state.pid, {:vllm, state.ref, delta})
    drain(state)
  end

  defp forward(last, state) do
    send(state.pid, {:vllm, state.ref, last})
    {:stop, :normal, state}
  end

  # The mailbox of a process on another node cannot be seen.
  defp busy?(pid) when node(pid) != node(), do: false

  defp busy?(pid) do
    case Process.info(pid, :message_queue_len) do
      {:message_queue_len, length} -> length >= @busy
      nil -> false
    end
  end

  # Restarts the timer for the reader's patience. Without an inter-token timeout
  # only the deadline counts, and one timer is enough.
  defp wait(%{timer: timer, reader: %{call: %{inter_token_timeout: :infinity}}} = state)
       when timer != nil,
       do: state

  defp wait(state) do
    if state.timer, do: :erlang.cancel_timer(state.timer)

    case Reader.patience(state.reader) do
      :infinity -> %{state | timer: nil}
      patience -> %{state | timer: :erlang.start_timer(patience, self(), :expired)}
    end
  end
end
