defmodule VLLM.Streaming.Forwarder do
  @moduledoc false
  # Reads a stream on behalf of a process that wants messages (`VLLM.stream_to`).
  #
  # It is a process because it has to watch the receiver: when that dies, the
  # stream is closed, and while its mailbox is long, deltas are held back. Deltas
  # that are held back are not acknowledged, so the worker merges those that follow.

  use GenServer, restart: :temporary

  alias VLLM.Bridge.{Deadline, Inbox}
  alias VLLM.Engine.Call
  alias VLLM.{Error, Remote}
  alias VLLM.Streaming.{Forwarded, Mailbox, Reader}

  # For how many ms a caller waits until another node has cancelled a stream.
  @patience 5_000

  @doc "Starts forwarding to `pid` and returns the stream's reference."
  @spec start(pid(), (() -> term())) :: reference()
  def start(pid, prepare) do
    ref = make_ref()

    with :ok <- VLLM.Started.check() do
      {:ok, _} =
        DynamicSupervisor.start_child(VLLM.StreamSupervisor, {__MODULE__, {ref, pid, prepare}})
    else
      {:error, error} -> send(pid, {:vllm, ref, {:error, error}})
    end

    ref
  end

  def start_link(arg), do: GenServer.start_link(__MODULE__, arg)

  @doc """
  Ends the stream. When called by its receiver, no message of it comes any more;
  else the receiver is told that it was aborted.
  """
  @spec cancel(reference()) :: :ok
  def cancel(ref) do
    case node(ref) do
      node when node == node() ->
        Forwarded.cancel(ref, self())

      node ->
        cancel(ref, node)
    end

    flush(ref)
  end

  # A process tells the other node, also when that answers again after the caller has stopped
  # waiting. With a node that is lost the stream has ended.
  defp cancel(ref, node) do
    caller = self()
    call = Call.new(%{timeout: :infinity})

    {_pid, monitor} = spawn_monitor(fn -> Remote.Call.run(node, caller, {:cancel, ref}, call) end)

    receive do
      {:DOWN, ^monitor, :process, _, _} -> :ok
    after
      @patience -> Process.demonitor(monitor, [:flush])
    end
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
    :ok = Forwarded.note(ref, pid)
    monitor = Process.monitor(pid)

    state = %{
      ref: ref,
      pid: pid,
      monitor: monitor,
      gauge: if(node(pid) != node(), do: Remote.Gauge.open(pid)),
      inbox: Inbox.new(),
      reader: nil,
      # Messages of the stream that are held back from a busy receiver.
      held: :queue.new(),
      looking?: false,
      # Whether the receiver has been sent a delta, and how many more it may be sent before it is
      # looked at again. While there is room, nothing is held.
      begun?: false,
      room: 0,
      timer: nil
    }

    {:ok, state, {:continue, prepare}}
  end

  @impl true
  def handle_continue(prepare, state) do
    with {:ok, {engine, method, params, call}} <- prepare.(),
         {:ok, reader} <- Reader.open(engine, method, params, call, state.inbox) do
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

  # What `drain/1` would do, without the queue.
  def handle_info(
        {inbox, ref, {:delta, _text, _token_ids} = delta},
        %{inbox: inbox, room: room, gauge: nil} = state
      )
      when room > 0 do
    {{:delta, delta}, reader} = Reader.handle(state.reader, {ref, delta})
    send(state.pid, {:vllm, state.ref, delta})
    {:noreply, wait(%{state | reader: reader, room: room - 1})}
  end

  def handle_info(message, %{inbox: inbox} = state) when elem(message, 0) == inbox do
    drain(%{state | held: :queue.in(Inbox.read(message), state.held)})
  end

  def handle_info(message, %{gauge: %{inbox: inbox} = gauge} = state)
      when elem(message, 0) == inbox do
    case Remote.Gauge.handle(gauge, Inbox.read(message)) do
      {:ok, gauge} -> drain(%{state | gauge: gauge})
      {:error, error} -> forward({:error, error}, state)
    end
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
    if :queue.is_empty(state.held), do: {:noreply, wait(state)}, else: drain_held(look(state))
  end

  defp drain_held(state) do
    if hold_back?(state) do
      {:noreply, look_again(state)}
    else
      {{:value, message}, held} = :queue.out(state.held)
      {event, reader} = Reader.handle(state.reader, message)
      forward(event, %{state | held: held, reader: reader})
    end
  end

  defp look(%{room: 0, begun?: true} = state), do: %{state | room: room(state)}
  defp look(state), do: state

  # A turn is for the request and not for the receiver, and others wait for it. That
  # a stream has begun is told at once: a receiver of several that waits for each to
  # begin would wait for ever behind what the first has sent it meanwhile.
  defp hold_back?(%{reader: reader} = state) do
    state.begun? and state.room == 0 and not Reader.waits_for_turn?(reader) and
      not Deadline.passed?(reader.call.deadline)
  end

  # A gauge tells of itself when there is room.
  defp look_again(%{gauge: %{}} = state), do: wait(state)
  defp look_again(%{looking?: true} = state), do: state

  defp look_again(state) do
    Process.send_after(self(), :look_again, Mailbox.look_again())
    %{state | looking?: true}
  end

  # The request was lost, or runs again.
  defp forward(:none, state), do: drain(state)

  defp forward({:delta, delta}, state) do
    send(state.pid, {:vllm, state.ref, delta})
    gauge = state.gauge && Remote.Gauge.sent(state.gauge)
    drain(%{state | begun?: true, room: max(state.room - 1, 0), gauge: gauge})
  end

  defp forward(last, state) do
    send(state.pid, {:vllm, state.ref, last})
    {:stop, :normal, state}
  end

  defp room(%{gauge: nil, pid: pid}), do: Mailbox.room(pid)
  defp room(%{gauge: gauge}), do: if(Remote.Gauge.full?(gauge), do: 0, else: 1)

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
